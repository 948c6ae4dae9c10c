"""What `limbeck plan` says of merging and distilling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from compress.footprint.advice import merge_or_distil
from limbeck.contract.recipe import parse_recipe
from tests.compress.test_compress import TINY, tiny

SHAPES: list[dict[str, Any]] = [
    {},
    {"hidden_size": 48},
    {"num_hidden_layers": 3},
    {"attention_bias": True},
    {"tie_word_embeddings": True},
]


@pytest.mark.parametrize("other", SHAPES)
def test_models_are_merged_if_one_loads_the_weights_of_the_other(
    other: dict[str, Any], tmp_path: Path
) -> None:
    """Held to torch's strict `load_state_dict`."""
    base, teacher = (
        AutoConfig.for_model(**{"vocab_size": 300, **TINY, **changes}) for changes in ({}, other)
    )
    one, two = (AutoModelForCausalLM.from_config(config) for config in (base, teacher))
    try:
        one.load_state_dict(two.state_dict(), strict=True)
        loads = True
    except RuntimeError:
        loads = False
    recipe = tiny(tmp_path, student={"kind": "lora", "rank": 2, "base": _random()})
    found = merge_or_distil(recipe, base, [("a", base), ("b", teacher)])
    assert found.startswith("try a merge first" if loads else "distil: no merge can hold b")


def test_a_smaller_student_is_distilled(tmp_path: Path) -> None:
    config = AutoConfig.for_model(**{"vocab_size": 300, **TINY})
    student = {"kind": "shrink", "layers": 1, "base": _random()}
    recipe = parse_recipe(tiny(tmp_path).resolved() | {"student": student})
    found = merge_or_distil(recipe, config, [("a", config), ("b", config)])
    assert found.startswith("distil: the student is smaller")


def test_a_teacher_that_does_not_run_here_cannot_be_merged(tmp_path: Path) -> None:
    config = AutoConfig.for_model(**{"vocab_size": 300, **TINY})
    recipe = tiny(tmp_path, student={"kind": "lora", "rank": 2, "base": _random()})
    found = merge_or_distil(recipe, config, [("a", config)])
    assert found.startswith("distil: no merge can hold b")


def _random() -> dict[str, Any]:
    return {"kind": "random", "config": TINY}
