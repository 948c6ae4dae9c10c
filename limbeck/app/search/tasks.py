"""What differs between the tasks of a search; `language` and `encoders` implement it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from limbeck.app.search import encoders, language
from limbeck.app.search.candidates import Candidate
from limbeck.contract.recipe import AnyRecipe

R = TypeVar("R", contravariant=True)  # a recipe
B = TypeVar("B", contravariant=True)  # its budget


class Task(Protocol[R, B]):
    """One of the two modules. A student is the `student:` of a recipe as plain data."""

    UNIT: str  # of training
    KINDS: tuple[str, ...]  # of students that can be searched among

    def students(self, recipe: R) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and student of everything in the space; whole bases first, then cut ones."""

    def sized(self, recipe: R, students: Mapping[str, dict[str, Any]]) -> list[Candidate]:
        """Every student in every form, with its planned size."""

    def probe_parts(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Parts of a recipe's plain data that make its training as short as can be."""

    def time_exports(
        self, recipe: R, exports: Sequence[tuple[Path, str]], out: Path
    ) -> list[dict[str, float]]:
        """Median times by run folder and form, from one interleaved run."""

    def rounds_of(self, recipe: R) -> list[int]:
        """Training of each round (tokens or examples), rising."""

    def make_teachers(
        self,
        recipe: R,
        student: dict[str, Any],
        folder: Path,
        rounds: Sequence[int],
        *,
        cached: bool,
    ) -> dict[str, Path]:
        """Artifacts of teachers by name. ``cached``: they were made in this folder before."""

    def heal(
        self,
        recipe: R,
        name: str,
        student: dict[str, Any],
        products: Mapping[str, Path],
        work: Path,
        rounds: Sequence[int],
        rung: int,
        in_time: Callable[[], bool],
    ) -> tuple[float, dict[str, float]] | None:
        """Train a student to the end of a round; return its loss and metric, or None if time is up.

        Raises `DivergenceError`.
        """

    def final_recipe(
        self, recipe: R, student: dict[str, Any], candidate: Candidate, budget: B
    ) -> dict[str, Any]:
        """The recipe of one candidate as plain data, complete in itself.

        It has no `extends`, absolute paths except for shipped recipes, and the budget as gates.
        """

    def measured(self, bench: Mapping[str, Any]) -> dict[str, float]:
        """Figures of the shipped form and of the best teacher from a bench result."""


def task_of(recipe: AnyRecipe) -> Task[Any, Any]:
    """The module for a recipe's task."""
    return language if recipe.task == "causal-lm" else encoders
