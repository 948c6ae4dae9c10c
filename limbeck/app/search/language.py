"""The search for a language model: whole bases with adapters, and cut ones; budget in tokens, times
per token. See `limbeck.app.search.tasks`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.app import run as pipeline
from limbeck.app.plan import form_sizes
from limbeck.app.search.candidates import Candidate
from limbeck.app.search.variants import (
    alone,
    base_config,
    cut_of,
    dimensions,
    exported,
    share_of,
    variant,
    whole_steps,
    why_uncut,
)
from limbeck.contract.progress import say
from limbeck.contract.recipe import Budget, MixedByLoss, MixedBySize, Recipe

UNIT, KINDS = "tokens", ("lora", "shrink")

# Students -----------------------------------------------------------------------------------------


def students(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and `student:` of every student in the space; whole bases first, then cut ones."""
    space, asked = recipe.search, recipe.resolved()["student"]
    base = asked["base"]
    for rank in space.ranks:
        kept = (
            {k: v for k, v in asked.items() if k not in ("rank", "alpha")}
            if asked["kind"] == "lora"
            else {}
        )
        yield (
            f"lora-r{rank}",
            {"kind": "lora", "base": base, **kept, "rank": rank, "alpha": 2 * rank},
        )
    if asked["kind"] == "lora" and (
        asked["rank"] not in space.ranks or asked["alpha"] not in (None, 2 * asked["rank"])
    ):
        yield "asked", asked
    if why := why_uncut(recipe):
        say(f"search: {why}; nothing is cut")
        return
    cut = cut_of(asked)
    most, seen = dimensions(recipe, cut), [dimensions(recipe, {"kind": "shrink", "base": base})]
    for hidden, width, depth in itertools.product(space.hidden, space.widths, space.depths):
        student = cut | {
            "layers": share_of(most, "layers", depth),
            "intermediate_size": share_of(most, "intermediate_size", width),
        }
        if hidden < 1:
            student |= _narrowed(recipe, base, most, hidden)
        kept = dimensions(recipe, student)
        if kept not in seen:
            seen.append(kept)
            sizes = ["layers", "intermediate_size"] + (["hidden_size"] if hidden < 1 else [])
            yield (
                f"cut-{'x'.join(str(kept[name]) for name in sizes)}",
                student | {name: kept[name] for name in sizes},
            )
    if asked["kind"] == "shrink" and dimensions(recipe, asked) not in seen[1:]:
        yield "asked", asked


def _narrowed(
    recipe: Recipe, base: dict[str, Any], most: Mapping[str, int], share: float
) -> dict[str, int]:
    """A share of the hidden width, and of the heads if they fill the architecture's width."""
    from compress.models.shrink import family_of

    made = variant(recipe, student={"kind": "shrink", "base": base}).student
    assert made.kind == "shrink"
    if not family_of(base_config(recipe, made.base)).head_size_is_fixed:
        return {"hidden_size": share_of(most, "hidden_size", share)}
    heads = share_of(most, "kv_heads", share)
    return {"kv_heads": heads, "hidden_size": most["hidden_size"] * heads // most["kv_heads"]}


def sized(recipe: Recipe, students: Mapping[str, dict[str, Any]]) -> list[Candidate]:
    """Every student in every form, with its planned size."""
    found = []
    base = {"kind": "shrink", "base": recipe.resolved()["student"]["base"]}
    # whole ones alone are all as deep
    whole = 1 if why_uncut(recipe) else dimensions(recipe, base)["layers"]
    for name, student in students.items():
        made = variant(recipe, student=student, export=exported(recipe, recipe.search.forms))
        sizes = form_sizes(made)
        layers = int(student.get("layers") or whole)
        shape = "whole" if student["kind"] == "lora" else name
        found += [Candidate(name, form, shape, sizes[form], layers) for form in recipe.search.forms]
    return found


# Probes -------------------------------------------------------------------------------------------


def probe_parts(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Parts of a recipe's plain data that make its training as short as can be."""
    block = tree["data"]["block"]
    return {
        "data": tree["data"] | {"heldout": tree["data"]["heldout"] | {"blocks": 2}},
        "features": {"weight": 0},
        "training": tree["training"]
        | {"tokens": block, "batch_tokens": block, "micro_batch": 1, "teacher_cache": "none"}
        | {"on_policy": None},
    }


def time_exports(
    recipe: Recipe, exports: Sequence[tuple[Path, str]], out: Path
) -> list[dict[str, float]]:
    """Median times by run folder and form, from one interleaved run."""
    from serve_bench.tasks.targets import measure_targets

    bench = recipe.bench.model_copy(
        update={
            "minutes": 1.0,
            "min_blocks": 3,
            "scenarios": (recipe.bench.scenario("single"),),
            "runtimes": (),
        }
    )
    targets = [f"{run}#{form}" for run, form in exports]
    result = measure_targets(targets, out=out, bench=bench).result
    arms = [arm for arm in result["arms"].values() if arm["role"] != "twin"]
    return [
        {metric: float(arm[metric]["value"]) for metric in ("tpot_ms", "ttft_ms")} for arm in arms
    ]


# Rounds -------------------------------------------------------------------------------------------


def rounds_of(recipe: Recipe) -> list[int]:
    """Tokens of each round, in whole steps."""
    assert recipe.training.tokens is not None  # as the search made sure
    return whole_steps(
        recipe.search.rungs, step=recipe.training.batch_tokens, most=recipe.training.tokens
    )


def make_teachers(
    recipe: Recipe, student: dict[str, Any], folder: Path, rounds: Sequence[int], *, cached: bool
) -> dict[str, Path]:
    """Make the teachers that are students of other recipes; fill the teacher cache once for all."""
    import compress

    products = pipeline.make_products(recipe)
    if not cached:
        say("== teachers, once")
        compress.cache_teachers(
            recipe=variant(recipe, student=student),
            products=products,
            work=folder / "healing" / "teachers",
            rounds=rounds,
        )
    return products


def heal(
    recipe: Recipe,
    name: str,
    student: dict[str, Any],
    products: Mapping[str, Path],
    work: Path,
    rounds: Sequence[int],
    rung: int,
    in_time: Callable[[], bool],
) -> tuple[float, dict[str, float]] | None:
    """Distil one student from the shared cache to the end of a round; continue the last round."""
    import compress

    found: list[float] = []

    def goes_on(index: int, nll: float) -> bool:
        if index < rung:
            return in_time()
        say(f"   {name}: {nll:.4f} nats a token after {rounds[index]} tokens")
        found.append(nll)
        return False

    training = recipe.resolved()["training"] | {"learning_rate": _rate(recipe, student)}
    short = variant(
        recipe, name=f"{recipe.name[:50]}-{name}"[:80], student=student, training=training
    )
    compress.heal(recipe=short, products=products, work=work, rounds=rounds, goes_on=goes_on)
    return (found[-1], {}) if found else None


def _rate(recipe: Recipe, student: Mapping[str, Any]) -> float:
    """Learning rate: the recipe's for its kind of student; a third of it if whole weights train."""
    rate, asked = recipe.training.learning_rate, recipe.student.kind
    if student["kind"] == asked:
        return rate
    return rate * 0.3 if asked == "lora" else rate / 0.3


# Finalists ----------------------------------------------------------------------------------------


def final_recipe(
    recipe: Recipe, student: dict[str, Any], candidate: Candidate, budget: Budget
) -> dict[str, Any]:
    """See `limbeck.app.search.tasks`."""
    gates, mixed = recipe.gates, recipe.export.mixed
    export = exported(recipe, [candidate.form])
    if candidate.form == "int4-weight":  # `mixed` chooses between 4 and 8 bits
        export["mixed"] = mixed.model_dump(mode="json")
        # The bound may be a gate of the recipe that is not in the budget.
        if isinstance(mixed, MixedBySize):
            export["mixed"]["mb"] = mixed.mb or budget.size_mb or gates.max_size_mb
        elif isinstance(mixed, MixedByLoss):
            rise = mixed.rise if mixed.rise is not None else gates.max_quantization_loss
            export["mixed"]["rise"] = rise
    return alone(
        recipe,
        student=student,
        name=candidate.student,
        form=candidate.form,
        gates={
            "max_size_mb": budget.size_mb,
            "max_tpot_ms": budget.tpot_ms,
            "max_ttft_ms": budget.ttft_ms,
            "max_loss_vs_best_teacher": budget.quality.max_loss if budget.quality else None,
            # the final loss includes the cost of rounding
            "max_quantization_loss": None,
        },
        export=export,
        training=recipe.resolved()["training"] | {"learning_rate": _rate(recipe, student)},
    )


def measured(bench: Mapping[str, Any]) -> dict[str, float]:
    """Figures of the shipped form and of the best teacher from a bench result."""
    arm = bench["arms"][bench["judged"]]
    return {
        "size": float(arm["bytes"]),
        **{metric: float(arm[metric]["value"]) for metric in ("tpot_ms", "ttft_ms")},
        "nll": float(arm["quality"]["mean_nll"]),
        "best_teacher": min(
            float(a["quality"]["mean_nll"])
            for a in bench["arms"].values()
            if a["role"] == "teacher"
        ),
    }
