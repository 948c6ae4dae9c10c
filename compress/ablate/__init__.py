"""The honesty ablation: the recipe's fusion beside its controls, at equal budgets and seeds.

A claim about several teachers counts only beside these: the label alone, the best single teacher,
uniform, static, entropy in its forms, inverted, shuffled, and an oracle that sees the label.
Intervals are paired bootstraps over seeds and held-out blocks (or examples). The table has figures
beside the loss that no arm is trained on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress import quiet_libraries
from compress.ablate.arms import (
    DESIGNS,
    EQUAL_TIME,
    ORACLE,
    asks_teachers,
    equal_time_tokens,
    is_merge,
    is_timed,
    require_arm,
    variant,
    with_live_teachers,
)
from compress.ablate.table import draw, markdown, summarise, verdict
from compress.checkpoint import CHECKPOINT
from compress.loop import fit, measure_teachers, setup
from compress.teachers.start import NothingToMergeError
from limbeck.contract.errors import RecipeError
from limbeck.contract.files import write_atomically
from limbeck.contract.progress import about, before, say
from limbeck.contract.recipe import AnyRecipe, fingerprint
from limbeck.contract.sources.digests import input_digests

__all__ = ["DESIGNS", "ablate", "markdown", "summarise", "verdict"]


_VERSION = 3  # of what a run of an arm holds


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
    known = [arm for arm in design.arms if recipe.base is not None or not is_merge(arm)]
    arms = _ordered(design.reference, asked or known)
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "runs.json"
    parents = input_digests(recipe, products=products)
    key = fingerprint([_VERSION, recipe.distillation(), parents, dict(design.arms)])
    saved = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    runs: dict[str, dict[str, Any]] = saved["runs"] if saved.get("key") == key else {}
    all_seeds = list(range(recipe.seed, recipe.seed + seeds))
    open_runs = [(a, seed) for seed in all_seeds for a in arms if f"{a}/{seed}" not in runs]
    estimate = _Estimate([arm for arm, _ in open_runs])
    for arm, seed in open_runs:
        say(f"{arm}, seed {seed}{estimate.shown(arm)}")
        try:
            with estimate.running(arm):
                runs[f"{arm}/{seed}"] = _run_arm(recipe, products, out, arm, seed, key, runs)
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


class _Estimate:
    """Estimated time left, from the arms that were trained before."""

    def __init__(self, arms: Sequence[str]) -> None:
        self._open = [arm for arm in arms if _trains(arm)]
        self._seconds: list[float] = []  # of each trained arm

    def shown(self, arm: str) -> str:
        """Time of ``arm``, the next one, and of all that are left; empty before one was trained."""
        if not self._seconds or not _trains(arm):
            return ""
        own = float(np.mean(self._seconds))
        return f": about {about(own)} (whole job: about {about(own * len(self._open))})"

    @contextmanager
    def running(self, arm: str) -> Iterator[None]:
        """Train ``arm``, the next one."""
        if not _trains(arm):
            yield
            return
        self._open.remove(arm)
        started = time.monotonic()
        with before(lambda own: len(self._open) * float(np.mean(self._seconds or [own]))):
            yield
        self._seconds.append(time.monotonic() - started)


def _trains(arm: str) -> bool:
    return not is_merge(arm) and arm != ORACLE


def _ordered(reference: str, asked: Iterable[str]) -> list[str]:
    """The reference, then the other arms, and last the arms of equal time, which need others."""
    asked, starts = list(asked), [arm.partition(EQUAL_TIME)[2] for arm in asked if is_timed(arm)]
    needed = [f"{arm}{start}" for start in starts for arm in ("ce-only", "recipe")]
    return sorted(dict.fromkeys([reference, *asked, *needed]), key=is_timed)


def _require_comparable(recipe: AnyRecipe, arms: Sequence[str]) -> None:
    if len(recipe.teachers) < 2:
        raise RecipeError(
            f"{recipe.name}: an ablation of fusion needs at least two teachers, found "
            f"{len(recipe.teachers)}."
        )
    if recipe.student.kind == "merge":
        raise RecipeError(
            f"{recipe.name}: a merge trains nothing, so that all arms would be one student; give "
            "student.kind: lora, and the arm merge-average beside the others."
        )
    for arm in arms:
        require_arm(recipe, arm)
    if recipe.minutes is not None:
        raise RecipeError(
            f"{recipe.name}: arms are compared at equal tokens; give training.tokens instead of "
            "minutes."
        )


def _run_arm(
    recipe: AnyRecipe,
    products: Mapping[str, Path],
    out: Path,
    arm: str,
    seed: int,
    key: str,
    runs: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    teachers = _measured_teachers(recipe, products, out, key)
    if arm == ORACLE:
        return teachers.oracle()
    tokens = equal_time_tokens(recipe, runs, f"{arm}/{seed}") if is_timed(arm) else None
    changed = variant(recipe, arm, seed, teachers.means, by_domain=teachers.best, tokens=tokens)
    run = setup(
        recipe=changed, products=products, work=out / ".training", key=f"{key}/{arm}/{seed}"
    )
    measure_teachers(run)
    state = fit(run)
    assert run.log is not None
    steps = run.log.read("step")
    run.log.close()
    run.log.cut({})
    (run.work / CHECKPOINT).unlink(missing_ok=True)
    (run.work / "teachers.json").unlink(missing_ok=True)
    losses_now, counts = run.task.losses(arm)
    # Teachers answer from the cache that all arms share; each arm is charged for those it asks.
    used = run.task.names if asks_teachers(recipe, arm) else ()
    teaching = sum(teachers.seconds[name] for name in used) * state.seen
    return {
        "loss": losses_now,
        "labels": counts,
        run.task.unit: state.seen,
        "seconds": state.seconds + teaching,
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


@dataclass(frozen=True)
class _Teachers:
    """Figures of the teachers, measured once for the whole ablation."""

    means: Mapping[str, float]  # held-out loss, the mean over domains, by teacher
    losses: Mapping[str, Mapping[str, list[float]]]  # summed over each block: by teacher, domain
    labels: Mapping[str, list[int]]  # of each block, by domain
    seconds: Mapping[str, float]  # for one unit of the training budget

    @property
    def best(self) -> dict[str, str]:
        """Teacher with the least held-out loss, by domain."""
        return {
            domain: min(self.losses, key=lambda name: sum(self.losses[name][domain]))
            for domain in self.labels
        }

    def oracle(self) -> dict[str, Any]:
        """The run whose every domain is answered by the teacher with the least loss there."""
        return {
            "loss": {domain: self.losses[name][domain] for domain, name in self.best.items()},
            "labels": self.labels,
            "tokens": 0,
            "seconds": 0.0,
            "weights": {},
        }


def _measured_teachers(
    recipe: AnyRecipe, products: Mapping[str, Path], out: Path, key: str
) -> _Teachers:
    kept = out / "teachers.json"
    saved = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if saved.get("key") == key:
        return _Teachers(**saved["teachers"])
    run = setup(
        recipe=with_live_teachers(variant(recipe, "uniform", recipe.seed, {})),
        products=products,
        work=out / ".training",
        key=f"{key}/teachers",
    )
    task = run.task
    _, labels = task.losses("student, before the training")
    losses = {name: task.teacher_losses(k) for k, name in enumerate(task.names)}
    means = {
        name: float(np.mean([sum(found[d]) / sum(labels[d]) for d in labels]))
        for name, found in losses.items()
    }
    seconds = {name: task.teacher_seconds(k) for k, name in enumerate(task.names)}
    teachers = _Teachers(means, losses, labels, seconds)
    write_atomically(kept, json.dumps({"key": key, "teachers": asdict(teachers)}))
    return teachers
