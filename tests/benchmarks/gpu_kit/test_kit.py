"""The pieces of the GPU kit, and what it leaves to the machine with the card."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.benchmarks.gpu_kit import collect


def test_the_joiner_makes_of_the_pieces_what_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "PIECE", 1000)
    (tmp_path / "a.whl").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "code.py").write_text("print('here')\n")
    kit = tmp_path / "kit"
    kit.mkdir()
    with tarfile.open(tmp_path / "source.tar", "w") as tar:
        tar.add(tmp_path / "code.py", "code.py")
    with tarfile.open(kit / "kit.tar", "w") as tar:
        tar.add(tmp_path / "a.whl", "wheels/a.whl")
        tar.add(tmp_path / "source.tar", "source.tar")
    pieces = collect.split(kit / "kit.tar")
    (kit / "kit.tar").unlink()
    shutil.copy(collect.HERE / "join.sh", kit)
    assert [piece.name for piece in pieces[:2]] == ["kit.tar.000", "kit.tar.001"]
    assert all(piece.stat().st_size <= 1000 for piece in pieces)

    subprocess.run(["bash", kit / "join.sh"], check=True)
    assert (kit / "wheels" / "a.whl").read_bytes() == (tmp_path / "a.whl").read_bytes()
    assert (kit / "source" / "code.py").read_text() == "print('here')\n"

    pieces[1].write_bytes(pieces[1].read_bytes()[:-1] + b"x")
    done = subprocess.run(["bash", kit / "join.sh"], capture_output=True, text=True, check=False)
    assert done.returncode
    assert "kit.tar.001" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "stays"),
    [
        ("torch", False),
        ("triton", False),
        ("nvidia-cudnn-cu13", False),
        ("nvidia-ml-py", True),
        ("transformers", True),
    ],
)
def test_torch_and_its_libraries_are_left_to_the_machine(name: str, stays: bool) -> None:
    assert (collect.BESIDE.match(name) is None) == stays


@pytest.mark.parametrize("script", ["join.sh", "run.sh"])
def test_the_scripts_are_shell(script: str) -> None:
    subprocess.run(["bash", "-n", collect.HERE / script], check=True)
