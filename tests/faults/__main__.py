"""``python -m tests.faults [NAME …]``: kill at every file event, fill disks, print a table.

Without names, every case; a name chooses the cases that contain it. Exits with 1 when a kill lost
something or left something over.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from limbeck.contract.errors import EnvironmentalError
from tests.faults import cases, job
from tests.faults.disks import NoMount
from tests.faults.kills import Case, Killed, Row, fill_disks, kill_everywhere, record

_JOB_STEP = 160  # kilobytes between the sizes of a disk


def main(names: list[str]) -> int:
    """Run the chosen cases."""
    failures = 0
    print(f"{'case':42} {'kills':>6} {'states':>7} {'seconds':>8}", flush=True)
    with tempfile.TemporaryDirectory(prefix="limbeck-faults-") as root:
        for case in [*cases.CASES, *_job(Path(root), names)]:
            if names and not any(name in case.name for name in names):
                continue
            try:
                row = kill_everywhere(case, Path(root) / "case")
            except Killed as error:
                failures += 1
                print(f"{case.name:42} FAILED: {error}", flush=True)
            else:
                _print(row)
            try:
                step = 4 if case in cases.CASES else _JOB_STEP
                _print(fill_disks(case, Path(root) / "case", step=step, wanted=EnvironmentalError))
            except NoMount as error:
                print(f"{case.name}, disk full: not tried, no disk can be mounted: {error}")
            except Killed as error:
                failures += 1
                print(f"{case.name}, disk full: FAILED: {error}", flush=True)
    print("every event was tried; no random choice was made" if not failures else "FAILED")
    return 1 if failures else 0


def _print(row: Row) -> None:
    print(f"{row.name:42} {row.kills:6} {row.states:7} {row.seconds:8.0f}", flush=True)


def _job(root: Path, names: list[str]) -> tuple[Case, ...]:
    """The cases of the tiny job, when they are wanted: they take minutes."""
    if names and not any(name in "job, compress job, export" for name in names):
        return ()
    job.warm()
    prepared = root / "prepared"
    prepared.mkdir()
    record(lambda folder: job.run_stage("compress", folder), prepared)
    return job.cases(prepared)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
