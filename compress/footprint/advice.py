"""Whether to merge or to distil: a rule from measured runs, for `limbeck plan`.

The runs are in docs/experiments/distillation.md; the figures below are theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress.footprint.shapes import meta_model
from compress.models.merge import can_be_merged, parameters_of
from limbeck.contract.recipe import AnyRecipe, LoraStudent, ShrinkStudent

_MERGE = (
    "try a merge first: {names} have the base's shape, and `student: {{kind: merge}}` takes a "
    "few minutes and trains nothing. With two experts of SmolLM2-135M it gave 88 % of what "
    "distilling gains over the base, and distilling from it lowered the loss by another 1.1 %"
)
_SMALLER = (
    "distil: the student is smaller than its teachers, so a merge alone is not enough. With two "
    "experts and 20 of 30 layers, the teachers lowered the loss by 2.3 % over training on the "
    "text alone"
)
_APART = (
    "distil: no merge can hold {names}, whose weights do not have the base's shape or are not "
    "here. The student can learn from the answers alone. Compare it with training on the text "
    "alone (`limbeck ablate --arms recipe,ce-only-equal-time`): two teachers of two families "
    "lowered the loss of SmolLM2-135M by 0.5 % at equal tokens, and the one of the other family "
    "did not help on its own domain"
)


def merge_or_distil(recipe: AnyRecipe, base: Any, teachers: Sequence[tuple[str, Any]]) -> str:
    """What to try first, and the measured reason; empty where the runs say nothing.

    ``base`` is the configuration of the student's base or None, and ``teachers`` are names and
    configurations of those that run here. Two models can be merged if the names and shapes of
    their parameters are equal.
    """
    student = recipe.student
    if len(recipe.teachers) < 2 or not isinstance(student, LoraStudent | ShrinkStudent):
        return ""
    own = parameters_of(meta_model(base))
    alike = [n for n, config in teachers if can_be_merged(own, parameters_of(meta_model(config)))]
    apart = [teacher.name for teacher in recipe.teachers if teacher.name not in alike]
    if apart:
        return _APART.format(names=_listed(apart))
    return _SMALLER if isinstance(student, ShrinkStudent) else _MERGE.format(names=_listed(alike))


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
