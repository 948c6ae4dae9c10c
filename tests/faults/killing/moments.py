"""A whole job that is stopped at random moments and started again, until it is done.

Each start is ``limbeck run`` in a process that begins with the libraries imported. A Poisson
process of stops ends it: by a kill of the first process alone, of all of them, by SIGTERM, or by
Ctrl-C. No process may outlive the first one; the next start must go on without help, and the end
must be that of a job that nothing stopped. Where a C compiler is at hand, the clock goes back at
every start, and once during it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing.forkserver
import os
import random
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests import forks
from tests.faults.killing.events import Killed, Row, listing
from tests.faults.killing.job import digests

NAME = "pico, random moments"
_BENCH = {"prompt_tokens": 8, "new_tokens": 4, "minutes": 0.02, "min_blocks": 3, "threads": 1}
_SHORT = (
    "run", "pico", "--out", "run", "--set", f"bench={json.dumps(_BENCH)}",
    "--set", "training.tokens=2560", "--set", "training.checkpoint_every=1",
)  # fmt: skip
# SIGTERM and Ctrl-C end a process by themselves before the command line has begun.
_STOPPED = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 143, 130)
_STOPS = 12  # of one job, which is then left alone: most would come in its longest stage
_ENDING = 15.0  # seconds that processes may take to end after the first one


def _run(folder: Path) -> None:
    os.setsid()
    forks.command(folder, *_SHORT)


@dataclass
class _Job:
    """A folder for one job, and the file by which its clock is set."""

    folder: Path
    clock: Path
    hours: int = 0  # that the clock is behind

    def start(self) -> BaseProcess:
        self.turn_back()
        return forks.start(
            _run, self.folder, environment={"LIMBECK_CACHE": str(self.folder / "cache")}
        )

    def turn_back(self) -> None:
        self.hours += 1
        with self.clock.open("r+b") as file:  # not replaced: processes have it mapped
            file.write(struct.pack("q", -3600 * self.hours))

    def output(self) -> str:
        try:
            return (self.folder / "stderr").read_text(errors="replace")
        except FileNotFoundError:  # it was stopped before it began to write
            return ""

    def outcome(self) -> dict[str, Any]:
        """Digests of student and graphs, and every name that is left."""
        return digests(self.folder) | dict.fromkeys(listing(self.folder))


def stop_at_random(kills: int, seed: int, root: Path) -> Row:
    """Stop jobs ``kills`` times in folders below ``root``. Raises `Killed` for the first harm."""
    clock = root / "clock"
    clock.write_bytes(bytes(8))
    _preload(root, clock)
    forks.start(time.sleep, 0).join()  # the imports of the server of forks
    draw, started = random.Random(seed), time.monotonic()
    clean = _Job(_fresh(root / "clean"), clock)
    process = clean.start()
    process.join()
    if process.exitcode != 0:
        raise Killed(f"the job fails without a stop: {clean.output()}")
    mean = (time.monotonic() - started) / 4
    expected = clean.outcome()
    done = jobs = 0
    while done < kills:
        job, stops = _Job(_fresh(root / "stopped"), clock), 0
        jobs += 1
        while True:
            more = done < kills and stops < _STOPS
            if _once(job, draw, mean if more else 1e6, f"seed {seed}, stop {done + 1}"):
                break
            stops, done = stops + 1, done + 1
        if (found := job.outcome()) != expected:
            kept = tempfile.mkdtemp(prefix="limbeck-differs-")
            shutil.copytree(root, kept, symlinks=True, dirs_exist_ok=True)
            raise Killed(
                f"seed {seed}: the end differs after {stops} stops; see {kept}: "
                f"{_differences(found, expected)}"
            )
        print(f"  job {jobs}: {stops} stops, then the same end; {done} of {kills}", flush=True)
    return Row(NAME, done, jobs, time.monotonic() - started)


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {found.get(name, 'missing')}, not {expected.get(name, 'there')}"
        for name in sorted(found.keys() | expected.keys())
        if name not in found or name not in expected or found[name] != expected[name]
    ]


def _preload(root: Path, clock: Path) -> None:
    """Let the processes that start from now on read the time of ``clock``."""
    if (compiler := shutil.which("cc")) is None:
        print("  no C compiler: the clock does not go back")
        return
    source, made = Path(__file__).with_name("clock.c"), root / "clock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", made, source, "-ldl"], check=True)
    os.environ |= {"LD_PRELOAD": str(made), "LIMBECK_TEST_CLOCK": str(clock)}


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _once(job: _Job, draw: random.Random, mean: float, where: str) -> bool:
    """Start the job and stop it at a moment; whether it came to its end before."""
    delay, how = draw.expovariate(1 / mean), draw.choice(("first", "all", "term", "ctrl-c"))
    where = f"{where} ({how}, after {delay:.2f} s)"
    process = job.start()
    assert process.pid is not None
    for wait in (delay / 2, delay / 2):
        process.join(wait)
        if process.exitcode is not None:
            if process.exitcode != 0:
                raise Killed(f"{where}: the start ended with {process.exitcode}: {job.output()}")
            return True
        job.turn_back()
    group = _session(process.pid)
    signal_ = {"term": signal.SIGTERM, "ctrl-c": signal.SIGINT}.get(how, signal.SIGKILL)
    for pid in [process.pid] if how in ("first", "term") else group:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal_)
    process.join(60)
    if process.exitcode not in (*_STOPPED, 0):  # 0: it was done just then
        raise Killed(f"{where}: ended with {process.exitcode}: {job.output()}")
    until = time.monotonic() + _ENDING
    while left := _session(process.pid) + _forked():
        if time.monotonic() > until:
            raise Killed(f"{where}: processes {left} are still there after {_ENDING:g} s")
        time.sleep(0.05)
    if "Traceback" in job.output():
        raise Killed(f"{where}: {job.output()}")
    return False


def _session(leader: int) -> list[int]:
    """The processes of a session."""
    return [pid for pid, _, session in _processes() if session == leader]


def _forked() -> list[int]:
    """What the server of forks has started: the job, and torch arms of its bench."""
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    return [pid for pid, parent, _ in _processes() if parent == server]


def _processes() -> list[tuple[int, int, int]]:
    """Process, parent and session of every process that still works (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            state, parent, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if state != "Z":
                found.append((int(path.parent.name), int(parent), int(session)))
    return found
