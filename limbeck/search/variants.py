"""Recipes of a search's students as plain data: what is the same in every task."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.encoder_recipe import AnyRecipe
from limbeck.recipe import find_recipe, portable_reference

_NOT_SHAPE = ("architectures", "dtype", "transformers_version", "_name_or_path", "id2label", "label2id", "num_labels")


def exported(recipe: AnyRecipe, forms: Sequence[str]) -> dict[str, Any]:
    """The recipe's `export:` with fp32 and these forms; a form that the recipe describes keeps its description."""
    export: dict[str, Any] = recipe.resolved()["export"]
    described = {form["kind"]: form for form in export["forms"]}
    return export | {"forms": [described.get(form, form) for form in ("fp32", *forms)]}


def alone(
    recipe: AnyRecipe,
    *,
    student: Mapping[str, Any],
    name: str,
    form: str,
    gates: Mapping[str, Any],
    export: Mapping[str, Any],
    training: Mapping[str, Any],
) -> dict[str, Any]:
    """The recipe of one candidate as plain data that stands alone: no `extends`, every path absolute but for shipped recipes, the budget as gates."""
    tree = recipe.resolved()
    tree["gates"] |= gates
    del tree["budget"], tree["search"]
    tree |= {
        # Not the form: a student is trained once for all of them.
        "name": f"{recipe.name[:50]}-{name}"[:80],
        "description": f"{name} of {recipe.name} as {form}, found by limbeck search.",
        "student": student,
        "export": export,
        "training": training,
    }
    absolute: dict[str, Any] = _absolute(tree, recipe.folder)
    return absolute


def fields(config: Any) -> dict[str, Any]:
    """A transformers configuration as a recipe's `fresh` student has it."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {k: v for k, v in values.items() if k not in _NOT_SHAPE}


def share_of(sizes: Mapping[str, int], name: str, share: float) -> int:
    """A share of one dimension, at least 1."""
    return max(1, int(sizes[name] * share + 0.5))


def _absolute(node: Any, folder: Path) -> Any:
    """Plain data with every path of a recipe made absolute; shipped recipes keep their names."""
    if isinstance(node, list):
        return [_absolute(item, folder) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: _absolute(value, folder) for key, value in node.items()}
    kind = made.get("kind")
    if kind == "recipe":
        made["recipe"] = portable_reference(find_recipe(made["recipe"], folder=folder))
    elif kind in ("local", "gguf", "datasets") or (kind == "onnx" and made["package"] is None):
        made["path"] = str((folder / Path(made["path"]).expanduser()).resolve())
    elif kind == "files":
        made["paths"] = [str(folder / Path(path).expanduser()) for path in made["paths"]]
    if isinstance(made.get("adapter"), str):
        made["adapter"] = str((folder / Path(made["adapter"]).expanduser()).resolve())
    return made
