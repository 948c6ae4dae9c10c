"""From raw samples to figures: latencies by arm, ratios between arms, the noise floor, the evidence for the gates.

Everything here can be computed again from samples.jsonl and quality.json at any time. Metrics by vLLM's names and
definitions: TTFT to the first token, E2EL to the last, TPOT = (E2EL - TTFT) / (tokens - 1), ITL each gap between tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.contract.recipe import Recipe
from serve_bench.judge import quality as quality_figures
from serve_bench.judge.gates import Evidence, judge
from serve_bench.judge.stats import (
    Array,
    Interval,
    first_look,
    geometric_means,
    paired_ratio,
    percentile,
    rate,
    relative_rise,
    sequential_interval,
    widened,
)
from serve_bench.measure.arms import Arm
from serve_bench.measure.roofline import against

SAMPLES, QUALITY, ENVIRONMENT = "samples.jsonl", "quality.json", "environment.json"


@dataclass(frozen=True)
class Sample:
    """One timed generation. ``at`` holds seconds from the request to each generated token."""

    arm: str
    block: int
    position: int
    at: tuple[float, ...]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Sample:
        """From a row of samples.jsonl."""
        return cls(row["arm"], row["block"], row["position"], tuple(row["at"]))

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.at[0]

    @property
    def e2el(self) -> float:
        """Seconds to the last token."""
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
    """What the evidence needs to know besides samples: the arms, the shipped form, the schedule of looks."""

    name: str
    shipped: str
    arms: tuple[Arm, ...]
    first_look: int
    judged: str = ""  # id of the arm that is judged; empty: the shipped form

    @property
    def shipped_arm(self) -> Arm:
        """The arm that is judged."""
        judged = self.judged or f"onnx:{self.shipped}"
        return next(arm for arm in self.arms if arm.id == judged)

    @property
    def twin(self) -> Arm:
        """Its copy in a process of its own."""
        return next(arm for arm in self.arms if arm.role == "twin")

    def with_role(self, role: str) -> list[Arm]:
        """Arms of one role."""
        return [arm for arm in self.arms if arm.role == role]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every row of samples.jsonl, in the order they were written."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_samples(path: Path) -> list[Sample]:
    """The timed generations of `single`, in the order they were made; warm-up and void blocks are left out."""
    return [Sample.of(row) for row in read_rows(path) if row["event"] == "sample"]


def by_block(samples: Iterable[Sample], arm: str, metric: str) -> Array:
    """Seconds of one metric by block: the geometric mean of the arm's two generations in it."""
    return geometric_means((s.block, getattr(s, metric)) for s in samples if s.arm == arm)


def latency(samples: Sequence[Sample], arm: str, *, first: int) -> dict[str, Any]:
    """Figures of one arm: times in ms with intervals over blocks, percentiles with their sample counts."""
    mine = [s for s in samples if s.arm == arm]
    itl = np.concatenate([s.itl for s in mine])
    tpot = _milliseconds(by_block(samples, arm, "tpot"), first)
    return {
        "n": len(mine),
        "ttft_ms": asdict(_milliseconds(by_block(samples, arm, "ttft"), first)),
        "tpot_ms": asdict(tpot),
        "e2el_ms": asdict(_milliseconds(by_block(samples, arm, "e2el"), first)),
        "decode_tokens_s": asdict(rate(1e3, tpot)),
        "itl_ms": {
            "n": len(itl),
            **{
                f"p{p}": None if (v := percentile(itl, p)) is None else 1e3 * v
                for p in (50, 90, 95, 99)
            },
        },
        "ttft_percentiles_ms": {
            f"p{p}": None if (v := percentile([s.ttft for s in mine], p)) is None else 1e3 * v
            for p in (90, 95)
        },
    }


def noise_floor(samples: Sequence[Sample], reference: Reference, metric: str) -> Interval:
    """Speed of the shipped form over its own copy: what is measured where there is no difference."""
    return _speed(
        samples, reference.shipped_arm.id, reference.twin.id, metric, reference.first_look
    )


def speed(
    samples: Sequence[Sample], reference: Reference, arm: str, metric: str = "tpot"
) -> Interval:
    """Speed of the shipped form over ``arm``: above 1 the shipped form is faster. Widened by the noise floor."""
    noise = noise_floor(samples, reference, metric)
    if arm == reference.twin.id:
        return noise
    return widened(
        _speed(samples, reference.shipped_arm.id, arm, metric, reference.first_look), noise
    )


def timing_evidence(samples: Sequence[Sample], reference: Reference) -> Evidence:
    """The part of the evidence that is known while blocks are still being timed."""
    shipped, first = reference.shipped_arm, reference.first_look
    fp32 = next((arm for arm in reference.arms if arm.id == "onnx:fp32"), None)

    def absolute(metric: str) -> Interval:
        interval = _milliseconds(by_block(samples, shipped.id, metric), first)
        return widened(interval, noise_floor(samples, reference, metric))

    return Evidence(
        name=reference.name,
        shipped=reference.shipped,
        speedup={
            arm.label: speed(samples, reference, arm.id) for arm in reference.with_role("teacher")
        },
        tpot_ms=absolute("tpot"),
        ttft_ms=absolute("ttft"),
        size=shipped.bytes,
        fp32_size=fp32.bytes if fp32 else None,
        rise_over_fp32=None,
        rise_over_teachers={},
    )


def evidence(
    samples: Sequence[Sample], quality: Mapping[str, Any], reference: Reference
) -> Evidence:
    """All the evidence."""
    timing, shipped = timing_evidence(samples, reference), reference.shipped_arm.id
    return Evidence(
        **vars(timing)
        | {
            "rise_over_fp32": _rise_over_fp32(quality, shipped),
            "recovered": "recovery" in quality,
            "rise_over_teachers": {
                arm.label: (
                    quality_figures.summarise(quality, arm.id)["mean_nll"],
                    rise(quality, shipped, arm.id),
                )
                for arm in reference.with_role("teacher")
            },
        }
    )


def reference_of(recipe: Recipe, shipped: str, arms: Sequence[Arm]) -> Reference:
    """What the arms are compared with, and when."""
    return Reference(recipe.name, shipped, tuple(arms), first_look(recipe.bench.min_blocks))


def summary(
    samples: Sequence[Sample],
    quality: Mapping[str, Any],
    environment: Mapping[str, Any],
    reference: Reference,
    recipe: Recipe,
) -> dict[str, Any]:
    """The bench artifact's result: figures by arm, speed ratios, gates, verdict. A function of the raw samples."""
    verdict = judge(recipe.gates, evidence(samples, quality, reference))
    result = speeds(samples, environment, reference, prompt_tokens=recipe.bench.prompt_tokens)
    for arm in reference.arms:
        result["arms"][arm.id]["quality"] = (
            quality_figures.summarise(quality, arm.id) if arm.scored else None
        )
    return result | {
        "nll_rise_of_shipped_over": {
            arm.id: asdict(rise(quality, reference.shipped_arm.id, arm.id))
            for arm in reference.arms
            if arm.scored and arm.id != reference.shipped_arm.id
        },
        "gates": [vars(gate) for gate in verdict.gates],
        "verdict": verdict.status,
        "sentence": verdict.sentence,
    }


def speeds(
    samples: Sequence[Sample],
    environment: Mapping[str, Any],
    reference: Reference,
    *,
    prompt_tokens: int,
) -> dict[str, Any]:
    """The part of the result that needs no recipe: figures by arm, and the speed of what is judged over every other."""
    judged, arms = reference.shipped_arm.id, {}
    for arm in reference.arms:
        measured = environment["arms"][arm.id]
        times = latency(samples, arm.id, first=reference.first_look)
        tpot, ttft = times["tpot_ms"]["value"], times["ttft_ms"]
        arms[arm.id] = {
            "label": arm.label,
            "role": arm.role,
            "runtime": arm.runtime,
            "bytes": arm.bytes,
            **{
                key: measured.get(key)
                for key in ("peak_rss_bytes", "device_bytes", "import_s", "load_s", "energy")
            },
            "steady": measured["steady"],
            **times,
            "prompt_tokens_s": {
                "value": 1e3 * prompt_tokens / ttft["value"],
                "low": 1e3 * prompt_tokens / ttft["high"] if ttft["high"] else None,
                "high": 1e3 * prompt_tokens / ttft["low"] if ttft["low"] else None,
                "n": ttft["n"],
            },
            "roofline": against(environment.get("roofline"), measured.get("weight_bytes"), tpot),
            "quality": None,
        }
    return {
        "shipped": reference.shipped,
        "judged": judged,
        **{key: environment.get(key) for key in ("blocks", "void_blocks", "disturbed", "stopped")},
        "arms": arms,
        "speed_of_shipped_over": {
            arm.id: {
                metric: asdict(speed(samples, reference, arm.id, metric))
                for metric in ("tpot", "ttft")
            }
            for arm in reference.arms
            if arm.id != judged
        },
    }


def _rise_over_fp32(quality: Mapping[str, Any], shipped: str) -> Interval | None:
    """What rounding costs: over the fp32 graph of the student as it was distilled, which recovery leaves behind."""
    if told := quality.get("recovery"):
        ours, theirs = (
            [np.asarray(told[who][d]) for d in quality["domains"]]
            for who in ("shipped", "distilled")
        )
        return _rise(quality, ours, theirs)
    return rise(quality, shipped, "onnx:fp32") if "onnx:fp32" in quality["arms"] else None


def rise(quality: Mapping[str, Any], ours: str, theirs: str) -> Interval:
    """Relative rise of one arm's mean NLL over another's, paired by held-out block."""
    return _rise(quality, _nll(quality, ours), _nll(quality, theirs))


def _nll(quality: Mapping[str, Any], arm: str) -> list[Array]:
    """Nats of each held-out block, by domain."""
    return [
        np.asarray(quality["arms"][arm][name]["nll"], np.float64) for name in quality["domains"]
    ]


def _rise(quality: Mapping[str, Any], ours: Sequence[Array], theirs: Sequence[Array]) -> Interval:
    return relative_rise(
        ours, theirs, [np.asarray(d["labels"], np.float64) for d in quality["domains"].values()]
    )


def asdict(interval: Interval) -> dict[str, Any]:
    """An interval as JSON: bounds that were not reached are null."""
    low, high = (interval.low, interval.high) if interval.bounded else (None, None)
    return {"value": interval.value, "low": low, "high": high, "n": interval.n}


def _speed(samples: Sequence[Sample], ours: str, theirs: str, metric: str, first: int) -> Interval:
    return paired_ratio(
        by_block(samples, theirs, metric), by_block(samples, ours, metric), first=first
    )


def _milliseconds(seconds: Array, first: int) -> Interval:
    return sequential_interval(1e3 * seconds, first=first)
