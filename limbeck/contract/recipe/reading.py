"""From a recipe file to plain data and to a checked tree: YAML, ``extends``, ``--set``.

Knows no particular recipe.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from limbeck.contract.errors import RecipeError
from limbeck.contract.recipe.mistakes import explain, kind_of

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
M = TypeVar("M", bound=BaseModel)


def read_tree(
    reference: str | Path, *, overrides: Sequence[str] = (), folder: Path | None = None
) -> tuple[Path, str, dict[str, Any]]:
    """Path, text and plain data of a recipe, its `extends` and the overrides applied. Raises `RecipeError`."""
    path = find_recipe(reference, folder=folder)
    text, tree = _read(path, seen=())
    for override in overrides:
        apply_override(tree, override, path)
    return path, text, tree


def parse_as(
    model: type[M],
    tree: Mapping[str, Any],
    *,
    where: str,
    contradictions: Callable[[M], Iterable[str]],
) -> M:
    """Build a recipe, or a part of one, from plain data; ``where`` names it in errors.

    ``contradictions`` yields mistakes that no single field shows. Raises `RecipeError` that lists every mistake.
    """
    try:
        made = model.model_validate(tree)
    except ValidationError as error:
        items = [
            dict(item)
            for item in error.errors()
            if item["type"] != "too_short" or item["input"] in ([], ())
        ]
        _refuse(where, [explain(item, tree, model) for item in items])
        raise
    _refuse(where, list(contradictions(made)))
    return made


def _refuse(where: str, mistakes: Sequence[str]) -> None:
    """Raise `RecipeError` that lists the mistakes, if there are any."""
    lines = list(dict.fromkeys(mistakes))
    if lines:
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise RecipeError(f"{where}: {count}\n" + "\n".join(f"  {line}" for line in lines))


def find_recipe(reference: str | Path, *, folder: Path | None = None) -> Path:
    """Path of a recipe given as a file or as a shipped name such as ``smollm2/135m-two-experts``."""
    path = (folder or Path.cwd()) / reference
    if path.is_file():
        return path.resolve()
    shipped = RECIPES / f"{str(reference).removeprefix('recipes/').removesuffix('.yaml')}.yaml"
    if shipped.is_file():
        return shipped
    names = [name for name, _ in shipped_recipes()]
    close = difflib.get_close_matches(str(reference), names, n=1)
    hint = f"did you mean {close[0]}?" if close else "`limbeck recipes` lists the shipped ones."
    raise RecipeError(
        f"{reference}: no such recipe file, and no shipped recipe of that name; {hint}"
    )


def portable_reference(path: Path) -> str:
    """How a recipe's file is named in another recipe: a shipped one by its name, which every machine with Limbeck knows."""
    return next(
        (name for name, shipped in shipped_recipes() if shipped.resolve() == path.resolve()),
        str(path),
    )


def shipped_recipes() -> list[tuple[str, Path]]:
    """Name and path of every recipe in the wheel, sorted."""
    return [
        (str(p.relative_to(RECIPES).with_suffix("")), p) for p in sorted(RECIPES.rglob("*.yaml"))
    ]


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML that refuses a key written twice, and says where in the text a value or key cannot be what it looks like."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (
            ValueError,
            KeyError,
            AttributeError,
        ) as error:  # PyYAML's own, of a date in month 13 or `!!int x`
            if not isinstance(node, yaml.ScalarNode):
                raise
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"{node.value!r} is no {kind} ({error}); put it in quotes if it is text",
                node.start_mark,
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"a key cannot be {kind_of(key)}; put it in quotes if it is text",
                    key_node.start_mark,
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is written twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)  # type: ignore[no-any-return]


def _read(path: Path, seen: tuple[Path, ...]) -> tuple[str, dict[str, Any]]:
    if path in seen:
        chain = " -> ".join(str(p) for p in (*seen, path))
        raise RecipeError(f"{path}: extends itself ({chain}); remove one `extends`.")
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise RecipeError(
            f"{path}:{line} not valid YAML: {getattr(error, 'problem', None) or error}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{path}: expected a mapping of recipe fields at the top, found {kind_of(tree)}."
        )
    base = tree.pop("extends", None)
    if base is not None:
        if not isinstance(base, str):
            raise RecipeError(
                f"{path}: extends: expected the path of a recipe file, found {kind_of(base)}."
            )
        _, inherited = _read(find_recipe(base, folder=path.parent), (*seen, path))
        tree = _merge(inherited, tree)
    return text, tree


def _merge(base: Any, over: Any) -> Any:
    """Mappings merge key by key unless their ``kind`` differs; everything else is replaced."""
    if (
        isinstance(base, dict)
        and isinstance(over, dict)
        and over.get("kind", base.get("kind")) == base.get("kind")
    ):
        return {
            key: _merge(base[key], over[key])
            if key in base and key in over
            else over.get(key, base.get(key))
            for key in {**base, **over}
        }
    return over


def apply_override(tree: dict[str, Any], override: str, path: Path) -> None:
    """Set one ``key=value`` in plain data; ``path`` names the recipe in errors. Raises `RecipeError`."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(
            f"--set {override}: expected key=value, for example training.tokens=20000."
        )
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"--set {override}: the value is not valid YAML: {getattr(error, 'problem', error)}"
        ) from None
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(node, list):
            node = node[_index(part, node, override)]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        else:
            raise RecipeError(
                f"--set {override}: {part} lies inside {kind_of(node)}, which has no fields ({path})."
            )
    if isinstance(node, list):
        node[_index(last, node, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise RecipeError(
            f"--set {override}: {last} lies inside {kind_of(node)}, which has no fields ({path})."
        )


def _index(part: str, node: list[Any], override: str) -> int:
    if part.isdigit() and int(part) < len(node):
        return int(part)
    raise RecipeError(
        f"--set {override}: {part!r} is no index of a list of {len(node)}; the first is 0."
    )
