"""The search: what is ruled out unseen, what is predicted, who goes on, and the recipe that is left at the end."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from typer.testing import CliRunner

from limbeck import search as module
from limbeck.cli import app
from limbeck.errors import EnvironmentalError, RecipeError
from limbeck.recipe import Budget, Recipe, load_recipe, parse_recipe
from limbeck.search import Candidate, _enqueue, _halve, final_recipe, fit_speed, nearest, search

BUDGET = {"size_mb": 0.6, "tpot_ms": 5.0}


def pico(**over: Any) -> Recipe:
    settings = {"budget": BUDGET, "search.rungs": [512, 1024], **over}
    return load_recipe("pico", overrides=[f"{key}={json.dumps(value)}" for key, value in settings.items()])


def candidate(student: str, form: str = "int8-weight", *, size: int = 100, layers: int = 4) -> Candidate:
    return Candidate(student, form, student, size, layers)


# Speed -----------------------------------------------------------------------------------------------------------


def test_the_speed_model_recovers_the_law_that_made_its_points() -> None:
    points = [
        candidate("s", form, size=mb * 1_000_000, layers=layers)
        for form in ("int8-weight", "int4-weight")
        for mb, layers in ((50, 10), (80, 15), (110, 30), (140, 20))
    ]
    cost = {"int8-weight": 0.04, "int4-weight": 0.07}

    def law(c: Candidate) -> float:
        return 0.5 + 0.03 * c.layers + cost[c.form] * c.size / 1e6

    fitted = fit_speed(points, [law(c) for c in points])
    unseen = candidate("t", "int4-weight", size=95_000_000, layers=12)
    assert fitted(unseen) == pytest.approx(law(unseen), rel=1e-6)
    assert fitted.error == pytest.approx(0, abs=1e-6)


def test_the_error_of_the_speed_model_is_that_of_points_it_had_not_seen() -> None:
    points = [candidate("s", size=mb * 1_000_000, layers=mb // 5) for mb in (50, 80, 110, 140)]
    times = [5.0, 8.0, 11.0, 28.0]  # the last is twice what the others say
    assert fit_speed(points, times).error == pytest.approx(0.5, rel=0.05)
    assert fit_speed(points[:1], times[:1]).error is None


# Halving ---------------------------------------------------------------------------------------------------------

LOSSES = {"a": 3.0, "b": 4.0, "c": 3.5, "d": 5.0}


def halve(
    recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Candidate], list[tuple[str, int]]]:
    """Candidates after the rounds, and which trainings there were; the loss of a student is made up."""
    trained: list[tuple[str, int]] = []

    def healed(_: Recipe, name: str, __: Any, tokens: int, ___: Path) -> float:
        trained.append((name, tokens))
        return LOSSES[name] - tokens / 1e4

    monkeypatch.setattr(module, "_healed", healed)
    candidates = [candidate(name) for name in LOSSES]
    _halve(recipe, {name: {} for name in LOSSES}, candidates, folder, until=float("inf"))
    return candidates, trained


def test_the_worse_half_gets_no_second_round_and_nothing_is_trained_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = pico()
    candidates, trained = halve(recipe, tmp_path, monkeypatch)
    assert [name for name, tokens in trained if tokens == 512] == list(LOSSES)
    assert ("d", 1024) not in trained
    assert ("b", 1024) not in trained
    left = {c.student: c.nll for c in candidates if c.out is None}
    assert left["a"] == pytest.approx(3.0 - 0.1024)
    assert next(c for c in candidates if c.student == "d").out == "behind after 512 tokens"
    _, again = halve(recipe, tmp_path, monkeypatch)
    assert again == []


def test_a_student_whose_process_died_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = f"sqlite:///{tmp_path / module.STATE}"
    study = optuna.create_study(study_name="students", storage=storage)
    _enqueue(study, list(LOSSES))
    dead, other = study.ask(), study.ask()
    dead.set_user_attr("worker", {"host": os.uname().nodename, "pid": 2**22 + 1})  # above the largest there is
    other.set_user_attr("worker", module._worker())  # at work, as far as anyone can tell
    _, trained = halve(pico(), tmp_path, monkeypatch)
    assert {name for name, _ in trained} == {"a", "c", "d"}


def test_no_student_is_begun_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_healed", lambda *_: pytest.fail("trained"))
    candidates = [candidate("a")]
    _halve(pico(), {"a": {}}, candidates, tmp_path, until=0.0)
    assert candidates[0].out == "no time left for it"


# What is left ----------------------------------------------------------------------------------------------------


def test_the_recipe_that_is_written_stands_alone(tmp_path: Path) -> None:
    recipe = load_recipe("smollm2/135m-two-experts", overrides=["budget={size_mb: 120, quality: {max_loss: 0.01}}"])
    assert recipe.budget is not None
    base = recipe.resolved()["student"]["base"]
    student = {"kind": "shrink", "base": base, "layers": 20}
    tree = final_recipe(recipe, student, candidate("cut-20", "int4-weight"), recipe.budget)
    (tmp_path / "chosen.yaml").write_text(yaml.safe_dump(tree))
    read = load_recipe(tmp_path / "chosen.yaml")
    assert read.student.kind == "shrink"
    assert read.training.learning_rate == pytest.approx(0.3 * recipe.training.learning_rate)
    assert [form.kind for form in read.export.forms] == ["fp32", "int4-weight"]
    assert (read.gates.max_size_mb, read.gates.max_loss_vs_best_teacher) == (120, 0.01)
    assert read.gates.min_decode_speedup == recipe.gates.min_decode_speedup
    assert read.budget is None
    assert all(Path(teacher["model"]["recipe"]).is_absolute() for teacher in tree["teachers"])


def test_what_a_form_does_not_have_is_left_out_of_its_recipe(tmp_path: Path) -> None:
    asked = [
        "export={forms: [fp32, int4-weight], mixed: {kind: size, mb: 1}, recover: {tokens: 512}}",
        "budget={size_mb: 1}",
    ]
    recipe = load_recipe("pico", overrides=asked)
    assert recipe.budget is not None
    student = recipe.resolved()["student"]
    for form, mixed in (("int8-weight", "rule"), ("int4-weight", "size")):
        made = parse_recipe(final_recipe(recipe, student, candidate("whole", form), recipe.budget))
        assert made.export.mixed.kind == mixed
        assert made.export.recover is None


def test_the_nearest_misses_its_worst_bound_by_least() -> None:
    small, fast = candidate("small", size=110_000_000), candidate("fast", size=240_000_000)
    small.predicted, fast.predicted = {"tpot_ms": 9.0}, {"tpot_ms": 4.0}
    assert nearest([fast, small], Budget(size_mb=100, tpot_ms=8)) is small
    assert nearest([fast, small], Budget(tpot_ms=5)) is fast


def test_a_budget_that_nothing_fits_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    found = search(pico(budget={"size_mb": 0.01}), out=tmp_path / "out")
    assert found.exit_code == 1
    assert found.sentence.startswith(
        "No student is small enough: size_mb 0.01 is asked for, the smallest is planned at 0."
    )
    assert not (tmp_path / "out" / module.CHOSEN).exists()
    assert not (tmp_path / "out" / "students").exists()
    assert load_recipe(tmp_path / "out" / module.NEAREST).gates.max_size_mb == 0.01
    result = json.loads((tmp_path / "out" / module.RESULT).read_text())
    assert all(c["out"].startswith("planned") for c in result["candidates"])
    with pytest.raises(RecipeError, match="another recipe or budget"):
        search(pico(budget={"size_mb": 0.02}), out=tmp_path / "out")


def test_wrong_input_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for override, said in (
        ("budget={hours: 2}", "a search needs a bound to keep to"),
        ("teachers=[]", "name a teacher"),
        ("student={kind: fresh, config: {model_type: llama}}", "a search cuts a base down"),
    ):
        given = ["search", "pico", "--set", "budget.size_mb=1", "--set", override]
        done = CliRunner().invoke(app, given)
        assert done.exit_code == 2
        assert said in done.stderr
    assert not (tmp_path / "runs").exists()


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(EnvironmentalError, match=r"limbeck\[search\]"):
        search(pico(), out=tmp_path / "out")


@pytest.mark.slow
def test_a_search_ends_with_a_student_that_measures_inside_its_budget(tmp_path: Path) -> None:
    recipe = pico(
        **{"training.tokens": 2048, "bench.minutes": 0.05, "search.depths": [1.0, 0.5], "search.widths": [0.5]}
    )
    found = search(recipe, out=tmp_path / "out")
    assert found.exit_code == 0, found.sentence
    result = json.loads((tmp_path / "out" / module.RESULT).read_text())
    best = next(c for c in result["candidates"] if f"{c['student']}-{c['form']}" == result["best"])
    assert best["measured"]["size"] <= 0.6e6
    assert best["measured"]["tpot_ms"] <= 5
    chosen = load_recipe(tmp_path / "out" / module.CHOSEN)
    run = json.loads((Path(best["run"]) / "run.json").read_text())
    assert chosen.digest == run["digest"]  # so that `limbeck run chosen.yaml` makes the same student
