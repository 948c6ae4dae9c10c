"""A machine in a bad state: the command says what is wrong and what to do, without a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from accelerate.utils import TorchDynamoPlugin
from accelerate.utils.environment import get_int_from_env, parse_flag_from_env

from limbeck.contract.artifact import MANIFEST
from limbeck.contract.environment import require_launcher
from limbeck.contract.errors import EnvironmentalError
from limbeck.contract.files import explained
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


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x', and should be a whole number from 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK is '1.5'"),
        ({"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE is 'two'"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536'"),
        ({"RANK": "1"}, "RANK is 1, and should be below WORLD_SIZE, which is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, and should be below WORLD_SIZE, which is 2"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "1"},
            "WORLD_SIZE is 2, but MASTER_ADDR is not set",
        ),
    ],
    ids=str,
)
def test_a_place_among_processes_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EnvironmentalError, match=said):
        require_launcher(trains=True)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"LOCAL_RANK": "-1"},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
    ],
    ids=str,
)
def test_a_place_among_processes_that_can_be(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    require_launcher(trains=True)


def test_a_command_names_the_place_that_cannot_be(tmp_path: Path) -> None:
    code, said = _limbeck("recipes", cwd=tmp_path, environment={"WORLD_SIZE": "x"})
    assert code == 2
    assert "the environment variable WORLD_SIZE is 'x'" in said


def _whole_number() -> None:
    get_int_from_env(["OMPI_COMM_WORLD_SIZE"], 1)


def _flag() -> None:
    parse_flag_from_env("ACCELERATE_DEBUG_MODE")


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("OMPI_COMM_WORLD_SIZE", "many", _whole_number),
        ("OMPI_COMM_WORLD_SIZE", "", _whole_number),
        ("ACCELERATE_DEBUG_MODE", "nein", _flag),
        ("ACCELERATE_DYNAMO_BACKEND", "fast", TorchDynamoPlugin),
    ],
)
def test_a_variable_that_a_library_cannot_read(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, read: Callable[[], object]
) -> None:
    for other in [known for known, text in os.environ.items() if text == value]:
        monkeypatch.delenv(other)  # the error says the value, and make sets empty variables
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"invalid|is not a valid") as raised:
        read()
    found = explained(raised.value)
    assert str(found).startswith(f"a library cannot read the environment variable {name} (")
    monkeypatch.delenv(name)
    assert explained(raised.value) is None  # without such a variable it is a defect


def test_a_number_of_ours_is_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_NAME", "many")
    with pytest.raises(ValueError, match="many") as raised:
        int("many")
    assert explained(raised.value) is None


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
