"""The cold scenario: time from nothing to the first token, in a fresh process every time."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from limbeck.contract.progress import task
from limbeck.contract.recipe import ColdScenario
from limbeck.contract.results.bench import Arm
from serve_bench.measure.workers import Worker


def measure_cold(
    arms: Sequence[Arm],
    prompt: list[int],
    starts: ColdScenario,
    raw: IO[str],
    *,
    threads: int,
    folder: Path,
) -> None:
    """Start every arm anew, in an order drawn for each block, until repeats or minutes are spent.

    Model files are read once before, so that they lie in the page cache for all. ``folder``
    receives the processes' logs.
    """
    started, budget = time.monotonic(), 60 * starts.minutes
    with task("cold starts", (starts.repeats + 1) * len(arms)) as progress:
        for block in range(-1, starts.repeats):  # the first is not counted
            if block > 0 and time.monotonic() - started >= budget:
                return
            for position, index in enumerate(
                np.random.default_rng((1, block + 1)).permutation(len(arms))
            ):
                spans = start(arms[int(index)], prompt, threads=threads, log=folder / "cold.log")
                if block >= 0:
                    row = {
                        "event": "cold",
                        "arm": arms[int(index)].id,
                        "block": block,
                        "position": position,
                        **spans,
                    }
                    raw.write(json.dumps(row) + "\n")
                progress.advance(1)
            raw.flush()


def start(arm: Arm, prompt: list[int], *, threads: int, log: Path) -> dict[str, float]:
    """Seconds of each span of one start, from the interpreter to the second token."""
    worker = Worker(arm, threads=threads, log=log)
    try:
        ready = worker.ask("ready")["at"]  # of the same monotonic clock as ours
        worker.open(threads=threads)
        first, second = worker.generate(prompt, 2)["at"]
    finally:
        worker.kill()
    spans = {
        "start_s": ready - worker.spawned,
        "import_s": worker.opened["import_s"],
        "load_s": worker.opened["load_s"],
    }
    spans |= {"first_token_s": first, "second_token_s": second - first}
    return {name: round(seconds, 6) for name, seconds in spans.items()}
