"""Students of real weights, trained for a few steps: enough to move every weight off its base.

Shipped recipes name the models and texts; sizes of training and held-out text are cut down here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import compress
from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import UserError
from limbeck.contract.recipe import AnyRecipe, load_any_recipe, parse_any_recipe

_DECODERS = {"smollm2": "smollm2/expert-scripture", "gemma3": "gemma3/expert-scripture"}
_ENCODERS = {"minilm-l6": 0, "minilm-l3": 1}  # place among the teachers of the recipe below
_SENTENCES = "minilm/sentences-two-encoders"
# A cut student keeps most of its base, so that a few steps leave it a language model.
_CUTS: dict[str, dict[str, Any]] = {
    "smollm2": {"layers": 27, "intermediate_size": 1408},
    "gemma3": {"layers": 16, "intermediate_size": 1792},
    "minilm-l6": {"layers": 4, "intermediate_size": 1280},
    "minilm-l3": {"layers": 2, "intermediate_size": 1280},
}


def recipe_of(model: str, kind: str, forms: Sequence[str]) -> AnyRecipe:
    """The recipe of a student of ``model``: `lora` (of an encoder: `full`) or `shrink`.

    Raises `UserError` with the install command if the package of a decoder is missing.
    """
    tree = load_any_recipe(_DECODERS.get(model, _SENTENCES)).model_dump(mode="json")
    base = tree["student"]["base"]
    if model in _ENCODERS:
        base = tree["teachers"][_ENCODERS[model]]["model"]
        tree["data"] |= {"most": 120, "heldout": {"every": 10, "most": 12}}
        tree["training"] |= {"examples": 64, "batch": 16, "learning_rate": 1e-4}
    else:
        tree["data"] |= {"block": 64, "heldout": {"every": 10, "piece_chars": 4096, "blocks": 8}}
        tree["training"] |= {"tokens": 512, "batch_tokens": 128, "learning_rate": 3e-4}
    student: dict[str, Any] = {"kind": kind, "base": base}
    if kind == "shrink":
        rows = "calibration_examples" if model in _ENCODERS else "calibration_blocks"
        student |= _CUTS[model] | {rows: 4}
    tree |= {"name": f"{model}-{kind}", "student": student, "export": {"forms": list(forms)}}
    return parse_any_recipe(tree)


def make_student(model: str, kind: str, out: Path, forms: Sequence[str] = ("fp32",)) -> Artifact:
    """Train the student of `recipe_of` at ``out``."""
    return compress.distill(recipe=recipe_of(model, kind, forms), out=out)


@contextmanager
def skip_if_missing() -> Iterator[None]:
    """Skip the test if a package of a model is missing; the reason has the install command."""
    try:
        yield
    except UserError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(str(error))
