"""Changes between two runs, judged against a tolerance: one row per metric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from limbeck.contract.results.bench import Interval
from serve_bench.judge import figures
from serve_bench.judge.figures import Cell, Reference, Sample
from serve_bench.judge.stats import Array, unpaired_ratio, widened

Status = Literal[
    "worse",
    "undecided",
    "better",
    "no difference shown",
    "within tolerance",
    "ratio only",
    "not compared",
]
TOLERANCES: Mapping[str, float] = {"speed": 0.05, "quality": 0.01, "size": 0.01, "memory": 0.05}
Timed = tuple[Sequence[Sample], Reference]


@dataclass(frozen=True)
class Row:
    """One metric of both runs.

    ``change`` is relative; above zero is worse. It has bounds if it was estimated. The status
    "ratio only" means that there are too few samples for bounds; such a row decides nothing.
    """

    metric: str
    kind: str  # of its tolerance
    before: str
    after: str
    change: Interval | None
    tolerance: float
    status: Status


@dataclass(frozen=True)
class Comparison:
    """All metrics, the other differences between the runs, and the outcome."""

    before: str
    after: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """1 if a metric is worse, else 3 if one is undecided, else 0."""
        statuses = {row.status for row in self.rows}
        return 1 if "worse" in statuses else 3 if "undecided" in statuses else 0


def time_change(
    old: Timed, new: Timed, *, metric: str, anchors: Sequence[str] = (), cell: Cell | None = None
) -> Interval:
    """Ratio of the shipped forms' times, new over old, widened by the noise floor of both runs.

    ``anchors`` are arms that both runs share. Times are then relative to theirs, block by block,
    which removes changes of the machine between the runs. Without anchors the ratio includes them.
    """
    sides = (new, old)
    ours = [
        figures.by_block(samples, reference.shipped_arm.id, metric, cell)
        for samples, reference in sides
    ]
    beside = [
        [figures.by_block(samples, anchor, metric, cell) for samples, _ in sides]
        for anchor in anchors
    ]
    return widened_by_both(ratio_of(ours, beside), old, new, metric, cell)


def ratio_of(ours: Sequence[Array], beside: Sequence[Sequence[Array]]) -> Interval:
    """Ratio new over old of ``ours`` (new, old), in seconds by block.

    Each is relative to the anchors ``beside`` in the same blocks.
    """
    relative = [
        np.exp(np.log(mine) - sum(np.log(anchor[side]) for anchor in beside) / max(len(beside), 1))
        for side, mine in enumerate(ours)
    ]
    return unpaired_ratio(*relative)


def widened_by_both(
    ratio: Interval, old: Timed, new: Timed, metric: str, cell: Cell | None = None
) -> Interval:
    """A ratio's interval, widened by the noise floors of both runs."""
    for samples, reference in (old, new):
        ratio = widened(ratio, figures.noise_floor(samples, reference, metric, cell))
    return ratio


def judge_change(change: Interval, tolerance: float, *, exact: bool = False) -> Status:
    """Status of a relative change; above zero is worse.

    An estimate is worse if its whole interval is past the tolerance, an exact number if it is. What
    is no number is undecided: it lies on no side of anything.
    """
    if math.isnan(change.value):
        return "undecided"
    low, high = (change.value, change.value) if exact else (change.low, change.high)
    if low > tolerance:
        return "worse"
    if high > tolerance:
        return "undecided"
    if change.high < 0:
        return "better"
    return "no difference shown" if change.low <= 0 else "within tolerance"


def speed_row(title: str, before: float, after: float, ratio: Interval, tolerance: float) -> Row:
    """A row for ``ratio``, time over time; without bounds it decides nothing."""
    change = relative(ratio)
    status = judge_change(change, tolerance) if change.bounded else "ratio only"
    return Row(title, "speed", f"{before:.4g}", f"{after:.4g}", change, tolerance, status)


def exact_row(
    title: str, kind: str, before: str, after: str, change: float, tolerance: float
) -> Row:
    """A row for a change that is counted, not estimated."""
    found = Interval(change, change, change, 1)
    status = judge_change(found, tolerance, exact=True)
    return Row(title, kind, before, after, found, tolerance, status)


def relative(ratio: Interval) -> Interval:
    """A ratio as a relative change."""
    return Interval(ratio.value - 1, ratio.low - 1, ratio.high - 1, ratio.n)
