"""The honesty ablation: the recipe's fusion beside its controls, at equal budgets and seeds.

A claim about several teachers counts only beside these: the label alone, the best single teacher,
uniform, static, entropy in its forms, inverted, shuffled, and an oracle that sees the label.
Intervals are paired bootstraps over seeds and held-out blocks (or examples). The table has figures
beside the loss that no arm is trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress import quiet_libraries
from compress.ablate.arms import DESIGNS, variant
from compress.ablate.table import draw, markdown, summarise, verdict
from compress.checkpoint import CHECKPOINT
from compress.loop import fit, measure_teachers, setup
from compress.teachers.start import NothingToMergeError
from limbeck.contract import sources
from limbeck.contract.errors import RecipeError
from limbeck.contract.files import write_atomically
from limbeck.contract.progress import say
from limbeck.contract.recipe import AnyRecipe, fingerprint

__all__ = ["DESIGNS", "ablate", "markdown", "summarise", "verdict"]


def ablate(
    *,
    recipe: AnyRecipe,
    products: Mapping[str, Path],
    out: Path,
    arms: Sequence[str] | None = None,
    seeds: int = 3,
) -> dict[str, Any]:
    """Train every arm with every seed and compare; write ``ablation.json`` and ``.svg`` to ``out``.

    None for ``arms`` means all of the task. Goes on where it was interrupted, while models and
    texts are the same. Raises `RecipeError` for a recipe without two teachers or an unknown arm.
    """
    design = DESIGNS[recipe.task]
    _require_comparable(recipe, arms or ())
    quiet_libraries()
    asked = arms or ()
    arms = list(dict.fromkeys([design.reference, *(asked or design.arms)]))
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "runs.json"
    parents = sources.input_digests(recipe, products=products)
    key = fingerprint([recipe.distillation(), parents, dict(design.arms)])
    saved = json.loads(kept.read_text()) if kept.exists() else {}
    runs: dict[str, dict[str, Any]] = saved["runs"] if saved.get("key") == key else {}
    all_seeds = list(range(recipe.seed, recipe.seed + seeds))
    for seed in all_seeds:
        for arm in arms:
            if f"{arm}/{seed}" in runs:
                continue
            say(f"{arm}, seed {seed}")
            try:
                runs[f"{arm}/{seed}"] = _train_arm(recipe, products, out, arm, seed, key)
            except NothingToMergeError as error:
                if arm in asked:
                    raise
                say(f"  {arm} is left out: {error}")
                continue
            write_atomically(kept, json.dumps({"key": key, "runs": runs}))
    wanted = {name: run for name, run in runs.items() if name.split("/")[0] in arms}
    table = summarise(wanted, all_seeds, design=design)
    record = {"arms": table, "seeds": seeds, "reference": design.reference, "loss": design.loss}
    record["recipe"] = recipe.resolved()
    write_atomically(out / "ablation.json", json.dumps(record, indent=1))
    draw(table, out / "ablation.svg", design)
    return {"arms": table, "verdict": verdict(table), "markdown": markdown(table, design)}


def _require_comparable(recipe: AnyRecipe, arms: Sequence[str]) -> None:
    if len(recipe.teachers) < 2:
        raise RecipeError(
            f"{recipe.name}: an ablation of fusion needs at least two teachers, found "
            f"{len(recipe.teachers)}."
        )
    known = DESIGNS[recipe.task].arms
    for arm in arms:
        if arm not in known:
            raise RecipeError(f"--arms {arm}: no such arm; known: {', '.join(known)}.")
    if recipe.minutes is not None:
        raise RecipeError(
            f"{recipe.name}: arms are compared at equal tokens; give training.tokens instead of "
            "minutes."
        )


def _train_arm(
    recipe: AnyRecipe, products: Mapping[str, Path], out: Path, arm: str, seed: int, key: str
) -> dict[str, Any]:
    work, losses = out / ".training", _teacher_losses(recipe, products, out, key)
    run = setup(
        recipe=variant(recipe, arm, seed, losses),
        products=products,
        work=work,
        key=f"{key}/{arm}/{seed}",
    )
    measure_teachers(run)
    fit(run)
    assert run.log is not None
    steps = run.log.read("step")
    run.log.close()
    run.log.cut({})
    (work / CHECKPOINT).unlink(missing_ok=True)
    (work / "teachers.json").unlink(missing_ok=True)
    losses_now, counts = run.task.losses(arm)
    return {
        "loss": losses_now,
        "labels": counts,
        "weights": _mean_weights([s["weights"] for s in steps if s["weights"]]),
        **run.task.further_figures(),
    }


def _mean_weights(weights: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean over the steps of every number in equal trees; a step may lack a domain."""
    if not weights:
        return {}
    if not isinstance(next(iter(weights[0].values())), Mapping):
        return {name: float(np.mean([w[name] for w in weights])) for name in weights[0]}
    return {d: _mean_weights([w[d] for w in weights if d in w]) for d in weights[0]}


def _teacher_losses(
    recipe: AnyRecipe, products: Mapping[str, Path], out: Path, key: str
) -> dict[str, float]:
    """Return the held-out loss of each teacher, measured once for the whole ablation ``key``."""
    kept = out / "teachers.json"
    saved = json.loads(kept.read_text()) if kept.exists() else {}
    if saved.get("key") != key:
        run = setup(
            recipe=variant(recipe, "uniform", recipe.seed, {}),
            products=products,
            work=out / ".training",
            key=f"{key}/teachers",
        )
        losses = {name: run.task.teacher_loss(k) for k, name in enumerate(run.task.names)}
        saved = {"key": key, "losses": losses}
        write_atomically(kept, json.dumps(saved))
    found: dict[str, float] = saved["losses"]
    return found
