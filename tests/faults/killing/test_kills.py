"""A kill at any file event loses nothing and leaves nothing over."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from limbeck.contract.errors import EnvironmentalError
from tests.faults.killing.cases import CASES
from tests.faults.killing.disks import NoMount
from tests.faults.killing.events import Case, Killed, fill_disks, kill_everywhere


def _quick(cases: Sequence[Case], *names: str) -> list[Any]:
    """The named cases run in the quick tests, all of them in the slow ones."""
    return [c if c.name in names else pytest.param(c, marks=pytest.mark.slow) for c in cases]


@pytest.mark.parametrize(
    "case",
    _quick(
        CASES,
        "artifact, replaced",
        "file, replaced",
        "cache, former and damaged",
        "run.json, former litter",
    ),
    ids=lambda case: case.name,
)
def test_a_kill_at_any_file_event_is_survived(tmp_path: Path, case: Case) -> None:
    row = kill_everywhere(case, tmp_path)
    assert row.kills >= 4
    assert row.states >= 2


@pytest.mark.parametrize(
    "case", _quick(CASES[:2], "artifact, replaced"), ids=lambda case: case.name
)
def test_ctrl_c_at_any_file_event_is_survived(tmp_path: Path, case: Case) -> None:
    assert kill_everywhere(case, tmp_path, signals=(signal.SIGINT,)).kills >= 4


def _careless(folder: Path) -> None:
    (folder / "report.json").write_text("first")
    (folder / "report.json").open("w").close()
    (folder / "report.json").write_text("second")


def test_the_harness_finds_work_that_loses_its_file(tmp_path: Path) -> None:
    def look(folder: Path) -> None:
        assert (folder / "report.json").read_text() in ("first", "second")

    case = Case(
        "careless",
        _careless,
        lambda folder: (folder / "report.json").read_text(),
        prepare=lambda folder: _careless(folder),
        look=look,
    )
    with pytest.raises(Killed, match=r"event 2 of 3, open"):
        kill_everywhere(case, tmp_path)


def test_the_harness_finds_what_is_left_over(tmp_path: Path) -> None:
    def untidy(folder: Path) -> None:
        (folder / f"tmp{len(list(folder.iterdir()))}").write_text("x")
        (folder / "made").write_text("x")

    with pytest.raises(Killed, match="left over"):
        kill_everywhere(
            Case("untidy", untidy, lambda folder: (folder / "made").exists()),
            tmp_path,
            signals=(signal.SIGKILL,),
        )


# Not the last one: sweeping the litter of a killed process frees the room that the work needs.
@pytest.mark.parametrize(
    "case", _quick(CASES[:-1], "artifact, replaced", "text, replaced"), ids=lambda case: case.name
)
def test_a_disk_that_is_full_at_any_page_is_reported_and_survived(
    tmp_path: Path, case: Case
) -> None:
    try:
        row = fill_disks(case, tmp_path, step=4, wanted=EnvironmentalError)
    except NoMount as error:
        pytest.skip(f"cannot mount a small disk: {error}")
    assert row.states >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [["job"], ["command, schema", "command, report", "command, push"]]
)
def test_the_tiny_job_and_commands_survive_a_kill_at_any_file_event(names: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "tests.faults", *names], check=False)
    assert done.returncode == 0
