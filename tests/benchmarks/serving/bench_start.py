"""From nothing to the first token of `limbeck generate`, without loading. Prints one JSON object.

`start_seconds`: median wall time of `limbeck generate FOLDER x --max-new-tokens 1`, a new process
each time, minus the time that the process spent on opening the session and reading the tokenizer.
Interpreter, imports, hashes and one token remain. Files are in the page cache.
`ARGS=runs/pico-1a2b3c4d` takes a run or an exported folder instead of exporting a tiny model first.

    make bench-start
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# The command with a clock around the loading. Both libraries are imported before the clock is set.
_CHILD = """
import sys, time
import onnxruntime, tokenizers
from limbeck.app import cli
from limbeck.runtime import text as runtime

spent = 0.0

def clocked(call):
    def run(*given, **named):
        global spent
        started = time.perf_counter()
        try:
            return call(*given, **named)
        finally:
            spent += time.perf_counter() - started
    return run

onnxruntime.InferenceSession.__init__ = clocked(onnxruntime.InferenceSession.__init__)
runtime.load_text = clocked(runtime.load_text)
try:
    cli.main()
finally:
    print(spent, file=sys.stderr)
"""


def export_tiny(work: Path) -> Path:
    """Export a tiny random model as int8-weight, and return the folder."""
    from export import export_student
    from tests.pico import make_model, make_student, pico_recipe

    make_student(work / "student", make_model(work / "model"))
    return export_student(student=work / "student", out=work / "onnx", recipe=pico_recipe()).path


def start(folder: Path) -> tuple[float, float]:
    """Wall seconds of one process, and those of them that were loading."""
    command = [sys.executable, "-c", _CHILD, "generate", str(folder), "x", "--max-new-tokens", "1"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - started, float(done.stderr.splitlines()[-1])


def main() -> None:
    """Start it again and again."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="a run or an exported folder")
    parser.add_argument("--runs", type=int, default=15)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or export_tiny(Path(temporary))
        found = [start(folder) for _ in range(asked.runs + 1)][
            1:
        ]  # the first reads files from the disk
    print(
        json.dumps(
            {
                "start_seconds": round(statistics.median(wall - load for wall, load in found), 3),
                "wall_seconds": round(statistics.median(wall for wall, _ in found), 3),
                "load_seconds": round(statistics.median(load for _, load in found), 3),
                "slowest_start_seconds": round(max(wall - load for wall, load in found), 3),
                "runs": asked.runs,
                "cores": len(os.sched_getaffinity(0)),
            }
        )
    )


if __name__ == "__main__":
    main()
