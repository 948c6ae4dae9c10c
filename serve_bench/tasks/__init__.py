"""The one place where a bench chooses its task. Everything else in `serve_bench` asks the task."""

from __future__ import annotations

import json

from limbeck.contract.artifact import Artifact
from limbeck.contract.recipe import AnyRecipe, Recipe, parse_any_recipe
from serve_bench.judge.figures import ENVIRONMENT
from serve_bench.tasks.encoder import Encoder
from serve_bench.tasks.language import Language

Task = Language | Encoder


def task_of(recipe: AnyRecipe) -> Task:
    """The task of a recipe."""
    return Language(recipe) if isinstance(recipe, Recipe) else Encoder(recipe)


def task_of_bench(bench: Artifact) -> Task:
    """The task of a ``bench`` artifact, as its recipe has it.

    A bench of targets has no recipe: language models.
    """
    saved = bench.manifest["recipe"]
    if saved is None:
        common = json.loads((bench.path / ENVIRONMENT).read_text("utf-8"))["fairness"]
        return Language(
            None, sizes={name: common[name] for name in ("prompt_tokens", "new_tokens")}
        )
    return task_of(parse_any_recipe(saved["resolved"], where=str(bench.path)))
