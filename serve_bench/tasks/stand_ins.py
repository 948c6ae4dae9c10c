"""Whether a recipe's models are random stand-ins, as in `pico` and after `--shrink-to pico`."""

from __future__ import annotations

from limbeck.contract.recipe import AnyRecipe


def stand_in(recipe: AnyRecipe) -> bool:
    """True when a teacher or the student's base has random weights: then quality figures mean
    nothing.
    """
    sources = [teacher.model for teacher in recipe.teachers]
    base = getattr(recipe.student, "base", None)  # a fresh student has none
    return any(source.kind == "random" for source in (*sources, base) if source is not None)
