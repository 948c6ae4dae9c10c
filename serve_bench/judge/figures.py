"""From raw samples to figures of every task: values by block, ratios of arms, the noise floor.

All of it can be computed again from samples.jsonl. `serve_bench.judge.language` and
`serve_bench.judge.encoder` have the figures of one task.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from limbeck.contract.results.bench import Arm, Interval
from serve_bench.judge.stats import (
    Array,
    geometric_means,
    paired_ratio,
    sequential_interval,
    widened,
)

SAMPLES, QUALITY, ENVIRONMENT = "samples.jsonl", "quality.json", "environment.json"


class Cell(NamedTuple):
    """Size of one unit of an encoder's work: sequences per batch, tokens per sequence."""

    batch: int
    length: int


@dataclass(frozen=True)
class Sample:
    """One timed unit of work. ``at`` holds seconds from its start to each of its results.

    A generation has one result per token. A batch of an encoder has one, at its end, and a
    ``cell``.
    """

    arm: str
    block: int
    position: int
    at: tuple[float, ...]
    cell: Cell | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Sample:
        """From a row of samples.jsonl for a generation."""
        return cls(row["arm"], row["block"], row["position"], tuple(row["at"]))

    @classmethod
    def of_batch(cls, row: Mapping[str, Any]) -> Sample:
        """From a row of samples.jsonl for a batch; its seconds are the mean over its runs."""
        cell = Cell(row["batch"], row["length"])
        return cls(row["arm"], row["block"], row["position"], (row["seconds"],), cell)

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.at[0]

    @property
    def e2el(self) -> float:
        """Seconds to the last result (end-to-end latency)."""
        return self.at[-1]

    @property
    def tpot(self) -> float:
        """Seconds per output token after the first; the prompt and the first token are in TTFT."""
        return (self.e2el - self.ttft) / (len(self.at) - 1)

    @property
    def itl(self) -> Array:
        """Seconds between tokens, [tokens - 1]."""
        return np.diff(np.asarray(self.at))


@dataclass(frozen=True)
class Reference:
    """Context of the figures: the arms, the shipped form, and the schedule of looks in blocks."""

    name: str
    shipped: str
    arms: tuple[Arm, ...]
    first_look: int
    judged: str = ""  # id of the arm that is judged; empty for the shipped form
    stand_in: bool = False  # whether the models have random weights, so that quality means nothing

    @property
    def shipped_arm(self) -> Arm:
        """The arm that is judged."""
        judged = self.judged or f"onnx:{self.shipped}"
        return next(arm for arm in self.arms if arm.id == judged)

    @property
    def twin(self) -> Arm:
        """Copy of the judged arm, in a process of its own."""
        return next(arm for arm in self.arms if arm.role == "twin")

    def with_role(self, role: str) -> list[Arm]:
        """Arms of one role."""
        return [arm for arm in self.arms if arm.role == role]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every row of samples.jsonl, in the order of writing."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def by_block(samples: Iterable[Sample], arm: str, metric: str, cell: Cell | None = None) -> Array:
    """Seconds of one metric by block: geometric mean of the arm's samples, of one cell or all."""
    return geometric_means(
        (s.block, getattr(s, metric)) for s in samples if s.arm == arm and cell in (None, s.cell)
    )


def noise_floor(
    samples: Sequence[Sample], reference: Reference, metric: str, cell: Cell | None = None
) -> Interval:
    """Speed of the shipped form over its own copy: the ratio that noise alone gives."""
    return _speed(samples, reference, reference.twin.id, metric, cell)


def speed(
    samples: Sequence[Sample], reference: Reference, arm: str, metric: str = "tpot"
) -> Interval:
    """Speed of the shipped form over ``arm`` on equal text; above 1 the shipped form is faster.

    Widened by the noise floor. The times of an arm with another tokenizer are multiplied by its
    `token_rate`: it was timed on as many tokens as the student, which are more or less text to it.
    """
    noise = noise_floor(samples, reference, metric)
    if arm == reference.twin.id:
        return noise
    return widened(_speed(samples, reference, arm, metric, None), noise)


def milliseconds(
    samples: Sequence[Sample], reference: Reference, metric: str, cell: Cell | None = None
) -> Interval:
    """Median time of the shipped form in ms. Widened by the noise floor."""
    seconds = by_block(samples, reference.shipped_arm.id, metric, cell)
    interval = sequential_interval(1e3 * seconds, first=reference.first_look)
    return widened(interval, noise_floor(samples, reference, metric, cell))


def _speed(
    samples: Sequence[Sample], reference: Reference, theirs: str, metric: str, cell: Cell | None
) -> Interval:
    ours = by_block(samples, reference.shipped_arm.id, metric, cell)
    rate = next(arm.token_rate for arm in reference.arms if arm.id == theirs) or 1.0
    seconds = rate * by_block(samples, theirs, metric, cell)
    return paired_ratio(seconds, ours, first=reference.first_look)


def common(arm: Arm, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ArmResult` that come from the arm and its entry in environment.json."""
    found = {
        name: getattr(arm, name) for name in ("label", "role", "runtime", "bytes", "token_rate")
    }
    for name in ("peak_rss_bytes", "device_bytes", "import_s", "load_s", "energy"):
        found[name] = measured.get(name)
    return found | {"steady": measured["steady"]}
