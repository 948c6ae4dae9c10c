"""Where teachers' outputs are kept: the cache folder alone, or also a URL that machines share.

An entry is an artifact with one file. At a URL its manifest is written last and read first, so that
half of an entry counts as none.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from limbeck.contract.artifact import MANIFEST, Artifact, find_artifact, open_artifact
from limbeck.contract.errors import ArtifactError, EnvironmentalError, LimbeckError
from limbeck.contract.files import new_folder
from limbeck.contract.lock import make_once
from limbeck.contract.progress import say
from limbeck.contract.sources.places import cache_folder
from limbeck.contract.sources.stores import file_system

Make = Callable[[Path], dict[str, Any]]  # fills a folder and returns the artifact's result


@dataclass(frozen=True)
class Entry:
    """What identifies one entry, and the name of its file."""

    kind: str  # of the artifact
    key: str
    teacher: str  # digest
    file: str

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.kind.removeprefix('teacher-')}-{self.key[:16]}"


class Store(Protocol):
    """A place for entries."""

    place: str  # for messages

    def has(self, entry: Entry) -> bool:
        """Whether a whole entry is there."""

    def obtain(self, entry: Entry, make: Make) -> Path:
        """Folder on this machine with the entry, checked; made and kept when missing."""

    def fill(self, entry: Entry, make: Make) -> str:
        """Check the entry in the store, and make it there when missing or damaged; its digest."""


class LocalStore:
    """The cache folder."""

    def __init__(self) -> None:
        self.folder = cache_folder() / "teachers"
        self.place = str(self.folder)

    def has(self, entry: Entry) -> bool:
        """See `Store`. Raises `ArtifactError` for a damaged entry."""
        return find_artifact(self.folder / entry.name, kind=entry.kind, key=entry.key) is not None

    def obtain(self, entry: Entry, make: Make) -> Path:
        """See `Store`. Raises `ArtifactError` for a damaged entry."""
        path = self.folder / entry.name
        make_once(
            path, kind=entry.kind, key=entry.key, parents={"teacher": entry.teacher}, make=make
        )
        return path

    def fill(self, entry: Entry, make: Make) -> str:
        """See `Store`. Raises `ArtifactError` for a damaged entry."""
        return open_artifact(self.obtain(entry, make), verify=False).digest


class RemoteStore:
    """A URL. The cache folder holds a checked copy of every entry that was made or used here."""

    def __init__(self, url: str) -> None:
        """Raises `UserError` if the plug-in for ``url`` is missing."""
        self.place, self._local = url, LocalStore()
        self._fs, self._root = file_system(url)

    def has(self, entry: Entry) -> bool:
        """See `Store`. Asks for the manifest alone; `obtain` and `fill` check the file."""
        with self._reached():
            return bool(self._fs.exists(f"{self._root}/{entry.name}/{MANIFEST}"))

    def obtain(self, entry: Entry, make: Make) -> Path:
        """See `Store`. A damaged entry is made again. Raises `EnvironmentalError`."""

        def fetch_or_make(out: Path) -> dict[str, Any]:
            if (found := self._fetch(entry, out)) is None:
                return make(out)
            (out / MANIFEST).unlink()  # this machine writes its own
            return found.result

        path = self._local.obtain(entry, fetch_or_make)
        if not self.has(entry):
            self._send(entry, path)
        return path

    def fill(self, entry: Entry, make: Make) -> str:
        """See `Store`. Raises `EnvironmentalError`."""
        self._local.folder.mkdir(parents=True, exist_ok=True)
        with new_folder(self._local.folder / "check") as folder:
            if (found := self._fetch(entry, folder)) is not None:
                return found.digest
        return open_artifact(self.obtain(entry, make), verify=False).digest

    def _fetch(self, entry: Entry, out: Path) -> Artifact | None:
        """Copy the entry to the folder ``out`` and check it; None, and no copy, unless it is whole.

        The manifest of a damaged entry is removed from the store.
        """
        if not self.has(entry):
            return None
        try:
            for name in (MANIFEST, entry.file):
                with self._reached():
                    self._fs.get_file(f"{self._root}/{entry.name}/{name}", str(out / name))
            found = open_artifact(out, kind=entry.kind)
            if found.key == entry.key:
                return found
        except (ArtifactError, FileNotFoundError):
            pass
        say(f"  {self.place}: {entry.name} is damaged or half-written, and is made again")
        for name in (MANIFEST, entry.file):
            (out / name).unlink(missing_ok=True)
        with self._reached():
            self._fs.rm_file(f"{self._root}/{entry.name}/{MANIFEST}")
        return None

    def _send(self, entry: Entry, path: Path) -> None:
        folder = f"{self._root}/{entry.name}"
        with self._reached():
            self._fs.makedirs(folder, exist_ok=True)
            for name in (entry.file, MANIFEST):
                self._fs.put_file(str(path / name), f"{folder}/{name}")

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Turn what a plug-in raises into an `EnvironmentalError`; each has errors of its own."""
        try:
            yield
        except (FileNotFoundError, LimbeckError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise EnvironmentalError(
                f"{self.place}: cannot be read or written ({type(error).__name__}: {error}); check "
                "the URL, the network, and that the credentials allow reading and writing."
            ) from error


def open_store(url: str | None) -> Store:
    """The store at ``url``, or the cache folder for None."""
    return LocalStore() if url is None else RemoteStore(url)
