"""The part of a task that judging needs: its samples, quality, figures and gates.

`serve_bench.tasks` implements it for language models and encoders. Nothing here depends on the
task.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import ArtifactError
from limbeck.contract.results.bench import Arm, BenchResult, Gate, TaskName, Verdict, arms_of
from serve_bench.judge.changes import Row, Timed
from serve_bench.judge.figures import ENVIRONMENT, SAMPLES, Cell, Reference, Sample, read_rows
from serve_bench.judge.gates import conclude


@dataclass(frozen=True)
class Measured:
    """The content of a bench, read once.

    ``quality`` is the task's own; None in a bench without a recipe.
    """

    rows: Sequence[Mapping[str, Any]]
    samples: Sequence[Sample]
    environment: Mapping[str, Any]
    quality: Any
    reference: Reference
    stored: Mapping[str, Any]  # the result in the manifest; empty while the bench is being made

    @property
    def timed(self) -> Timed:
        """What `time_change` compares."""
        return self.samples, self.reference


@dataclass(frozen=True)
class Judged:
    """A bench, its figures and its verdict: made once, passed on to report and certificate."""

    measured: Measured
    evidence: Any  # the task's own
    verdict: Verdict
    result: BenchResult


class JudgingTask(Protocol):
    """The judging of one task."""

    @property
    def name(self) -> TaskName:
        """The task, as recipes name it."""

    @property
    def metrics(self) -> Sequence[tuple[str, str, Cell | None]]:
        """Times compared between two runs: title, metric of `Sample`, cell."""

    def reference(self, shipped: str, arms: Sequence[Arm], judged: str = "") -> Reference:
        """The context of the figures."""

    def read_sample(self, row: Mapping[str, Any]) -> Sample:
        """A sample from its row of samples.jsonl."""

    def read_quality(self, bench: Artifact, reference: Reference) -> Any:
        """Quality of the arms, from the files of the bench."""

    def evidence(self, measured: Measured) -> Any:
        """Figures that gates are judged on."""

    def gates(self, measured: Measured, evidence: Any) -> list[Gate]:
        """Every gate that the recipe names, judged."""

    def result(self, measured: Measured, evidence: Any, verdict: Verdict) -> BenchResult:
        """The bench artifact's result."""

    def promises(self, judged: Judged) -> dict[str, Any]:
        """The key `figures` of the certificate: the shipped form, with the gates' intervals."""

    def data(self, bench: Artifact) -> dict[str, Any]:
        """The key `data` of the certificate: hash and sizes of the held-out text."""

    def protocol(self) -> dict[str, Any]:
        """Sizes of the timed work, for the certificate."""

    def losses(
        self, old: Measured, new: Measured, tolerance: float, *, same_text: bool
    ) -> Iterator[Row]:
        """Quality of two runs side by side."""

    def scenarios(
        self, old: Measured, new: Measured, tolerance: float, anchors: Sequence[str]
    ) -> tuple[list[Row], list[str]]:
        """More rows and notes for a comparison."""


def read_bench(bench: Artifact, task: JudgingTask) -> Measured:
    """Read a bench artifact. Raises `ArtifactError` if its layout is older."""
    environment = json.loads((bench.path / ENVIRONMENT).read_text("utf-8"))
    if "task" not in bench.result or "before" not in environment:
        raise ArtifactError(
            f"{bench.path}: was measured by an older version of Limbeck; `limbeck run` with its "
            "recipe measures it again."
        )
    rows = read_rows(bench.path / SAMPLES)
    reference = task.reference(
        str(bench.result["shipped"]), arms_of(bench.result), str(bench.result["judged"])
    )
    samples = [task.read_sample(row) for row in rows if row["event"] == "sample"]
    quality = task.read_quality(bench, reference)
    return Measured(rows, samples, environment, quality, reference, bench.result)


def judge_bench(measured: Measured, task: JudgingTask) -> Judged:
    """Judge a bench, once."""
    evidence, reference = task.evidence(measured), measured.reference
    verdict = conclude(
        task.gates(measured, evidence),
        name=reference.name,
        shipped=reference.shipped,
        stand_in=reference.stand_in,
    )
    return Judged(measured, evidence, verdict, task.result(measured, evidence, verdict))
