"""The honesty ablation: equal tokens, paired intervals, and a sentence that says when the recipe
does not win.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress import ablate
from compress.ablate.arms import variant
from compress.loop import setup
from compress.tasks.continuations import calibration_error
from limbeck.contract.errors import RecipeError
from limbeck.contract.recipe import Recipe, parse_recipe
from tests.compress.test_compress import TINY, killed_while_writing, tiny
from tests.encoders import classifier_recipe, embedding_recipe, source
from tests.pico import make_model


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


def require_units(shown: str, unit: str) -> None:
    """Every loss of the training and of the teachers has its unit."""
    losses = [line for line in shown.splitlines() if re.search(r"\b(loss|nll) [\d.]", line)]
    teachers = re.findall(r"^  teacher \w+: [a-z_]+ \d.*", shown, re.MULTILINE)
    assert any("training" in line for line in losses)
    assert teachers
    assert [line for line in losses if unit not in line] == []
    assert unit.startswith("(") or [line for line in teachers if unit not in line] == []


def test_arms_run_to_a_table_a_picture_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tiny(tmp_path, training={"tokens": 128}), tmp_path / "ablation"
    arms = ["best-single", "static", "entropy-token", "recipe"]
    found = ablate.ablate(recipe=recipe, products={}, out=out, arms=arms, seeds=1)
    assert set(found["arms"]) == {"ce-only", *arms}
    shown = capsys.readouterr().err
    require_units(shown, "nats a token")
    first, *later = re.findall(r"^\S+, seed \d.*", shown, re.MULTILINE)
    assert first.endswith("seed 0")
    assert len(later) == len(arms)
    assert all(re.search(r": about \S+ s \(whole job: about \S+ s\)$", line) for line in later)
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
    monkeypatch.setattr(ablate, "_run_arm", None)
    assert ablate.ablate(recipe=recipe, products={}, out=out, arms=arms, seeds=1) == found


@pytest.mark.parametrize("make", [classifier_recipe, embedding_recipe], ids=["classes", "vectors"])
def test_encoders_have_controls_too(
    tmp_path: Path, make: Any, capsys: pytest.CaptureFixture[str]
) -> None:
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
    unit = "nats an example" if design.is_nll else "(distances, no unit)"
    require_units(capsys.readouterr().err, unit)
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
    """A run whose teachers have these losses, nats a token of two blocks of ten."""
    values = list(losses.values())
    return SimpleNamespace(
        task=SimpleNamespace(
            names=list(losses),
            teacher_losses=lambda k: {"x": [10 * values[k]] * 2},
            teacher_seconds=lambda k: 1e-3,
            losses=lambda _: ({}, {"x": [10, 10]}),
        )
    )


def test_killed_while_the_teachers_figures_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(tmp_path)
    monkeypatch.setattr(ablate, "setup", lambda **_: teachers_of_loss(a=1.5))
    with killed_while_writing(), pytest.raises(KeyboardInterrupt):
        ablate._measured_teachers(recipe, {}, tmp_path, "key")
    for _ in range(2):  # measured, and read again
        assert ablate._measured_teachers(recipe, {}, tmp_path, "key").means == {"a": 1.5}


def test_nothing_is_compared_across_other_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    domain = {"name": "x", "text": {"kind": "files", "paths": [str(text)]}}
    recipe, out = tiny(tmp_path, data={"domains": [domain]}), tmp_path / "ablation"
    trained: list[str] = []
    measured: list[str] = []

    def run_arm(
        recipe: Recipe, products: Any, out: Path, arm: str, seed: int, key: str, runs: Any
    ) -> dict[str, object]:
        trained.append(arm)
        means = ablate._measured_teachers(recipe, products, out, key).means
        assert means == {"a": len(measured), "b": 1.0}
        return fake(arm, seed, 0.0)

    def measure(*, key: str, **_: Any) -> SimpleNamespace:
        measured.append(key)
        return teachers_of_loss(a=len(measured), b=1.0)

    monkeypatch.setattr(ablate, "_run_arm", run_arm)
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


def test_starts_the_oracle_and_equal_seconds_are_arms(tmp_path: Path) -> None:
    source = {"kind": "local", "path": str(make_model(tmp_path / "base"))}
    teachers = [
        {"name": n, "model": {"kind": "local", "path": str(make_model(tmp_path / n, seed=seed))}}
        for seed, n in enumerate("ab", start=3)
    ]
    student = {"kind": "lora", "rank": 2, "base": source}
    recipe = tiny(tmp_path, teachers=teachers, student=student, training={"tokens": 256})
    arms = ["recipe@base", "recipe@merge", "ce-only-equal-time@merge", "routed-oracle"]
    arms.append("best-by-domain")
    out = tmp_path / "ablation"
    found = ablate.ablate(recipe=recipe, products={}, out=out, arms=arms, seeds=1)["arms"]
    # Arms that others need are run too, and before them.
    assert list(found) == ["ce-only", *arms[:2], *arms[3:], "ce-only@merge", arms[2]]
    assert found["recipe@base"]["mean_loss"] != found["recipe@merge"]["mean_loss"]
    assert found["recipe@base"]["tokens"] == found["recipe@merge"]["tokens"]
    ours, alone, timed = (found[a] for a in ("recipe@merge", "ce-only@merge", arms[2]))
    # Whole batches of 64 tokens, at least one. Batches differ by a few labels.
    batches = max(1, int(ours["seconds"] / alone["seconds"] * 256) // 64)
    assert round(timed["tokens"] / (alone["tokens"] / 4)) == batches

    run = setup(recipe=recipe, products={}, work=tmp_path / "work", key="teachers")
    of_each = [run.task.measure_teacher(k).nll for k in range(2)]
    least = {d: min(nll[d] for nll in of_each if nll) for d in of_each[0] or ()}
    assert found["routed-oracle"]["loss"] == pytest.approx(least, rel=1e-4)
    for domain, weights in found["best-by-domain"]["weights"].items():
        for k, name in enumerate(run.task.names):
            assert weights[name] == (least[domain] == (of_each[k] or {})[domain])


def test_arms_of_one_teacher_and_of_one_loss_across_tokenizers(tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    for name in ("a", "b"):
        alone = variant(recipe, f"single-{name}", 3, {"a": 1.0, "b": 2.0})
        assert [teacher.name for teacher in alone.teachers] == [name]
    best = variant(recipe, "best-single", 3, {"a": 2.0, "b": 1.0})
    assert best == variant(recipe, "single-b", 3, {})
    for loss in ("projected", "chunk", "uld"):
        changed = variant(recipe, f"across-{loss}", 3, {}).resolved()["fusion"]
        assert changed == recipe.resolved()["fusion"] | {"across": loss}
    for arm in ("single-c", "across-nothing"):
        with pytest.raises(RecipeError, match=r"label-sequence.*single-a, single-b"):
            ablate.ablate(recipe=recipe, products={}, out=tmp_path / "a", arms=[arm])


def test_calibration_error_by_hand() -> None:
    """Two bins: 0.9 sure and half right, 0.2 sure and all right; 0.4 * 2 + 0.8 over 3 tokens."""
    found = calibration_error(torch.tensor([0.9, 0.9, 0.2]), torch.tensor([True, False, True]))
    assert found == pytest.approx((0.4 * 2 + 0.8) / 3)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("uniform@nowhere", r"found a start of 'nowhere'; a start is base or merge"),
        ("merge-ties@base", "of an arm that trains a language model"),
        ("routed-oracle@merge", "of an arm that trains a language model"),
        ("merge-ties", "student's base, and a student of kind fresh has none; leave the arm out"),
        ("recipe@base", "a student of kind fresh has one start only; name the arm recipe"),
    ],
)
def test_starts_that_an_arm_cannot_have(tmp_path: Path, arm: str, message: str) -> None:
    tree = tiny(tmp_path).resolved() | {"student": {"kind": "fresh", "config": TINY}}
    recipe = parse_recipe(tree)
    with pytest.raises(RecipeError, match=message):
        ablate.ablate(recipe=recipe, products={}, out=tmp_path / "a", arms=[arm])


@pytest.mark.parametrize("kind", ["fresh", "lora"])
def test_the_default_arms_are_those_that_the_student_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Each of them by name is taken; of a fresh student, each arm that is left out is refused."""

    class Seen(Exception):
        """Carries the arms before the first is trained."""

    def seen(arms: list[str]) -> None:
        raise Seen(arms)

    fresh = {"student": {"kind": "fresh", "config": TINY}} if kind == "fresh" else {}
    recipe = parse_recipe(tiny(tmp_path).resolved() | fresh)
    monkeypatch.setattr(ablate, "_Estimate", seen)

    def arms_of(asked: list[str] | None) -> list[str]:
        with pytest.raises(Seen) as found:
            ablate.ablate(recipe=recipe, products={}, out=tmp_path / "a", arms=asked, seeds=1)
        return list(found.value.args[0])

    by_default = arms_of(None)
    assert "recipe" in by_default
    for arm in ablate.DESIGNS["causal-lm"].arms:
        if arm in by_default:
            assert arm in arms_of([arm])
        else:
            with pytest.raises(RecipeError, match="a merge starts from the student's base"):
                arms_of([arm])
    assert any(arm.startswith("merge-") for arm in by_default) == (kind == "lora")


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such arm; known: ce-only, best-single"):
        ablate.ablate(recipe=tiny(tmp_path), products={}, out=tmp_path / "a", arms=["nothing"])
    with pytest.raises(RecipeError, match="needs at least two teachers, found 0"):
        ablate.ablate(recipe=tiny(tmp_path, teachers=[]), products={}, out=tmp_path / "a")
    merged = tiny(tmp_path).resolved()
    merged |= {"student": {"kind": "merge", "base": merged["student"]["base"]}}
    with pytest.raises(RecipeError, match="a merge trains nothing"):
        ablate.ablate(recipe=parse_recipe(merged), products={}, out=tmp_path / "a")
    with pytest.raises(RecipeError, match="equal tokens"):
        ablate.ablate(
            recipe=tiny(tmp_path, training={"tokens": None, "minutes": 1}),
            products={},
            out=tmp_path / "a",
        )
