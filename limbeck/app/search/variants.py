"""Students of a search and their recipes: the part that all tasks share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from limbeck.contract.errors import ModelError
from limbeck.contract.recipe import AnyRecipe, find_recipe, parse_any_recipe, portable_reference
from limbeck.contract.sources.places import file_at

R = TypeVar("R", bound=AnyRecipe)
_NOT_SHAPE = (
    "architectures",
    "dtype",
    "transformers_version",
    "_name_or_path",
    "id2label",
    "label2id",
    "num_labels",
)


def variant(recipe: R, **changes: Any) -> R:
    """The recipe with some parts replaced, without the options that not every student can have."""
    tree = recipe.resolved() | {"gates": {}, "budget": None} | changes
    tree["export"] |= recipe.plain_export
    made = parse_any_recipe(tree, where=recipe.name)
    assert isinstance(made, type(recipe))
    made._folder = recipe.folder
    return made


def base_config(recipe: AnyRecipe, base: Any) -> Any:
    """The transformers configuration of a student's base."""
    from compress.footprint.tasks import task_of

    return task_of(recipe.task).config_of(base, folder=recipe.folder)


def dimensions(recipe: AnyRecipe, student: dict[str, Any]) -> dict[str, int]:
    """Sizes of a cut student, rounded to multiples that can be cut."""
    from compress.models.shrink import shrunk_sizes

    made = variant(recipe, student=student).student
    assert made.kind == "shrink"
    return shrunk_sizes(base_config(recipe, made.base), made)


def cut_of(asked: Mapping[str, Any]) -> dict[str, Any]:
    """A cut student of the base of ``asked``, with its settings for heads and hidden width."""
    own = asked if asked["kind"] == "shrink" else {}
    cut = {"kind": "shrink", "base": asked["base"]}
    return cut | {
        name: value for name, value in own.items() if name not in ("layers", "intermediate_size")
    }


def why_uncut(recipe: AnyRecipe) -> str | None:
    """Reason why the recipe's base cannot be cut, or None."""
    try:
        dimensions(recipe, {"kind": "shrink", "base": recipe.resolved()["student"]["base"]})
    except ModelError as error:
        if recipe.student.kind == "shrink":
            raise
        return str(error)
    return None


def whole_steps(rungs: Sequence[int], *, step: int, most: int) -> list[int]:
    """Training of each round, in whole steps and at most the recipe's."""
    return sorted({max(min(rung, most) // step, 1) * step for rung in rungs})


def exported(recipe: AnyRecipe, forms: Sequence[str]) -> dict[str, Any]:
    """The recipe's `export:` with fp32 and these forms, without options that not all of them have.

    Forms in the recipe keep their settings.
    """
    export: dict[str, Any] = recipe.resolved()["export"]
    described = {form["kind"]: form for form in export["forms"]}
    forms_and_fp32 = [described.get(form, form) for form in ("fp32", *forms)]
    return export | dict(recipe.plain_export) | {"forms": forms_and_fp32}


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
    """The recipe of one candidate as plain data, complete in itself.

    It has no `extends`, absolute paths except for shipped recipes, and the budget as gates.
    """
    tree = recipe.resolved()
    tree["gates"] |= gates
    del tree["budget"], tree["search"]
    tree |= {
        # The form is not in the name: one training serves all forms.
        "name": f"{recipe.name[:50]}-{name}"[:80],
        "description": f"{name} of {recipe.name} as {form}, found by limbeck search.",
        "student": student,
        "export": export,
        "training": training,
    }
    absolute: dict[str, Any] = _absolute(tree, recipe.folder)
    return absolute


def fields(config: Any) -> dict[str, Any]:
    """A transformers configuration as for a recipe's `fresh` student."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {k: v for k, v in values.items() if k not in _NOT_SHAPE}


def share_of(sizes: Mapping[str, int], name: str, share: float) -> int:
    """A share of one dimension, at least 1."""
    return max(1, int(sizes[name] * share + 0.5))


def _absolute(node: Any, folder: Path) -> Any:
    """Plain data with all paths of a recipe made absolute; shipped recipes keep their names."""
    if isinstance(node, list):
        return [_absolute(item, folder) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: _absolute(value, folder) for key, value in node.items()}
    kind = made.get("kind")
    if kind == "recipe":
        made["recipe"] = portable_reference(find_recipe(made["recipe"], folder=folder))
    elif kind in ("local", "gguf", "datasets") or (kind == "onnx" and made["package"] is None):
        made["path"] = str(file_at(Path(made["path"]), folder=folder))
    elif kind == "files":
        made["paths"] = [str(folder / Path(path).expanduser()) for path in made["paths"]]
    if isinstance(made.get("adapter"), str):
        made["adapter"] = str((folder / Path(made["adapter"]).expanduser()).resolve())
    return made
