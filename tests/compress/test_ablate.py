"""The honesty ablation: equal tokens, paired intervals, and a sentence that says when the recipe does not win."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from compress import ablate
from limbeck.contract.errors import RecipeError
from limbeck.contract.recipe import Recipe
from tests.compress.test_compress import killed_while_writing, tiny


def fake(arm: str, seed: int, gain: float) -> dict[str, object]:
    """A run that is ``gain`` nats a token better than cross-entropy on every block, with noise that both arms share."""
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
    assert ablate.markdown(found["arms"]).count("\n") == 6
    monkeypatch.setattr(ablate, "_train_arm", None)
    assert ablate.ablate(recipe=recipe, products={}, out=out, arms=arms, seeds=1) == found


def test_killed_while_the_teachers_figures_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(tmp_path)
    monkeypatch.setattr(ablate, "setup", lambda **_: None)
    monkeypatch.setattr(ablate, "measure_teachers", lambda _: {"a": {"mean_nll": 1.5}})
    with killed_while_writing(), pytest.raises(KeyboardInterrupt):
        ablate._teacher_nll(recipe, {}, tmp_path, "key")
    assert ablate._teacher_nll(recipe, {}, tmp_path, "key") == {"a": 1.5}


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
        assert ablate._teacher_nll(recipe, products, out, key) == {"a": len(measured), "b": 1.0}
        return fake(arm, seed, 0.0)

    def measure(key: str) -> dict[str, dict[str, float]]:
        measured.append(key)
        return {"a": {"mean_nll": len(measured)}, "b": {"mean_nll": 1.0}}

    monkeypatch.setattr(ablate, "_train_arm", train_arm)
    monkeypatch.setattr(ablate, "setup", lambda **asked: asked["key"])
    monkeypatch.setattr(ablate, "measure_teachers", measure)
    monkeypatch.setattr(ablate, "summarise", lambda *_: {})
    monkeypatch.setattr(ablate, "_draw", lambda *_: None)
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
