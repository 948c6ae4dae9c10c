"""Changes between two runs in a language model's other scenarios: batches, cold starts, load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from limbeck.contract.results.bench import Interval
from serve_bench.judge import scenarios
from serve_bench.judge.changes import Row, exact_row, ratio_of, speed_row, widened_by_both
from serve_bench.judge.stats import CONFIDENCE, median_interval
from serve_bench.judge.task import Measured

_BATCHES = 8  # of successive requests, whose means are taken to be independent


def scenario_changes(
    old: Measured, new: Measured, tolerance: float, anchors: Sequence[str]
) -> tuple[list[Row], list[str]]:
    """Rows of scenarios that both runs have, and notes on scenarios that are not compared."""
    notes: list[str] = []
    rows = [
        *_batches(old, new, tolerance, anchors),
        *_starts(old, new, tolerance, anchors),
        *_served(old, new, tolerance, notes),
    ]
    return rows, notes


def _batches(
    old: Measured, new: Measured, tolerance: float, anchors: Sequence[str]
) -> Iterator[Row]:
    """Throughput of every cell of `offline` that both runs timed."""
    then, now = scenarios.batches(old.rows), scenarios.batches(new.rows)
    for cell in (cell for cell in then if cell in now):
        arms, others = then[cell], now[cell]
        if old.reference.shipped_arm.id not in arms or new.reference.shipped_arm.id not in others:
            continue
        batch, prompt, made = cell
        there = [anchor for anchor in anchors if anchor in arms and anchor in others]
        for what, metric, seconds, tokens in (
            ("generated", "tpot", scenarios.decoding, batch * (made - 1)),
            ("of prompts", "ttft", scenarios.ttft, batch * prompt),
        ):
            ours = [
                scenarios.by_block(others[new.reference.shipped_arm.id], seconds),
                scenarios.by_block(arms[old.reference.shipped_arm.id], seconds),
            ]
            beside = [
                [scenarios.by_block(side[anchor], seconds) for side in (others, arms)]
                for anchor in there
            ]
            ratio = widened_by_both(ratio_of(ours, beside), old.timed, new.timed, metric)
            title = f"tokens/s {what}, batch {batch}, prompt {prompt}, new {made}"
            yield speed_row(
                title, tokens / np.median(ours[1]), tokens / np.median(ours[0]), ratio, tolerance
            )


def _starts(
    old: Measured, new: Measured, tolerance: float, anchors: Sequence[str]
) -> Iterator[Row]:
    """Seconds of a cold start. Each start is a process of its own, so no noise floor is added."""
    then, now = (
        {
            arm: np.array([scenarios.until_first_token(row) for row in rows])
            for arm, rows in scenarios.starts(run.rows).items()
        }
        for run in (old, new)
    )
    if old.reference.shipped_arm.id in then and new.reference.shipped_arm.id in now:
        ours = [now[new.reference.shipped_arm.id], then[old.reference.shipped_arm.id]]
        ratio = ratio_of(ours, [[now[a], then[a]] for a in anchors if a in then and a in now])
        title = "s from a cold start to the first token"
        yield speed_row(title, np.median(ours[1]), np.median(ours[0]), ratio, tolerance)


def _served(old: Measured, new: Measured, tolerance: float, notes: list[str]) -> Iterator[Row]:
    """The server's highest rate, and latencies of the same arrivals at a rate that both tried."""
    then, now = old.stored.get("server"), new.stored.get("server")
    if not then or not now:
        return
    if then["target"]["kind"] != now["target"]["kind"]:
        notes.append(
            "One run asked a server of its own and the other a URL, so they are not compared under "
            "load."
        )
        return
    if then["slo"] == now["slo"]:
        yield from _highest(then["highest_rate"]["value"], now["highest_rate"]["value"], tolerance)
    else:
        notes.append(
            "The promises (slo) of the server differ, so the highest rates that keep them are not "
            "compared."
        )
    held = {rate["rate"] for rate in then["rates"] if rate["meets"]}
    before, after = scenarios.requests(old.rows), scenarios.requests(new.rows)
    common = {
        rate
        for rate in before
        if rate in after and _arrivals(before[rate]) == _arrivals(after[rate])
    }
    if not common:
        notes.append(
            "No rate of the server was tried in both runs; give the scenario a first_rate to have "
            "its latencies compared."
        )
        return
    rate = max(common & held, default=min(common))
    notes.append(
        f"Latencies of the server are paired by request, of the same arrivals at {rate:g} "
        "requests/s; what the machine did between the runs is in them."
    )
    yield from _answers(before[rate], after[rate], f"at {rate:g} requests/s", tolerance)


def _highest(then: float | None, now: float | None, tolerance: float) -> Iterator[Row]:
    """The rates themselves: each is the result of one search and has no samples."""
    title = "highest requests/s that keep the SLO"
    if then and now:
        yield speed_row(title, then, now, Interval(then / now, -np.inf, np.inf, 1), tolerance)
    elif then or now:
        before, after = (f"{rate:.4g}" if rate else "none" for rate in (then, now))
        yield Row(title, "speed", before, after, None, tolerance, "worse" if then else "better")


def _answers(
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    where: str,
    tolerance: float,
) -> Iterator[Row]:
    """Latencies of the requests that both runs answered, and the number that failed.

    Requests that wait for each other are not independent. So their log-ratios are averaged over
    batches of consecutive requests, and the interval is of those means (method of batch means; Law,
    Simulation Modeling and Analysis, chapter 9).
    """
    pairs = list(zip(before, after, strict=True))
    answered = [pair for pair in pairs if all(row["error"] is None for row in pair)]
    for title, seconds in (("TTFT ms", scenarios.ttft), ("TPOT ms", scenarios.tpot)):
        timed = [
            found for pair in answered if None not in (found := tuple(seconds(row) for row in pair))
        ]
        if timed:
            then, now = np.array(timed, np.float64).T
            means = [
                part.mean()
                for part in np.array_split(np.log(now / then), min(_BATCHES, len(timed)))
            ]
            ratio = median_interval(means, error=1 - CONFIDENCE).map_exp()
            yield speed_row(
                f"{title}, {where}", 1e3 * np.median(then), 1e3 * np.median(now), ratio, tolerance
            )
    failed = [sum(row["error"] is not None for row in rows) for rows in (before, after)]
    if any(failed):
        more = (failed[1] - failed[0]) / len(pairs)
        lost, lose = (f"{count} of {len(pairs)}" for count in failed)
        yield exact_row(f"requests that failed, {where}", "speed", lost, lose, more, tolerance)


def _arrivals(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [row["scheduled"] for row in rows]
