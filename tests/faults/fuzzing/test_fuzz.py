"""Damaged files are refused by name: a few hundred cases here, as many as one likes with `make
fuzz`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from limbeck.contract.errors import DataError
from tests.faults.fuzzing.fuzz import Target, fuzz
from tests.faults.fuzzing.targets import QUICK


@pytest.mark.parametrize("target", QUICK, ids=lambda target: target.name)
def test_damaged_files_raise_nothing_but_our_errors(tmp_path: Path, target: Target) -> None:
    found = fuzz(target, seed=0, cases=60, seconds=30, root=tmp_path)
    assert not found.harm
    assert found.cases == found.fine + found.refused
    assert found.refused >= 20


def _number(folder: Path) -> None:
    (folder / "x").write_text("1 2 3")


def _fragile(folder: Path) -> None:
    try:
        text = (folder / "x").read_text()
    except UnicodeDecodeError:
        raise DataError("not text") from None
    if "3" not in text:
        raise ZeroDivisionError


def test_the_harness_finds_another_exception(tmp_path: Path) -> None:
    found = fuzz(
        Target("fragile", "x", _number, _fragile), seed=0, cases=500, seconds=30, root=tmp_path
    )
    assert "ZeroDivisionError" in found.harm


@pytest.mark.slow
def test_every_target_for_a_while() -> None:
    command = [sys.executable, "-m", "tests.faults.fuzzing.fuzz", "--seconds", "120", "--seed", "1"]
    assert subprocess.run(command, check=False).returncode == 0
