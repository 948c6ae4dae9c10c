"""Files and folders: written whole or not at all, hashed, and cleaned up after a kill.

Knows paths and the system's errors. Knows nothing about what the files mean.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from limbeck.contract.environment import misread
from limbeck.contract.errors import ArtifactError, EnvironmentalError, ModelError
from limbeck.contract.recipe import fingerprint

_MOST_JSON = 256 << 20  # bytes; the largest manifest seen has 1 MB
_LEFT = re.compile(r"\.(?P<name>.+?)((\.[0-9a-f]+)?\.writing|(?P<old>\.old))")
_POINTER, _LFS = 1024, b"version https://git-lfs.github.com/"  # bytes, and how they begin
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_AT_FDCWD = -100
# Libraries that write through C or C++ report a full disk only in words: torch, numpy.
# Of the system, of its loader of libraries, and of torch.
_NO_MEMORY = re.compile("[Cc]an(not|'t) allocate memory|failed to map segment from shared object")
_FULL = re.compile(
    r"No space left|unexpected pos \d+|file write failed|\d+ requested and \d+ written"
)
_REFUSALS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP,
    errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS,
    errno.EEXIST,  # a folder in place of a link that leads nowhere
}  # fmt: skip


# Writing ------------------------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` holds either the old content or all of the new, even after a
    power cut.

    Raises `EnvironmentalError` when the disk is full, or as `require_place` does.
    """
    require_place(path)
    with disk_full_is_a_user_error(path), _beside(path, _new_file) as (temporary, handle):
        with open(handle, "w", encoding="utf-8", closefd=False) as file:
            file.write(text)
            file.flush()
            os.fsync(handle)
        temporary.rename(path)
        _sync(path.parent)


def require_utf8(path: Path) -> Path:
    """``path``. Raises `EnvironmentalError` unless its absolute form is UTF-8: safetensors,
    tokenizers and onnxruntime open no other, and would say so after the training.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise EnvironmentalError(
            f"{path.absolute()}: this path is not UTF-8, and the libraries that read and write "
            "models open no such path; give the file or folder another name."
        ) from None
    return path


def require_place(path: Path) -> None:
    """Raise `EnvironmentalError` unless ``path`` is a file or a free name in a folder.

    A rename would replace a device by a file, and a pipe waits for a reader.
    """
    if path.exists() and not path.is_file():
        raise EnvironmentalError(f"{path}: a folder, pipe or device; name a file to write.")
    if not path.parent.exists():
        raise EnvironmentalError(f"{path}: there is no folder {path.parent}; make it first.")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to fill, beside ``path``, which takes its place at the end unless an error comes."""
    with _beside(path, _new_file) as (temporary, _):
        yield temporary
        _sync(temporary)
        temporary.rename(path)
        _sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, beside ``path``.

    It is removed at the end, unless `put_in_place` has moved it.
    """
    with _beside(path, _new_folder) as (folder, _):
        yield folder


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """An empty folder among the system's temporary files, for this user alone; removed at the end.

    Those that killed processes left are removed too, by the next process that needs one.
    """
    import tempfile

    place = Path(tempfile.gettempdir()) / f"limbeck-{os.getuid()}"
    with _beside(place, _private_folder) as (folder, _):
        yield folder


def put_in_place(folder: Path, path: Path) -> None:
    """Let ``folder``, complete, take the place of ``path``. At every moment ``path`` is the old
    folder or the new one.

    Where the file system cannot exchange two names, ``path`` is away for a moment; `sweep` repairs
    that after a kill.
    """
    for directory, _, names in os.walk(folder):
        for name in names:
            if not (Path(directory) / name).is_symlink():
                _sync(Path(directory) / name)
        _sync(Path(directory))
    if not path.exists():
        folder.rename(path)
    elif not _exchanged(folder, path):
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        handle = os.open(path, os.O_RDONLY)
        try:
            _own(handle)
            path.rename(old)
            folder.rename(path)
            shutil.rmtree(old)
        finally:
            os.close(handle)
    _sync(path.parent)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left in ``folder``: half-written files and folders that no
    living process owns.

    Only leftovers of the file or folder ``name``, if it is given.
    """
    with contextlib.suppress(OSError, ValueError):  # the write itself reports the error
        for left in os.scandir(folder):
            found = _LEFT.fullmatch(left.name)
            if found is None or (name is not None and found["name"] != name):
                continue
            with contextlib.suppress(OSError), _unowned(left.path):
                if not left.is_dir(follow_symlinks=False):
                    if not found["old"]:
                        os.unlink(left.path)
                elif found["old"] and not (folder / found["name"]).exists():
                    # The process was killed between the two renames of `put_in_place`.
                    os.rename(left.path, folder / found["name"])
                else:
                    shutil.rmtree(left.path)


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is one that `sweep` may remove."""
    return _LEFT.fullmatch(name) is not None


@contextmanager
def _beside(path: Path, make: Callable[[Path], int]) -> Iterator[tuple[Path, int]]:
    """A temporary file or folder in the folder of ``path``, held open and owned by this process,
    and removed at the end.

    A lock shows the ownership: the system lets go of it when the process ends, however it ends.
    """
    sweep(path.parent, path.name)
    while True:
        temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.writing")
        try:
            handle = make(temporary)
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise
            reason = "this folder takes no files"  # such as /proc
            raise PermissionError(errno.EACCES, reason, str(path)) from None
        try:
            if _own(handle) and temporary.exists():  # else another process has just swept it
                yield temporary, handle
                return
        finally:
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)
            os.close(handle)


def _new_file(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def _new_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY)


def _private_folder(path: Path) -> int:
    path.mkdir(mode=0o700)
    return os.open(path, os.O_RDONLY)


def _own(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks; nothing is swept there
        return True
    return True


@contextmanager
def _unowned(left: str) -> Iterator[None]:
    """Hold what a process left. Raises `OSError` when a living process owns it."""
    handle = os.open(left, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return not rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Reading ------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises `FileNotFoundError`, and `ArtifactError` saying why it cannot be read.
    """
    with open_regular(path, most=_MOST_JSON) as file:
        text = file.read()
    try:
        return parse_json(text)
    except ValueError as error:  # no JSON, no UTF-8, an endless number, too deep
        raise ArtifactError(f"{path}: not JSON ({_reason(error)}).") from None


def parse_json(text: str | bytes) -> Any:
    """As `json.loads`, with a ValueError too for what is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


@contextmanager
def open_regular(path: Path, *, most: int | None = None) -> Iterator[BufferedReader]:
    """Open a file for reading. Raises `FileNotFoundError`, and `ArtifactError` for what is no file,
    cannot be read or has more than ``most`` bytes.

    A pipe or a device would block for ever.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ArtifactError(f"{path}: cannot be read ({_reason(error)}).") from None
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        raise ArtifactError(f"{path}: a folder, pipe or device, where a file was expected.")
    if most is not None and found.st_size > most:
        os.close(handle)
        raise ArtifactError(f"{path}: larger than {most >> 20} MB, too large for this file.")
    with open(handle, "rb") as file:
        yield file


def require_content(path: Path) -> None:
    """Raise `ModelError` for the pointer that a clone without Git LFS has in a file's place."""
    if path.is_file() and path.stat().st_size < _POINTER and path.read_bytes().startswith(_LFS):
        raise ModelError(
            f"{path}: a pointer of Git LFS, not the file itself. Run `git lfs pull` in that "
            "folder, or download the file."
        )


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0]


def file_digest(path: Path) -> str:
    """sha256 of one file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(path: Path) -> str:
    """sha256 over the name and content of every file below ``path``."""
    return fingerprint({name: file_digest(path / name) for name in files_below(path)})


def files_below(folder: Path) -> list[str]:
    """Sorted names of everything below ``folder`` but folders. Links are not followed."""
    return sorted(
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if p.is_symlink() or not p.is_dir()
    )


# The system's errors ------------------------------------------------------------------------------


@contextmanager
def disk_full_is_a_user_error(path: Path) -> Iterator[None]:
    """Turn "no space left" into an `EnvironmentalError`, also inside a library's error."""
    try:
        yield
    except Exception as error:
        if isinstance(error, EnvironmentalError) or not _is_full(error):
            raise
        raise EnvironmentalError(
            f"{path}: no space left on the disk; free some room and run again. Nothing "
            "half-written was kept."
        ) from error


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _FULL.search(
            str(error)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def explained(error: Exception) -> EnvironmentalError | None:
    """What a user can do about an error of the system that nothing nearer to it has explained.

    None for a defect.
    """
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        return EnvironmentalError(
            "no memory is left; close other programs, raise the limit of `ulimit -v`, or take a "
            "larger machine."
        )
    if (variable := misread(error)) is not None:
        return variable
    if not isinstance(error, OSError):
        return None
    where = os.fsdecode(error.filename) if error.filename else "standard output"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EnvironmentalError(f"{where}: no space left; free some room and run again.")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return EnvironmentalError(
            f"{where}: too many open files; raise the limit with `ulimit -n`."
        )
    if error.errno in (errno.EIO, errno.ESTALE):
        where = where if error.filename else "a file"  # Python does not say which it was reading
        return EnvironmentalError(
            f"{where}: the disk or its network failed ({error.strerror}); check it and run again."
        )
    if error.errno in _REFUSALS:
        return EnvironmentalError(
            f"{where}: the system refuses it ({error.strerror}); name another."
        )
    if "No usable temporary directory" in str(error):
        return EnvironmentalError(f"{error.strerror}; set TMPDIR to a folder that can be written.")
    try:
        os.getcwd()
    except FileNotFoundError:
        return EnvironmentalError("the working directory was deleted; change to one that exists.")
    return None


@contextmanager
def unwritable_is_a_user_error(
    folder: Path, *, remedy: str = "name another with --out"
) -> Iterator[None]:
    """Turn a refusal of the file system into an `EnvironmentalError` that names ``folder`` and the
    ``remedy``.

    Refusals are: no permission, read-only, a name that is too long or impossible, and no support
    for locks.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) not in _REFUSALS and "null byte" not in str(error):
            raise
        raise EnvironmentalError(
            f"{folder}: cannot be written ({_reason(error)}); {remedy}."
        ) from None
