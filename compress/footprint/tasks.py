"""The tasks whose training can be planned; this is the one place that chooses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from compress.footprint import encoders, language
from compress.footprint.base import Asked, Footprint
from limbeck.contract.recipe import AnyRecipe
from limbeck.contract.recipe.checks import require_equal_shares, require_share_for_all

R = TypeVar("R", contravariant=True)  # a recipe


class Shape(Protocol):
    """A model as its configuration describes it."""

    @property
    def config(self) -> Any: ...
    @property
    def parameters(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...


class Task(Protocol[R]):
    """One of the two modules. Configurations are transformers'."""

    def config_of(self, source: Any, *, folder: Path) -> Any:
        """The configuration of a model source. Raises `ModelError` if it is not available."""

    def describe(self, config: Any, recipe: R, *, name: str) -> Any:
        """The shape of a model of the recipe. Raises `ModelError` if it cannot serve there."""

    def student_config(self, recipe: R, *, base: Any, vocabulary: int) -> Any:
        """The student's configuration from its base's; ``vocabulary`` is of a fresh student."""

    def teacher_shape(self, recipe: R, index: int, shape: Any, made: AnyRecipe | None) -> Any:
        """A teacher in memory; ``made`` is the recipe that makes it, if there is one."""

    def asked(self, recipe: R) -> dict[str, Asked]:
        """Requests to servers, by the teacher's name."""

    def served_vocabulary(self, recipe: R) -> int | None:
        """Tokens of the first teacher's tokenizer if that teacher is behind a server, else None."""

    def meta_model(self, config: Any, task: str) -> Any:
        """The model on the meta device."""

    def footprint(
        self, recipe: R, *, student: Any, base: Any, teachers: Sequence[Any], precision: str
    ) -> Footprint:
        """The cost of the training; ``precision`` is fp32 or bf16."""

    def measure_speed(
        self, recipe: R, student: Any, *, seconds: float, precision: str, device: torch.device
    ) -> float:
        """Operations per second of the student's layers on this machine, timed for ``seconds``."""


def task_of(name: str) -> Task[Any]:
    """The module for a recipe's ``task``."""
    return language if name == "causal-lm" else encoders


def require_shares(recipe: AnyRecipe, *, processes: int) -> None:
    """Raise `RecipeError` for a batch that so many processes cannot share."""
    if recipe.task == "causal-lm":
        require_share_for_all(recipe, processes=processes, sharded=False)
    else:
        require_equal_shares(recipe, processes=processes)


def student_shape(recipe: AnyRecipe) -> Any:
    """The shape of a student that has a base, from configurations alone."""
    task = task_of(recipe.task)
    base = task.config_of(recipe.base, folder=recipe.folder)
    config = task.student_config(recipe, base=base, vocabulary=0)
    return task.describe(config, recipe, name="the student")
