"""The honesty ablation: equal tokens, paired intervals, and a sentence that says when the recipe
does not win.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compress import ablate
from limbeck.contract.errors import RecipeError
from limbeck.contract.recipe import Recipe
from tests.compress.test_compress import killed_while_writing, tiny
from tests.encoders import classifier_recipe, embedding_recipe, source


def fake(arm: str, seed: int, gain: float) -> dict[str, object]:
    """A run that is ``gain`` nats a token better than cross-entropy on every block, with noise that
    both arms share.
    """
    shared = [100 + 7 * ((seed * 5 + b * 3) % 4) for b in range(12)]
    return {
        "loss": {d: [s - gain * 50 for s in shared] for d in ("x", "y")},
        "labels": {d: [50] * 12 for d in ("x", "y")},
        "weights": {},
    }


def table(**gains: float) -> dict[str, dict[str, object]]:
    runs = {
        f"{arm.replace('_', '-')}/{s}": fake(arm, s, g)
        for arm, g in {"ce-only": 0.0, **gains}.items()
        for s in range(3)
    }
    return ablate.summarise(runs, [0, 1, 2])


def test_paired_difference_and_interval_by_hand() -> None:
    row = table(recipe=0.02)["recipe"]
    assert row["against_reference"] == pytest.approx(
        (-0.02, -0.02, -0.02)
    )  # the shared noise cancels in every draw
    assert row["mean_loss"] == pytest.approx(table()["ce-only"]["mean_loss"] - 0.02)


def test_the_verdict_says_what_was_not_beaten() -> None:
    assert (
        ablate.verdict(table(recipe=0.02, uniform=0.01))
        == "The recipe's arm beats ce-only, uniform (95 % interval below zero)."
    )
    assert "does NOT clearly beat uniform" in ablate.verdict(table(recipe=0.02, uniform=0.03))
    assert (
        ablate.verdict(table(recipe=-0.01))
        == "The recipe's arm beats no control; it does NOT clearly beat ce-only."
    )


def test_arms_run_to_a_table_a_picture_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = tiny(tmp_path, training={"tokens": 128}), tmp_path / "ablation"
    arms = ["best-single", "static", "entropy-token", "recipe"]
    found = ablate.ablate(recipe=recipe, products={}, out=out, arms=arms, seeds=1)
    assert set(found["arms"]) == {"ce-only", *arms}
    recipe_row = found["arms"]["recipe"]
    assert 0 <= recipe_row["top1_agreement"] <= 1
    assert 0 <= recipe_row["text_match"] <= 1
    assert 0 < recipe_row["distinct_2"] <= 1
    assert 0 <= recipe_row["repetition"] < 1
    assert recipe_row["perplexity"]["code"] == pytest.approx(math.exp(recipe_row["loss"]["code"]))
    assert found["arms"]["static"]["weights"]["code"].keys() == {"a", "b"}
    assert (out / "ablation.svg").read_text().startswith("<?xml")
    assert json.loads((out / "ablation.json").read_text())["seeds"] == 1
    assert found["markdown"].count("\n") == 6
    monkeypatch.setattr(ablate, "_train_arm", None)
    assert ablate.ablate(recipe=recipe, products={}, out=out, arms=arms, seeds=1) == found


@pytest.mark.parametrize("make", [classifier_recipe, embedding_recipe], ids=["classes", "vectors"])
def test_encoders_have_controls_too(tmp_path: Path, make: Any) -> None:
    training = {"examples": 32, "batch": 8, "precision": "fp32", "threads": 1}
    over: dict[str, Any] = {"training": training}
    if make is classifier_recipe:
        labels = {"id2label": {"0": "code", "1": "prose"}}
        models = [source(seed=n) for n in (1, 2)]
        named = [{**m, "config": m["config"] | labels} for m in models]
        over["teachers"] = [{"name": f"t{n}", "model": m} for n, m in enumerate(named)]
    recipe, out = make(**over), tmp_path / "ablation"
    arms = ["best-single", "static", "entropy-inverted", "recipe"]
    found = ablate.ablate(recipe=recipe, products={}, out=out, arms=arms, seeds=1)
    design = ablate.DESIGNS[recipe.task]
    assert set(found["arms"]) == {design.reference, *arms}
    for run in json.loads((out / "runs.json").read_text())["runs"].values():
        losses = [value for group in run["loss"].values() for value in group]
        assert len(losses) == sum(map(sum, run["labels"].values()))
    row = found["arms"]["recipe"]
    assert ("accuracy" in row) == ("perplexity" in row) == design.is_nll
    if not design.is_nll:
        assert 0 < row["mean_loss"] < 2  # 1 - a rank correlation
    assert f"against {design.reference}" in found["markdown"]


def teachers_of_loss(**losses: float) -> SimpleNamespace:
    """A run whose teachers have these losses."""
    values = list(losses.values())
    return SimpleNamespace(
        task=SimpleNamespace(names=list(losses), teacher_loss=lambda k: values[k])
    )


def test_killed_while_the_teachers_figures_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(tmp_path)
    monkeypatch.setattr(ablate, "setup", lambda **_: teachers_of_loss(a=1.5))
    with killed_while_writing(), pytest.raises(KeyboardInterrupt):
        ablate._teacher_losses(recipe, {}, tmp_path, "key")
    assert ablate._teacher_losses(recipe, {}, tmp_path, "key") == {"a": 1.5}


def test_nothing_is_compared_across_other_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    domain = {"name": "x", "text": {"kind": "files", "paths": [str(text)]}}
    recipe, out = tiny(tmp_path, data={"domains": [domain]}), tmp_path / "ablation"
    trained: list[str] = []
    measured: list[str] = []

    def train_arm(
        recipe: Recipe, products: Any, out: Path, arm: str, seed: int, key: str
    ) -> dict[str, object]:
        trained.append(arm)
        assert ablate._teacher_losses(recipe, products, out, key) == {"a": len(measured), "b": 1.0}
        return fake(arm, seed, 0.0)

    def measure(*, key: str, **_: Any) -> SimpleNamespace:
        measured.append(key)
        return teachers_of_loss(a=len(measured), b=1.0)

    monkeypatch.setattr(ablate, "_train_arm", train_arm)
    monkeypatch.setattr(ablate, "setup", measure)
    for unused in ("summarise", "draw", "markdown", "verdict"):
        monkeypatch.setattr(ablate, unused, lambda *_, **__: {})
    for words, arms in (("one", ["recipe"]), ("one", ["recipe", "uniform"]), ("two", ["recipe"])):
        text.write_text(words)
        ablate.ablate(recipe=recipe, products={}, out=out, arms=arms, seeds=1)
    assert trained == ["ce-only", "recipe", "uniform", "ce-only", "recipe"]
    assert (
        len(set(measured)) == len(measured) == 2
    )  # a checkpoint of the other text is of another key, too


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such arm; known: ce-only, best-single"):
        ablate.ablate(recipe=tiny(tmp_path), products={}, out=tmp_path / "a", arms=["nothing"])
    with pytest.raises(RecipeError, match="needs at least two teachers, found 0"):
        ablate.ablate(recipe=tiny(tmp_path, teachers=[]), products={}, out=tmp_path / "a")
    with pytest.raises(RecipeError, match="equal tokens"):
        ablate.ablate(
            recipe=tiny(tmp_path, training={"tokens": None, "minutes": 1}),
            products={},
            out=tmp_path / "a",
        )
