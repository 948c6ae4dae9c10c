"""Figures of an encoder: throughput over the grid, the task's metric, and the gates' evidence.

Throughput of a cell is its batch size over the seconds of one run. The ratio of two arms is the
geometric mean over the cells of a block, then the median over blocks.

Metrics: accuracy or macro F1 for a classifier. For a sentence encoder: Spearman's correlation
between the similarities of all pairs and the mean of the teachers' (in torch). The loss of an arm
is 1 - its metric divided by another arm's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats as scipy_stats

from limbeck.contract.data.arrays import Ids, Logits
from limbeck.contract.data.examples import accuracy, macro_f1, similarities
from limbeck.contract.recipe import EncoderRecipe
from limbeck.contract.results.bench import (
    Arm,
    CellResult,
    EncoderArm,
    EncoderResult,
    Gate,
    Interval,
    Status,
    Verdict,
)
from serve_bench.judge.figures import Cell, Reference, Sample, by_block, common, milliseconds, speed
from serve_bench.judge.gates import estimated, show, size_gates
from serve_bench.judge.stats import rate, sequential_interval

_RESAMPLES = {"classification": 2000, "embedding": 200}  # ranks of all pairs cost much time


class Quality:
    """The arms' answers on the held-out examples, and their metrics."""

    def __init__(
        self,
        recipe: EncoderRecipe,
        answers: Mapping[str, Logits],
        groups: npt.NDArray[np.int32],
        arms: Sequence[Arm],
    ) -> None:
        self._teachers = [arm.id for arm in arms if arm.role == "teacher"]
        self._groups = groups.astype(np.int64)
        self._task = recipe.task
        self.metric: str
        self._score: Callable[[str, Ids], float]
        if recipe.task == "classification":
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

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Held-out examples of each group."""
        return {name: int((self._groups == index).sum()) for index, name in enumerate(names)}

    def value(self, arm: str) -> float:
        """The metric of an arm on all examples."""
        return self.all_metrics[arm][self.metric]

    @property
    def best_teacher(self) -> str | None:
        """The teacher with the best metric."""
        return max(self._teachers, key=self.value, default=None)

    def loss(self, ours: str, theirs: str, *, seed: int = 0) -> Interval:
        """1 - our metric over theirs, with the interval for other examples of the same kind.

        The interval is a paired bootstrap over examples.
        """
        draw, n = np.random.default_rng(seed), len(self._groups)
        value = 1 - self.value(ours) / (self.value(theirs) or 1e-12)  # a teacher may be all wrong
        losses = []
        for _ in range(_RESAMPLES[self._task]):
            picks = draw.integers(n, size=n)
            losses.append(1 - self._score(ours, picks) / (self._score(theirs, picks) or 1e-12))
        low, high = np.quantile(losses, [0.025, 0.975])
        return Interval(value, min(float(low), value), max(float(high), value), n)

    def _of_classes(self, arm: str, picks: Ids) -> float:
        said, there = self._predicted[arm][picks], self._groups[picks]
        return (
            accuracy(said, there)
            if self.metric == "accuracy"
            else macro_f1(said, there, self._classes)
        )

    def _of_pairs(self, arm: str, picks: Ids) -> float:
        """Spearman's correlation over pairs of different examples.

        An example drawn twice is no pair with itself.
        """
        first, second = np.triu_indices(len(picks), 1)
        different = picks[first] != picks[second]
        i, j = picks[first[different]], picks[second[different]]
        return float(scipy_stats.spearmanr(self._pairs[arm][i, j], self._reference[i, j]).statistic)


@dataclass(frozen=True)
class Evidence:
    """Figures that gates are judged on.

    Ratios of throughput and losses of the metric are by arm; sizes are in bytes.
    """

    throughput: Mapping[str, Interval]
    losses: Mapping[str, Interval]
    latency: Interval | None  # ms of one sequence; None where no batch of one is timed
    size: int
    fp32_size: int | None


def longest(recipe: EncoderRecipe) -> Cell:
    """One sequence of the largest length: the size whose time `max_latency_ms` bounds."""
    return Cell(1, max(recipe.bench.lengths))


def timing_evidence(
    samples: Sequence[Sample], recipe: EncoderRecipe, reference: Reference
) -> Evidence:
    """The part of the evidence that more blocks can change."""
    ours, one = reference.shipped_arm, longest(recipe)
    fp32 = next((arm.bytes for arm in reference.arms if arm.id == "onnx:fp32"), None)
    others = [arm.id for arm in reference.arms if arm.id != ours.id]
    timed = any(sample.cell == one for sample in samples)
    return Evidence(
        throughput={arm: speed(samples, reference, arm, "e2el") for arm in others},
        losses={},
        latency=milliseconds(samples, reference, "e2el", one) if timed else None,
        size=ours.bytes,
        fp32_size=fp32,
    )


def evidence(
    samples: Sequence[Sample], quality: Quality, recipe: EncoderRecipe, reference: Reference
) -> Evidence:
    """All the evidence."""
    ours = reference.shipped_arm.id
    scored = [arm.id for arm in reference.arms if arm.scored and arm.id != ours]
    losses = {arm: quality.loss(ours, arm) for arm in scored}
    return Evidence(**vars(timing_evidence(samples, recipe, reference)) | {"losses": losses})


def timing_gates(
    found: Evidence, quality: Quality, recipe: EncoderRecipe, reference: Reference
) -> list[Gate]:
    """The gates that more blocks can decide."""
    gates, asked, best = list[Gate](), recipe.gates, quality.best_teacher
    if asked.min_throughput_ratio is not None and best is not None:
        label = next(arm.label for arm in reference.arms if arm.id == best)
        gates.append(
            estimated(
                "min_throughput_ratio",
                "Throughput over the better teacher",
                found.throughput[best],
                asked.min_throughput_ratio,
                unit="×",
                least=True,
                found=f"{{}} the throughput of {label}, the better teacher, in torch",
            )
        )
    if asked.max_latency_ms is not None and found.latency is not None:
        length = longest(recipe).length
        gates.append(
            estimated(
                "max_latency_ms",
                "Time of one sequence",
                found.latency,
                asked.max_latency_ms,
                unit="ms",
                least=False,
                found=f"{{}} for one sequence of {length} tokens",
            )
        )
    return gates


def all_gates(
    found: Evidence, quality: Quality, recipe: EncoderRecipe, reference: Reference
) -> list[Gate]:
    """Every gate that the recipe names, judged."""
    asked, ours = recipe.gates, reference.shipped_arm.id
    gates = timing_gates(found, quality, recipe, reference)
    title, best = "Quality against the better teacher", quality.best_teacher
    if asked.max_metric_loss is not None and best is not None:
        against = (quality.value(ours), quality.value(best), found.losses[best])
        bound, whose = asked.max_metric_loss, "the better teacher"
        gates.append(_loss_gate("max_metric_loss", title, quality.metric, *against, bound, whose))
    most = asked.max_quantization_loss
    if most is not None and "onnx:fp32" in quality.all_metrics:
        fp32 = found.losses.get("onnx:fp32") or quality.loss(ours, "onnx:fp32")
        against = (quality.value(ours), quality.value("onnx:fp32"), fp32)
        name, title = "max_quantization_loss", "Loss from quantising"
        gates.append(_loss_gate(name, title, quality.metric, *against, most, "the fp32 graph"))
    return gates + size_gates(asked, found.size, found.fp32_size)


def _loss_gate(
    name: str,
    title: str,
    metric: str,
    ours: float,
    theirs: float,
    loss: Interval,
    bound: float,
    whose: str,
) -> Gate:
    sentence = (
        f"{metric.replace('_', ' ').capitalize()} {ours:.4f} against {theirs:.4f} of {whose}: "
        f"a loss of {show(loss.value, '%', bound)} (interval for such examples "
        f"{100 * loss.low:+.2f} to {show(loss.high, '%')}); at most {100 * bound:g} % was asked."
    ).replace("-", "−")
    status: Status = "pass" if loss.value <= bound else "fail"
    return Gate(name, title, status, loss.value, loss.low, loss.high, bound, "%", False, sentence)


def result(
    samples: Sequence[Sample],
    quality: Quality,
    environment: Mapping[str, Any],
    found: Evidence,
    verdict: Verdict,
    recipe: EncoderRecipe,
    reference: Reference,
) -> EncoderResult:
    """The bench artifact's result, a function of the raw samples and answers."""
    cells = list(dict.fromkeys(sample.cell for sample in samples if sample.cell is not None))
    return EncoderResult(
        task=recipe.task,
        shipped=reference.shipped,
        judged=reference.shipped_arm.id,
        stand_in=reference.stand_in,
        blocks=environment["blocks"],
        void_blocks=environment.get("void_blocks"),
        disturbed=environment.get("disturbed"),
        stopped=environment["stopped"],
        over_budget=environment.get("over_budget"),
        arms={
            arm.id: _arm_result(samples, environment, cells, arm, quality, reference.first_look)
            for arm in reference.arms
        },
        speed_of_shipped_over={
            arm: {"throughput": ratio} for arm, ratio in found.throughput.items()
        },
        metric=quality.metric,
        best_teacher=quality.best_teacher,
        metric_loss_of_shipped_against=found.losses,
        gates=verdict.gates,
        verdict=verdict.status,
        sentence=verdict.sentence,
    )


def _arm_result(
    samples: Sequence[Sample],
    environment: Mapping[str, Any],
    cells: Sequence[Cell],
    arm: Arm,
    quality: Quality,
    first: int,
) -> EncoderArm:
    grid = []
    for cell in cells:
        seconds = sequential_interval(by_block(samples, arm.id, "e2el", cell), first=first)
        grid.append(CellResult(cell.batch, cell.length, seconds, rate(cell.batch, seconds)))
    return EncoderArm(
        **common(arm, environment["arms"][arm.id]),
        n=sum(sample.arm == arm.id for sample in samples),
        grid=tuple(grid),
        metrics=quality.all_metrics.get(arm.id),
    )
