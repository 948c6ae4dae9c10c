"""Recipes of any task; the only place that chooses a recipe's class by its `task`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.contract.errors import RecipeError
from limbeck.contract.recipe.base import Frozen
from limbeck.contract.recipe.bench import Bench
from limbeck.contract.recipe.checks import (
    bench_contradictions,
    classification_contradictions,
    embedding_contradictions,
    language_contradictions,
)
from limbeck.contract.recipe.encoder import ClassificationRecipe, EmbeddingRecipe
from limbeck.contract.recipe.language import Recipe
from limbeck.contract.recipe.reading import apply_override, parse_as, read_tree

AnyRecipe = Recipe | ClassificationRecipe | EmbeddingRecipe


def load_any_recipe(
    reference: str | Path, *, overrides: Sequence[str] = (), folder: Path | None = None
) -> AnyRecipe:
    """Read a recipe of any task: a file or a shipped name, with ``key=value`` overrides applied
    last.

    Relative references start from ``folder`` (default: the working directory). Raises `RecipeError`
    listing every mistake with its YAML path and the remedy.
    """
    path, text, tree = read_tree(reference, overrides=overrides, folder=folder)
    recipe = parse_any_recipe(tree, where=str(path))
    recipe._folder, recipe._text = path.parent, text
    return recipe


def parse_any_recipe(tree: Mapping[str, Any], *, where: str = "recipe") -> AnyRecipe:
    """Build a recipe from plain data; ``where`` names it in errors. Raises `RecipeError`."""
    match tree.get("task"):
        case "classification":
            return parse_as(
                ClassificationRecipe,
                tree,
                where=where,
                contradictions=classification_contradictions,
            )
        case "embedding":
            return parse_as(
                EmbeddingRecipe, tree, where=where, contradictions=embedding_contradictions
            )
        case _:
            return parse_as(Recipe, tree, where=where, contradictions=language_contradictions)


def load_recipe(
    reference: str | Path, *, overrides: Sequence[str] = (), folder: Path | None = None
) -> Recipe:
    """As `load_any_recipe`, for language models only. Raises `RecipeError` for another task."""
    path, text, tree = read_tree(reference, overrides=overrides, folder=folder)
    recipe = parse_recipe(tree, where=str(path))
    recipe._folder, recipe._text = path.parent, text
    return recipe


def parse_recipe(tree: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """As `parse_any_recipe`, for language models only. Raises `RecipeError` for another task."""
    recipe = parse_any_recipe(tree, where=where)
    if isinstance(recipe, Recipe):
        return recipe
    raise RecipeError(
        f"{where}: its task is {recipe.task}; this command works on language models (task: "
        "causal-lm) only. "
        "Encoders have plan, run, search, compress, export, bench, report and verify."
    )


def load_teacher_recipe(path: Path, *, of: AnyRecipe) -> AnyRecipe:
    """Read the recipe that makes a teacher of ``of``. Raises `RecipeError`, also for another
    task."""
    made = load_any_recipe(path)
    if made.task != of.task:
        raise RecipeError(
            f"{path}: its task is {made.task}, expected {of.task}; name a recipe of that task."
        )
    return made


class _BenchPart(Frozen):
    bench: Bench


def load_bench(overrides: Sequence[str] = ()) -> Bench:
    """The `bench:` part alone: defaults and ``bench.key=value``. Raises `RecipeError`."""
    part: dict[str, Any] = {"bench": {"minutes": 1.0}}
    for override in overrides:
        if not override.startswith("bench."):
            raise RecipeError(
                f"--set {override}: without a recipe only fields of bench can be set, for "
                "example bench.minutes=5."
            )
        apply_override(part, override, Path("bench"))
    read = parse_as(
        _BenchPart,
        part,
        where="--set",
        contradictions=lambda part: bench_contradictions(part.bench),
    )
    return read.bench
