"""The search for a classifier or sentence encoder: bases whole and cut, examples, the time of one
sequence. See `limbeck.app.search.tasks`.

Encoders train quickly, so each round trains anew from the base, and teachers answer again.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.app import run as pipeline
from limbeck.app.plan import form_sizes
from limbeck.app.search.candidates import Candidate
from limbeck.app.search.variants import (
    alone,
    cut_of,
    dimensions,
    exported,
    share_of,
    variant,
    whole_steps,
    why_uncut,
)
from limbeck.contract.progress import say
from limbeck.contract.recipe import ClassificationBudget, EmbeddingBudget, EncoderRecipe

UNIT, KINDS = "examples", ("full", "shrink")
_PROBE = {"examples": 64, "batch": 32}  # as many as a static form is calibrated on

# Students -----------------------------------------------------------------------------------------


def students(recipe: EncoderRecipe) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and `student:` of every student in the space; whole bases first, then cut ones."""
    space, asked = recipe.search, recipe.resolved()["student"]
    base = asked["base"]
    if why := why_uncut(recipe):
        say(f"search: {why}; nothing is cut")
        yield "whole", {"kind": "full", "base": base}
        return
    cut = cut_of(asked)
    whole, most = dimensions(recipe, {"kind": "shrink", "base": base}), dimensions(recipe, cut)
    seen: list[dict[str, int]] = []
    for width, depth in itertools.product(space.widths, space.depths):
        sizes = {
            "layers": share_of(most, "layers", depth),
            "intermediate_size": share_of(most, "intermediate_size", width),
        }
        kept = dimensions(recipe, cut | sizes)
        if kept in seen:
            continue
        seen.append(kept)
        sizes = {name: kept[name] for name in sizes}
        if kept == whole:
            yield "whole", {"kind": "full", "base": base}
        else:
            yield f"cut-{kept['layers']}x{kept['intermediate_size']}", cut | sizes
    if asked["kind"] == "shrink" and dimensions(recipe, asked) not in seen:
        yield "asked", asked


def sized(recipe: EncoderRecipe, students: Mapping[str, dict[str, Any]]) -> list[Candidate]:
    """Every student in every form, with its planned size and the operations of one sequence."""
    from compress.footprint.encoders import trace_encoder
    from compress.footprint.tasks import student_shape

    found, length = [], max(recipe.bench.lengths)
    for name, student in students.items():
        made = variant(recipe, student=student, export=exported(recipe, recipe.search.forms))
        sizes, shape = form_sizes(made), student_shape(made)
        work = (
            trace_encoder(shape, rows=1, length=length, precision="fp32", trains=False).forward
            / 1e9
        )
        found += [
            Candidate(name, form, name, sizes[form], shape.layers, work=work)
            for form in recipe.search.forms
        ]
    return found


# Probes -------------------------------------------------------------------------------------------


def probe_parts(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Parts of a recipe's plain data that make its training as short as can be."""
    return {
        "data": tree["data"] | {"heldout": tree["data"]["heldout"] | {"most": 8}},
        "training": tree["training"] | _PROBE,
    }


def time_exports(
    recipe: EncoderRecipe, exports: Sequence[tuple[Path, str]], out: Path
) -> list[dict[str, float]]:
    """Median times of one sequence by run folder and form, from one interleaved run."""
    from serve_bench.tasks.exports import time_encoders

    bench = recipe.bench.model_copy(update={"minutes": min(1.0, recipe.bench.minutes)})
    return [{"latency_ms": found} for found in time_encoders(exports, out=out, bench=bench)]


# Rounds -------------------------------------------------------------------------------------------


def rounds_of(recipe: EncoderRecipe) -> list[int]:
    """Examples of each round, in whole steps."""
    return whole_steps(
        recipe.search.rungs, step=recipe.training.batch, most=recipe.training.examples
    )


def make_teachers(
    recipe: EncoderRecipe,
    student: dict[str, Any],
    folder: Path,
    rounds: Sequence[int],
    *,
    cached: bool,
) -> dict[str, Path]:
    """Make the teachers that are students of other recipes; their answers are not cached."""
    return pipeline.make_products(recipe)


def heal(
    recipe: EncoderRecipe,
    name: str,
    student: dict[str, Any],
    products: Mapping[str, Path],
    work: Path,
    rounds: Sequence[int],
    rung: int,
    in_time: Callable[[], bool],
) -> tuple[float, dict[str, float]]:
    """Train one student from the base for a round's examples. A round that began is finished.

    The loss of a classifier is the NLL of held-out labels: it has less noise than accuracy.
    """
    import compress

    short = variant(
        recipe,
        name=f"{recipe.name[:50]}-{name}"[:80],
        student=student,
        training=recipe.resolved()["training"] | {"examples": rounds[rung]},
    )
    metrics = compress.distill(recipe=short, out=work / f"round-{rung}", products=products).result[
        "metrics"
    ]
    shutil.rmtree(work)  # the next round begins from the base
    metric = recipe.bench.metric if recipe.task == "classification" else "spearman"
    loss = float(metrics["nll"] if recipe.task == "classification" else 1 - metrics["spearman"])
    shown = f", loss {loss:.4f} nats an example" if recipe.task == "classification" else ""
    title = f"{metric.replace('_', ' ')} {metrics[metric]:.4f}"
    say(f"   {name}: {title}{shown} after {rounds[rung]} examples")
    return loss, {metric: float(metrics[metric])}


# Finalists ----------------------------------------------------------------------------------------


def final_recipe(
    recipe: EncoderRecipe,
    student: dict[str, Any],
    candidate: Candidate,
    budget: ClassificationBudget | EmbeddingBudget,
) -> dict[str, Any]:
    """See `limbeck.app.search.tasks`."""
    return alone(
        recipe,
        student=student,
        name=candidate.student,
        form=candidate.form,
        gates={
            "max_size_mb": budget.size_mb,
            "max_latency_ms": budget.latency_ms,
            "max_metric_loss": budget.quality.max_loss if budget.quality else None,
            # the final loss includes the cost of rounding
            "max_quantization_loss": None,
        },
        export=exported(recipe, [candidate.form]),
        training=recipe.resolved()["training"],
    )


def measured(bench: Mapping[str, Any]) -> dict[str, float]:
    """Figures of the shipped form and of the best teacher from a bench result."""
    metric, arm = str(bench["metric"]), bench["arms"][f"onnx:{bench['shipped']}"]
    found = {"size": float(arm["bytes"])}
    single = [cell for cell in arm["grid"] if cell["batch"] == 1]
    if single:
        found["latency_ms"] = 1e3 * float(
            max(single, key=lambda cell: int(cell["length"]))["seconds"]["value"]
        )
    found[metric] = float(arm["metrics"][metric])
    return found | {"best_teacher": float(bench["arms"][bench["best_teacher"]]["metrics"][metric])}
