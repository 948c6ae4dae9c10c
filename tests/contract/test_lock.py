"""One process at a time: what several want at once is made once, and whoever waits is told so."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from limbeck.contract.artifact import open_artifact
from limbeck.contract.errors import EnvironmentalError
from limbeck.contract.files import new_folder
from limbeck.contract.lock import locked, make_once
from limbeck.contract.progress import say_once


@pytest.fixture(autouse=True)
def _forgets() -> None:
    say_once.cache_clear()


def test_what_several_want_at_once_is_made_once(tmp_path: Path) -> None:
    path, start, made = tmp_path / "cache" / "models" / "abc", Barrier(3), list[Path]()

    def make(folder: Path) -> dict[str, Any]:
        made.append(folder)
        time.sleep(0.05)
        (folder / "weights").write_text("1")
        return {"parameters": 1}

    def want(_: int) -> str:
        start.wait()
        make_once(path, kind="model", key="abc", parents={}, make=make)
        return open_artifact(path, kind="model").digest

    with ThreadPoolExecutor(3) as pool:
        digests = list(pool.map(want, range(3)))
    assert len(made) == 1
    assert len(set(digests)) == 1


def test_who_waits_is_told_once_for_whom(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(name: str) -> None:
        make_once(
            tmp_path / "teachers" / name, kind="rows", key=name, parents={}, make=lambda _: {}
        )

    (tmp_path / "teachers").mkdir()
    with ThreadPoolExecutor(2) as pool:
        for name in ("a", "b"):
            with (tmp_path / "teachers" / f".{name}.lock").open("w") as held:
                fcntl.flock(held, fcntl.LOCK_EX)
                held.write(f"{os.getppid()}\n")
                held.flush()
                waits = pool.submit(rows, name)
                time.sleep(0.05)
                assert not waits.done()
            waits.result(timeout=5)
            assert open_artifact(tmp_path / "teachers" / name).key == name
    assert (
        capsys.readouterr().err == f"  waiting for another run (process {os.getppid()}), "
        "which is making teachers in the cache\n"
    )


def test_who_is_stopped_lets_the_next_one_make_it(tmp_path: Path) -> None:
    def stopped(folder: Path) -> dict[str, Any]:
        (folder / "half").write_text("…")
        raise KeyboardInterrupt

    path = tmp_path / "models" / "abc"
    with pytest.raises(KeyboardInterrupt):
        make_once(path, kind="model", key="abc", parents={}, make=stopped)
    assert not path.exists()
    make_once(path, kind="model", key="abc", parents={}, make=lambda _: {"parameters": 1})
    assert open_artifact(path).manifest["files"] == {}


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(
        EnvironmentalError, match=rf"run: cannot be written \({os.strerror(code)}\); .* --out"
    ):
        with locked(tmp_path / "run", wait=False):
            pass
    with pytest.raises(
        EnvironmentalError,
        match=r"models: cannot be written .* name another cache folder with LIMBECK_CACHE",
    ):
        make_once(
            tmp_path / "models" / "abc", kind="model", key="abc", parents={}, make=lambda _: {}
        )


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(
    tmp_path: Path,
) -> None:
    for name in (".report.json.4711.writing", ".report.json.0a1b2c3d.writing", ".x.writing"):
        (tmp_path / name).write_text("{")
    for name in (".student.writing", ".bench.0a1b2c3d.writing", ".student.old"):
        (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / "student").mkdir()
    (tmp_path / ".onnx.old" / "kept").mkdir(parents=True)  # its new folder never came
    (tmp_path / ".mine.yaml.old").write_text("a file of the user's")
    with new_folder(tmp_path / "living") as living:
        with locked(tmp_path, wait=False):
            pass
        assert {path.name for path in tmp_path.iterdir()} == {
            ".lock", ".mine.yaml.old", "student", "onnx", living.name,
        }  # fmt: skip
    assert (tmp_path / "onnx" / "kept").is_dir()
    assert not living.exists()


def test_a_file_system_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(EnvironmentalError, match="No locks available"):
        with locked(tmp_path, wait=False):
            pass


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_no_file_can_have_is_reported(tmp_path: Path, name: str) -> None:
    with pytest.raises(EnvironmentalError, match="cannot be written"):
        with locked(tmp_path / name, wait=False):
            pass
