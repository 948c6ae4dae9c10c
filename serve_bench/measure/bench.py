"""The order of a measurement: memory, open and warm up every arm, time blocks, further scenarios,
quality.

The same for every task. Figures are computed from the raw samples that this writes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from limbeck.contract.artifact import Artifact, find_artifact, open_artifact, write_artifact
from limbeck.contract.errors import ArtifactError
from limbeck.contract.machine import available_cores, host
from limbeck.contract.progress import say, task
from limbeck.contract.recipe import fingerprint
from limbeck.contract.results.bench import Arm
from serve_bench.judge.figures import ENVIRONMENT, SAMPLES, Sample, read_rows
from serve_bench.judge.task import Measured, judge_bench
from serve_bench.measure import fairness
from serve_bench.measure.clock import Limits, Timed, time_blocks
from serve_bench.measure.host import machine
from serve_bench.measure.host.roofline import measure_roofline
from serve_bench.measure.host.sentinel import LIMIT, Sentinel
from serve_bench.measure.live import Live, live_table
from serve_bench.measure.memory import measure_memory
from serve_bench.measure.task import MeasuringTask
from serve_bench.measure.units import Unit
from serve_bench.measure.workers import Workers

Units = Callable[[int], Sequence[Unit]]


def measure(*, onnx: Path, student: Path, out: Path, asked: MeasuringTask) -> Artifact:
    """See `serve_bench.bench`."""
    exported, trained = open_artifact(onnx, kind="onnx"), open_artifact(student, kind="student")
    if exported.manifest["parents"].get("student") != trained.digest:
        raise ArtifactError(f"{onnx} was not made from {student}; run the export stage again.")
    parents, recipe = {"onnx": exported.digest, "student": trained.digest}, asked.recipe
    wanted = {part: getattr(recipe, part).model_dump(mode="json") for part in ("bench", "gates")}
    key = fingerprint(
        {
            "stage": "bench",
            "task": asked.name,
            "version": asked.version,
            "asked": wanted,
            "parents": parents,
            "host": host(),
        }
    )
    if found := find_artifact(out, kind="bench", key=key):
        shutil.rmtree(_scratch_folder(out), ignore_errors=True)  # a kill can leave it
        return found

    arms = asked.open(exported, trained)
    threads = asked.threads or available_cores()
    reference = asked.reference(str(exported.result["shipped"]), arms)
    with (
        scratch(out) as work,
        write_artifact(out, kind="bench", key=key, parents=parents, recipe=recipe) as draft,
    ):
        with (draft.folder / SAMPLES).open("w", encoding="utf-8") as raw:
            with Workers(work, threads=threads, task=asked.name) as workers:
                environment = before(workers, arms, asked.units(0), threads=threads)
                asked.before_timing(workers, arms, reference, draft.folder, work)
                timed = single(
                    workers,
                    arms,
                    asked.units,
                    Limits(asked.min_blocks, asked.minutes, reference.first_look),
                    raw,
                    environment,
                    asked=asked.protocol(),
                    read=asked.read_sample,
                    decided=lambda samples: asked.decided(samples, reference),
                    live=live_table(reference, *asked.live(threads), threads=threads),
                )
                environment["after"] = machine.load()
                asked.after_timing(workers, timed.samples, raw, draft.folder, work)
            asked.alone(raw, environment, work)
        rows = read_rows(draft.folder / SAMPLES)
        asked.finish(rows, environment, draft.folder)
        (draft.folder / ENVIRONMENT).write_text(json.dumps(environment, indent=1), encoding="utf-8")
        samples = [asked.read_sample(row) for row in rows if row["event"] == "sample"]
        measured = Measured(rows, samples, environment, asked.quality, reference, {})
        draft.result = judge_bench(measured, asked).result.as_json()
    return open_artifact(out, kind="bench", verify=False)


def _scratch_folder(out: Path) -> Path:
    return out.parent / f".{out.name}.work"


@contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """An empty folder beside ``out`` for logs and intermediate files, deleted in the end."""
    work = _scratch_folder(out)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def before(
    workers: Workers, arms: Sequence[Arm], units: Sequence[Unit], *, threads: int
) -> dict[str, Any]:
    """Measure before timing: the machine, its bandwidth, and each arm's memory and energy.

    Leaves every arm open.
    """
    started, device = time.monotonic(), str(arms[0].spec.get("device", "cpu"))
    environment = {
        **machine.fingerprint(threads=threads, device=device),
        "before": machine.load_before(),
    }
    environment["roofline"] = measure_roofline(threads=threads, device=device)
    own = [arm for arm in arms if arm.runtime != "openai" and arm.role != "twin"]
    watched = measure_memory(workers, own, units[-1])
    environment["arms"] = {arm.id: dict(watched.get(arm.id, {})) for arm in arms}
    for twin in (arm for arm in arms if arm.role == "twin" and arm.runtime != "openai"):
        original = next(arm.id for arm in own if arm.spec == twin.spec)
        environment["arms"][twin.id] |= watched[original]  # the same artifact, so the same memory
    environment["memory_pass_s"] = time.monotonic() - started
    open_all(workers, arms, environment)
    return environment


def open_all(workers: Workers, arms: Sequence[Arm], environment: dict[str, Any]) -> None:
    """Start every arm that is not open yet, and write down the facts of each."""
    running = workers.running
    with task("opening", len(arms)) as progress:
        for arm in arms:
            opened = (workers[arm] if arm in running else workers.start(arm)).opened
            weight_bytes = opened["facts"].get("weight_bytes")
            environment["arms"][arm.id] |= {**opened, "weight_bytes": weight_bytes}
            progress.advance()


def single(
    workers: Workers,
    arms: Sequence[Arm],
    units: Units,
    limits: Limits,
    raw: IO[str],
    environment: dict[str, Any],
    *,
    asked: dict[str, Any],
    read: Callable[[Any], Sample],
    decided: Callable[[Sequence[Sample]], bool] | None,
    live: Live,
) -> Timed:
    """Warm up every arm, time blocks, and write down in ``environment`` how that went."""
    warm_all(workers, arms, units(0), raw, environment)
    prompts = [row for block in range(limits.min_blocks) for u in units(block) for row in u.prompts]
    facts = {arm.id: dict(workers[arm].opened["facts"]) for arm in arms}
    for arm in arms:
        if arm.token_rate is not None:  # another tokenizer, so the prompts are no text of its own
            facts[arm.id]["vocabulary"] = None
    environment["fairness"] = fairness.manifest(facts, prompts=prompts, **asked)
    sentinel = Sentinel(environment["threads"])
    try:
        with live as show:
            timed = time_blocks(
                workers,
                arms,
                units,
                limits,
                raw,
                read=read,
                sentinel=sentinel,
                decided=decided,
                show=show,
            )
    finally:
        sentinel.close()
    environment["sentinel"] = {
        "threads": sentinel.threads,
        "median_s": sentinel.median,
        "limit": LIMIT,
    }
    environment["blocks"] = len({sample.block for sample in timed.samples})
    environment |= {"void_blocks": timed.void, "disturbed": timed.disturbed}
    environment |= {"timed_s": timed.seconds, "stopped": timed.stopped}
    environment["over_budget"] = timed.over_budget
    return timed


def warm_all(
    workers: Workers,
    arms: Sequence[Arm],
    units: Sequence[Unit],
    raw: IO[str],
    environment: dict[str, Any],
) -> None:
    """Run every arm on every unit until it is steady; how that went goes to ``environment``."""
    with task("warming up", len(arms) * len(units)) as progress:
        for arm in arms:
            found = []
            for unit in units:
                found.append(unit.warm(workers[arm], raw))
                progress.advance()
            steady, runs = all(f["steady"] for f in found), sum(f["warm_up_runs"] for f in found)
            environment["arms"][arm.id] |= {
                "steady": steady,
                "warm_up_runs": runs,
                "warm_up_s": sum(f["warm_up_s"] for f in found),
            }
            if not steady:
                say(f"  {arm.label}: not steady after {runs} runs; its figures are marked")
