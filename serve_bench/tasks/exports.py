"""Timing exported encoders by themselves, for the search: no teachers, no quality, no gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.contract.artifact import open_artifact
from limbeck.contract.data.examples import EXAMPLES, load_examples
from limbeck.contract.machine import available_cores
from limbeck.contract.recipe import EncoderBench
from limbeck.contract.results.bench import Arm
from serve_bench.judge.figures import SAMPLES, Cell, Sample, by_block
from serve_bench.measure.arms import form_arm, require_context
from serve_bench.measure.bench import open_all, warm_all
from serve_bench.measure.clock import Limits, time_blocks
from serve_bench.measure.units import Batch, batch
from serve_bench.measure.workers import Workers


def time_encoders(
    exports: Sequence[tuple[Path, str]], *, out: Path, bench: EncoderBench
) -> list[float]:
    """Median milliseconds of one sequence at the largest of `lengths`, of each run folder and form,
    all in one interleaved run.

    Blocks go on for the bench's `minutes`; its samples lie in ``out``. Raises `ArtifactError` for a
    folder without export, `DataError` for a sequence past a model's context.
    """
    cell, arms = Cell(1, max(bench.lengths)), list[Arm]()
    for run, form in exports:
        arm = form_arm(open_artifact(run / "onnx", kind="onnx"), form)
        arms.append(replace(arm, id=f"{run.name}:{form}", label=f"{run.name} {form}"))
    student = exports[0][0] / "student"
    require_context(arms, bench, student / "model")
    heldout, threads = load_examples(student / EXAMPLES), bench.threads or available_cores()
    runs: dict[tuple[str, Cell], int] = {}

    def units(block: int) -> list[Batch]:
        return [Batch(cell, batch(heldout, cell, block), runs)]

    out.mkdir(parents=True, exist_ok=True)
    environment: dict[str, Any] = {"arms": {arm.id: {} for arm in arms}}
    with (
        Workers(out, threads=threads, task="classification") as workers,
        (out / SAMPLES).open("w", encoding="utf-8") as raw,
    ):
        open_all(workers, arms, environment)
        warm_all(workers, arms, units(0), raw, environment)
        limits = Limits(bench.min_blocks, bench.minutes, bench.min_blocks)
        timed = time_blocks(workers, arms, units, limits, raw, read=Sample.of_batch)
    return [1e3 * float(np.median(by_block(timed.samples, arm.id, "e2el"))) for arm in arms]
