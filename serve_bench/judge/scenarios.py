"""Figures of the other scenarios, from raw samples: throughput of batches, cold starts, load.

All of it can be computed again from samples.jsonl. docs/artifacts.md describes each key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from limbeck.contract.recipe import Bench, ServerScenario, Slo
from limbeck.contract.results.bench import Arm
from serve_bench.judge import figures
from serve_bench.judge.figures import Reference, Sample
from serve_bench.judge.stats import CONFIDENCE, Array, geometric_means, median_interval, percentile

Row = Mapping[str, Any]
Cell = tuple[int, int, int]  # rows of a batch, prompt tokens, generated tokens


def compared(reference: Reference, samples: Sequence[Sample]) -> list[Arm]:
    """Arms of the other scenarios: the judged one, its fp32 graph, and the fastest teacher.

    Without a teacher, the student takes its place.
    """
    judged = reference.shipped_arm
    arms = [judged, *(arm for arm in reference.arms if arm.id == "onnx:fp32" and arm != judged)]
    rivals = reference.with_role("teacher") or reference.with_role("student")
    if rivals:
        arms.append(
            min(rivals, key=lambda arm: float(np.median(figures.by_block(samples, arm.id, "tpot"))))
        )
    return arms


def summary(
    rows: Sequence[Row], environment: Row, bench: Bench, arms: Sequence[Arm]
) -> dict[str, Any]:
    """Keys of the bench result for scenarios: the list of those measured, and one key for each."""
    labels = {arm.id: arm.label for arm in arms}
    result: dict[str, Any] = {"scenarios": [scenario.kind for scenario in bench.scenarios]}
    if bench.scenario("offline") is not None:
        result["offline"] = offline(rows)
    if bench.scenario("cold") is not None:
        result["cold"] = cold(rows, labels)
    if (asked := bench.scenario("server")) is not None:
        result["server"] = server(rows, asked, environment["server"], bench)
    return result


# Batches ------------------------------------------------------------------------------------------


def offline(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Throughput by arm and cell. Prompt and generated tokens are never added together."""
    result = []
    for (batch, prompt_tokens, new_tokens), arm, blocks in (
        (cell, arm, blocks) for cell, arms in batches(rows).items() for arm, blocks in arms.items()
    ):
        first, rest, whole = (
            by_block(blocks, seconds) for seconds in (ttft, decoding, lambda row: row["at"][-1])
        )
        result.append(
            {
                "arm": arm,
                "batch": batch,
                "prompt_tokens": prompt_tokens,
                "new_tokens": new_tokens,
                "n": sum(map(len, blocks.values())),
                "prompt_tokens_s": _median(batch * prompt_tokens / first),
                "generated_tokens_s": _median(batch * (new_tokens - 1) / rest),
                "requests_s": _median(batch / whole),
            }
        )
    return result


def batches(rows: Iterable[Row]) -> dict[Cell, dict[str, dict[int, list[Row]]]]:
    """Rows of `offline` by cell, arm and block."""
    cells: dict[Cell, dict[str, dict[int, list[Row]]]] = {}
    for row in rows:
        if row["event"] == "offline":
            arms = cells.setdefault((row["batch"], row["prompt_tokens"], row["new_tokens"]), {})
            arms.setdefault(row["arm"], {}).setdefault(row["block"], []).append(row)
    return cells


def by_block(blocks: Mapping[int, Sequence[Row]], seconds: Callable[[Row], float]) -> Array:
    """Geometric mean of the two generations of each block, in the order of the blocks."""
    return geometric_means((block, seconds(row)) for block, rows in blocks.items() for row in rows)


def _median(values: Array) -> dict[str, Any]:
    return median_interval(values, error=1 - CONFIDENCE).as_json()


# Cold starts --------------------------------------------------------------------------------------

SPANS = ("start_s", "import_s", "load_s", "first_token_s", "second_token_s")


def cold(rows: Iterable[Row], labels: Mapping[str, str]) -> dict[str, Any]:
    """Median seconds of each span of a start, by arm."""
    return {
        arm: {
            "label": labels[arm],
            "n": len(mine),
            **{span: _median(np.array([row[span] for row in mine])) for span in SPANS},
            "total_s": _median(np.array([until_first_token(row) for row in mine])),
        }
        for arm, mine in starts(rows).items()
    }


def starts(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of `cold` by arm, in the order of the blocks."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["event"] == "cold":
            found.setdefault(row["arm"], []).append(row)
    return found


def until_first_token(row: Row) -> float:
    """Seconds from the start of a process to its first token."""
    return float(sum(row[span] for span in SPANS[:-1]))


# A server under load ------------------------------------------------------------------------------


def server(rows: Iterable[Row], asked: ServerScenario, target: Row, bench: Bench) -> dict[str, Any]:
    """Latency, throughput and goodput at every rate tried, and the highest that meets the SLO."""
    measured = [
        rate_figures(rate, mine, asked.slo) for rate, mine in sorted(requests(rows).items())
    ]
    fails_at = min((rate["rate"] for rate in measured if not rate["meets"]), default=None)
    holds = [rate["rate"] for rate in measured if rate["meets"]]
    return {
        "target": dict(target),
        "slo": asked.slo.model_dump(),
        "arrivals": "poisson",
        "prompt_tokens": bench.prompt_tokens,
        "new_tokens": bench.new_tokens,
        "highest_rate": {"value": max(holds, default=None), "fails_at": fails_at},
        "rates": measured,
    }


def requests(rows: Iterable[Row]) -> dict[float, list[Row]]:
    """Rows of `server` by the rate at which they arrived."""
    rates: dict[float, list[Row]] = {}
    for row in rows:
        if row["event"] == "request":
            rates.setdefault(row["rate"], []).append(row)
    return rates


def rate_figures(rate: float, rows: Sequence[Row], slo: Slo) -> dict[str, Any]:
    """Figures of the requests that arrived at one rate."""
    done = [row for row in rows if row["error"] is None]
    first = min(row["scheduled"] for row in rows)
    duration = max((row["scheduled"] + row["at"][-1] for row in done), default=first) - first
    good = sum(within(row, slo) for row in rows)
    gaps = np.concatenate([np.diff(row["at"]) for row in done]) if done else np.array([])

    def per_second(count: float) -> float:
        return count / duration if duration > 0 else 0.0

    return {
        "rate": rate,
        "phase": rows[0]["phase"],
        "requests": len(rows),
        "completed": len(done),
        "failed": len(rows) - len(done),
        "errors": sorted({row["error"] for row in rows if row["error"]})[:5],
        "duration_s": duration,
        "meets": meets(rows, slo),
        "share": good / len(rows),
        "goodput": per_second(good),
        "requests_s": per_second(len(done)),
        "output_tokens_s": per_second(sum(row["output_tokens"] for row in done)),
        "prompt_tokens_s": per_second(sum(row["prompt_tokens"] or 0 for row in done)),
        "ttft_ms": distribution([ttft(row) for row in done]),
        "tpot_ms": distribution([t for row in done if (t := tpot(row)) is not None]),
        "itl_ms": distribution(gaps),
        "e2el_ms": distribution([row["at"][-1] for row in done]),
        "late_ms": distribution([row["sent"] - row["scheduled"] for row in rows]),
    }


def ttft(row: Row) -> float:
    """Seconds to the first token from the scheduled arrival; for a batch, from its start."""
    return float(row["at"][0])


def decoding(row: Row) -> float:
    """Seconds from the first token to the last."""
    return float(row["at"][-1] - row["at"][0])


def tpot(row: Row) -> float | None:
    """Seconds per output token after the first; None if the answer has one token.

    Several tokens may have come in one event.
    """
    if row["output_tokens"] < 2:
        return None
    return decoding(row) / float(row["output_tokens"] - 1)


def within(row: Row, slo: Slo) -> bool:
    """Whether a request was answered within the SLO."""
    if row["error"] is not None:
        return False
    return ttft(row) <= slo.ttft_ms / 1e3 and (tpot(row) or 0.0) <= slo.tpot_ms / 1e3


def meets(rows: Sequence[Row], slo: Slo) -> bool:
    """Whether the SLO's share of requests was answered within the SLO."""
    return sum(within(row, slo) for row in rows) >= slo.share * len(rows)


def distribution(seconds: Sequence[float] | Array) -> dict[str, Any]:
    """Mean and percentiles in ms; those with too few samples are null."""
    values = 1e3 * np.asarray(seconds, np.float64)
    return {
        "n": len(values),
        "mean": float(values.mean()) if len(values) else None,
        **{f"p{p}": percentile(values, p) for p in (50, 90, 95, 99)},
    }
