"""`limbeck init`: the student is the best that fits, and what is written runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from limbeck import pipeline
from limbeck.cli import app
from limbeck.init import _cuts, _sizes, choose_student
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
    for target in (10.0, 2.2, 1.6, 1.3):
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
        # The verdict is on size and on what it costs in quality.
        gates = recipe.gates
        assert gates.max_loss_vs_best_teacher == 0.02
        assert gates.max_quantization_loss == {"int8-weight": 0.01, "int4-weight": 0.05}[form]
        found.append((recipe.student.kind, form))
    assert found[:2] == [("lora", "int8-weight"), ("lora", "int4-weight")]
    assert [kind for kind, _ in found[2:]] == ["shrink", "shrink"]


def test_a_cut_keeps_the_most_that_fits_in_either_form(tmp_path: Path) -> None:
    assert init(1.2, "--out", "cut.yaml").exit_code == 0
    recipe = load_recipe(tmp_path / "cut.yaml").resolved()
    tree, base = {name: recipe[name] for name in ("name", "data", "training")}, recipe["student"]["base"]
    sizes = {str(student): (_sizes(tree, student), student) for student, _ in _cuts(tree, base)}
    most = 0.97 * 1.2
    fitting = [found for found in sizes.values() if min(found[0].values()) <= most]
    assert 0 < len(fitting) < len(sizes)
    planned, student = max(fitting, key=lambda found: found[0]["int8-weight"])
    chosen = choose_student(tree, [base], target_mb=1.2)
    assert chosen.student == student
    assert chosen.form == ("int8-weight" if planned["int8-weight"] <= most else "int4-weight")


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
    asked = {"max_size_mb", "max_loss_vs_best_teacher", "max_quantization_loss"}
    assert {gate.name for gate in report.verdict.gates} == asked
