"""Read a folder that another process may be writing, or that a stranger made.

A stage replaces a whole artifact in one step, so a reader that opens one file after another could
meet files of two artifacts. It notices this at the end.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from limbeck.contract.artifact import MANIFEST
from limbeck.contract.errors import ArtifactError, LimbeckError
from limbeck.contract.lock import holder

_State = Mapping[Path, tuple[int, int] | None]  # of every manifest: inode and time of change


@contextmanager
def reading(*paths: Path) -> Iterator[Callable[[], None]]:
    """Read artifacts or run folders. Yields a check to call before a result is put in place;
    without such a call it is made at the end.

    Raises `ArtifactError` if an artifact was replaced meanwhile, instead of any other error that
    this has caused, and for values of another kind than Limbeck's: the results in a manifest, and
    files whose hashes hold, can come from somebody else's program. That message ends with the
    place in the code, so that a defect of ours can be found too.
    """
    before, checked = _state(paths), False

    def require_same(*, failed: bool = False) -> None:
        nonlocal checked
        now, checked = _state(paths), True
        names = before.keys() | now.keys() if failed else before.keys()
        for manifest in sorted(names):
            if before.get(manifest) != now.get(manifest):
                folder = manifest.parent
                who = holder(folder.parent) or holder(folder) or "another process"
                raise ArtifactError(
                    f"{folder}: {who} replaced it while it was read here; run this command again "
                    "once the other one has ended."
                )

    try:
        yield require_same
    except Exception as error:
        require_same(failed=True)
        if not paths or isinstance(error, LimbeckError | OSError | MemoryError | ImportError):
            raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise ArtifactError(
            f"{paths[0]}: holds values that Limbeck does not write; run its stage again, or report "
            f"this if nobody changed the folder: {type(error).__name__}: {str(error)[:200]} "
            f"({Path(at.filename).name}, line {at.lineno})."
        ) from error
    if not checked:
        require_same()


def _state(paths: tuple[Path, ...]) -> _State:
    """Every manifest in ``paths``, which are artifacts or run folders."""
    found: dict[Path, tuple[int, int] | None] = {}
    for path in paths:
        for manifest in (path / MANIFEST, *path.glob(f"[!.]*/{MANIFEST}")):
            try:
                status = manifest.stat()
            except (OSError, ValueError):  # a ValueError: no name that can be
                found[manifest] = None
            else:
                found[manifest] = status.st_ino, status.st_mtime_ns
    return found
