"""Speed of the students of a search: time a few untrained exports, predict the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.app import run as pipeline
from limbeck.app.search.candidates import Candidate, Search, SpeedModel, fit_speed, still_in
from limbeck.app.search.outcome import UNEXPORTED, why_refused
from limbeck.app.search.state import TIMING
from limbeck.app.search.tasks import task_of
from limbeck.app.search.variants import exported, fields, variant
from limbeck.contract.errors import QualityError
from limbeck.contract.files import write_atomically
from limbeck.contract.progress import say
from limbeck.contract.recipe import AnyBudget, AnyRecipe

_NOISE = 0.1  # least error of a time, relative


def predict_speeds(search: Search) -> dict[str, SpeedModel]:
    """Time a few exports, predict the rest, rule out those too slow beyond the model's error."""
    recipe, candidates = search.recipe, search.candidates
    budget, folder = search.budget, search.folder
    if all(bound is None for bound in budget.times.values()):
        return {}
    left = still_in(candidates)
    if not left:
        return {}
    by_shape: dict[str, list[Candidate]] = {}
    for candidate in left:
        by_shape.setdefault(candidate.shape, []).append(candidate)
    shapes = sorted(
        by_shape, key=lambda shape: (by_shape[shape][0].layers, by_shape[shape][0].size)
    )
    probes = _spread(shapes, recipe.search.probes)
    groups = {shape: list({c.form: c for c in by_shape[shape]}.values()) for shape in probes}
    if not (folder / TIMING).exists():
        _time_probes(search, groups, of=len(shapes))
    measured = json.loads((folder / TIMING).read_text("utf-8"))
    probed = [c for group in groups.values() for c in group]
    timed = [c for c in probed if "refused" not in measured[c.name]]
    # A form that was refused for one shape can be timed with another. Refused for
    # all, it is out.
    refused = {
        c.form: measured[c.name]["refused"] for c in probed if c.form not in {t.form for t in timed}
    }
    for candidate in left:
        if candidate.form in refused:
            candidate.out = f"{UNEXPORTED}{refused[candidate.form]}"
    if not timed:
        return {}
    models = {}
    for metric in budget.times:
        models[metric] = fit_speed(timed, [measured[c.name][metric] for c in timed])
        error = models[metric].error
        if len(probes) < len(shapes):
            said = (
                f"predicted within {error:.0%}"
                if error is not None
                else "predicted from too few to say how well"
            )
            say(f"   {metric}: {said}")
    known = {(c.shape, c.form): measured[c.name] for c in timed}
    for candidate in candidates:
        _predict(candidate, models, known)
    _rule_out_slow(still_in(left), models, budget)
    return models


def _predict(
    candidate: Candidate,
    models: Mapping[str, SpeedModel],
    known: Mapping[tuple[str, str], Mapping[str, float]],
) -> None:
    """Fill in a candidate's times: those ``known`` of its shape and form, or those predicted."""
    of_it = known.get((candidate.shape, candidate.form))
    candidate.timed = of_it is not None
    for metric, model in models.items():
        if of_it is not None:
            candidate.predicted[metric] = of_it[metric]
        elif candidate.form in model.forms:
            candidate.predicted[metric] = model(candidate)


def _rule_out_slow(
    candidates: Sequence[Candidate], models: Mapping[str, SpeedModel], budget: AnyBudget
) -> None:
    """Rule out candidates whose time is above its bound by more than the error of the model."""
    for candidate in candidates:
        for metric, bound in budget.times.items():
            # Even a timed export differs in another process, and a good fit promises nothing:
            # candidates near the bound stay in.
            error = max(models[metric].error or 0.0, _NOISE)
            if bound is not None and candidate.predicted.get(metric, 0.0) * (1 - error) > bound:
                candidate.out = (
                    f"{'timed' if candidate.timed else 'predicted'} {metric.removesuffix('_ms')} "
                    f"{candidate.predicted[metric]:.2f} ms"
                )


def export_untrained(
    recipe: AnyRecipe, student: dict[str, Any], forms: Sequence[str], folder: Path
) -> None:
    """Export a random model of a student's shape: speed does not depend on the weights.

    A cut model before training could lose more to rounding than the parity check allows.
    """
    from compress.footprint.tasks import student_shape

    tree = recipe.resolved()
    probe = variant(
        recipe,
        name=f"{recipe.name[:60]}-probe",
        teachers=tree["teachers"][:1],  # its tokenizer
        student={
            "kind": "fresh",
            "config": fields(student_shape(variant(recipe, student=student)).config),
        },
        fusion={"weights": {"kind": "uniform"}},
        export=exported(recipe, forms),
        **task_of(recipe).probe_parts(tree),
    )
    for stage in ("compress", "export"):
        pipeline.run_stage(stage, probe, out=folder)


def _spread(items: Sequence[str], count: int) -> list[str]:
    """``count`` items at even distances in a sorted list, including both ends."""
    if count >= len(items):
        return list(items)
    if count == 1:
        return [items[-1]]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _time_probes(search: Search, groups: Mapping[str, Sequence[Candidate]], *, of: int) -> None:
    """Median times of untrained exports by candidate, from one interleaved run.

    They are saved in ``timing.json``, or the reason for their absence; the exports are deleted.
    """
    recipe, folder = search.recipe, search.folder
    task = task_of(recipe)
    say(f"== timing {len(groups)} of {of} shapes, untrained: {', '.join(groups)}")
    targets: dict[str, tuple[Path, str]] = {}  # by candidate's name
    times: dict[str, dict[str, Any]] = {}
    for shape, group in groups.items():
        student, place = search.students[group[0].student], folder / "probes" / shape
        try:
            export_untrained(recipe, student, [c.form for c in group], place)
            targets |= {c.name: (place, c.form) for c in group}
        except QualityError:  # one form failed, so the others are exported one by one
            for c in group:
                place = folder / "probes" / c.name
                try:
                    export_untrained(recipe, student, [c.form], place)
                    targets[c.name] = (place, c.form)
                except QualityError as error:
                    say(f"   {c.name} is not timed: {error}")
                    times[c.name] = {"refused": why_refused(error)}
    if targets:
        found = task.time_exports(recipe, list(targets.values()), folder / "probes" / "timing")
        times |= dict(zip(targets, found, strict=True))
    write_atomically(folder / TIMING, json.dumps(times, indent=1))
    shutil.rmtree(folder / "probes", ignore_errors=True)
