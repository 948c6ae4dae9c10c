"""Stage 3: measure the cost and the quality of the student beside its teachers, on the machine that
will serve it.

Importing this package is cheap: torch, onnxruntime and matplotlib are imported when a function is
called, torch and onnxruntime only in the worker processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from limbeck.contract.artifact import Artifact
from limbeck.contract.recipe import AnyRecipe

if TYPE_CHECKING:
    from serve_bench.judge.changes import Comparison
    from serve_bench.judge.findings import Finding
    from serve_bench.tell.report import Report

__all__ = ["bench", "compare_runs", "replay", "write_report"]


def bench(*, onnx: Path, student: Path, out: Path, recipe: AnyRecipe) -> Artifact:
    """Time and score every form of the ``onnx`` artifact, its student, and the student's teachers.

    Writes the ``bench`` artifact of docs/artifacts.md to ``out``, or returns the one there if it
    was made from the same artifacts, `bench:` and `gates:` on this machine. Raises `ArtifactError`
    for inputs that do not belong together, `DataError` for a prompt and answer past a model's
    context, `EnvironmentalError` if an arm cannot run here.
    """
    from serve_bench.measure.bench import measure
    from serve_bench.tasks import task_of

    return measure(onnx=onnx, student=student, out=out, asked=task_of(recipe))


def write_report(*, run: Path, recipe: AnyRecipe) -> Report:
    """Write ``report.html``, ``report.json`` and ``certificate.json`` of the run folder ``run``
    from its artifacts' raw samples.

    The report carries the verdict, its exit code (0 pass, 1 fail, 3 undecided) and a Markdown
    table. Raises `ArtifactError` when one of ``run/student``, ``run/onnx`` and ``run/bench`` is
    missing or changed.
    """
    from serve_bench.tasks import task_of
    from serve_bench.tell.report import write_report as write

    return write(run=run, recipe=recipe, task=task_of(recipe))


def replay(*, run: Path, quality: bool = True, speed: bool = True) -> list[Finding]:
    """Measure the promises of ``run/certificate.json`` about the shipped form on this machine.

    Needs ``run/onnx`` and ``run/bench``, not the student or its text. Raises `ArtifactError` if the
    certificate is damaged or of other artifacts, and the errors of a worker if the form cannot run
    here.
    """
    from serve_bench.measure.replay import replay as run_again
    from serve_bench.tasks import task_of_bench

    return run_again(task_of_bench, run=run, quality=quality, speed=speed)


def compare_runs(
    before: Path,
    after: Path,
    *,
    tolerances: Mapping[str, float] | None = None,
    across_machines: bool = False,
) -> Comparison:
    """The shipped forms of two runs (run folders or bench artifacts), metric by metric, in every
    scenario that both have; measures nothing.

    ``tolerances`` are relative (0.05 is 5 %), by `speed`, `quality`, `size` and `memory`. Raises
    `ArtifactError` when there is no bench, `UserError` for runs of different work, or of different
    machines without ``across_machines``.
    """
    from serve_bench.judge.compare import compare_runs as compare
    from serve_bench.tasks import task_of_bench

    return compare(
        before, after, task_of_bench, tolerances=tolerances, across_machines=across_machines
    )
