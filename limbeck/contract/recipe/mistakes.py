"""One line a mistake in a recipe: place, value found, value expected, remedy."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel

from limbeck.contract.recipe.base import without_password


def explain(error: dict[str, Any], tree: Any, root: type[BaseModel]) -> str:
    """One line for one pydantic error: YAML path, value found, value expected, remedy."""
    path, model = _locate(error["loc"], tree, root)
    where = ".".join(str(part) for part in path) or "(top)"
    context = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            known = sorted(model.model_fields) if model else []
            close = difflib.get_close_matches(str(path[-1]), known, n=1)
            remedy = (
                f"did you mean `{close[0]}`?"
                if close
                else f"remove it; known here: {', '.join(known)}."
            )
            return f"{where}: unknown key; {remedy}"
        case "missing":
            field = model.model_fields.get(str(path[-1])) if model else None
            return (
                f"{where}: missing; add "
                f"it{f' ({field.description})' if field and field.description else ''}"
            )
        case "union_tag_invalid":
            expected = context["expected_tags"].replace("'", "`")
            close = difflib.get_close_matches(
                str(context["tag"]), context["expected_tags"].replace("'", "").split(", "), n=1
            )
            hint = f"; did you mean `{close[0]}`?" if close else ""
            return f"{where}.kind: found {context['tag']!r}, expected one of {expected}{hint}"
        case "union_tag_not_found":
            return f"{where}: needs a `kind:` that says which choice this is"
    message = error["msg"][0].lower() + error["msg"][1:]
    field = model.model_fields.get(str(path[-1])) if model and path else None
    about = f" ({field.description})" if field and field.description else ""
    return (
        f"{where}: found {_shown(error['input'])}; "
        f"{message.replace('input should', 'it should').replace('tuple', 'list')}{about}"
    )


def _locate(
    loc: tuple[Any, ...], tree: Any, root: type[BaseModel]
) -> tuple[list[Any], type[BaseModel] | None]:
    """YAML path of pydantic's location (without union tags), and the model of its last key."""
    path: list[Any] = []
    annotation: Any = root
    owner: type[BaseModel] | None = None
    node = tree
    for part in loc:
        models = list(_models(annotation))
        tag = isinstance(part, str) and len(models) > 1
        chosen = [m for m in models if tag and _tag(m) == part]
        if chosen:
            annotation = chosen[0]
            continue
        if isinstance(part, str) and not models and not isinstance(node, dict):
            continue  # the branch of a plain union, such as `int`
        path.append(part)
        owner = None
        if isinstance(part, str) and models:
            owner = models[0]
            field = owner.model_fields.get(part)
            annotation = field.annotation if field else None
        elif isinstance(part, int):
            arguments = [a for a in typing.get_args(_unwrap(annotation)) if a is not Ellipsis]
            annotation = arguments[0] if arguments else None
        else:
            annotation = None
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            node = None
    return path, owner


def _unwrap(annotation: Any) -> Any:
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    annotation = _unwrap(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            yield from _models(argument)


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    arguments = typing.get_args(field.annotation) if field else ()
    return arguments[0] if arguments else None


def kind_of(value: Any) -> str:
    """A user's name for the type of a YAML value."""
    names = {
        dict: "a mapping",
        list: "a list",
        str: "a text",
        int: "a number",
        float: "a number",
        bool: "a yes/no",
        type(None): "nothing",
    }
    return names.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    text = without_password(repr(value))
    return text if len(text) <= 60 else f"{kind_of(value)} ({text[:50]}…)"


def did_you_mean(path: Path) -> str:
    """``, did you mean PATH?`` where something of nearly that name is there, else nothing."""
    try:
        there = path.absolute().parent
        while not there.exists():
            there = there.parent
        missing = path.absolute().relative_to(there).parts
        names = {entry.name.lower(): entry.name for entry in there.iterdir()}
    except (OSError, ValueError):
        return ""
    for close in difflib.get_close_matches(missing[0].lower(), names, cutoff=0.7):
        suggested = there.joinpath(names[close], *missing[1:])
        if suggested.exists() and suggested != path.absolute():
            here = Path.cwd()
            shown = suggested.relative_to(here) if suggested.is_relative_to(here) else suggested
            return f", did you mean {shown}?"
    return ""
