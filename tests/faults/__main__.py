"""Kill at every file event, fill disks, stop a whole job at random moments, print a table.

Exits with 1 when a kill lost something or left something over.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
from pathlib import Path

from limbeck.contract.errors import EnvironmentalError
from tests.faults.killing import cases, commands, job, moments
from tests.faults.killing.disks import NoMount
from tests.faults.killing.events import Case, Killed, Row, fill_disks, kill_everywhere

_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "ctrl-c": signal.SIGINT}
# Each event takes a training of ten seconds or more: only by name, best with --step.
_LONG = ("command, cache", "command, ablate", "command, search")
_JOB_STEP = 160  # kilobytes between the sizes of a disk


def main() -> int:
    """Run the chosen cases."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", help="cases whose names contain one; default: all")
    parser.add_argument("--kills", type=int, default=20, help="at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of these moments")
    parser.add_argument(
        "--signals", nargs="+", choices=_SIGNALS, default=["kill"], help="at file events"
    )
    parser.add_argument(
        "--first", type=int, default=0, help="event to begin at, where a find is mended"
    )
    parser.add_argument("--last", type=int, help="event to end before; default: none")
    parser.add_argument("--step", type=int, default=1, help="2 takes every second event")
    asked = parser.parse_args()
    signals = tuple(_SIGNALS[name] for name in asked.signals)
    failures, names = 0, asked.names
    print(f"{'case':42} {'kills':>6} {'states':>7} {'seconds':>8}", flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="limbeck-faults-") as root,
        contextlib.ExitStack() as stack,
    ):
        for case in [*cases.CASES, *_made(Path(root), names, stack)]:
            if not (any(name in case.name for name in names) if names else case.name not in _LONG):
                continue
            try:
                row = kill_everywhere(
                    case, Path(root) / "case", signals=signals, first=asked.first, last=asked.last,
                    step=asked.step,
                )  # fmt: skip
            except Killed as error:
                failures += 1
                print(f"{case.name:42} FAILED: {error}", flush=True)
            else:
                _print(row)
            if case.name.startswith("command"):
                continue  # they write as the other cases do
            try:
                step = 4 if case in cases.CASES else _JOB_STEP
                _print(fill_disks(case, Path(root) / "case", step=step, wanted=EnvironmentalError))
            except NoMount as error:
                print(f"{case.name}, disk full: not tried, no disk can be mounted: {error}")
            except Killed as error:
                failures += 1
                print(f"{case.name}, disk full: FAILED: {error}", flush=True)
        if not names or any(name in moments.NAME for name in names):
            try:
                _print(moments.stop_at_random(asked.kills, asked.seed, Path(root)))
            except Killed as error:
                failures += 1
                print(f"{moments.NAME}, seed {asked.seed}: FAILED: {error}", flush=True)
    print("FAILED" if failures else f"all cases passed; random moments: seed {asked.seed}")
    return 1 if failures else 0


def _print(row: Row) -> None:
    print(f"{row.name:42} {row.kills:6} {row.states:7} {row.seconds:8.0f}", flush=True)


def _made(root: Path, names: list[str], stack: contextlib.ExitStack) -> tuple[Case, ...]:
    """The cases of the tiny job and of commands, when they are wanted: they take minutes."""
    if names and not any(name.startswith(("job", "command")) for name in names):
        return ()
    job.warm()
    job.prepare(root / "prepared")
    made = stack.enter_context(commands.cases(root / "prepared"))
    return (*job.cases(root / "prepared"), *made)


if __name__ == "__main__":
    sys.exit(main())
