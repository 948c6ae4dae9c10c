"""Figures of a language model: TTFT, TPOT, throughput, loss, and the evidence for its gates.

Metrics have vLLM's names and definitions: TTFT to the first token, E2EL to the last, TPOT = (E2EL -
TTFT) / (tokens - 1), ITL each gap between tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from scipy.stats import binomtest

from limbeck.contract.data import evals as rows
from limbeck.contract.results.bench import (
    Arm,
    Evaluations,
    Interval,
    LanguageArm,
    LanguageResult,
    Verdict,
)
from serve_bench.judge import quality as quality_figures
from serve_bench.judge.figures import Reference, Sample, by_block, common, milliseconds, speed
from serve_bench.judge.gates import Evidence
from serve_bench.judge.stats import (
    Array,
    mean_interval,
    percentile,
    rate,
    relative_rise,
    sequential_interval,
)


def latency(samples: Sequence[Sample], arm: str, *, first: int) -> dict[str, Any]:
    """Times of one arm in ms, with intervals over blocks; percentiles with their sample counts."""
    mine = [s for s in samples if s.arm == arm]
    itl = np.concatenate([s.itl for s in mine])

    def median(metric: str) -> Interval:
        return sequential_interval(1e3 * by_block(samples, arm, metric), first=first)

    tpot = median("tpot")
    return {
        "n": len(mine),
        "ttft_ms": median("ttft"),
        "tpot_ms": tpot,
        "e2el_ms": median("e2el"),
        "decode_tokens_s": rate(1e3, tpot),
        "itl_ms": {"n": len(itl)} | _percentiles(itl, (50, 90, 95, 99)),
        "ttft_percentiles_ms": _percentiles([s.ttft for s in mine], (90, 95)),
    }


def _percentiles(seconds: Sequence[float] | Array, percents: Sequence[int]) -> dict[str, Any]:
    found = {f"p{p}": percentile(seconds, p) for p in percents}
    return {name: None if value is None else 1e3 * value for name, value in found.items()}


def timing_evidence(samples: Sequence[Sample], reference: Reference) -> Evidence:
    """The part of the evidence that is known while blocks are still being timed."""
    fp32 = next((arm for arm in reference.arms if arm.id == "onnx:fp32"), None)
    return Evidence(
        name=reference.name,
        shipped=reference.shipped,
        speedup={
            arm.label: speed(samples, reference, arm.id) for arm in reference.with_role("teacher")
        },
        tpot_ms=milliseconds(samples, reference, "tpot"),
        ttft_ms=milliseconds(samples, reference, "ttft"),
        size=reference.shipped_arm.bytes,
        fp32_size=fp32.bytes if fp32 else None,
        rise_over_fp32=None,
        rise_over_teachers={},
    )


def evidence(
    samples: Sequence[Sample], quality: Mapping[str, Any], reference: Reference
) -> Evidence:
    """All the evidence."""
    timing, shipped = timing_evidence(samples, reference), reference.shipped_arm.id
    answered = evaluations(quality)
    others, served = quality.get("other_tokenizers", ()), served_teachers(quality, reference)
    quality = with_served(quality)
    teachers = {arm.label: arm.id for arm in reference.with_role("teacher")} | served
    return Evidence(
        **vars(timing)
        | {
            "rise_over_fp32": _rise_over_fp32(quality, shipped),
            "recovered": "recovery" in quality,
            "rise_of_ggufs": quality.get("ggufs", {}),
            "evaluations": answered.get(shipped),
            "teachers": {
                arm.label: answered[arm.id]
                for arm in reference.with_role("teacher")
                if arm.id in answered
            },
            "by_byte": frozenset(name for name, arm in teachers.items() if arm in others),
            "rise_over_teachers": {
                name: (
                    quality_figures.summarise(quality, arm)["mean_nll"],
                    rise(quality, shipped, arm, by="utf8_bytes" if arm in others else "labels"),
                )
                for name, arm in teachers.items()
            },
        }
    )


def with_served(quality: Mapping[str, Any]) -> dict[str, Any]:
    """``quality`` with the losses of all teachers behind servers under ``arms``.

    They are those that the answers gave before the training, on the same blocks.
    """
    served = {
        f"teacher:{name}": {domain: {"nll": nats} for domain, nats in blocks.items()}
        for name, blocks in quality.get("served", {}).items()
    }
    return {**quality, "arms": quality["arms"] | served}


def served_teachers(quality: Mapping[str, Any], reference: Reference) -> dict[str, str]:
    """Names of the teachers behind servers, which are no arms, and how `with_served` calls them."""
    known = [
        *quality.get("other_tokenizers", ()),
        *(f"teacher:{name}" for name in quality.get("served", {})),
    ]
    here = {arm.id for arm in reference.arms}
    return {arm.removeprefix("teacher:"): arm for arm in known if arm not in here}


def result(
    samples: Sequence[Sample],
    environment: Mapping[str, Any],
    reference: Reference,
    *,
    prompt_tokens: int,
    quality: Mapping[str, Any] | None = None,
    verdict: Verdict | None = None,
    **more: Any,
) -> LanguageResult:
    """The bench artifact's result, a function of the raw samples.

    Without a recipe there is no quality and no verdict.
    """
    judged = reference.shipped_arm.id
    others = [arm.id for arm in reference.arms if arm.id != judged]
    scored = [arm.id for arm in reference.arms if arm.scored and arm.id != judged]
    answered = evaluations(quality or {})
    return LanguageResult(
        task="causal-lm",
        shipped=reference.shipped,
        judged=judged,
        stand_in=reference.stand_in,
        blocks=environment.get("blocks"),
        void_blocks=environment.get("void_blocks"),
        disturbed=environment.get("disturbed"),
        stopped=environment.get("stopped"),
        over_budget=environment.get("over_budget"),
        arms={
            arm.id: _arm_result(
                samples, environment, reference, arm, prompt_tokens, quality, answered.get(arm.id)
            )
            for arm in reference.arms
        },
        speed_of_shipped_over={
            arm: {metric: speed(samples, reference, arm, metric) for metric in ("tpot", "ttft")}
            for arm in others
        },
        nll_rise_of_shipped_over=(
            {} if quality is None else {arm: rise(quality, judged, arm) for arm in scored}
        ),
        gates=verdict.gates if verdict else (),
        verdict=verdict.status if verdict else None,
        sentence=verdict.sentence if verdict else "",
        base_evals=evaluations_of_base(quality or {}),
        **more,
    )


def _arm_result(
    samples: Sequence[Sample],
    environment: Mapping[str, Any],
    reference: Reference,
    arm: Arm,
    prompt_tokens: int,
    quality: Mapping[str, Any] | None,
    answered: Evaluations | None,
) -> LanguageArm:
    times = latency(samples, arm.id, first=reference.first_look)
    measured, ttft = environment["arms"][arm.id], times["ttft_ms"]
    return LanguageArm(
        **common(arm, measured),
        **times,
        prompt_tokens_s=rate(1e3 * prompt_tokens, ttft),
        roofline=against(
            environment.get("roofline"), measured.get("weight_bytes"), times["tpot_ms"].value
        ),
        quality=(
            quality_figures.summarise(quality, arm.id)
            if quality is not None and arm.scored
            else None
        ),
        evals=answered,
    )


def against(
    roofline: Mapping[str, Any] | None, weight_bytes: int | None, tpot_ms: float
) -> dict[str, Any] | None:
    """Roofline: share of the bandwidth that decoding reaches, and tokens/s at full bandwidth."""
    if roofline is None or not weight_bytes:
        return None
    limit = roofline["bandwidth_bytes_s"] / weight_bytes
    return {
        "weight_bytes": weight_bytes,
        "bandwidth_fraction": 1e3 / tpot_ms / limit,
        "limit_tokens_s": limit,
    }


def _rise_over_fp32(quality: Mapping[str, Any], shipped: str) -> Interval | None:
    """Cost of rounding: NLL over the fp32 graph of the student as distilled, before recovery."""
    if recovery := quality.get("recovery"):
        ours, theirs = (
            [np.asarray(recovery[who][d]) for d in quality["domains"]]
            for who in ("shipped", "distilled")
        )
        return _rise(quality, ours, theirs)
    return rise(quality, shipped, "onnx:fp32") if "onnx:fp32" in quality["arms"] else None


def rise(
    quality: Mapping[str, Any],
    ours: str,
    theirs: str,
    *,
    by: Literal["labels", "utf8_bytes"] = "labels",
) -> Interval:
    """Relative rise of one arm's mean NLL over another's, paired by held-out block.

    The mean is over domains, of nats a token or (``utf8_bytes``) of bits a byte.
    """
    return _rise(quality, _nll(quality, ours), _nll(quality, theirs), by=by)


def _nll(quality: Mapping[str, Any], arm: str) -> list[Array]:
    """Nats of each held-out block, by domain."""
    return [
        np.asarray(quality["arms"][arm][name]["nll"], np.float64) for name in quality["domains"]
    ]


def _rise(
    quality: Mapping[str, Any],
    ours: Sequence[Array],
    theirs: Sequence[Array],
    *,
    by: Literal["labels", "utf8_bytes"] = "labels",
) -> Interval:
    sizes = [np.asarray(domain[by], np.float64) for domain in quality["domains"].values()]
    # Special tokens alone have no bytes.
    some = [found for found in zip(ours, theirs, sizes, strict=True) if found[2].any()]
    return relative_rise(*zip(*some, strict=True))


def evaluations(quality: Mapping[str, Any]) -> dict[str, Evaluations]:
    """The evaluations of each arm that was asked; none for benches of older versions."""
    asked = quality.get("evals") or {"arms": {}}
    return {arm: _evaluations(asked, found, asked["base"]) for arm, found in asked["arms"].items()}


def evaluations_of_base(quality: Mapping[str, Any]) -> Evaluations | None:
    """The evaluations of the student's base, where it has one."""
    asked = quality.get("evals") or {}
    return _evaluations(asked, asked["base"], None) if asked.get("base") else None


def _evaluations(asked: Mapping[str, Any], found: rows.Sums, base: rows.Sums | None) -> Evaluations:
    labels = asked["labels"]
    shares = {
        name: mean_interval(np.asarray(share)) if name == "next_line_tokens" else _counted(share)
        for name, share in rows.shares(labels, found).items()
    }
    texts = [name for name in rows.TEXTS if name in labels]
    forgetting = None
    if base is not None and texts:
        ours, theirs = (
            [np.asarray(sums[name]["nll"], np.float64) for name in texts] for sums in (found, base)
        )
        counts = [np.asarray(labels[name], np.float64) for name in texts]
        forgetting = relative_rise(ours, theirs, counts)
    return Evaluations(shares, rows.losses(labels, found), forgetting)


def _counted(right: Sequence[float]) -> Interval:
    """A share of rows that are 0 or 1, and its Wilson interval, which holds near 0 and 1 too."""
    count, total = round(sum(right)), len(right)
    span = binomtest(count, total).proportion_ci(method="wilson")
    return Interval(count / total, float(span.low), float(span.high), total)
