"""Stage 3: measure the cost and the quality of the student beside its teachers, on the machine that
will serve it.

Importing this package is cheap: torch, onnxruntime and matplotlib are imported when a function is
called, torch and onnxruntime only in the worker processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.contract.artifact import Artifact
from limbeck.contract.recipe import AnyRecipe, Bench, EncoderBench

if TYPE_CHECKING:
    from serve_bench.judge.changes import Comparison
    from serve_bench.judge.findings import Finding
    from serve_bench.tell.report import Report

__all__ = [
    "bench",
    "compare_runs",
    "evaluate",
    "measure_targets",
    "replay",
    "table",
    "time_encoders",
    "write_report",
]


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


def measure_targets(
    targets: Sequence[str], *, against: Sequence[str] = (), out: Path, bench: Bench
) -> Artifact:
    """Time ``targets`` and those to compare with, without a recipe; ratios are of the first target.

    A target is a run or an exported folder (``#FORM`` picks a form), a model folder,
    ``hub:ID[@REVISION]``, or the URL of an OpenAI-compatible server. Writes a ``bench`` artifact
    without quality and verdict to ``out``. Raises `ModelError` if a target is none of these,
    `ArtifactError` if ``out`` holds something else, `DataError` if arms cannot be compared.
    """
    from serve_bench.tasks.targets import measure_targets as run

    return run(targets, against=against, out=out, bench=bench)


def time_encoders(
    exports: Sequence[tuple[Path, str]], *, out: Path, bench: EncoderBench
) -> list[float]:
    """Median milliseconds of one sequence at the largest of `lengths`, of each run folder and form,
    all in one interleaved run.

    Blocks go on for the bench's `minutes`; its samples lie in ``out``. Raises `ArtifactError` for a
    folder without export, `DataError` for a sequence past a model's context.
    """
    from serve_bench.tasks.exports import time_encoders as run

    return run(exports, out=out, bench=bench)


def table(bench: Artifact) -> str:
    """The figures of a ``bench`` artifact as a llama-bench-like table for a terminal."""
    from serve_bench.tell.terminal import of_artifact

    return of_artifact(bench)


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


def evaluate(
    artifact: Path,
    *,
    tasks: Sequence[str],
    include_path: Path | None = None,
    form: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Run tasks of lm-eval on a form of the ``onnx`` artifact (the shipped one unless ``form``
    names another).

    ``include_path`` is a folder of task files; ``limit`` the most samples a task; ``shots``
    examples before each question. Raises `EnvironmentalError` without lm-eval, `UserError` for an
    unknown task, `DataError` for data that is not local.
    """
    from serve_bench.lm_eval import evaluate as run

    return run(
        artifact,
        tasks=tasks,
        include_path=include_path,
        form=form,
        limit=limit,
        shots=shots,
        threads=threads,
    )
