"""Several starts at once on one folder: one works, and the others say so truthfully."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from limbeck.app.run import open_run
from limbeck.contract.errors import LimbeckError
from tests.pico import pico_recipe

_ROUNDS = 8


@pytest.mark.parametrize("starts", [2, 6])
def test_of_several_starts_one_works_and_the_others_name_it(tmp_path: Path, starts: int) -> None:
    for turn in range(_ROUNDS):
        told = _start(tmp_path / f"run{turn}", starts)
        working = [pid for pid, message in told.items() if message == "works"]
        assert len(working) == 1, told
        for pid, message in told.items():
            if pid not in working:
                found = re.search(r"another run \(process (\d+)\) is using this folder", message)
                assert found, message
                assert int(found[1]) == working[0]


def _start(folder: Path, count: int) -> dict[int, str]:
    """What each of ``count`` processes says that start at the same moment; the one that works waits
    for the others.
    """
    begin, end = os.pipe(), os.pipe()
    answers: dict[int, int] = {}
    for _ in range(count):
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(begin[1])
            os.close(end[1])
            os.read(begin[0], 1)  # returns when the parent closes its end
            try:
                with open_run(pico_recipe(), folder):
                    os.write(writer, b"works")
                    os.close(writer)
                    os.read(end[0], 1)
            except LimbeckError as error:
                os.write(writer, str(error).encode())
            os._exit(0)
        os.close(writer)
        answers[pid] = reader
    os.close(begin[1])
    told = {pid: os.read(reader, 10_000).decode() for pid, reader in answers.items()}
    os.close(end[1])
    for pid, reader in answers.items():
        os.waitpid(pid, 0)
        os.close(reader)
    os.close(begin[0])
    os.close(end[0])
    return told
