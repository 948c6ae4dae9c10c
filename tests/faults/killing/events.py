"""Kill a piece of work at every file event it makes, run it again, and see that nothing is lost and
nothing is left over.

A piece of work runs in a forked process, so that a kill costs milliseconds. An event is a file
opened for writing, a rename, a removal, a new folder or link, a change of mode, or an fsync; the
kill comes just before it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.contract import progress
from tests.faults.killing.disks import resize, small_disk, used

_EVENTS = {
    "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.link",
    "os.symlink",
}  # fmt: skip
_RANDOM = re.compile(r"\.[0-9a-f]{8}\.writing")
_WRITING = os.O_WRONLY | os.O_RDWR
_FAILED = 3  # exit status of a child whose work raised an exception

_ROOM = 256 << 10  # kilobytes; more than any case needs

Work = Callable[[Path], None]


def _nothing(_: Path) -> None:
    pass


@dataclass(frozen=True)
class Case:
    """``work`` on a folder that ``prepare`` has filled. Its ``outcome`` must not depend on kills in
    between.

    ``look`` asserts what must hold at every moment, so also just after a kill.
    """

    name: str
    work: Work
    outcome: Callable[[Path], Any]
    prepare: Work = _nothing
    look: Work = _nothing


@dataclass(frozen=True)
class Row:
    """What the kills of one case came to.

    ``states`` are different contents of the folder after a kill; of full disks, the sizes at which
    the work failed.
    """

    name: str
    kills: int
    states: int
    seconds: float


class Killed(AssertionError):
    """Work that did not end as it does without a kill; the message names the event."""


def kill_everywhere(
    case: Case,
    root: Path,
    *,
    signals: tuple[int, ...] = (signal.SIGKILL,),
    first: int = 0,
    last: int | None = None,
    step: int = 1,
) -> Row:
    """Kill ``case`` at events ``first``, ``first + step`` and so on, before ``last`` if there is
    one, in folders below ``root``.

    Raises `Killed` for the first kill that harms.
    """
    started, clean = time.monotonic(), _fresh(case, root / "clean")
    events = record(case.work, clean)
    expected, listed = case.outcome(clean), listing(clean)
    kills, seen = 0, set[str]()
    chosen = list(enumerate(events))[first:last:step]
    # A line of text, not a bar: a bar has a thread, and this process forks.
    done = progress.Task(f"{case.name}, kills", len(signals) * len(chosen))
    for number in signals:
        for at, event in chosen:
            folder = _fresh(case, root / "killed")
            where = f"{case.name}: signal {number} at event {at} of {len(events)}, {event}"
            stop_at(case.work, folder, at, number=number)
            kills += 1
            done.advance()
            try:
                case.look(folder)
            except Exception as error:
                raise Killed(f"{where}: {type(error).__name__}: {error}") from error
            if (state := digest(folder)) in seen:
                continue
            seen.add(state)
            record(case.work, folder, where=where)
            if (found := case.outcome(folder)) != expected:
                raise Killed(f"{where}: the next start gave {found}, expected {expected}")
            if (left := listing(folder)) != listed:
                raise Killed(f"{where}: left over {sorted(set(left) ^ set(listed))}")
    return Row(case.name, kills, len(seen), time.monotonic() - started)


def record(work: Work, folder: Path, *, where: str = "") -> list[str]:
    """Let ``work`` run to its end in a child; its events in order.

    Raises `Killed` when it fails.
    """
    log = folder.with_name(f"{folder.name}.events")
    log.write_text("")

    def write(event: str) -> None:
        os.write(handle, f"{event}\n".encode())

    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    try:
        status = _run(work, folder, write)
    finally:
        os.close(handle)
    if status != 0:
        report = folder.with_name(f"{folder.name}.error").read_text()
        raise Killed(f"{where}: the next start failed with status {status}:\n{report}")
    return log.read_text().splitlines()


def stop_at(work: Work, folder: Path, at: int, *, number: int = signal.SIGKILL) -> None:
    """Let ``work`` run in a child, which sends itself signal ``number`` before event ``at``."""
    count, came = 0, mmap.mmap(-1, 1)  # shared with the child

    def stop(_: str) -> None:
        nonlocal count
        count += 1
        if count == at + 1:
            came[0] = 1
            os.kill(os.getpid(), number)

    def stopped(folder: Path) -> None:
        # As the command line does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        work(folder)

    status = _run(stopped, folder, stop)
    if not came[0]:
        report = folder.with_name(f"{folder.name}.error").read_text() if status else ""
        raise Killed(f"event {at} did not come, status {status}:\n{report}")


def _run(
    work: Work, folder: Path, on_event: Callable[[str], None], *, report: Path | None = None
) -> int:
    """Status of a child that did ``work``; what it raised goes to ``report``."""
    report = report or folder.with_name(f"{folder.name}.error")
    child = os.fork()
    if child == 0:
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            watch(on_event, below=folder)
            work(folder)
            os._exit(0)
        except BaseException:
            report.write_text(traceback.format_exc())
            os._exit(_FAILED)
    return os.waitpid(child, 0)[1]


def watch(on_event: Callable[[str], None], *, below: Path) -> None:
    """Call ``on_event`` before each file event below a folder, for the rest of this process."""
    root, fsync = str(below), os.fsync

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            if isinstance(args[2], int) and args[2] & _WRITING and _is_below(args[0], root):
                on_event(f"open {args[0]}")
        elif event in _EVENTS and _is_below(args[0], root):
            on_event(f"{event} {args[0]}")

    def synced(handle: Any) -> None:
        on_event("fsync")
        fsync(handle)

    sys.addaudithook(hook)
    os.fsync = synced


def _is_below(path: Any, root: str) -> bool:
    # `shutil.rmtree` names files relative to an open folder.
    name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
    return name.startswith(root) or not os.path.isabs(name)


def _fresh(case: Case, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    case.prepare(folder)
    return folder


def listing(folder: Path) -> list[str]:
    """Every name below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def digest(folder: Path) -> str:
    """Of the names and contents of everything below a folder, without the random part of temporary
    names, and times.
    """
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = _RANDOM.sub(".writing", path.relative_to(folder).as_posix())
        found.update(repr((name, _content(path))).encode())
    return found.hexdigest()


def _content(path: Path) -> Any:
    if path.is_symlink() or not path.is_file():
        return os.readlink(path) if path.is_symlink() else "folder"
    content = path.read_bytes()
    if path.name == "log.jsonl":  # each line has a time
        return content.count(b"\n"), content[-1:]
    if path.name == "manifest.json" and content.endswith(b"}"):
        manifest = json.loads(content)
        return manifest["key"], manifest.get("files", {}).keys()
    return content


def fill_disks(case: Case, root: Path, *, step: int, wanted: type[Exception]) -> Row:
    """Run ``case`` on disks of every size up to what it needs, ``step`` kilobytes apart, and then
    with room.

    A full disk must raise ``wanted``, leave nothing half-written, and the next start must go on.
    Raises `Killed`, and `NoMount` where nothing can be mounted.
    """
    started, disk = time.monotonic(), root / "disk"
    with small_disk(disk, kilobytes=_ROOM):
        expected, listed, needed = _on_disk(case, disk)
    tries = full = 0
    for kilobytes in range(step, needed + step, step):
        where = f"{case.name}: a disk of {kilobytes} kB of {needed}"
        with small_disk(disk, kilobytes=kilobytes):
            folder = disk / "folder"
            try:
                folder.mkdir()
                case.prepare(folder)
            except (OSError, wanted):
                continue  # not even room for what was there before
            error = root / "folder.error"
            error.unlink(missing_ok=True)
            status = _run(case.work, folder, _ignore, report=error)
            tries += 1
            if status:
                full += 1
                said = error.read_text() if error.exists() else f"status {status}"
                if f"{wanted.__name__}: " not in said.splitlines()[-1]:
                    raise Killed(f"{where}: {said}")
            case.look(folder)
            resize(disk, kilobytes=_ROOM)
            if _run(case.work, folder, _ignore, report=error):
                raise Killed(f"{where}: the next start failed:\n{error.read_text()}")
            if (found := case.outcome(folder)) != expected:
                raise Killed(f"{where}: the next start gave {found}, expected {expected}")
            if (left := listing(folder)) != listed:
                raise Killed(f"{where}: left over {sorted(set(left) ^ set(listed))}")
    return Row(f"{case.name}, disk full", tries, full, time.monotonic() - started)


def _on_disk(case: Case, disk: Path) -> tuple[Any, list[str], int]:
    folder = _fresh(case, disk / "folder")
    record(case.work, folder)
    return case.outcome(folder), listing(folder), used(disk)


def _ignore(_: str) -> None:
    pass
