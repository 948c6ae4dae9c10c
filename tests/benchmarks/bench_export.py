"""Cost of an export: SmolLM2-135M to fp32, int8-weight and int4-weight, with parity of each.

Runs in a process of its own and prints one JSON object. `seconds`: `export_student`, imports
included. `peak_over_model`: highest resident memory of that process over the size of the fp32
weights. The base model is made a student artifact first, outside the measurement.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.memory import resident

FORMS = ("fp32", "int8-weight", "int4-weight")


def export(student: Path, out: Path) -> None:
    """The measured process; its last line is what it found."""
    started = time.perf_counter()
    from export import export_student
    from tests.benchmarks.smollm2 import demo_recipe

    recipe = demo_recipe(f"export.forms=[{', '.join(FORMS)}]")
    found = export_student(student=student, out=out, recipe=recipe)
    seconds, peak = time.perf_counter() - started, resident("VmHWM")
    forms = found.result["forms"]
    print(
        json.dumps(
            {
                "seconds": seconds,
                "peak": peak,
                "bytes": {name: form["bytes"] for name, form in forms.items()},
                "kl": {name: form["parity"]["kl"] for name, form in forms.items()},
            }
        )
    )


def main() -> None:
    """Make the student, export it in a process of its own, and print what that took."""
    if len(sys.argv) > 1:
        export(Path(sys.argv[1]), Path(sys.argv[2]))
        return
    from tests.benchmarks.smollm2 import untrained_student

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        untrained_student(work / "student")
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.bench_export",
            str(work / "student"),
            str(work / "onnx"),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        weights = (work / "student/model/model.safetensors").stat().st_size
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(
        json.dumps(
            {
                "seconds": round(found["seconds"], 1),
                "peak_over_model": round(found["peak"] / weights, 3),
                "peak_mb": round(found["peak"] / 1e6),
                "model_mb": round(weights / 1e6),
                "megabytes": {name: round(size / 1e6, 1) for name, size in found["bytes"].items()},
                "kl": {name: float(f"{value:.2g}") for name, value in found["kl"].items()},
                "cores": len(os.sched_getaffinity(0)),
            }
        )
    )


if __name__ == "__main__":
    main()
