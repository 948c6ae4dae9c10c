"""The offline scenario: tokens a second over batch, prompt and output sizes."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from typing import IO

from limbeck.contract.progress import task
from limbeck.contract.recipe import OfflineScenario
from limbeck.contract.results.bench import Arm
from serve_bench.measure.workers import Workers

Cell = tuple[int, int, int]  # rows of a batch, prompt tokens, generated tokens a row


def cells(grid: OfflineScenario) -> list[Cell]:
    """The grid, smallest work first."""
    return sorted(
        itertools.product(grid.batches, grid.prompts, grid.outputs),
        key=lambda cell: cell[0] * sum(cell[1:]),
    )


def measure_offline(
    workers: Workers,
    arms: Sequence[Arm],
    prompts: Callable[[int, int], list[int]],
    grid: OfflineScenario,
    raw: IO[str],
) -> None:
    """Time mirrored blocks of ``arms`` in every cell, going round the grid until blocks or minutes
    are spent.

    Every row has a prompt of its own, the same for all arms. Rows of samples.jsonl: see
    docs/artifacts.md.
    """
    started, budget, all_cells = time.monotonic(), 60 * grid.minutes, cells(grid)
    with task("throughput, batches", grid.blocks * len(all_cells) * 2 * len(arms)) as progress:
        for batch, prompt_tokens, _ in all_cells:
            for arm in arms:  # memory for this size is taken once, and is no part of any sample
                workers[arm].batch([prompts(row, prompt_tokens) for row in range(batch)], 2)
        for block, (index, cell) in itertools.product(range(grid.blocks), enumerate(all_cells)):
            if block and time.monotonic() - started >= budget:
                return
            batch, prompt_tokens, new_tokens = cell
            rows = [prompts(block * batch + n, prompt_tokens) for n in range(batch)]
            there = arms if (block + index) % 2 == 0 else arms[::-1]
            for position, arm in enumerate([*there, *reversed(there)]):
                answer = workers[arm].batch(rows, new_tokens)
                sizes = {"batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
                place = {"block": block, "position": position, "at": answer["at"]}
                row = {"event": "offline", "arm": arm.id} | sizes | place
                raw.write(json.dumps(row) + "\n")
                progress.advance(1, **{"tokens/s": batch * new_tokens / answer["at"][-1]})
            raw.flush()
