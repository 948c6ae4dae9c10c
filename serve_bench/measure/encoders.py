"""Measuring an encoder: held-out examples through every arm, then batches over a grid of sizes in mirrored blocks.

Quality comes first, because the gate on speed is against the better teacher. Figures are computed in `encoder_figures`, from
the raw samples and answers this writes.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from limbeck.contract.artifact import Artifact, find_artifact, open_artifact, write_artifact
from limbeck.contract.errors import ArtifactError, DataError
from limbeck.contract.examples import EXAMPLES, Examples, load_examples
from limbeck.contract.machine import available_cores, host, versions
from limbeck.contract.progress import Task, say, task
from limbeck.contract.recipe import EncoderBench, EncoderRecipe, fingerprint
from limbeck.runtime.encoder import COUNTS_FROM_PADDING
from serve_bench.judge import encoder_figures as figures
from serve_bench.judge.encoder_figures import ANSWERS, Cell, Sample
from serve_bench.judge.figures import ENVIRONMENT, SAMPLES
from serve_bench.judge.stats import first_look, is_look
from serve_bench.measure.arms import Arm, Workers, context_of, weights_on_disk
from serve_bench.measure.clock import order

_VERSION = 1  # of the stage: raise it when the same inputs would be measured otherwise

_RUN = 0.05  # seconds a sample takes at least: a short batch is run several times
_WARM_WINDOW, _WARM_SPREAD, _WARM_MOST = (
    3,
    1.10,
    10,
)  # steady: the last three within 10 %; given up after ten
_PAUSE = 0.01  # seconds before a sample, for the last arm's threads to stop spinning


def measure_encoder(*, onnx: Path, student: Path, out: Path, recipe: EncoderRecipe) -> Artifact:
    """See `serve_bench.measure`."""
    exported, trained = open_artifact(onnx, kind="onnx"), open_artifact(student, kind="student")
    if exported.manifest["parents"].get("student") != trained.digest:
        raise ArtifactError(f"{onnx} was not made from {student}; run the export stage again.")
    parents = {"onnx": exported.digest, "student": trained.digest}
    asked = {part: getattr(recipe, part).model_dump(mode="json") for part in ("bench", "gates")}
    key = fingerprint(
        {
            "stage": "encoder bench",
            "version": _VERSION,
            "asked": asked,
            "parents": parents,
            "host": host(),
        }
    )
    if found := find_artifact(out, kind="bench", key=key):
        return found

    arms = list_arms(onnx=exported, student=trained)
    cells = [
        Cell(batch, length) for batch in recipe.bench.batches for length in recipe.bench.lengths
    ]
    _require_context(arms, cells, trained.path / "model")
    heldout = load_examples(trained.path / EXAMPLES)
    threads = recipe.bench.threads or available_cores()
    shipped = str(exported.result["shipped"])
    work = out.parent / f".{out.name}.work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        with write_artifact(out, kind="bench", key=key, parents=parents, recipe=recipe) as draft:
            environment: dict[str, Any] = {
                "host": host(),
                "threads": threads,
                "versions": versions(),
            }
            workers_of = Workers(work, threads=threads, module="serve_bench.measure.encoder_worker")
            with workers_of as workers, (draft.folder / SAMPLES).open("w") as raw:
                answers = _ask(workers, arms, trained.path / EXAMPLES, work)
                save_file(answers, draft.folder / ANSWERS)
                quality = figures.Quality(recipe, answers, heldout.groups, arms)
                runs, steady = _warm(workers, arms, cells, heldout, raw)
                samples, seconds, stopped = _time(
                    workers, arms, cells, heldout, runs, quality, shipped, recipe, raw
                )
                environment["arms"] = {
                    arm.id: {
                        **workers[arm].opened,
                        "peak_rss_bytes": workers[arm].ask("time", ids=[[1]], runs=1)[
                            "peak_rss_bytes"
                        ],
                        "steady": steady[arm.id],
                    }
                    for arm in arms
                }
            environment |= {"blocks": samples[-1].block + 1, "timed_s": seconds, "stopped": stopped}
            (draft.folder / ENVIRONMENT).write_text(json.dumps(environment, indent=1))
            draft.result = figures.summary(samples, quality, environment, shipped, arms, recipe)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return open_artifact(out, kind="bench", verify=False)


def list_arms(*, onnx: Artifact, student: Artifact) -> list[Arm]:
    """Teachers and student in torch, every form under onnxruntime, and the shipped form once more.

    Raises `ArtifactError` when a teacher's folder is gone.
    """
    task_name, arms = str(student.result["task"]), []
    for teacher in json.loads((student.path / "teachers.json").read_text()):
        folder = Path(teacher["model"])
        if not folder.is_dir():
            raise ArtifactError(
                f"{folder}: the folder of teacher {teacher['name']} is gone, so the student cannot be measured against it; run "
                "the recipe again, which makes it."
            )
        spec = {"model": str(folder), "task": task_name, "pooling": teacher["pooling"]}
        arms.append(
            Arm(
                f"teacher:{teacher['name']}",
                teacher["name"],
                "teacher",
                "torch",
                weights_on_disk(folder),
                spec,
            )
        )
    model = student.path / "model"
    spec = {"model": str(model), "task": task_name, "pooling": "mean"}
    arms.append(Arm("student", "student", "student", "torch", weights_on_disk(model), spec))
    shipped = str(onnx.result["shipped"])
    for name, form in onnx.result["forms"].items():
        spec = {"artifact": str(onnx.path), "form": name}
        arms.append(Arm(f"onnx:{name}", name, "form", "onnxruntime", int(form["bytes"]), spec))
    size, spec = (
        int(onnx.result["forms"][shipped]["bytes"]),
        {"artifact": str(onnx.path), "form": shipped},
    )
    arms.append(Arm(f"onnx:{shipped}:twin", f"{shipped} (copy)", "twin", "onnxruntime", size, spec))
    return arms


def _require_context(arms: Sequence[Arm], cells: Sequence[Cell], student: Path) -> None:
    wanted = max(cell.length for cell in cells)
    for arm in arms:
        folder = Path(arm.spec["model"]) if arm.runtime == "torch" else student
        context = context_of(folder)
        config = json.loads((folder / "config.json").read_text())
        if context is not None and config["model_type"] in COUNTS_FROM_PADDING:
            context -= config["pad_token_id"] + 1
        if context is not None and wanted > context:
            raise DataError(
                f"bench.lengths: found {wanted}; {arm.label} reads {context} tokens at most. Make it smaller."
            )


def _ask(
    workers: Workers, arms: Sequence[Arm], examples: Path, work: Path
) -> dict[str, npt.NDArray[np.float32]]:
    """Open every arm, and keep what it says of the held-out examples; the twin is the shipped form itself."""
    answers = {}
    with task("opening, and held-out examples", len(arms)) as progress:
        for arm in arms:
            worker = workers.start(arm)
            if arm.scored:
                worker.ask("answers", examples=str(examples), out=str(work / "answers.npy"))
                answers[arm.id] = np.load(work / "answers.npy")
            progress.advance()
    return answers


def _batch(heldout: Examples, cell: Cell, block: int) -> list[list[int]]:
    """Rows of a block: windows of held-out text, examples joined, read from its start again where it ends."""
    text = np.concatenate(
        [row[:length] for row, length in zip(heldout.input_ids, heldout.lengths, strict=True)]
    )
    wanted = cell.batch * cell.length
    found: list[list[int]] = np.resize(
        np.roll(text, -wanted * block), (cell.batch, cell.length)
    ).tolist()
    return found


def _warm(
    workers: Workers, arms: Sequence[Arm], cells: Sequence[Cell], heldout: Examples, raw: IO[str]
) -> tuple[dict[tuple[str, Cell], int], dict[str, bool]]:
    """Run every arm and cell until it is steady: how often a sample runs each, and which arms settled."""
    runs, steady = {}, {arm.id: True for arm in arms}
    with task("warming up", len(arms) * len(cells)) as progress:
        for arm in arms:
            for cell in cells:
                ids, times = _batch(heldout, cell, 0), list[float]()
                while len(times) < _WARM_MOST:
                    times.append(workers[arm].ask("time", ids=ids, runs=1)["seconds"])
                    window = times[-_WARM_WINDOW:]
                    if len(window) == _WARM_WINDOW and max(window) <= _WARM_SPREAD * min(window):
                        break
                else:
                    steady[arm.id] = False
                runs[arm.id, cell] = max(1, math.ceil(_RUN / min(times)))
                raw.write(
                    json.dumps({"event": "warm-up", "arm": arm.id, **vars(cell), "seconds": times})
                    + "\n"
                )
                progress.advance()
            if not steady[arm.id]:
                say(
                    f"  {arm.label}: still not steady after {_WARM_MOST} runs of a batch; its figures are marked"
                )
    return runs, steady


def _time(
    workers: Workers,
    arms: Sequence[Arm],
    cells: Sequence[Cell],
    heldout: Examples,
    runs: Mapping[tuple[str, Cell], int],
    quality: figures.Quality,
    shipped: str,
    recipe: EncoderRecipe,
    raw: IO[str],
) -> tuple[list[Sample], float, str]:
    """Time mirrored blocks until the gate on speed is decided or the time is spent; samples, seconds, and why it ended."""
    samples: list[Sample] = []
    started, budget, first = (
        time.monotonic(),
        60 * recipe.bench.minutes,
        first_look(recipe.bench.min_blocks),
    )
    with task(f"timing {len(arms)} arms x {len(cells)} sizes, samples") as progress:
        for block in range(1_000_000):
            samples += _block(workers, arms, cells, heldout, runs, block, raw, progress)
            done, spent = block + 1, time.monotonic() - started
            if is_look(done, first=first):
                gates = figures.timing_gates(samples, quality, shipped, arms, recipe)
                if all(gate.status != "undecided" for gate in gates):
                    return samples, spent, "decided"
            if spent >= budget and done >= recipe.bench.min_blocks:
                return samples, spent, "time spent"
    raise AssertionError("unreachable")


def _block(
    workers: Workers,
    arms: Sequence[Arm],
    cells: Sequence[Cell],
    heldout: Examples,
    runs: Mapping[tuple[str, Cell], int],
    block: int,
    raw: IO[str],
    progress: Task,
) -> list[Sample]:
    """Every arm twice on every cell, in mirrored order."""
    samples = []
    for place, cell in enumerate(cells):
        ids = _batch(heldout, cell, block)
        for position, arm in enumerate(order(arms, block * len(cells) + place)):
            time.sleep(_PAUSE)
            count = runs[arm.id, cell]
            seconds = workers[arm].ask("time", ids=ids, runs=count)["seconds"] / count
            samples.append(Sample(arm.id, block, position, cell, seconds))
            row = {
                "event": "sample",
                "arm": arm.id,
                "block": block,
                "position": position,
                **vars(cell),
            }
            raw.write(json.dumps(row | {"runs": count, "seconds": seconds}) + "\n")
            progress.advance()
    raw.flush()
    return samples


# Exports by themselves -------------------------------------------------------------------------------------------


def time_encoders(
    exports: Sequence[tuple[Path, str]], *, out: Path, bench: EncoderBench
) -> list[float]:
    """See `serve_bench.time_encoders`."""
    cell, arms = Cell(1, max(bench.lengths)), []
    for run, form in exports:
        onnx = open_artifact(run / "onnx", kind="onnx")
        size, spec = (
            int(onnx.result["forms"][form]["bytes"]),
            {"artifact": str(onnx.path), "form": form},
        )
        arms.append(
            Arm(f"{run.name}:{form}", f"{run.name} {form}", "form", "onnxruntime", size, spec)
        )
    student = exports[0][0] / "student"
    _require_context(arms, [cell], student / "model")
    heldout, threads = load_examples(student / EXAMPLES), bench.threads or available_cores()
    out.mkdir(parents=True, exist_ok=True)
    samples: list[Sample] = []
    with (
        Workers(out, threads=threads, module="serve_bench.measure.encoder_worker") as workers,
        (out / SAMPLES).open("w") as raw,
    ):
        for arm in arms:
            workers.start(arm)
        runs, _ = _warm(workers, arms, [cell], heldout, raw)
        started, block = time.monotonic(), 0
        with task(f"timing {len(arms)} exports, samples") as progress:
            while block < bench.min_blocks or time.monotonic() - started < 60 * bench.minutes:
                samples += _block(workers, arms, [cell], heldout, runs, block, raw, progress)
                block += 1
    return [1e3 * float(np.median(figures.by_block(samples, arm.id))) for arm in arms]
