"""A disk of a chosen size, to be filled: a tmpfs, which takes the right to mount."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path


class NoMount(Exception):
    """This process may not mount; the message says why."""


@contextlib.contextmanager
def small_disk(folder: Path, *, kilobytes: int) -> Iterator[None]:
    """Mount a file system of ``kilobytes`` at ``folder``. Raises `NoMount`."""
    folder.mkdir(parents=True, exist_ok=True)
    _call("mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder))
    try:
        yield
    finally:
        _call("umount", str(folder))


@contextlib.contextmanager
def read_only_disk(folder: Path) -> Iterator[None]:
    """Mount an empty file system that cannot be written at ``folder``. Raises `NoMount`."""
    folder.mkdir(parents=True, exist_ok=True)
    _call("mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(folder))
    try:
        yield
    finally:
        _call("umount", str(folder))


def resize(folder: Path, *, kilobytes: int) -> None:
    """Give the disk at ``folder`` another size, as who frees some room does."""
    _call("mount", "-o", f"remount,size={kilobytes}k", str(folder))


def used(folder: Path) -> int:
    """Kilobytes in use on the disk at ``folder``."""
    done = subprocess.run(
        ["df", "--output=used", "-k", folder], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def _call(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NoMount(str(error)) from None
    if done.returncode:
        raise NoMount(done.stderr.strip())
