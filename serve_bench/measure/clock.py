"""The order of a measurement and its clock: memory, open and warm up every arm, time mirrored blocks until the gates are
decided, the other scenarios, then score what was timed. Figures are computed elsewhere, from the raw samples this writes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from limbeck.contract.artifact import Artifact, find_artifact, open_artifact, write_artifact
from limbeck.contract.errors import ArtifactError, DataError
from limbeck.contract.heldout import HELDOUT, Blocks, load_heldout
from limbeck.contract.machine import available_cores, host
from limbeck.contract.progress import say, task
from limbeck.contract.recipe import Bench, Gates, Recipe, fingerprint
from serve_bench.judge import figures
from serve_bench.judge.figures import ENVIRONMENT, QUALITY, SAMPLES, Reference, Sample
from serve_bench.judge.gates import judge
from serve_bench.judge.quality import measure_quality
from serve_bench.judge.stats import is_look
from serve_bench.measure import fairness, generation, machine
from serve_bench.measure.arms import Arm, Worker, Workers, context_of, list_arms
from serve_bench.measure.memory import measure_memory
from serve_bench.measure.roofline import graph_weight_bytes, measure_roofline
from serve_bench.measure.scenarios import cold, load, offline
from serve_bench.measure.scenarios import figures as scenarios
from serve_bench.measure.sentinel import LIMIT, Sentinel
from serve_bench.tell.terminal import live_table

_VERSION = 2  # of the stage: raise it when the same inputs would be measured otherwise

# Steady: after so many generations and seconds at least, the last three within 10 %. Given up after so many of both.
_WARM_LEAST, _WARM_SECONDS, _WARM_WINDOW, _WARM_SPREAD = 3, 0.5, 3, 1.10
_WARM_MOST, _WARM_PATIENCE = 10, 3.0
_WARM_TOKENS = 16  # of a warm-up generation after the first, which is as long as the timed ones
_PAUSE = 0.02  # seconds before a generation, for the last arm's threads to stop spinning

Prompts = Callable[[int, int], list[int]]  # of a block, so many tokens


@dataclass(frozen=True)
class Timed:
    """What timing blocks came to."""

    samples: list[Sample]
    seconds: float
    stopped: str  # why: `decided` or `time spent`
    void: int  # blocks timed again
    disturbed: (
        bool  # whether blocks were kept that the sentinel complained of, because too many were
    )


def measure(*, onnx: Path, student: Path, out: Path, recipe: Recipe) -> Artifact:
    """See `serve_bench.measure`."""
    exported, trained = open_artifact(onnx, kind="onnx"), open_artifact(student, kind="student")
    if exported.manifest["parents"].get("student") != trained.digest:
        raise ArtifactError(f"{onnx} was not made from {student}; run the export stage again.")
    parents = {"onnx": exported.digest, "student": trained.digest}
    asked = {part: getattr(recipe, part).model_dump(mode="json") for part in ("bench", "gates")}
    key = fingerprint(
        {"stage": "bench", "version": _VERSION, "asked": asked, "parents": parents, "host": host()}
    )
    if found := find_artifact(out, kind="bench", key=key):
        return found

    recovery = exported.result.get("recovery")
    if recovery is not None and "blocks" not in recovery:
        raise ArtifactError(
            f"{onnx}: was recovered by an older version; run the export stage again."
        )
    bench = recipe.bench
    arms = list_arms(onnx=exported, student=trained, bench=bench)
    require_context(arms, recipe, student / "model")
    if (server := bench.scenario("server")) is not None:
        load.require_server(server, exported.path)
    heldout = load_heldout(trained.path / HELDOUT)
    threads = bench.threads or available_cores()
    reference = figures.reference_of(recipe, str(exported.result["shipped"]), arms)

    def prompts(block: int, tokens: int) -> list[int]:
        return prompt(heldout, block, tokens)

    work = out.parent / f".{out.name}.work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        with write_artifact(out, kind="bench", key=key, parents=parents, recipe=recipe) as draft:
            environment = before(bench, arms, prompts, threads=threads, folder=work)
            with (draft.folder / SAMPLES).open("w") as raw:
                with Workers(work, threads=threads) as workers:
                    samples = single(
                        workers, reference, prompts, bench, recipe.gates, raw, environment
                    )
                    compared = scenarios.compared(reference, samples)
                    if (grid := bench.scenario("offline")) is not None:
                        offline.measure_offline(workers, compared, prompts, grid, raw)
                    environment["after"] = machine.load()
                    workers.stop(arm for arm in workers.running if not arm.scored)
                    vocabulary = min(
                        int(workers[arm].opened["facts"]["vocabulary"]) for arm in workers.running
                    )
                    quality = measure_quality(
                        workers, arms, heldout, vocabulary=vocabulary, folder=work
                    )
                elsewhere(
                    bench,
                    compared,
                    exported,
                    prompts,
                    raw,
                    environment,
                    threads=threads,
                    folder=work,
                )
            for arm in arms:
                if (graph := _graph(arm, exported)) is not None:
                    environment["arms"][arm.id]["weight_bytes"] = graph_weight_bytes(graph)
            environment["prompt_source"] = (
                "held-out text, another window of another domain in every block"
            )
            if recovery is not None:
                # The student as it was distilled has no graph here; its losses on the same blocks travel in the manifest,
                # with those of what ships, both over the whole vocabulary.
                quality["recovery"] = recovery["blocks"]
            quality["generation"] = generation.of_run(
                figures.read_rows(draft.folder / SAMPLES),
                reference,
                continuation=lambda block: prompt(
                    heldout, block, bench.prompt_tokens, then=bench.new_tokens
                ),
                folder=exported.path,
            )
            shutil.copyfile(
                trained.path / HELDOUT, draft.folder / HELDOUT
            )  # so that a replay needs no student
            (draft.folder / QUALITY).write_text(json.dumps(quality))
            (draft.folder / ENVIRONMENT).write_text(json.dumps(environment, indent=1))
            draft.result = figures.summary(samples, quality, environment, reference, recipe)
            draft.result |= scenarios.summary(
                figures.read_rows(draft.folder / SAMPLES), environment, bench, arms
            )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return open_artifact(out, kind="bench", verify=False)


def require_context(arms: Sequence[Arm], recipe: Recipe, student: Path) -> None:
    """Raise `DataError` when a prompt and its answer do not fit into the shortest context."""
    bench, wanted = recipe.bench, {("bench", recipe.bench.prompt_tokens, recipe.bench.new_tokens)}
    if (grid := bench.scenario("offline")) is not None:
        wanted |= {("offline", max(grid.prompts), max(grid.outputs))}
    for arm in arms:
        if arm.runtime == "openai":
            continue
        folder = Path(arm.spec["model"]) if arm.runtime.startswith("torch") else student
        context = context_of(folder)
        for where, asked, new in wanted:
            if context is None or asked + new <= context:
                continue
            names = ("bench.prompt_tokens", "bench.new_tokens")
            if where == "offline":
                names = ("the longest of offline's prompts", "of its outputs")
            raise DataError(
                f"{names[0]} ({asked}) and {names[1]} ({new}) come to {asked + new} tokens; the context of {arm.label} is "
                f"{context}. Make either smaller."
            )


def prompt(heldout: Mapping[str, Blocks], block: int, tokens: int, *, then: int = 0) -> list[int]:
    """The prompt of a block: a window of held-out text, blocks joined, read from its start again where it ends.

    With ``then`` it is the so many tokens that follow the prompt.
    """
    blocks = heldout[sorted(heldout)[block % len(heldout)]]
    text = np.concatenate(
        [row[:length] for row, length in zip(blocks.input_ids, blocks.lengths, strict=True)]
    )
    window = np.resize(np.roll(text, -tokens * (block // len(heldout))), tokens + then)
    return [int(token) for token in (window[tokens:] if then else window)]


def order(arms: Sequence[Arm], block: int) -> list[Arm]:
    """Arms of one block, there and back; who stands where is drawn anew for each block."""
    there = [arms[int(i)] for i in np.random.default_rng((0, block)).permutation(len(arms))]
    return [*there, *reversed(there)]


def before(
    bench: Bench, arms: Sequence[Arm], prompts: Prompts, *, threads: int, folder: Path
) -> dict[str, Any]:
    """What is measured before any arm is timed: the machine, its bandwidth, and each arm's memory and energy."""
    device = str(arms[0].spec.get("device", "cpu"))
    environment = {**machine.fingerprint(threads=threads, device=device), "before": machine.load()}
    environment["roofline"] = measure_roofline(threads=threads, device=device)
    own = [arm for arm in arms if arm.runtime != "openai" and arm.role != "twin"]
    watched = measure_memory(
        own, prompts(0, bench.prompt_tokens), bench.new_tokens, threads=threads, folder=folder
    )
    environment["arms"] = {arm.id: dict(watched.get(arm.id, {})) for arm in arms}
    for twin in (
        arm for arm in arms if arm.role == "twin" and arm.runtime != "openai"
    ):  # the same artifact, so the same memory
        environment["arms"][twin.id] |= watched[
            next(arm.id for arm in own if arm.spec == twin.spec)
        ]
    return environment


def single(
    workers: Workers,
    reference: Reference,
    prompts: Prompts,
    bench: Bench,
    gates: Gates | None,
    raw: IO[str],
    environment: dict[str, Any],
) -> list[Sample]:
    """Open and warm up every arm, time blocks, and write down in ``environment`` how that went."""
    steady = open_and_warm(workers, reference.arms, prompts, bench, raw)
    for arm in reference.arms:
        opened = workers[arm].opened
        environment["arms"][arm.id] |= {
            **opened,
            **steady[arm.id],
            "weight_bytes": opened["facts"].get("weight_bytes"),
        }
    environment["fairness"] = fairness.manifest(
        {arm.id: workers[arm].opened["facts"] for arm in reference.arms},
        prompt_tokens=bench.prompt_tokens,
        new_tokens=bench.new_tokens,
        prompts=[prompts(block, bench.prompt_tokens) for block in range(bench.min_blocks)],
    )
    sentinel = Sentinel(environment["threads"])
    try:
        timed = time_blocks(workers, reference, prompts, bench, gates, raw, sentinel)
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
    return timed.samples


def elsewhere(
    bench: Bench,
    compared: Sequence[Arm],
    exported: Artifact | None,
    prompts: Prompts,
    raw: IO[str],
    environment: dict[str, Any],
    *,
    threads: int,
    folder: Path,
) -> None:
    """The scenarios that start processes of their own, once the arms' are gone."""
    if (starts := bench.scenario("cold")) is not None:
        tokens = prompts(0, bench.prompt_tokens)
        cold.measure_cold(compared, tokens, starts, raw, threads=threads, folder=folder)
    if (server := bench.scenario("server")) is not None:
        sizes = load.Sizes(bench.prompt_tokens, bench.new_tokens)
        environment["server"] = load.measure_server(
            server,
            exported.path if exported else None,
            prompts,
            sizes,
            raw,
            threads=threads,
            folder=folder,
        )


def open_and_warm(
    workers: Workers, arms: Sequence[Arm], prompts: Prompts, bench: Bench, raw: IO[str]
) -> dict[str, dict[str, Any]]:
    """Start every arm and run it until it is steady; by arm id, whether it became so and what it took."""
    steady = {}
    with task("opening and warming up", len(arms)) as progress:
        for arm in arms:
            steady[arm.id] = warm(
                workers.start(arm), prompts(0, bench.prompt_tokens), bench.new_tokens, raw
            )
            if not steady[arm.id]["steady"]:
                say(
                    f"  {arm.label}: not steady after {steady[arm.id]['warm_up_runs']} generations; its figures are marked"
                )
            progress.advance()
    return steady


def time_blocks(
    workers: Workers,
    reference: Reference,
    prompts: Prompts,
    bench: Bench,
    gates: Gates | None,
    raw: IO[str],
    sentinel: Sentinel,
) -> Timed:
    """Time mirrored blocks until every timing gate is decided or the time is spent; without ``gates`` it always is.

    A block that the sentinel complains of is void and timed again, as long as no more are void than the fewest that are
    wanted; after that the machine is called disturbed, and what it gives is kept.
    """
    samples, void, disturbed = list[Sample](), 0, False
    started, last = time.monotonic(), sentinel.read()
    budget, first, done = 60 * bench.minutes, reference.first_look, 0
    sizes = {
        "prompt_tokens": bench.prompt_tokens,
        "new_tokens": bench.new_tokens,
        "threads": sentinel.threads,
    }
    with live_table(reference, **sizes) as show:
        for block in range(1_000_000):
            tokens = prompts(block, bench.prompt_tokens)
            rows = []
            for position, arm in enumerate(order(reference.arms, block)):
                time.sleep(_PAUSE)
                rows.append(_generate(workers[arm], tokens, bench.new_tokens, block, position))
            raw.write(json.dumps({"event": "sentinel", "block": block, "seconds": last}) + "\n")
            previous, last = last, sentinel.read()
            complaint = sentinel.complaint(previous, last)
            if complaint and void < bench.min_blocks:
                void += 1
                rows = [
                    row | {"event": "void", "of": row["event"], "why": complaint} for row in rows
                ]
            else:
                disturbed |= complaint is not None
                samples += map(Sample.of, rows)
                done += 1
            raw.writelines(json.dumps(row) + "\n" for row in rows)
            raw.flush()
            seconds = time.monotonic() - started
            show(samples, f"{done} blocks, {void} void, {seconds:.0f} of {budget:.0f} s")
            if gates is not None and rows[0]["event"] == "sample" and is_look(done, first=first):
                verdict = judge(
                    gates, figures.timing_evidence(samples, reference), timing_only=True
                )
                if all(gate.status != "undecided" for gate in verdict.gates):
                    return Timed(samples, seconds, "decided", void, disturbed)
            if seconds >= budget and done >= bench.min_blocks:
                return Timed(samples, seconds, "time spent", void, disturbed)
    raise AssertionError("unreachable")


def _generate(
    worker: Worker, tokens: list[int], new_tokens: int, block: int, position: int
) -> dict[str, Any]:
    answer = worker.generate(tokens, new_tokens)
    row = {
        "event": "sample",
        "arm": worker.arm.id,
        "block": block,
        "position": position,
        "prompt_tokens": len(tokens),
    }
    row |= {"started": answer["started"], "at": answer["at"]}
    if answer["device_s"] is not None:
        row["device_s"] = answer["device_s"]
    return row | {"tokens": answer["tokens"]}


def warm(worker: Worker, tokens: list[int], new_tokens: int, raw: IO[str]) -> dict[str, Any]:
    """Run a worker until its time per token is steady, or patience ends."""
    speeds, started = list[float](), time.monotonic()
    for run in range(1_000_000):
        answer = worker.generate(tokens, new_tokens if run == 0 else min(new_tokens, _WARM_TOKENS))
        raw.write(
            json.dumps({"event": "warm-up", "arm": worker.arm.id, "run": run, "at": answer["at"]})
            + "\n"
        )
        seconds = time.monotonic() - started
        if run == 0:
            started = time.monotonic()  # the first one compiles, allocates and reads pages
            continue
        speeds.append(Sample(worker.arm.id, 0, 0, tuple(answer["at"])).tpot)
        window, enough = (
            speeds[-_WARM_WINDOW:],
            len(speeds) >= _WARM_LEAST and seconds >= _WARM_SECONDS,
        )
        steady = enough and max(window) <= _WARM_SPREAD * min(window)
        if steady or (len(speeds) >= _WARM_MOST and seconds >= _WARM_PATIENCE):
            return {"steady": steady, "warm_up_runs": run + 1, "warm_up_s": seconds}
    raise AssertionError("unreachable")


def _graph(arm: Arm, onnx: Artifact) -> Path | None:
    """The graph that an arm of an ``onnx`` artifact runs."""
    if not arm.runtime.startswith("onnxruntime"):
        return None
    form = arm.spec.get("form") or onnx.result["shipped"]
    return Path(onnx.path / onnx.result["forms"][form]["graph"])
