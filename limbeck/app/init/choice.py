"""The student of `limbeck init`: the best one of at most so many megabytes.

Knows sizes and the order of preference. Reads configurations, no weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.app.plan import form_sizes
from limbeck.contract.errors import ModelError
from limbeck.contract.recipe import Recipe, parse_recipe

_TARGET_SHARE = 0.99  # of the size asked for; `make bench-plan` found errors of 0.3 % at most
_DEPTHS = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25)  # shares of the layers kept, most first
_WIDTHS = (1.0, 0.75, 0.5)  # shares of the FFN's neurons
_BITS = {"int8-weight": 8, "int4-weight": 4}  # forms that may ship


@dataclass(frozen=True)
class Choice:
    """A student that fits, in YAML's flow style, the form it ships in, and why it was taken."""

    student: dict[str, Any]
    form: str
    megabytes: float
    why: str

    @property
    def caution(self) -> str | None:
        """Expected result of a cut student, as measured (docs/experiments/size.md); None if it is
        whole."""
        if self.student["kind"] != "shrink":
            return None
        return (
            "A cut heals slowly, and max_loss_vs_best_teacher will likely fail: SmolLM2-135M cut "
            "to 20 of 30 layers was still 0.8 nats above its best teacher after 24,576 tokens. "
            "Give far more text and training.tokens, or a larger --target-mb."
        )


def choose_student(
    tree: dict[str, Any], bases: Sequence[dict[str, Any]], *, target_mb: float
) -> Choice:
    """The best student of at most ``target_mb``: whole before cut, largest cut, 8 bits before 4.

    4 bits cost a few percent of loss, a cut far more (docs/experiments/size.md). Raises
    `ModelError` with the smallest student found if none fits.
    """
    most = target_mb * _TARGET_SHARE
    base = min(
        bases, key=lambda base: sizes_of(tree, {"kind": "lora", "base": base})["int8-weight"]
    )
    whole = {"kind": "lora", "base": base, "rank": 16}
    tried = []
    for form, megabytes in sizes_of(tree, whole).items():
        why = f"the smallest model fits whole in {_BITS[form]} bits"
        why += ", so adapters on it lose nothing" if form == "int8-weight" else " but not in 8"
        if megabytes <= most:
            return Choice(whole, form, megabytes, why)
        tried.append((megabytes, f"whole, {form}"))
    try:
        found = [(sizes_of(tree, student), student, kept) for student, kept in cuts(tree, base)]
    except ModelError as error:
        raise ModelError(f"{target_mb:g} MB: the model itself does not fit, and {error}") from error
    for sizes, student, kept in sorted(found, key=lambda cut: -cut[0]["int8-weight"]):
        for form, megabytes in sizes.items():
            if megabytes <= most:
                return Choice(
                    student, form, megabytes, f"whole it does not fit, so {kept} are kept"
                )
            tried.append((megabytes, f"{kept} kept, {form}"))
    least, why = min(tried)
    raise ModelError(
        f"--target-mb {target_mb:g}: no student of that size from these models; the smallest is "
        f"{least:.1f} MB ({why}). Ask for that, or name a smaller model with --student."
    )


def cuts(tree: dict[str, Any], base: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    layers, neurons = _dimensions(tree, base)
    for width, depth in itertools.product(_WIDTHS, _DEPTHS):
        if width == depth == 1:
            continue
        kept = max(1, round(layers * depth))
        student: dict[str, Any] = {"kind": "shrink", "base": base, "layers": kept}
        if width < 1:
            student["intermediate_size"] = int(neurons * width)
        yield student, f"{kept} of {layers} layers and {width:.0%} of the neurons"


def _dimensions(tree: dict[str, Any], base: dict[str, Any]) -> tuple[int, int]:
    from compress.models.language import model_config
    from compress.models.shrink import shrunk_sizes

    recipe = _recipe(tree, {"kind": "shrink", "base": base}, "int8-weight")
    assert recipe.student.kind == "shrink"
    sizes = shrunk_sizes(model_config(recipe.student.base, folder=recipe.folder), recipe.student)
    return sizes["layers"], sizes["intermediate_size"]


def sizes_of(tree: dict[str, Any], student: dict[str, Any]) -> dict[str, float]:
    """Megabytes of each form that may ship, 8 bits first."""
    sizes = form_sizes(_recipe(tree, student, *_BITS))
    return {form: sizes[form] / 1e6 for form in _BITS}


def _recipe(tree: dict[str, Any], student: dict[str, Any], *forms: str) -> Recipe:
    # Without teachers: the size is that of the student alone. Gates are about the student, not
    # about the plan.
    return parse_recipe(
        {
            **tree,
            "teachers": [],
            "gates": {},
            "student": student,
            "export": {"forms": ["fp32", *forms]},
        }
    )
