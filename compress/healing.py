"""Short distillations that are compared while they run; they share one teacher cache.

No student is kept. The caller decides which distillation goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from compress.loop import Run, fit, measure_teachers, setup
from limbeck.contract.recipe import HiddenCache, Recipe, fingerprint


def heal(
    *,
    recipe: Recipe,
    products: Mapping[str, Path],
    work: Path,
    rounds: Sequence[int],
    goes_on: Callable[[int, float], bool],
) -> None:
    """See `compress.heal`."""
    steps = [tokens // recipe.training.batch_tokens for tokens in rounds]
    run = prepare(recipe, products, work, rounds)
    measure_teachers(run)
    reported = 0

    def ends() -> bool:
        nonlocal reported
        assert run.log is not None
        nll = {entry["step"]: entry["mean_nll"] for entry in run.log.read("evaluate")}
        while reported < len(steps) and steps[reported] in nll:  # several after an interruption
            reported += 1
            if not goes_on(reported - 1, nll[steps[reported - 1]]):
                return True
        return False

    fit(run, ends=ends)
    if run.log is not None:
        run.log.close()


def prepare(recipe: Recipe, products: Mapping[str, Path], work: Path, rounds: Sequence[int]) -> Run:
    """Load everything; the teachers read what the rounds will ask them for."""
    config = recipe.training
    assert all(tokens % config.batch_tokens == 0 for tokens in rounds)
    every = math.gcd(*(tokens // config.batch_tokens for tokens in rounds))
    short = {
        "tokens": rounds[-1],
        "minutes": None,
        "patience": None,
        "on_policy": None,  # students share a cache of what the teachers say of the corpus
        "teacher_cache": HiddenCache(kind="hidden", store=recipe.store),
        "evaluate_every": every,
    }
    # The aligned layers depend on the student's depth; without them all students share a cache.
    features = recipe.features.model_copy(update={"weight": 0.0})
    recipe = recipe.model_copy(
        update={"training": config.model_copy(update=short), "features": features}
    )
    return setup(
        recipe=recipe,
        products=products,
        work=work,
        key=fingerprint(["heal", recipe.distillation()]),
    )
