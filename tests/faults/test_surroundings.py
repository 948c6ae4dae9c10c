"""A machine in a bad state: the command says what is wrong and what to do, without a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from limbeck.contract.artifact import MANIFEST
from tests import ROOT
from tests.faults.killing.disks import NoMount, read_only_disk

_ROOT = str(ROOT)


def _limbeck(
    *command: str | Path,
    cwd: Path,
    before: str = "",
    stdout: str = "",
    environment: Mapping[str, str] | None = None,
    without: Sequence[str] = (),
) -> tuple[int, str]:
    """Exit code and what was said, of a command started by a shell that first does what ``before``
    says.
    """
    line = " ".join(["exec", sys.executable, "-m", "limbeck", *map(str, command)])
    variables = {name: value for name, value in os.environ.items() if name not in without}
    variables |= {"PYTHONPATH": _ROOT, "LIMBECK_CACHE": str(cwd / "cache"), **(environment or {})}
    done = subprocess.run(
        ["sh", "-c", f"{before} {line} {stdout}"], cwd=cwd, env=variables, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    assert "Exception ignored" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("command", ["recipes", "--help", "--version"])
def test_full_output(tmp_path: Path, command: str) -> None:
    code, said = _limbeck(command, cwd=tmp_path, stdout="> /dev/full")
    assert code == 2
    assert "limbeck: standard output: no space left; free some room and run again." in said


@pytest.mark.parametrize("closed", ["<&- >&-", ">&- 2>&-"])
def test_closed_files_are_not_taken_by_others(tmp_path: Path, closed: str) -> None:
    code, _ = _limbeck("schema", "--out", "schema.json", cwd=tmp_path, stdout=closed)
    assert code == 0
    json.loads((tmp_path / "schema.json").read_text())


@pytest.mark.parametrize("megabytes", [250, 600])  # the first is too little to load torch
def test_too_little_memory(tmp_path: Path, megabytes: int) -> None:
    before = f"ulimit -v {megabytes << 10};"
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    code, said = _limbeck("run", "pico", cwd=tmp_path, before=before, environment=one)
    assert code == 2
    assert "limbeck: no memory is left; close other programs, raise the limit of" in said


def test_deleted_working_directory(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    code, said = _limbeck(
        "run", "pico", cwd=tmp_path, before="cd gone && rmdir ../gone &&", stdout=""
    )
    assert code == 2
    assert "the working directory was deleted; change to one that exists" in said


@pytest.mark.parametrize("command", [["recipes"], ["validate", "pico"]])
def test_no_home_and_no_temporary_folder(tmp_path: Path, command: list[str]) -> None:
    code, _ = _limbeck(
        *command, cwd=tmp_path, without=("HOME", "USER", "LOGNAME"),
        environment={"TMPDIR": str(tmp_path / "missing")},
    )  # fmt: skip
    assert code == 0


@pytest.mark.parametrize("name", ["x" * 300, f"{'deep/' * 1000}run"], ids=["long", "deep"])
def test_name_too_long(tmp_path: Path, name: str) -> None:
    code, said = _limbeck("run", "pico", "--out", name, cwd=tmp_path)
    assert code == 2
    assert "File name too long" in said


def test_link_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to("gone")
    code, said = _limbeck("run", "pico", "--out", "run", cwd=tmp_path)
    assert code == 2
    assert "run: cannot be written (File exists); name another with --out." in said


def test_pipe_as_manifest(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    os.mkfifo(tmp_path / "student" / MANIFEST)
    code, said = _limbeck("verify", "student", cwd=tmp_path)
    assert code == 2
    assert "a folder, pipe or device, where a file was expected" in said


def test_folder_as_claim(tmp_path: Path) -> None:
    (tmp_path / "run" / "run.json").mkdir(parents=True)
    code, said = _limbeck("run", "pico", "--out", "run", cwd=tmp_path)
    assert code == 2
    assert "not what Limbeck writes" in said


def test_read_only_folders(tmp_path: Path) -> None:
    try:
        with read_only_disk(tmp_path / "disk"):
            code, said = _limbeck("run", "pico", "--out", tmp_path / "disk" / "run", cwd=tmp_path)
    except NoMount as error:
        pytest.skip(f"cannot mount a disk: {error}")
    assert code == 2
    assert "cannot be written (Read-only file system); name another with --out" in said
