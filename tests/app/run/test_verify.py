"""`limbeck verify`: what it finds changed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import export
import serve_bench
from limbeck.app import run as pipeline
from limbeck.app.verify import verify
from limbeck.contract.errors import ArtifactError, ParityError
from limbeck.contract.recipe import load_recipe
from serve_bench.judge.findings import Finding
from tests.app.run.stages import KEPT, recipe


def test_verify_passes_what_is_unchanged(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert verify(finished) == 0
    out = capsys.readouterr().out
    assert out.count("unchanged") == 3
    assert "fp32  9          1e-05" in out
    assert re.search(r"^mean loss, nats a token +2.5 +2.5 +equal to the digit$", out, re.MULTILINE)
    assert out.endswith("\nverified\n")
    assert verify(finished / "onnx") == 0


def test_verify_names_a_changed_file(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "student" / "file").write_text("x")
    assert verify(finished) == 2
    out = capsys.readouterr().out
    assert "file has changed since it was written" in out
    assert out.endswith("NOT verified\n")


def test_verify_sees_an_artifact_made_from_another(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.run(load_recipe(recipe("other")), out=Path("elsewhere"))
    shutil.rmtree(finished / "student")
    shutil.copytree(Path("elsewhere/student"), finished / "student")
    assert verify(finished) == 2
    assert "was made from another student than the one in out/student" in capsys.readouterr().out


def test_verify_tells_a_graph_that_computes_something_else(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def differs(_: Path) -> Any:
        raise ParityError("the fp32 graph does not compute what the student computes")

    monkeypatch.setattr(export, "verify_parity", differs)
    assert verify(finished) == 1
    assert "does not compute" in capsys.readouterr().out


def test_verify_replays_what_it_is_asked_to_and_tells_a_broken_promise(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def replay(**asks: Any) -> list[Finding]:
        asked.append(asks)
        return [KEPT, Finding("TPOT ms", "7", "9", "slower than certified", False)]

    monkeypatch.setattr(serve_bench, "replay", replay)
    assert verify(finished, speed=False) == 1
    assert asked == [{"run": finished, "quality": True, "speed": False}]
    assert "certificate: TPOT ms slower than certified." in capsys.readouterr().out
    (finished / "certificate.json").unlink()
    assert verify(finished) == 2
    assert "`limbeck report out` writes it again" in capsys.readouterr().out


def test_verify_of_an_unfinished_run_says_what_is_not_there(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(finished / "bench")
    assert verify(finished) == 2
    assert "certificate.json promises figures that nothing here" in capsys.readouterr().out
    (finished / "certificate.json").unlink()
    assert verify(finished) == 0
    assert "bench" in capsys.readouterr().out.split("not made yet")[0]
    with pytest.raises(ArtifactError, match="no complete artifact"):
        verify(Path("cache"))
