"""The JSON Schema of recipes, for editors: made from the same fields that `limbeck run` checks.

Knows the recipes' classes. An editor reads it by the line `# yaml-language-server: $schema=…` of a
recipe.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from limbeck.contract.recipe import AnyRecipe

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_EXTENDS = {
    "type": "string",
    "description": "Another recipe, a path relative to this one or a shipped name. Mappings are "
    "merged with its own key by key, unless their kind differs; everything else replaces what is "
    "there.",
}
# pydantic leaves its own names of bounds where a validator comes before them.
_BOUNDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
    "min_length": "minLength",
    "max_length": "maxLength",
}


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe of any task.

    `task` chooses among the recipes. A recipe that extends another may leave out what is required.
    """
    made = _with_bounds(TypeAdapter(AnyRecipe).json_schema(mode="validation"))
    definitions: dict[str, Any] = made["$defs"]
    names = {
        task: name
        for name, definition in definitions.items()
        if (task := _task(definition)) is not None
    }
    for name in names.values():
        definitions[name]["properties"] |= {"extends": _EXTENDS}
    parts = {f"{name}Part": _partial(definition) for name, definition in definitions.items()}
    return {
        "$schema": _DIALECT,
        "title": "Limbeck recipe",
        "type": "object",
        "if": {"required": ["extends"]},
        # Without its own task it inherits the other recipe's, which a schema cannot read.
        "then": {
            "if": {"required": ["task"]},
            "then": _by_task(names, "Part"),
            "else": {"anyOf": [{"$ref": f"#/$defs/{name}Part"} for name in names.values()]},
        },
        "else": _by_task(names, ""),
        "$defs": definitions | parts,
    }


def _with_bounds(node: Any) -> Any:
    """The schema with the bounds of numbers and texts under their names in JSON Schema."""
    if isinstance(node, list):
        return [_with_bounds(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key if isinstance(value, dict) else _BOUNDS.get(key, key): _with_bounds(value)
        for key, value in node.items()
    }


def _task(definition: dict[str, Any]) -> str | None:
    task = definition.get("properties", {}).get("task", {})
    return task.get("const") if "const" in task else None


def _by_task(names: dict[str, str], suffix: str) -> dict[str, Any]:
    """The definition that `task` names; without `task`, a language model's."""
    chosen: dict[str, Any] = {"$ref": f"#/$defs/{names['causal-lm']}{suffix}"}
    for task, name in names.items():
        if task != "causal-lm":
            chosen = {
                "if": {"properties": {"task": {"const": task}}, "required": ["task"]},
                "then": {"$ref": f"#/$defs/{name}{suffix}"},
                "else": chosen,
            }
    return chosen


def _partial(node: Any) -> Any:
    """The schema with no field required; any fitting choice of several is valid."""
    if isinstance(node, list):
        return [_partial(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {
        key: _partial(value)
        for key, value in node.items()
        if key not in ("required", "discriminator")
    }
    if isinstance(found.get("oneOf"), list):
        found["anyOf"] = found.pop("oneOf")
    if isinstance(found.get("$ref"), str):
        found["$ref"] = f"{found['$ref']}Part"
    return found
