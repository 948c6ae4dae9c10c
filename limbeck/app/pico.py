"""`--shrink-to pico`: any recipe with tiny random models of the same architectures, built-in text
and a few steps.

It shows that a recipe runs to its verdict on this machine, before weights are downloaded and hours
spent. The choices of the recipe stay; sizes, weights and text are replaced. Gates are left out:
they bound other models, and the verdict says only that the job runs here. Knows recipes, not torch.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from limbeck.contract.errors import ModelError, RecipeError
from limbeck.contract.files import parse_json
from limbeck.contract.recipe import (
    AnyRecipe,
    EncoderRecipe,
    FreshStudent,
    GgufModel,
    HubModel,
    LocalModel,
    ModelSource,
    OnnxModel,
    PackageModel,
    RandomModel,
    Recipe,
    ServerModel,
    StaticShapes,
    find_recipe,
    load_teacher_recipe,
    parse_any_recipe,
)
from limbeck.contract.sources.models import model_path

# By a word in the model's name, special names first, so that nothing has to be opened or
# downloaded.
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
_ENCODER_BY_NAME = {
    "modernbert": "modernbert",
    "distilbert": "distilbert",
    "distilroberta": "roberta",
    "xlm-roberta": "xlm-roberta",
    "multilingual-e5": "xlm-roberta",
    "bge-m3": "xlm-roberta",
    "roberta": "roberta",
    "deberta-v": "deberta-v2",
    "albert": "albert",
    "electra": "electra",
    "mpnet": "mpnet",
    "minilm": "bert",
    "tinybert": "bert",
    "bert": "bert",
    "bge-": "bert",
    "gte-": "bert",
    "e5-": "bert",
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
_FULL_HEADS = {k: v for k, v in _SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
_ENCODER_SIZES: Mapping[str, Any] = {**_FULL_HEADS, "max_position_embeddings": 514}
_OWN_SIZES: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_inner": 128, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "gpt_neox": _FULL_HEADS,
    "opt": {**_FULL_HEADS, "ffn_dim": 128},
    "gemma3_text": {
        **_SIZES,
        "sliding_window": 32,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
    "distilbert": {
        "dim": 64,
        "hidden_dim": 128,
        "n_layers": 4,
        "n_heads": 4,
        "max_position_embeddings": 514,
    },
}
_BLOCK, _STEPS = 64, 4
_TEXTS = (["json/*.py"], ["email/*.py"], ["logging/*.py"], ["unittest/*.py"])
_EXAMPLES = 40  # of a class or domain
_SCENARIOS: Mapping[str, Mapping[str, Any]] = {
    "single": {},
    "offline": {"batches": [1, 2], "prompts": [16], "outputs": [4], "blocks": 1, "minutes": 0.05},
    "server": {"requests": 4, "bisections": 0, "minutes": 0.05},
    "cold": {"repeats": 1, "minutes": 0.05},
}


@overload
def shrink_to_pico(recipe: Recipe) -> Recipe: ...
@overload
def shrink_to_pico(recipe: AnyRecipe) -> AnyRecipe: ...
def shrink_to_pico(recipe: AnyRecipe) -> AnyRecipe:
    """The recipe with tiny random models. Raises `ModelError` if an architecture is unknown."""
    tree = recipe.resolved()
    tree["name"] = f"{recipe.name[:75]}-pico"
    for index, model in enumerate(recipe.teacher_models.values()):
        kind = architecture(model, recipe, where=f"teachers.{index}")
        tree["teachers"][index]["model"] = _random(kind, recipe, seed=index + 1)
    _shrink_student(tree["student"], recipe)
    tree["gates"] = {}
    _family(recipe).shrink(tree, recipe)
    small = parse_any_recipe(tree, where=f"{recipe.name} shrunk to pico")
    small._folder, small._text = recipe.folder, recipe.text
    return small


@dataclass(frozen=True)
class _Family:
    """How recipes of a task are made tiny."""

    names: Mapping[str, str]  # model type by a part of a model's name, special names first
    before: str  # regular expression of the text before that part
    sizes: Mapping[str, Any]  # of a configuration
    calibration: Mapping[str, int]  # of a cut student
    shrink: Callable[[dict[str, Any], Any], None]  # changes the other parts of a recipe's tree


def _family(recipe: AnyRecipe) -> _Family:
    if recipe.task == "causal-lm":
        calibration = {"calibration_blocks": 2}
        return _Family(_BY_NAME, "", _SIZES, calibration, _shrink_language_model)
    # Names of encoders contain each other: a match begins a word, so albert is not bert.
    calibration = {"calibration_examples": 4}
    return _Family(_ENCODER_BY_NAME, "(?<![a-z])", _ENCODER_SIZES, calibration, _shrink_encoder)


def _shrink_language_model(tree: dict[str, Any], recipe: Recipe) -> None:
    for teacher in tree["teachers"]:
        teacher["adapter"] = None
    for index, domain in enumerate(tree["data"]["domains"]):
        domain["text"] = {"kind": "stdlib", "paths": _TEXTS[index % len(_TEXTS)]}
    tree["data"] |= {"block": _BLOCK, "heldout": {"every": 4, "piece_chars": 1024, "blocks": 2}}
    tree["features"]["layers"] = None
    if recipe.gates.max_quantization_loss is not None:
        # A recovery and a mix of bits ask for this bound; a rise of 100 % is not reached.
        tree["gates"]["max_quantization_loss"] = 1.0
    tree["training"] |= {
        "tokens": 2 * _BLOCK * _STEPS,
        "minutes": None,
        "batch_tokens": 2 * _BLOCK,
        "micro_batch": min(2, recipe.training.micro_batch),
        "evaluate_every": 2,
        "checkpoint_every": 2,
    }
    if tree["training"]["on_policy"] is not None:
        tree["training"]["on_policy"] |= {"prompts": {"tokens": 16}, "new_tokens": 16}
    tree["bench"] |= {"prompt_tokens": 16, "new_tokens": 8, "min_blocks": 3, "minutes": 0.05}
    for scenario in tree["bench"]["scenarios"]:
        scenario |= _SCENARIOS[scenario["kind"]]
    if recipe.export.recover is not None:
        tree["export"]["recover"]["tokens"] = 2 * _BLOCK * _STEPS
    if isinstance(recipe.export.shapes, StaticShapes):
        tree["export"]["shapes"]["length"] = min(
            recipe.export.shapes.length, _SIZES["max_position_embeddings"]
        )


def _shrink_encoder(tree: dict[str, Any], recipe: EncoderRecipe) -> None:
    data, batch = tree["data"], min(8, recipe.training.batch)
    labelled = bool(recipe.classes)
    groups = data["classes" if labelled else "domains"]
    for group, module in zip(groups, _modules(recipe), strict=True):
        group["text"] = {
            "kind": "stdlib",
            "paths": [module],
            "format": {"kind": "python-strings", "min_chars": 40},
        }
    for cut in groups if labelled else [data]:
        cut["most"] = _EXAMPLES
    data |= {"max_tokens": min(32, recipe.data.max_tokens), "heldout": {"every": 4, "most": 8}}
    if not labelled:
        data["piece_chars"] = 80
    tree["training"] |= {
        "examples": _STEPS * batch,
        "batch": batch,
        "evaluate_every": 2,
        "checkpoint_every": 2,
    }
    sizes = {"batches": sorted({min(2, b) for b in recipe.bench.batches})}
    sizes["lengths"] = sorted({min(16, n) for n in recipe.bench.lengths})
    tree["bench"] |= {**sizes, "min_blocks": 3, "minutes": 0.05}


def _modules(recipe: EncoderRecipe) -> list[str]:
    """A module of the standard library for each class or domain: its long strings are examples.

    The largest modules are taken.
    """
    count, root = len(recipe.groups()), Path(sysconfig.get_paths()["stdlib"])
    found = sorted(root.glob("*.py"), key=lambda path: (-path.stat().st_size, path.name))[:count]
    if len(found) < count:
        raise RecipeError(
            f"{recipe.name}: --shrink-to pico has built-in text for {len(found)} classes or "
            f"domains, not for {count}; name fewer of them to try it out."
        )
    return [path.name for path in found]


def architecture(source: ModelSource | OnnxModel, recipe: AnyRecipe, *, where: str) -> str:
    """The transformers model type of a source, from its configuration or its name.

    Raises `ModelError`.
    """
    match source:
        case RandomModel():
            return str(source.config.get("model_type", "llama"))
        case LocalModel():
            path = model_path(source, folder=recipe.folder)
            assert path is not None
            try:
                return str(parse_json((path / "config.json").read_text("utf-8"))["model_type"])
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise ModelError(
                    f"{where}: {path / 'config.json'}: no model_type can be read from it ({error})."
                ) from None
        case OnnxModel():
            return architecture(source.like, recipe, where=where)
        case HubModel():
            name = source.id
        case PackageModel():
            name = str(source.path)
        case ServerModel():  # any architecture will do: the served one is not known here
            named = (kind for part, kind in _BY_NAME.items() if part in source.model.lower())
            return next(named, "llama")
        case GgufModel():
            name = source.path.name  # the folders above it are the user's
        case _:
            made = load_teacher_recipe(find_recipe(source.recipe, folder=recipe.folder), of=recipe)
            if isinstance(made.student, FreshStudent):
                return str(made.student.config.get("model_type"))
            return architecture(made.student.base, made, where=f"{where} ({made.name})")
    family, name_in_lower_case = _family(recipe), name.lower()
    found = next(
        (
            kind
            for part, kind in family.names.items()
            if re.search(family.before + re.escape(part), name_in_lower_case)
        ),
        None,
    )
    if found is None:
        raise ModelError(
            f"{where}: the architecture of {name} cannot be found from its name; known are "
            f"{', '.join(family.names)}. Point to a local folder with a config.json instead."
        )
    return found


def _shrink_student(student: dict[str, Any], recipe: AnyRecipe) -> None:
    if isinstance(recipe.student, FreshStudent):
        student["config"] = _config(str(recipe.student.config.get("model_type")), recipe)
        return
    kind = architecture(recipe.student.base, recipe, where="student.base")
    student["base"] = {"kind": "random", "config": _config(kind, recipe), "seed": 0}
    if student["kind"] == "shrink":
        # else width and heads are cut together
        heads = 1 if "head_dim" in student["base"]["config"] else 2
        small = {"layers": 3, "intermediate_size": 96, "kv_heads": heads, "hidden_size": 32}
        student |= {name: value for name, value in small.items() if student[name] is not None}
        student["round_to"] = min(32, student["round_to"])
        student |= _family(recipe).calibration


def _random(kind: str, recipe: AnyRecipe, *, seed: int) -> dict[str, Any]:
    """A random teacher; a teacher of classes has a head for them."""
    config = _config(kind, recipe)
    if recipe.classes:
        config["id2label"] = {str(index): name for index, name in enumerate(recipe.classes)}
    return {"kind": "random", "config": config, "seed": seed}


def _config(kind: str, recipe: AnyRecipe) -> dict[str, Any]:
    return {"model_type": kind, **_OWN_SIZES.get(kind, _family(recipe).sizes)}
