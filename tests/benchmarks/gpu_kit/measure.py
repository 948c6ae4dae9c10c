"""Run the GPU tests and the GPU benchmark of an unpacked kit, and write one JSON file.

Keys: `card` and `driver` (None on a dry run), `versions`, `tests` (numbers by outcome), `bench`
(see `tests.benchmarks.serving.bench_gpu`), `seconds` and `dry`. Exits with 1 if a test or the
benchmark failed.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

TESTS_SECONDS, BENCH_SECONDS = 180, 300  # at most; installing takes the rest of nine minutes


def main() -> None:
    """Write the file ``--out``; ``--dry`` opens no CUDA session."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    asked = parser.parse_args()
    started = time.monotonic()
    card, driver = (None, None) if asked.dry else graphics_card()
    tests = run_tests()
    bench = run_bench(asked.dry)
    failed = bool(tests.get("failures") or tests.get("errors") or bench.get("failed"))
    if not asked.dry:
        failed = failed or not tests.get("passed")
    result = {
        "dry": asked.dry,
        "card": card,
        "driver": driver,
        "python": platform.python_version(),
        "versions": {d.metadata["Name"]: d.version for d in distributions()},
        "tests": tests,
        "bench": bench,
        "seconds": round(time.monotonic() - started, 1),
        "failed": failed,
    }
    asked.out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    benched = "failed" if "failed" in bench else "done"
    print(f"{asked.out.resolve()}: tests {tests}, bench {benched}")
    raise SystemExit(int(failed))


def graphics_card() -> tuple[str, str]:
    """Name of the first card, and its driver."""
    words = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    name, driver = lines.splitlines()[0].split(", ")
    return name, driver


def run_tests() -> dict[str, Any]:
    """What `make test-gpu` runs; numbers by outcome.

    Only files with such tests are read: the others want packages that the kit does not have.
    """
    files = [p for p in Path("tests").rglob("test_*.py") if "pytest.mark.gpu" in p.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        words = ["-m", "pytest", "-m", "gpu", "-rs", f"--junitxml={report}", *map(str, files)]
        try:
            subprocess.run([sys.executable, *words], timeout=TESTS_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return {"errors": 1, "why": f"not done after {TESTS_SECONDS} s"}
        if not report.exists():
            return {"errors": 1, "why": "pytest wrote no report"}
        suite = ElementTree.parse(report).getroot().find("testsuite")
        assert suite is not None
        outcomes = ("tests", "failures", "errors", "skipped")
        found = {name: int(suite.attrib[name]) for name in outcomes}
    passed = found["tests"] - found["failures"] - found["errors"] - found["skipped"]
    return found | {"passed": passed}


def run_bench(dry: bool) -> dict[str, Any]:
    """The JSON object of the benchmark; with the key `failed` if there is none."""
    words = [sys.executable, "-m", "tests.benchmarks.serving.bench_gpu"]
    words += ["--dry"] if dry else []
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=BENCH_SECONDS)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {BENCH_SECONDS} s"}
    if done.returncode:
        return {"failed": f"exit code {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
