"""From an encoder's raw samples and answers to figures: throughput over the grid, ratios, the task's metric, gates.

Everything here can be computed again from samples.jsonl and answers.safetensors at any time. Throughput of a cell is its batch
over the seconds of one run; the ratio of two arms is the geometric mean over the cells of a block, then the median over blocks.

Metrics: accuracy or macro F1 of a classifier; of a sentence encoder Spearman's correlation of the similarities of all pairs with
their mean over the teachers in torch. The loss of an arm is 1 - its metric over that of another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats as scipy_stats

from limbeck.contract.examples import accuracy, macro_f1, similarities
from limbeck.contract.recipe import ClassificationRecipe, EncoderRecipe
from serve_bench.judge.figures import asdict
from serve_bench.judge.gates import Gate, Verdict, conclude, estimated, exact, show
from serve_bench.judge.stats import (
    Array,
    Interval,
    first_look,
    geometric_means,
    paired_ratio,
    rate,
    sequential_interval,
    widened,
)
from serve_bench.measure.arms import Arm

ANSWERS = "answers.safetensors"
_RESAMPLES = {"classification": 2000, "embedding": 200}  # ranks of all pairs are dear

Answers = npt.NDArray[np.float32]
Picks = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Cell:
    """One place of the grid."""

    batch: int
    length: int


@dataclass(frozen=True)
class Sample:
    """Seconds of one run of one arm on one cell, averaged over the runs of a sample."""

    arm: str
    block: int
    position: int
    cell: Cell
    seconds: float


def read_samples(path: Path) -> list[Sample]:
    """The timed samples of samples.jsonl, in the order they were made; warm-up is left out."""
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return [
        Sample(r["arm"], r["block"], r["position"], Cell(r["batch"], r["length"]), r["seconds"])
        for r in rows
        if r["event"] == "sample"
    ]


# Quality ---------------------------------------------------------------------------------------------------------


class Quality:
    """What every arm said of the held-out examples, told in figures."""

    def __init__(
        self,
        recipe: EncoderRecipe,
        answers: Mapping[str, Answers],
        groups: npt.NDArray[np.int32],
        arms: Sequence[Arm],
    ) -> None:
        self._teachers = [arm.id for arm in arms if arm.role == "teacher"]
        self._groups = groups.astype(np.int64)
        self._task = recipe.task
        self.metric: str
        self._score: Callable[[str, Picks], float]
        if isinstance(recipe, ClassificationRecipe):
            self.metric, self._classes = recipe.bench.metric, len(recipe.data.classes)
            self._predicted = {
                arm: found.argmax(1).astype(np.int64) for arm, found in answers.items()
            }
            self._score = self._of_classes
            self.all_metrics = {
                arm: {
                    "accuracy": accuracy(said, self._groups),
                    "macro_f1": macro_f1(said, self._groups, self._classes),
                }
                for arm, said in self._predicted.items()
            }
        else:
            self.metric = "spearman"
            self._pairs = {arm: similarities(found) for arm, found in answers.items()}
            self._reference = np.mean([self._pairs[name] for name in self._teachers], axis=0)
            self._score = self._of_pairs
            whole = np.arange(len(groups))
            self.all_metrics = {arm: {"spearman": self._of_pairs(arm, whole)} for arm in answers}

    def value(self, arm: str) -> float:
        """The metric of an arm on all examples."""
        return self.all_metrics[arm][self.metric]

    @property
    def best_teacher(self) -> str | None:
        """The teacher with the best metric."""
        return max(self._teachers, key=self.value, default=None)

    def loss(self, ours: str, theirs: str, *, seed: int = 0) -> Interval:
        """1 - our metric over theirs, and how far it may move on other examples of the kind (paired bootstrap over examples)."""
        draw, n = np.random.default_rng(seed), len(self._groups)
        value = 1 - self.value(ours) / self.value(theirs)
        losses = []
        for _ in range(_RESAMPLES[self._task]):
            picks = draw.integers(n, size=n)
            losses.append(1 - self._score(ours, picks) / (self._score(theirs, picks) or 1e-12))
        low, high = np.quantile(losses, [0.025, 0.975])
        return Interval(value, min(float(low), value), max(float(high), value), n)

    def _of_classes(self, arm: str, picks: Picks) -> float:
        said, there = self._predicted[arm][picks], self._groups[picks]
        return (
            accuracy(said, there)
            if self.metric == "accuracy"
            else macro_f1(said, there, self._classes)
        )

    def _of_pairs(self, arm: str, picks: Picks) -> float:
        """Over the pairs of different examples: one that was drawn twice says nothing about itself."""
        first, second = np.triu_indices(len(picks), 1)
        different = picks[first] != picks[second]
        i, j = picks[first[different]], picks[second[different]]
        return float(scipy_stats.spearmanr(self._pairs[arm][i, j], self._reference[i, j]).statistic)


# Speed -----------------------------------------------------------------------------------------------------------


def by_block(samples: Sequence[Sample], arm: str, cell: Cell | None = None) -> Array:
    """Seconds of a run by block: geometric mean of the arm's samples in it, of one cell or of all."""
    return geometric_means(
        (s.block, s.seconds) for s in samples if s.arm == arm and cell in (None, s.cell)
    )


def speed(
    samples: Sequence[Sample], arms: Sequence[Arm], shipped: str, arm: str, *, first: int
) -> Interval:
    """Throughput of the shipped form over ``arm``, over the grid; widened by what its copy differs in beyond chance."""
    ours = by_block(samples, f"onnx:{shipped}")
    twin = next(a.id for a in arms if a.role == "twin")
    noise = paired_ratio(by_block(samples, twin), ours, first=first)
    return (
        noise
        if arm == twin
        else widened(paired_ratio(by_block(samples, arm), ours, first=first), noise)
    )


def latency(
    samples: Sequence[Sample], arms: Sequence[Arm], shipped: str, length: int, *, first: int
) -> Interval:
    """Median milliseconds of the shipped form for one sequence; widened by what its copy differs in beyond chance."""
    cell, twin = Cell(1, length), next(a.id for a in arms if a.role == "twin")
    ours = by_block(samples, f"onnx:{shipped}", cell)
    noise = paired_ratio(by_block(samples, twin, cell), ours, first=first)
    return widened(sequential_interval(1e3 * ours, first=first), noise)


def timing_gates(
    samples: Sequence[Sample],
    quality: Quality,
    shipped: str,
    arms: Sequence[Arm],
    recipe: EncoderRecipe,
) -> list[Gate]:
    """The gates that more blocks can decide."""
    gates, asked, first = [], recipe.gates, first_look(recipe.bench.min_blocks)
    best = quality.best_teacher
    if asked.min_throughput_ratio is not None and best is not None:
        ratio = speed(samples, arms, shipped, best, first=first)
        found = f"{{}} the throughput of {_label(arms, best)}, the better teacher, in torch"
        gates.append(
            estimated(
                "min_throughput_ratio", "Throughput over the better teacher", ratio, asked.min_throughput_ratio,
                unit="×", least=True, found=found,
            )
        )  # fmt: skip
    if asked.max_latency_ms is not None:
        length = max(recipe.bench.lengths)
        taken = latency(samples, arms, shipped, length, first=first)
        gates.append(
            estimated(
                "max_latency_ms", "Time of one sequence", taken, asked.max_latency_ms,
                unit="ms", least=False, found=f"{{}} for one sequence of {length} tokens",
            )
        )  # fmt: skip
    return gates


def judge(
    samples: Sequence[Sample],
    quality: Quality,
    shipped: str,
    arms: Sequence[Arm],
    recipe: EncoderRecipe,
) -> Verdict:
    """Every gate that the recipe names, and what they come to."""
    gates, asked, ours = (
        timing_gates(samples, quality, shipped, arms, recipe),
        recipe.gates,
        f"onnx:{shipped}",
    )
    sizes = {arm.id: arm.bytes for arm in arms}
    best = quality.best_teacher
    for name, title, bound, other, whose in (
        (
            "max_metric_loss",
            "Quality against the better teacher",
            asked.max_metric_loss,
            best,
            "the better teacher",
        ),
        (
            "max_quantization_loss",
            "Loss from quantising",
            asked.max_quantization_loss,
            "onnx:fp32",
            "the fp32 graph",
        ),
    ):
        if bound is not None and other is not None:
            gates.append(_loss_gate(name, title, quality, ours, other, bound, whose))
    if asked.max_size_ratio is not None:
        ratio = sizes[ours] / sizes["onnx:fp32"]
        found = "{} the size of the fp32 graph"
        gates.append(
            exact(
                "max_size_ratio",
                "Size over the fp32 graph",
                ratio,
                asked.max_size_ratio,
                unit="×",
                found=found,
            )
        )
    if asked.max_size_mb is not None:
        gates.append(
            exact(
                "max_size_mb",
                "Size on disk",
                sizes[ours] / 1e6,
                asked.max_size_mb,
                unit="MB",
                found="{} on disk",
            )
        )
    return conclude(gates, name=recipe.name, shipped=shipped)


def _loss_gate(
    name: str, title: str, quality: Quality, ours: str, other: str, bound: float, whose: str
) -> Gate:
    loss, metric = quality.loss(ours, other), quality.metric.replace("_", " ")
    sentence = (
        f"{metric.capitalize()} {quality.value(ours):.4f} against {quality.value(other):.4f} of {whose}: a loss of {show(loss.value, '%')} "
        f"(interval for such examples {100 * loss.low:+.2f} to {show(loss.high, '%')}); at most {100 * bound:g} % was asked."
    ).replace("-", "−")
    status = "pass" if loss.value <= bound else "fail"
    return Gate(name, title, status, loss.value, loss.low, loss.high, bound, "%", False, sentence)  # type: ignore[arg-type]


def _label(arms: Sequence[Arm], name: str) -> str:
    return next(arm.label for arm in arms if arm.id == name)


def summary(
    samples: Sequence[Sample],
    quality: Quality,
    environment: Mapping[str, Any],
    shipped: str,
    arms: Sequence[Arm],
    recipe: EncoderRecipe,
) -> dict[str, Any]:
    """The bench artifact's result: figures by arm, ratios, gates, verdict. A function of the raw samples and answers."""
    verdict, first = (
        judge(samples, quality, shipped, arms, recipe),
        first_look(recipe.bench.min_blocks),
    )
    cells = list(dict.fromkeys(sample.cell for sample in samples))
    ours = f"onnx:{shipped}"
    figures: dict[str, Any] = {}
    for arm in arms:
        measured = environment["arms"][arm.id]
        grid = []
        for cell in cells:
            seconds = sequential_interval(by_block(samples, arm.id, cell), first=first)
            grid.append(
                {
                    **vars(cell),
                    "seconds": asdict(seconds),
                    "sequences_s": asdict(rate(cell.batch, seconds)),
                }
            )
        figures[arm.id] = {
            "label": arm.label,
            "role": arm.role,
            "runtime": arm.runtime,
            "bytes": arm.bytes,
            "peak_rss_bytes": measured["peak_rss_bytes"],
            "load_s": measured["load_s"],
            "import_s": measured["import_s"],
            "steady": measured["steady"],
            "grid": grid,
            "metrics": quality.all_metrics.get(arm.id),
        }
    return {
        "task": recipe.task,
        "metric": quality.metric,
        "shipped": shipped,
        "best_teacher": quality.best_teacher,
        "blocks": environment["blocks"],
        "stopped": environment["stopped"],
        "arms": figures,
        "throughput_of_shipped_over": {
            arm.id: asdict(speed(samples, arms, shipped, arm.id, first=first))
            for arm in arms
            if arm.id != ours
        },
        "metric_loss_of_shipped_against": {
            arm.id: asdict(quality.loss(ours, arm.id))
            for arm in arms
            if arm.scored and arm.id != ours
        },
        "gates": [vars(gate) for gate in verdict.gates],
        "verdict": verdict.status,
        "sentence": verdict.sentence,
    }
