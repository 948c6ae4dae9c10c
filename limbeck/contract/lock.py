"""One process at a time: in a run folder, and in making what the cache holds. The system lets go when a process ends, however it ends.

Knows folders and artifacts; knows nothing of what is made.
"""

from __future__ import annotations

import fcntl
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from limbeck.contract.artifact import find_artifact, unwritable_is_a_user_error, write_artifact
from limbeck.contract.errors import ArtifactError
from limbeck.contract.progress import say
from limbeck.contract.recipe import BaseRecipe

LOCK = ".lock"


@contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[None]:
    """Keep every other process out of ``folder``.

    ``wait`` waits for one that holds it, which otherwise is an `ArtifactError`. Raises `EnvironmentalError` where the folder
    cannot be written.
    """
    with unwritable_is_a_user_error(folder):
        file = (folder / LOCK).open("a+")
    with file:
        if (holder := _take(file)) is not None:
            if not wait:
                raise ArtifactError(
                    f"{folder}: another run ({holder}) is using this folder; wait for it or name another with --out."
                )
            say(f"waiting for another run ({holder}), which is making {folder.name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        _sign(file)
        yield


def make_once(
    path: Path,
    *,
    kind: str,
    key: str,
    parents: Mapping[str, str],
    make: Callable[[Path], dict[str, Any]],
    recipe: BaseRecipe | None = None,
) -> None:
    """Have the artifact of ``key`` at ``path``, in the cache: where it is not there, ``make`` fills a folder and says what it measured.

    Of several processes that want it at once one makes it, and the others wait for it.
    """
    if find_artifact(path, kind=kind, key=key) is not None:
        return
    with unwritable_is_a_user_error(
        path.parent, remedy="name another cache folder with LIMBECK_CACHE"
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_name(f".{path.name}{LOCK}").open("a+")
    with file:
        if (holder := _take(file)) is not None:
            _say_once(
                f"  waiting for another run ({holder}), which is making {path.parent.name} in the cache"
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        _sign(file)
        if find_artifact(path, kind=kind, key=key) is None:  # else who held the lock has made it
            with write_artifact(path, kind=kind, key=key, parents=parents, recipe=recipe) as draft:
                draft.result = make(draft.folder)


def _take(file: IO[str]) -> str | None:
    """Lock ``file``; where another process has, say which."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return f"process {file.read().strip() or 'unknown'}"
    return None


@functools.cache
def _say_once(message: str) -> None:
    say(message)


def _sign(file: IO[str]) -> None:
    file.seek(0)
    file.truncate()
    file.write(f"{os.getpid()}\n")
    file.flush()
