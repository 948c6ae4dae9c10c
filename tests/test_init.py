"""`limbeck init`: the student is the best that fits, and what is written runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from limbeck import pipeline
from limbeck.cli import app
from limbeck.plan import form_sizes
from limbeck.recipe import load_recipe
from tests.pico import make_model

SIZES: dict[str, Any] = {"max_position_embeddings": 256, "num_hidden_layers": 6, "vocab_size": 258, "scale": 0.05}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "models" / "Legal", seed=1, hidden_size=256, intermediate_size=512, **SIZES)
    make_model(tmp_path / "models" / "medical", seed=2, hidden_size=192, intermediate_size=512, **SIZES)
    words = " ".join(f"word{i % 97} of line {i}" for i in range(4000))
    (tmp_path / "text.txt").write_text(words)


def init(target: float, *more: str) -> Result:
    given = ["--teacher", "models/Legal", "--teacher", "models/medical", "--data", "text.txt"]
    return CliRunner().invoke(app, ["init", *given, "--target-mb", str(target), *more])


def test_the_student_is_the_best_that_fits(tmp_path: Path) -> None:
    found = []
    for target in (10.0, 2.2, 1.6):
        result = init(target, "--out", f"for-{target}.yaml")
        assert result.exit_code == 0, result.output
        recipe = load_recipe(tmp_path / f"for-{target}.yaml")
        form = recipe.export.forms[-1].kind
        assert form_sizes(recipe)[form] <= target * 1e6
        assert len(recipe.text.splitlines()) <= 15
        assert recipe.text.startswith(f"# Written by `limbeck init` for {target:g} MB. Student: ")
        assert [t.name for t in recipe.teachers] == ["legal", "medical"]
        assert recipe.gates.max_size_mb == target
        assert recipe.student.model_dump()["base"]["path"].name == "medical"  # the smaller one
        found.append((recipe.student.kind, form))
    assert found == [("lora", "int8-weight"), ("lora", "int4-weight"), ("shrink", "int8-weight")]


def test_what_cannot_be_is_told_and_nothing_is_written(tmp_path: Path) -> None:
    result = init(0.01)
    assert result.exit_code == 2
    assert "no student of that size from these models; the smallest is " in result.stderr
    assert init(10, "--data", "gone.txt").exit_code == 2
    assert "no such folder, .gguf file, recipe, or hub id" in init(10, "--student", "models/gone/x").stderr
    assert not (tmp_path / "recipe.yaml").exists()
    (tmp_path / "recipe.yaml").write_text("mine")
    assert "is already there" in init(10).stderr
    assert (tmp_path / "recipe.yaml").read_text() == "mine"


def test_what_is_written_runs_to_a_verdict(tmp_path: Path) -> None:
    assert init(10).exit_code == 0
    few = ["training.tokens=2048", "bench.minutes=0.05", "bench.min_blocks=3", "data.heldout.blocks=2"]
    report = pipeline.run(load_recipe(tmp_path / "recipe.yaml", overrides=few), out=tmp_path / "run")
    assert report.verdict.status in ("pass", "fail", "undecided")
    assert any(gate.name == "max_size_mb" for gate in report.verdict.gates)
