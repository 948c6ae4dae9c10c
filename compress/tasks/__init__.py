"""What differs between language models, classifiers and sentence encoders, behind one protocol.

`compress.loop` trains any `Task`; `task_of` is the only place that chooses one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from compress.tasks.classification import ClassificationTask
from compress.tasks.embedding import EmbeddingTask
from compress.tasks.language import LanguageTask
from compress.tasks.saved import Saved
from limbeck.contract.recipe import AnyRecipe, ClassificationRecipe, EmbeddingRecipe, Recipe
from limbeck.contract.results.student import TeacherResult

Figures = dict[str, Any]


class Step(Protocol):
    """One optimiser step, as this process computes its share of the global batch."""

    count: int  # label positions, or examples, of the global batch

    @property
    def parts(self) -> Sequence[Tensor]:
        """Rows of the global batch, a tensor for each micro-batch of this process."""

    def loss(self, student: Any, part: Tensor) -> Tensor:
        """Return a scalar with gradient: the part's share of the loss of the global batch."""

    def figures(self) -> Figures:
        """Return the step's figures for the log, equal on every process; `loss` is one of them."""

    def samples(self) -> list[Figures]:
        """Return the texts that the student wrote for this step, of all processes."""

    def fingerprint(self) -> str:
        """Return a short digest of the batch."""


class Task(Protocol):
    """Teachers, text and student of a recipe, loaded."""

    temperatures: list[float]  # calibration of the teachers

    @property
    def student(self) -> nn.Module:
        """The model that is trained, and projections beside it."""

    @property
    def unit(self) -> str:
        """What the budget counts: `tokens` or `examples`."""

    @property
    def loss_unit(self) -> str:
        """Unit of the training and held-out loss."""

    @property
    def steps(self) -> int | None:
        """Steps of the budget; None where it is in minutes."""

    @property
    def minutes(self) -> float | None:
        """The budget in minutes; None where it is in steps."""

    @property
    def patience(self) -> int | None:
        """Measurements without a better one before the training stops."""

    @property
    def selects(self) -> str | None:
        """Figure of `measure` whose least value picks the kept weights; None keeps the last."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the teachers."""

    def step(self, index: int, *, progress: float) -> Step:
        """Return step ``index``; ``progress`` is the share of the budget that is spent."""

    def measure(self, label: str) -> Figures:
        """Measure the student on the held-out text, as it is now."""

    def measure_teacher(self, k: int) -> TeacherResult:
        """Calibrate teacher ``k`` and measure it on held-out text."""

    def describe_teacher(self, report: TeacherResult) -> str:
        """Put the figures of `measure_teacher` in words."""

    def teacher_entries(self) -> list[dict[str, Any]]:
        """Return the entries of `teachers.json`: where each teacher is, and its digest."""

    def losses(self, label: str) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
        """Return the student's held-out losses and label counts of each block or example.

        Summed over the block, by domain or class; less is better.
        """

    def teacher_losses(self, k: int) -> dict[str, list[float]]:
        """Return the held-out losses of teacher ``k``, as `losses` has the student's."""

    def teacher_seconds(self, k: int) -> float:
        """Measure the seconds that teacher ``k`` takes for one `unit` of the training budget."""

    def further_figures(self) -> dict[str, float]:
        """Measure what the ablation shows beside the loss."""

    def save(self, folder: Path, best: Mapping[str, Tensor], *, seen: int, best_step: int) -> Saved:
        """Write the student and its held-out text to ``folder``; measure it as it is loaded there.

        ``best`` holds the trained weights where `selects` picked them, and is empty otherwise.
        """


def task_of(
    recipe: AnyRecipe,
    *,
    products: Mapping[str, Path],
    accelerator: Any,
    precision: str,
    model: Any = None,
) -> Task:
    """Load the task of a recipe. ``model`` is a student to train further; None builds the recipe's.

    Raises `ModelError` or `DataError`.
    """
    match recipe:
        case Recipe():
            return LanguageTask(
                recipe, products=products, accelerator=accelerator, precision=precision, model=model
            )
        case ClassificationRecipe():
            return ClassificationTask(recipe, products=products, accelerator=accelerator)
        case EmbeddingRecipe():
            return EmbeddingTask(recipe, products=products, accelerator=accelerator)
