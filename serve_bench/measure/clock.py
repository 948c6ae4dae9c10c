"""The only block loop: every arm is timed twice in mirrored order, block by block, until the gates
are decided.

Knows the order of the work and the clock. A `Unit` is the timed work; figures are computed
elsewhere, from the raw samples.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Protocol

import numpy as np

from limbeck.contract.results.bench import Arm
from serve_bench.judge.figures import Sample
from serve_bench.judge.stats import is_look
from serve_bench.measure.host.sentinel import Sentinel
from serve_bench.measure.units import Unit
from serve_bench.measure.workers import Worker

PAUSE = 0.02  # seconds before a sample, for the last arm's threads to stop spinning
_OVER = 1.5  # times the budget, above which the reason is written down

Row = dict[str, Any]


class Running(Protocol):
    """The open workers, by arm."""

    def __getitem__(self, arm: Arm) -> Worker: ...


@dataclass(frozen=True)
class Limits:
    """How long to go on.

    ``minutes`` counts from the start of timing; ``first_look`` is in blocks.
    """

    min_blocks: int
    minutes: float
    first_look: int


@dataclass(frozen=True)
class Timed:
    """The outcome of timing blocks."""

    samples: list[Sample]
    seconds: float
    stopped: str  # why: `decided` or `time spent`
    void: int  # blocks timed again
    disturbed: bool  # whether disturbed blocks were kept, because too many were
    over_budget: str | None  # why timing took more than 1.5 times its budget


def order(arms: Sequence[Arm], block: int) -> list[Arm]:
    """Arms of one block, there and back; their places are drawn anew for each block."""
    there = [arms[int(i)] for i in np.random.default_rng((0, block)).permutation(len(arms))]
    return [*there, *reversed(there)]


def time_block(
    workers: Running, arms: Sequence[Arm], units: Sequence[Unit], block: int
) -> Iterator[Row]:
    """Every arm twice on every unit, in mirrored order; one row of samples.jsonl each."""
    for place, unit in enumerate(units):
        for position, arm in enumerate(order(arms, block * len(units) + place)):
            time.sleep(PAUSE)
            row = {"event": "sample", "arm": arm.id, "block": block, "position": position}
            yield row | unit.time(workers[arm])


def time_blocks(
    workers: Running,
    arms: Sequence[Arm],
    units: Callable[[int], Sequence[Unit]],
    limits: Limits,
    raw: IO[str],
    *,
    read: Callable[[Mapping[str, Any]], Sample],
    sentinel: Sentinel | None = None,
    decided: Callable[[Sequence[Sample]], bool] | None = None,
    show: Callable[[Sequence[Sample], str], None] | None = None,
) -> Timed:
    """Time blocks until ``decided`` is true at a look, or the time and the fewest blocks are spent.

    The sentinel voids a disturbed block, which is then timed again. At most ``min_blocks`` blocks
    are voided, or half as many once the time is spent; after that the machine counts as disturbed,
    and its blocks are kept.
    """
    samples, void, disturbed, done = list[Sample](), 0, False, 0
    started, budget = time.monotonic(), 60 * limits.minutes
    last = sentinel.read() if sentinel else 0.0
    for block in itertools.count():
        rows = list(time_block(workers, arms, units(block), block))
        seconds, complaint = time.monotonic() - started, None
        if sentinel is not None:
            raw.write(json.dumps({"event": "sentinel", "block": block, "seconds": last}) + "\n")
            previous, last = last, sentinel.read()
            complaint = sentinel.complaint(previous, last)
        # With the budget spent, voids may add half of the fewest blocks: 1.5 times their time in
        # all.
        most = limits.min_blocks if seconds < budget else -(-limits.min_blocks // 2)
        if complaint and void < most:
            void += 1
            rows = [row | {"event": "void", "of": row["event"], "why": complaint} for row in rows]
        else:
            disturbed |= complaint is not None
            samples += map(read, rows)
            done += 1
        raw.writelines(json.dumps(row) + "\n" for row in rows)
        raw.flush()
        seconds = time.monotonic() - started
        if show is not None:
            show(samples, f"{done} blocks, {void} void, {seconds:.0f} of {budget:.0f} s")
        looks = decided is not None and bool(samples) and samples[-1].block == block
        over = _over_budget(seconds, budget, done, void, limits.min_blocks)
        if looks and is_look(done, first=limits.first_look) and decided and decided(samples):
            return Timed(samples, seconds, "decided", void, disturbed, over)
        if seconds >= budget and done >= limits.min_blocks:
            return Timed(samples, seconds, "time spent", void, disturbed, over)
    raise AssertionError("unreachable")


def _over_budget(
    seconds: float, budget: float, done: int, void: int, min_blocks: int
) -> str | None:
    """Why timing takes longer than its budget; None while it keeps to it."""
    if seconds <= _OVER * budget or done == 0:
        return None
    each = seconds / (done + void)
    again = f", and {void} were disturbed and timed again" if void else ""
    return (
        f"timing took {seconds / 60:.2g} minutes, bench.minutes is {budget / 60:.2g}: a verdict "
        f"needs {min_blocks} blocks, a block took {each:.2g} s on this machine{again}"
    )
