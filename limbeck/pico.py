"""`--shrink-to pico`: any recipe with tiny random models of the same architectures, built-in text and a few steps.

What it is for: to see that a recipe runs to its verdict here, before its weights are fetched and its hours are spent. Every
choice of the recipe stays; only sizes, weights and text are exchanged. Knows recipes, and no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from limbeck import sources
from limbeck.errors import ModelError
from limbeck.recipe import (
    FreshStudent,
    GgufModel,
    HubModel,
    LocalModel,
    ModelSource,
    PackageModel,
    RandomModel,
    Recipe,
    find_recipe,
    load_recipe,
    parse_recipe,
)

# By what the name of a model holds, the more special name first: nothing is opened or fetched to find it out.
_BY_NAME = {
    "smollm3": "smollm3",
    "smollm": "llama",
    "qwen3": "qwen3",
    "qwen2": "qwen2",
    "mistral": "mistral",
    "gemma-3": "gemma3_text",
    "llama": "llama",
    "gpt2": "gpt2",
    "distilgpt2": "gpt2",
    "pythia": "gpt_neox",
    "granite": "granite",
    "phi-3": "phi3",
}
_SIZES: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
_OWN_SIZES: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_inner": 128, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "gpt_neox": {k: v for k, v in _SIZES.items() if k not in ("num_key_value_heads", "head_dim")},
    "opt": {**_SIZES, "ffn_dim": 128},
    "gemma3_text": {**_SIZES, "sliding_window": 32, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
}
_FIXED_HEADS = ("gpt2", "gpt_neox", "opt")  # width and heads are cut together
_BLOCK, _STEPS = 64, 4
_TEXTS = (["json/*.py"], ["email/*.py"], ["logging/*.py"], ["unittest/*.py"])


def shrink_to_pico(recipe: Recipe) -> Recipe:
    """The recipe on tiny random models. Raises `ModelError` for a model whose architecture cannot be told."""
    tree = recipe.resolved()
    tree["name"] = f"{recipe.name[:75]}-pico"
    for index, teacher in enumerate(recipe.teachers):
        kind = architecture(teacher.model, recipe, where=f"teachers.{index}")
        tree["teachers"][index] |= {"model": _random(kind, seed=index + 1), "adapter": None}
    _shrink_student(tree["student"], recipe)
    for index, domain in enumerate(tree["data"]["domains"]):
        domain["text"] = {"kind": "stdlib", "paths": _TEXTS[index % len(_TEXTS)]}
    tree["data"] |= {"block": _BLOCK, "heldout": {"every": 4, "piece_chars": 1024, "blocks": 2}}
    tree["features"]["layers"] = None
    tree["training"] |= {
        "tokens": 2 * _BLOCK * _STEPS,
        "minutes": None,
        "batch_tokens": 2 * _BLOCK,
        "micro_batch": min(2, recipe.training.micro_batch),
        "evaluate_every": 2,
        "checkpoint_every": 2,
    }
    tree["bench"] |= {"prompt_tokens": 16, "new_tokens": 8, "min_blocks": 3, "minutes": 0.05}
    small = parse_recipe(tree, where=f"{recipe.name} shrunk to pico")
    small._folder, small._text = recipe.folder, recipe.text
    return small


def architecture(source: ModelSource, recipe: Recipe, *, where: str) -> str:
    """The transformers model type of a source, by its configuration or its name. Raises `ModelError`."""
    match source:
        case RandomModel():
            return str(source.config.get("model_type", "llama"))
        case LocalModel():
            path = sources.model_path(source, folder=recipe.folder)
            assert path is not None
            return str(json.loads((path / "config.json").read_text()).get("model_type"))
        case HubModel():
            name = source.id
        case PackageModel() | GgufModel():
            name = str(source.path)
        case _:
            path = find_recipe(source.recipe, folder=recipe.folder)
            made = load_recipe(path)
            if isinstance(made.student, FreshStudent):
                return str(made.student.config.get("model_type"))
            return architecture(made.student.base, made, where=f"{where} ({made.name})")
    found = next((kind for part, kind in _BY_NAME.items() if part in name.lower()), None)
    if found is None:
        raise ModelError(
            f"{where}: the architecture of {name} cannot be told from its name; known are {', '.join(_BY_NAME)}. "
            "Point to a local folder with a config.json instead."
        )
    return found


def _shrink_student(student: dict[str, Any], recipe: Recipe) -> None:
    if isinstance(recipe.student, FreshStudent):
        student["config"] = _config(str(recipe.student.config.get("model_type")))
        return
    kind = architecture(recipe.student.base, recipe, where="student.base")
    student["base"] = _random(kind, seed=0)
    if student["kind"] == "shrink":
        small = {"layers": 3, "intermediate_size": 96, "kv_heads": 2 if kind in _FIXED_HEADS else 1, "hidden_size": 32}
        student |= {name: value for name, value in small.items() if student[name] is not None}
        student["calibration_blocks"] = 2


def _random(kind: str, *, seed: int) -> dict[str, Any]:
    return {"kind": "random", "config": _config(kind), "seed": seed}


def _config(kind: str) -> dict[str, Any]:
    return {"model_type": kind, **_OWN_SIZES.get(kind, _SIZES)}
