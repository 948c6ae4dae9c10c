"""One process at a time: in a run folder, and for each artifact in the cache.

The system releases a lock when its process ends, however it ends. Not `filelock`: it does not say
which process holds a lock, and would replace two calls of `flock` (docs/dependencies.md).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from limbeck.contract.artifact import find_artifact, write_artifact
from limbeck.contract.errors import ArtifactError
from limbeck.contract.files import (
    disk_full_is_a_user_error,
    open_regular,
    sweep,
    unwritable_is_a_user_error,
)
from limbeck.contract.progress import say, say_once
from limbeck.contract.recipe import BaseRecipe

LOCK = ".lock"
_OTHER_CACHE = "name another cache folder with LIMBECK_CACHE"
_LONGEST = 100  # bytes of a process's number
_SIGNED_WITHIN = 0.5  # seconds a holder may take to write its number into the file it has locked


@contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[None]:
    """Keep every other process out of ``folder``, and remove what killed ones left there.

    ``wait`` waits for a process that holds it; without it that is an `ArtifactError`. Raises
    `EnvironmentalError` where the folder cannot be written.
    """
    with _opened(folder / LOCK) as (file, holder), disk_full_is_a_user_error(folder):
        if holder is not None:
            if not wait:
                raise ArtifactError(
                    f"{folder}: another run ({holder}) is using this folder; wait for it or name "
                    "another with --out."
                )
            say(f"waiting for another run ({holder}), which is making {folder.name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        sweep(folder)
        with _signed(file):
            yield


def holder(folder: Path) -> str | None:
    """The living process that holds ``folder`` by `locked`, such as ``process 4711``."""
    try:
        with open_regular(folder / LOCK, most=_LONGEST) as file:
            number = file.read().decode("ascii").strip()
    except (ArtifactError, OSError, ValueError):
        return None
    return f"process {number}" if _is_alive(number) else None


def make_once(
    path: Path,
    *,
    kind: str,
    key: str,
    parents: Mapping[str, str],
    make: Callable[[Path], dict[str, Any]],
    recipe: BaseRecipe | None = None,
) -> None:
    """Make the artifact of ``key`` at ``path``, in the cache, unless it is there. ``make`` fills a
    folder and returns the result.

    Of several processes that need it at once one makes it, and the others wait.
    """
    sweep(path.parent)
    if find_artifact(path, kind=kind, key=key) is not None:
        return
    lock = path.with_name(f".{path.name}{LOCK}")
    with _opened(lock, remedy=_OTHER_CACHE) as (file, holder), disk_full_is_a_user_error(path):
        if holder is not None:
            say_once(
                f"  waiting for another run ({holder}), which is making {path.parent.name} in the "
                "cache"
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        with _signed(file):
            if find_artifact(path, kind=kind, key=key) is None:  # not made by the other one
                with write_artifact(
                    path, kind=kind, key=key, parents=parents, recipe=recipe
                ) as draft:
                    draft.result = make(draft.folder)


@contextmanager
def _opened(
    lock: Path, *, remedy: str = "name another with --out"
) -> Iterator[tuple[IO[str], str | None]]:
    """The locked lock file, or the name of the process that has it."""
    with unwritable_is_a_user_error(lock.parent, remedy=remedy):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a+", encoding="utf-8")
    with file:
        with unwritable_is_a_user_error(lock.parent, remedy=remedy):
            holder = _take(file)
        yield file, holder


def _take(file: IO[str]) -> str | None:
    """Lock ``file``. Returns the process that has locked it, or None if this one has now."""
    until = time.monotonic() + _SIGNED_WITHIN
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            return None
        file.seek(0)
        number = file.read().strip()
        if _is_alive(number) or time.monotonic() > until:
            return f"process {number or 'unknown'}"
        time.sleep(0.01)


def _is_alive(number: str) -> bool:
    """Whether a process of this machine has this number; a killed one leaves its number behind."""
    try:
        os.kill(int(number), 0)
    except PermissionError:
        return True
    except (ValueError, OverflowError, OSError):
        return False
    return True


@contextmanager
def _signed(file: IO[str]) -> Iterator[None]:
    """Write this process's number into the lock file, and take it out again at the end."""
    file.seek(0)
    file.truncate()
    file.write(f"{os.getpid()}\n")
    file.flush()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.truncate(0)
