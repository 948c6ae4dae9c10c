"""Files and folders on odd systems, and the system's errors as a user sees them."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck.contract import files
from limbeck.contract.errors import ArtifactError, EnvironmentalError


def _folder(path: Path, text: str) -> None:
    with files.new_folder(path) as folder:
        (folder / "file").write_text(text)
        files.put_in_place(folder, path)


def test_a_folder_is_replaced_where_two_names_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise OSError("a C library without renameat2")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    for text in ("old", "new"):
        _folder(tmp_path / "student", text)
        assert (tmp_path / "student" / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.mark.parametrize(
    ("make", "write"),
    [
        ("_new_file", lambda path: files.write_atomically(path, "whole")),
        ("_new_folder", lambda path: _folder(path, "whole")),
    ],
    ids=["file", "folder"],
)
def test_a_temporary_name_that_another_process_swept_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: str, write: Callable[[Path], None]
) -> None:
    """Between its creation and its lock a temporary file has no owner."""
    real, made = getattr(files, make), list[Path]()

    def swept_at_first(path: Path) -> int:
        handle: int = real(path)
        if not made:
            files.sweep(tmp_path)
        made.append(path)
        return handle

    monkeypatch.setattr(files, make, swept_at_first)
    target = tmp_path / "target"
    write(target)
    assert (target / "file" if target.is_dir() else target).read_text() == "whole"
    assert len(set(made)) == 2
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_a_folder_of_the_system_takes_no_files() -> None:
    for write in (files.write_atomically, _folder):
        with (
            pytest.raises(EnvironmentalError, match=r"/proc/x: cannot be written \(this folder"),
            files.unwritable_is_a_user_error(Path("/proc/x")),
        ):
            write(Path("/proc/x"), "whole")


def test_a_huge_manifest_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate((256 << 20) + 1)  # takes no room on disk
    with pytest.raises(ArtifactError, match=r"manifest\.json: larger than 256 MB, too large"):
        files.read_json(tmp_path / "manifest.json")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EDQUOT, "out: no space left; free some room and run again."),
        (errno.ENFILE, "out: too many open files; raise the limit with `ulimit -n`."),
        (errno.EROFS, "out: the system refuses it (Read-only file system); name another."),
        (
            errno.EIO,
            "out: the disk or its network failed (Input/output error); check it and run again.",
        ),
        (errno.EBADF, None),
    ],
)
def test_an_error_of_the_system_has_a_remedy_unless_it_is_a_defect(
    number: int, message: str | None
) -> None:
    shown = files.explained(OSError(number, os.strerror(number), "out"))
    assert (shown and str(shown)) == message


def test_a_failed_read_is_not_called_standard_output() -> None:
    with open("/proc/self/mem", "rb") as memory, pytest.raises(OSError) as caught:  # noqa: PT011
        memory.read(1)  # address 0 is never mapped: the system answers EIO, without a name
    assert caught.value.errno == errno.EIO
    assert str(files.explained(caught.value)).startswith("a file: the disk or its network failed")


def test_a_machine_without_a_temporary_folder_is_named() -> None:
    """The words are those of Python's `tempfile`."""
    found = "No usable temporary directory found in ['/tmp', '/var/tmp']"
    shown = files.explained(FileNotFoundError(errno.ENOENT, found))
    assert str(shown) == f"{found}; set TMPDIR to a folder that can be written."


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken disk"), ValueError("a defect")])
def test_only_refusals_of_the_file_system_are_a_folder_that_cannot_be_written(
    tmp_path: Path, error: Exception
) -> None:
    with pytest.raises(type(error)) as caught, files.unwritable_is_a_user_error(tmp_path):
        raise error
    assert caught.value is error
    with pytest.raises(EnvironmentalError, match=r"cannot be written \(embedded null byte\); name"):
        with files.unwritable_is_a_user_error(tmp_path):
            (tmp_path / "a\0b").read_text()
