"""The part of a task that measuring needs: its arms, the work of a block, and the work before and
after timing.

`serve_bench.tasks` implements it for language models and encoders. Nothing here depends on the
task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from limbeck.contract.artifact import Artifact
from limbeck.contract.recipe import AnyRecipe
from limbeck.contract.results.bench import Arm
from serve_bench.judge.figures import Cell, Reference, Sample
from serve_bench.judge.task import JudgingTask
from serve_bench.measure.live import Test
from serve_bench.measure.units import Unit
from serve_bench.measure.workers import Workers


class MeasuringTask(JudgingTask, Protocol):
    """How a task is measured."""

    quality: Any  # the task's own; set by `before_timing` or `after_timing`

    @property
    def recipe(self) -> AnyRecipe:
        """The recipe."""

    @property
    def version(self) -> int:
        """Raised when the same inputs would be measured otherwise."""

    @property
    def replayed(self) -> Sequence[tuple[str, str, Cell | None]]:
        """Times that a replay measures: title, metric of `Sample`, cell."""

    @property
    def min_blocks(self) -> int:
        """Fewest blocks before a verdict."""

    @property
    def minutes(self) -> float:
        """Budget for timing."""

    @property
    def threads(self) -> int | None:
        """Threads of every arm; None for every core."""

    def open(self, onnx: Artifact, student: Artifact) -> list[Arm]:
        """Read the held-out text and list the arms.

        Raises `ArtifactError` and `DataError` if something cannot be measured.
        """

    def open_data(self, folder: Path) -> None:
        """Read the held-out text that lies in a bench artifact."""

    def units(self, block: int) -> Sequence[Unit]:
        """The work of a block."""

    def decided(self, samples: Sequence[Sample], reference: Reference) -> bool:
        """Whether every timing gate is decided."""

    def before_timing(
        self, workers: Workers, arms: Sequence[Arm], reference: Reference, out: Path, work: Path
    ) -> None:
        """Whatever needs the workers before they are timed; files of the artifact go to ``out``."""

    def after_timing(
        self, workers: Workers, samples: Sequence[Sample], raw: IO[str], out: Path, work: Path
    ) -> None:
        """Whatever needs the workers after they were timed."""

    def alone(self, raw: IO[str], environment: dict[str, Any], work: Path) -> None:
        """Whatever starts processes of its own, once the workers are gone."""

    def finish(
        self, rows: Sequence[dict[str, Any]], environment: dict[str, Any], out: Path
    ) -> None:
        """Write the remaining files of the artifact."""

    def live(self, threads: int) -> tuple[str, list[Test]]:
        """Unit of the table shown while timing; title, metric, cell and amount of each row."""

    def replay_quality(
        self,
        workers: Workers,
        arm: Arm,
        certificate: Mapping[str, Any],
        bench: Artifact,
        work: Path,
    ) -> list[tuple[str, float, float]]:
        """Score the shipped form again: name, promised value and value now of each figure."""

    def tolerance(self, onnx: Artifact) -> float:
        """Largest difference that a replay on other hardware or libraries may have."""
