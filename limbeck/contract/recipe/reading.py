"""From a recipe file to plain data and to a checked tree: YAML, ``extends``, ``--set``.

Knows no particular recipe.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from limbeck.contract.errors import RecipeError
from limbeck.contract.recipe.mistakes import did_you_mean, explain, kind_of

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
MOST_BYTES = 1_000_000  # of a recipe file; the longest shipped one has 4 kB
_MOST_EXTENDS, _MOST_PARTS = 20, 30
MOST_DEPTH, MOST_VALUES = 40, 100_000  # nested values; values after aliases are followed
_CORE = ("str", "int", "float", "bool", "null", "map", "seq", "merge")
_TAG = "tag:yaml.org,2002:"
_KINDS = {yaml.MappingNode: "mapping", yaml.SequenceNode: "list"}
_HOLDERS = {"map": yaml.MappingNode, "seq": yaml.SequenceNode}
_MOST_DIGITS = 40
_C = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_C_TEXTS = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
M = TypeVar("M", bound=BaseModel)


def read_tree(
    reference: str | Path, *, overrides: Sequence[str] = (), folder: Path | None = None
) -> tuple[Path, str, dict[str, Any]]:
    """Path, text and plain data of a recipe, with overrides applied. Raises `RecipeError`."""
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

    ``contradictions`` yields mistakes that no single field shows. Raises `RecipeError` that lists
    every mistake.
    """
    try:
        made = model.model_validate(tree)
    except ValidationError as error:
        items = [
            dict(item)
            for item in error.errors()
            if item["type"] != "too_short" or item["input"] in ([], ())
        ]
        _refuse_all(where, [explain(item, tree, model) for item in items])
        raise
    _refuse_all(where, list(contradictions(made)))
    return made


def _refuse_all(where: str, mistakes: Sequence[str]) -> None:
    """Raise `RecipeError` that lists the mistakes, if there are any."""
    lines = list(dict.fromkeys(mistakes))
    if lines:
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise RecipeError(f"{where}: {count}\n" + "\n".join(f"  {line}" for line in lines))


def find_recipe(reference: str | Path, *, folder: Path | None = None) -> Path:
    """Path of a recipe given as a file or as a name such as ``smollm2/135m-two-experts``."""
    try:
        path = (folder or Path.cwd()) / os.path.expanduser(reference)
        if path.is_file():
            return path.resolve()
    except FileNotFoundError:  # of the working directory; the command line explains it
        raise
    except (OSError, ValueError) as error:  # too long, or a NUL in it
        raise RecipeError(f"{str(reference)[:100]}: no path of a recipe ({error}).") from None
    shipped = RECIPES / f"{str(reference).removeprefix('recipes/').removesuffix('.yaml')}.yaml"
    if "\0" not in str(reference) and shipped.is_file():
        return shipped
    names = [name for name, _ in shipped_recipes()]
    close = difflib.get_close_matches(str(reference), names, n=1)
    if close:
        hint = f"; did you mean {close[0]}?"
    elif path.is_dir():
        hint = "; it is a folder, and `limbeck init` writes a recipe for models in folders"
    else:
        hint = did_you_mean(path)
    raise RecipeError(
        f"{reference}: no such recipe file, and no shipped recipe of that name"
        f"{hint or '; `limbeck recipes` lists the shipped ones.'}"
    )


def portable_reference(path: Path) -> str:
    """How another recipe names this file: a shipped recipe by its name, which holds everywhere."""
    return next(
        (name for name, shipped in shipped_recipes() if shipped.resolve() == path.resolve()),
        str(path),
    )


def shipped_recipes() -> list[tuple[str, Path]]:
    """Name and path of every recipe in the wheel, sorted by name."""
    paths = RECIPES.rglob("*.yaml")
    return sorted((str(path.relative_to(RECIPES).with_suffix("")), path) for path in paths)


def _read(path: Path, seen: tuple[Path, ...]) -> tuple[str, dict[str, Any]]:
    """Text and plain data of a recipe file and those it extends; ``seen`` leads to it."""
    if path in seen:
        chain = " -> ".join(str(p) for p in (*seen, path))
        raise RecipeError(f"{path}: extends itself ({chain}); remove one `extends`.")
    if len(seen) > _MOST_EXTENDS:
        raise RecipeError(
            f"{seen[0]}: extends a recipe that extends a recipe, more than {_MOST_EXTENDS} times; "
            "write what you need into one file."
        )
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise RecipeError(
                f"{path}: found {size:,} bytes; a recipe has at most {MOST_BYTES:,}. Is it a "
                "recipe?"
            )
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(
            f"{path}: cannot be read: it is not text in UTF-8; save it as UTF-8."
        ) from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        tree = load_yaml(text)
    except yaml.YAMLError as error:
        # The file of another recipe may be any file of this machine: show no part of it.
        raise RecipeError(f"{path}:{_problem(error, shown=not seen)}") from None
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
        _, inherited = _read(_extended(base, path), (*seen, path))
        tree = _merge(inherited, tree)
    return text, tree


def _extended(base: str, path: Path) -> Path:
    """The YAML file that a recipe extends; a stranger's recipe cannot name any other file."""
    try:
        found = find_recipe(base, folder=path.parent)
    except RecipeError as error:
        raise RecipeError(f"{path}: extends: {error}") from None
    if found.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"{path}: extends: {base}: a recipe is a .yaml file; name one.")
    return found


def _problem(error: yaml.YAMLError, *, shown: bool) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    line = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
    return f"{line} not valid YAML: {problem or error}" if shown else f"{line} not valid YAML"


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
    """Set one ``key=value`` in plain data of the recipe ``path``. Raises `RecipeError`."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(
            f"--set {override}: expected key=value, for example training.tokens=20000."
        )
    if len(parts := key.split(".")) > _MOST_PARTS:
        raise RecipeError(f"--set {key[:60]}…: {len(parts)} names; no field lies that deep.")
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise RecipeError(f"--set {override}: the value is not valid YAML: {problem}") from None
    node: Any = tree
    *parents, last = parts
    for part in parents:
        if isinstance(node, list):
            node = node[_index(part, node, override)]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        else:
            raise RecipeError(
                f"--set {override}: {part} lies inside {kind_of(node)}, which has no fields "
                f"({path})."
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
    if re.fullmatch("[0-9]{1,9}", part) and int(part) < len(node):
        return int(part)
    raise RecipeError(
        f"--set {override}: {part!r} is no index of a list of {len(node)}; the first is 0."
    )


# Untrusted YAML: safe, bounded in depth and size, and only values that JSON can hold --------------


def load_yaml(text: str) -> Any:
    """Plain data: mappings with text or whole numbers as keys, lists, texts, numbers, yes/no,
    nothing.

    Raises `yaml.YAMLError` for anything else, for a key that is written twice, a value that refers
    to itself, and for values nested deeper or, with their aliases followed, more than the bounds of
    this module.
    """
    return _load(text, _Loader)


def load_yaml_texts(text: str) -> Any:
    """As `load_yaml`, for files that others write: dates, numbers and the like stay text."""
    return _load(text, _C_TEXTS)


def _load(text: str, loader: Any) -> Any:
    try:
        _bound(text)
        return yaml.load(text, Loader=loader)
    except (ValueError, RecursionError) as error:  # such as characters that YAML cannot hold
        raise yaml.YAMLError(str(error)) from None


def _bound(text: str) -> None:
    """Walk over the text without building anything, so that no bomb goes off."""
    sizes: dict[str, int] = {}  # values below each anchor that is complete
    open_anchors: list[str | None] = []
    counts = [0]
    for event in yaml.parse(text, Loader=_C):
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in open_anchors:
                _refuse(f"*{event.anchor} refers to itself", mark)
            counts[-1] += sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.ScalarEvent):
            counts[-1] += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_anchors.append(event.anchor)
            counts.append(1)
            if len(open_anchors) > MOST_DEPTH:
                _refuse(f"values are nested more than {MOST_DEPTH} deep", mark)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, count = open_anchors.pop(), counts.pop()
            counts[-1] += count
            if anchor:
                sizes[anchor] = count
        if counts[-1] > MOST_VALUES:
            _refuse(f"more than {MOST_VALUES:,} values, aliases followed", mark)


def _refuse(problem: str, mark: Any) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, problem, mark)


class _Loader(_C):  # type: ignore[misc,valid-type]
    """Safe YAML without YAML's further types: binary, sets, dates and the like."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        kind = node.tag.removeprefix(_TAG)
        shown = repr(node.value[:60]) if isinstance(node, yaml.ScalarNode) else "this value"
        # Base 60 (1:30) takes quadratic time, and numbers of thousands of digits break JSON.
        if kind in ("int", "float") and (":" in node.value or len(node.value) > _MOST_DIGITS):
            _refuse(
                f"{shown} is no number of a field; put it in quotes if it is text", node.start_mark
            )
        if kind in _HOLDERS and not isinstance(node, _HOLDERS[kind]):
            _refuse(f"{shown} is no {kind}; leave out the type !!{kind}", node.start_mark)
        if kind not in _CORE:
            _refuse(
                f"{shown} is of the type {kind}, which no field takes; put it in quotes if it "
                "is text",
                node.start_mark,
            )
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:  # PyYAML's own, of `!!int x`
            _refuse(
                f"{shown} is no {kind} ({error}); put it in quotes if it is text", node.start_mark
            )
        if isinstance(value, str):
            if "\0" in value:
                _refuse("a text holds a NUL character; remove it", node.start_mark)
            if any("\ud800" <= c <= "\udfff" for c in value):
                _refuse(
                    "a text holds half of a character (a lone surrogate); remove it",
                    node.start_mark,
                )
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == f"{_TAG}merge":  # `<<: *other`
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                _refuse(
                    f"a key cannot be a {_KINDS[type(key_node)]}; put it in quotes if it is text",
                    key_node.start_mark,
                )
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int) or isinstance(key, bool):
                _refuse(
                    f"a key should be text; put {key_node.value[:60]!r} in quotes",
                    key_node.start_mark,
                )
            if key in seen:
                _refuse(f"key {key!r} is written twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)  # type: ignore[no-any-return]
