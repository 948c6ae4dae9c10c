"""Damaged files, read by the code that meets them.

``python -m tests.faults.fuzzing.fuzz [--seconds N] [--seed N] [NAME …]`` does it for long.

Each target writes a good file, damages it and reads it. Only a `LimbeckError` may come of that: no
other exception, no crash, and nothing that takes longer than `SLOWEST`. A target runs in a forked
process, so that a crash is seen. Prints a table; exits with 1 after a finding. A finding is
repeated with its seed and its name.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.contract.errors import LimbeckError
from tests.faults.fuzzing.damage import damaged

SLOWEST = 10  # seconds


@dataclass(frozen=True)
class Target:
    """A ``file`` that ``make`` writes into a folder, as it should be, and ``read``s from there."""

    name: str
    file: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]


@dataclass
class Found:
    """What the cases of one target came to."""

    cases: int = 0
    fine: int = 0
    refused: int = 0
    harm: str = ""  # the first case that raised something else, crashed or took too long
    messages: Counter[str] | None = None


def fuzz(target: Target, *, seed: int, cases: int, seconds: float, root: Path) -> Found:
    """Try up to ``cases`` damaged files within ``seconds``, in a forked process."""
    folder = root / target.name.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    report = root / "report.json"
    report.unlink(missing_ok=True)
    if (child := os.fork()) == 0:
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            _try_all(target, seed, cases, seconds, folder, report)
        except BaseException:
            harm = f"the harness failed: {traceback.format_exc()}"
            report.write_text(json.dumps(vars(Found(harm=harm)) | {"messages": {}}))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    told = json.loads(report.read_text())
    found = Found(**{name: told[name] for name in ("cases", "fine", "refused", "harm")})
    found.messages = Counter(told["messages"])
    if os.WIFSIGNALED(status):
        found.harm = f"case {found.cases} of seed {seed}: killed by signal {os.WTERMSIG(status)}"
    return found


def _try_all(
    target: Target, seed: int, cases: int, seconds: float, folder: Path, report: Path
) -> None:
    signal.signal(signal.SIGALRM, _too_slow)
    found, messages = Found(), Counter[str]()
    target.make(folder)
    target.read(folder)  # the good file can be read, and libraries are loaded now
    until = time.monotonic() + seconds
    good = (folder / target.file).read_bytes()
    while found.cases < cases and time.monotonic() < until and not found.harm:
        draw = random.Random(f"{target.name} {seed} {found.cases}")
        bad = damaged(good, draw)
        (folder / target.file).write_bytes(bad)
        report.write_text(
            json.dumps(vars(found) | {"messages": messages})
        )  # a crash is the next case
        signal.alarm(SLOWEST)
        try:
            target.read(folder)
            found.fine += 1
        except LimbeckError as error:
            found.refused += 1
            messages[str(error).replace(str(folder) + "/", "").replace(str(folder), ".")[:200]] += 1
        except BaseException:
            last = traceback.format_exc().strip().splitlines()
            found.harm = f"case {found.cases} of seed {seed}: {last[-1]} ({last[-3].strip()})"
            (report.parent / f"{folder.name}.harm").write_bytes(bad)
        signal.alarm(0)
        found.cases += 1
    report.write_text(json.dumps(vars(found) | {"messages": dict(messages.most_common(200))}))


def _too_slow(*_: Any) -> None:
    raise TimeoutError(f"more than {SLOWEST} s")


@contextlib.contextmanager
def _workplace() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="limbeck-fuzz-") as root:
        yield Path(root)


def main() -> int:
    """Fuzz the chosen targets, for an equal part of the time each."""
    from tests.faults.fuzzing.targets import TARGETS

    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=120, help="of all targets together")
    parser.add_argument("--cases", type=int, default=20_000, help="at most, of each target")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("names", nargs="*")
    asked = parser.parse_args()
    chosen = [t for t in TARGETS if not asked.names or any(name in t.name for name in asked.names)]
    print(
        f"seed {asked.seed}\n{'target':24} {'cases':>7} {'read':>7} {'refused':>8} finding",
        flush=True,
    )
    harmed, cases = 0, 0
    with _workplace() as root:
        for target in chosen:
            found = fuzz(
                target, seed=asked.seed, cases=asked.cases, seconds=asked.seconds / len(chosen),
                root=root,
            )  # fmt: skip
            harmed, cases = harmed + bool(found.harm), cases + found.cases
            print(
                f"{target.name:24} {found.cases:7} {found.fine:7} {found.refused:8} "
                f"{found.harm or 'none'}",
                flush=True,
            )
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    print(f"{cases} cases, {harmed} findings, at most {most} MB of memory")
    return 1 if harmed else 0


if __name__ == "__main__":
    raise SystemExit(main())
