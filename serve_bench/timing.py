"""The order of a measurement and its clock: open and warm up every arm, time mirrored blocks until the gates are decided,
then score what was timed. Figures are computed elsewhere, from the raw samples this writes.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from limbeck.artifact import Artifact, available_cores, find_artifact, host, open_artifact, versions, write_artifact
from limbeck.errors import ArtifactError, DataError
from limbeck.heldout import HELDOUT, Blocks, load_heldout
from limbeck.progress import say, task
from limbeck.recipe import Recipe, fingerprint
from serve_bench import figures
from serve_bench.arms import Arm, Worker, Workers, context_of, list_arms
from serve_bench.figures import ENVIRONMENT, QUALITY, SAMPLES, Reference, Sample
from serve_bench.gates import judge
from serve_bench.quality import measure_quality
from serve_bench.stats import is_look

_VERSION = 1  # of the stage: raise it when the same inputs would be measured otherwise

_WARM_TOKENS = 16  # of a warm-up generation after the first, which is as long as the timed ones
_WARM_WINDOW, _WARM_SPREAD, _WARM_MOST = 3, 1.10, 10  # steady: the last three within 10 %; given up after ten
_PAUSE = 0.02  # seconds before a generation, for the last arm's threads to stop spinning


def measure(*, onnx: Path, student: Path, out: Path, recipe: Recipe) -> Artifact:
    """See `serve_bench.measure`."""
    exported, trained = open_artifact(onnx, kind="onnx"), open_artifact(student, kind="student")
    if exported.manifest["parents"].get("student") != trained.digest:
        raise ArtifactError(f"{onnx} was not made from {student}; run the export stage again.")
    parents = {"onnx": exported.digest, "student": trained.digest}
    asked = {part: getattr(recipe, part).model_dump(mode="json") for part in ("bench", "gates")}
    key = fingerprint({"stage": "bench", "version": _VERSION, "asked": asked, "parents": parents, "host": host()})
    if found := find_artifact(out, kind="bench", key=key):
        return found

    arms = list_arms(onnx=exported, student=trained)
    require_context(arms, recipe, student / "model")
    heldout = load_heldout(trained.path / HELDOUT)
    threads = recipe.bench.threads or available_cores()
    reference = figures.reference_of(recipe, str(exported.result["shipped"]), arms)
    work = out.parent / f".{out.name}.work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        with write_artifact(out, kind="bench", key=key, parents=parents, recipe=recipe) as draft:
            environment = {"host": host(), "threads": threads, "versions": versions(), **_machine(), "before": _load()}
            with Workers(work, threads=threads) as workers, (draft.folder / SAMPLES).open("w") as raw:
                steady = open_and_warm(workers, arms, heldout, recipe, raw)
                samples, seconds, stopped = time_blocks(workers, reference, heldout, recipe, raw)
                environment["after"] = _load()
                workers.stop([reference.twin])
                quality = measure_quality(
                    workers, arms, heldout, vocabulary=_shared_vocabulary(workers, arms), folder=work
                )
                environment["arms"] = {
                    arm.id: {
                        "import_s": workers[arm].opened["import_s"],
                        "load_s": workers[arm].opened["load_s"],
                        "facts": workers[arm].opened["facts"],
                        **steady[arm.id],
                    }
                    for arm in arms
                    if arm.scored
                } | {reference.twin.id: steady[reference.twin.id]}
            environment |= {"blocks": samples[-1].block + 1, "timed_s": seconds, "stopped": stopped}
            environment["prompt_source"] = "held-out text, another window of another domain in every block"
            shutil.copyfile(trained.path / HELDOUT, draft.folder / HELDOUT)  # so that a replay needs no student
            (draft.folder / QUALITY).write_text(json.dumps(quality))
            (draft.folder / ENVIRONMENT).write_text(json.dumps(environment, indent=1))
            draft.result = figures.summary(samples, quality, environment, reference, recipe)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return open_artifact(out, kind="bench", verify=False)


def require_context(arms: Sequence[Arm], recipe: Recipe, student: Path) -> None:
    """Raise `DataError` when prompt and answer do not fit into the shortest context."""
    wanted = recipe.bench.prompt_tokens + recipe.bench.new_tokens
    for arm in arms:
        folder = Path(arm.spec["model"]) if arm.runtime == "torch" else student
        context = context_of(folder)
        if context is not None and wanted > context:
            raise DataError(
                f"bench.prompt_tokens ({recipe.bench.prompt_tokens}) and bench.new_tokens ({recipe.bench.new_tokens}) come "
                f"to {wanted} tokens; the context of {arm.label} is {context}. Make either smaller."
            )


def prompt(heldout: Mapping[str, Blocks], block: int, tokens: int) -> list[int]:
    """The prompt of a block: a window of held-out text, blocks joined, read from its start again where it ends."""
    blocks = heldout[sorted(heldout)[block % len(heldout)]]
    text = np.concatenate([row[:length] for row, length in zip(blocks.input_ids, blocks.lengths, strict=True)])
    return [int(token) for token in np.resize(np.roll(text, -tokens * (block // len(heldout))), tokens)]


def order(arms: Sequence[Arm], block: int) -> list[Arm]:
    """Arms of one block, there and back; who stands where is drawn anew for each block."""
    there = [arms[int(i)] for i in np.random.default_rng((0, block)).permutation(len(arms))]
    return [*there, *reversed(there)]


def open_and_warm(
    workers: Workers, arms: Sequence[Arm], heldout: Mapping[str, Blocks], recipe: Recipe, raw: IO[str]
) -> dict[str, dict[str, Any]]:
    """Start every arm and run it until it is steady. Peak memory is read after one full generation, before scoring."""
    steady = {}
    with task("opening and warming up", len(arms)) as progress:
        for arm in arms:
            worker = workers.start(arm)
            steady[arm.id] = _warm(worker, heldout, recipe, raw)
            if not steady[arm.id]["steady"]:
                say(f"  {arm.label}: still not steady after {_WARM_MOST} generations; its figures are marked")
            progress.advance()
    return steady


def time_blocks(
    workers: Workers, reference: Reference, heldout: Mapping[str, Blocks], recipe: Recipe, raw: IO[str]
) -> tuple[list[Sample], float, str]:
    """Time mirrored blocks until every timing gate is decided or the time is spent; samples, seconds, and why it ended."""
    samples: list[Sample] = []
    started = time.monotonic()
    budget, first = 60 * recipe.bench.minutes, reference.first_look
    shipped = reference.shipped_arm
    with task(f"timing {len(reference.arms)} arms, generations") as progress:
        for block in range(1_000_000):
            tokens = prompt(heldout, block, recipe.bench.prompt_tokens)
            for position, arm in enumerate(order(reference.arms, block)):
                time.sleep(_PAUSE)
                sample = _generate(workers[arm], arm, tokens, recipe.bench.new_tokens, raw, block, position)
                samples.append(sample)
                rates = {shipped.label: 1 / sample.tpot} if arm.id == shipped.id else {}
                progress.advance(1, **rates)
            raw.flush()
            done, seconds = block + 1, time.monotonic() - started
            if is_look(done, first=first):
                verdict = judge(recipe.gates, figures.timing_evidence(samples, reference), timing_only=True)
                if all(gate.status != "undecided" for gate in verdict.gates):
                    return samples, seconds, "decided"
            if seconds >= budget and done >= recipe.bench.min_blocks:
                return samples, seconds, "time spent"
    raise AssertionError("unreachable")


def _generate(
    worker: Worker, arm: Arm, tokens: list[int], new_tokens: int, raw: IO[str], block: int, position: int
) -> Sample:
    answer = worker.ask("generate", prompt=tokens, new_tokens=new_tokens)
    at = tuple(round(t - answer["started"], 7) for t in answer["at"])
    assert len(at) == new_tokens, f"{arm.id}: {len(at)} tokens instead of {new_tokens}"
    row = {"event": "sample", "arm": arm.id, "block": block, "position": position, "prompt_tokens": len(tokens)}
    # The first block's tokens are kept, to see that two forms or two copies do the same work.
    row |= {"started": answer["started"], "at": at, **({"tokens": answer["tokens"]} if block == 0 else {})}
    raw.write(json.dumps(row) + "\n")
    return Sample(arm.id, block, position, at)


def _warm(worker: Worker, heldout: Mapping[str, Blocks], recipe: Recipe, raw: IO[str]) -> dict[str, Any]:
    tokens = prompt(heldout, 0, recipe.bench.prompt_tokens)
    peak, speeds = 0, list[float]()
    for run in range(_WARM_MOST + 1):
        new_tokens = recipe.bench.new_tokens if run == 0 else min(recipe.bench.new_tokens, _WARM_TOKENS)
        answer = worker.ask("generate", prompt=tokens, new_tokens=new_tokens)
        at = tuple(round(t - answer["started"], 7) for t in answer["at"])
        raw.write(json.dumps({"event": "warm-up", "arm": worker.arm.id, "run": run, "at": at}) + "\n")
        if run == 0:
            peak = answer["peak_rss_bytes"]
            continue
        speeds.append(Sample(worker.arm.id, 0, 0, at).tpot)
        window = speeds[-_WARM_WINDOW:]
        if len(window) == _WARM_WINDOW and max(window) <= _WARM_SPREAD * min(window):
            return {"peak_rss_bytes": peak, "steady": True, "warm_up_runs": run + 1}
    return {"peak_rss_bytes": peak, "steady": False, "warm_up_runs": _WARM_MOST + 1}


def _shared_vocabulary(workers: Workers, arms: Sequence[Arm]) -> int:
    """Rows that every arm's head has; some pad theirs."""
    return min(int(workers[arm].opened["facts"]["vocabulary"]) for arm in arms if arm.scored)


def _machine() -> dict[str, Any]:
    """What changes speed and is not in `limbeck.artifact.host`: the governor and a container's limit, where readable."""
    return {
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "cgroup_cpu_max": _read("/sys/fs/cgroup/cpu.max"),
    }


def _load() -> dict[str, Any]:
    return {"load_average": [round(value, 2) for value in os.getloadavg()], "at": time.time()}


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
