"""Compare the promises of a certificate with a replay, and decide which differences count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from limbeck.contract.results.bench import Interval

_NEAR = 1.1  # up to 10 % slower counts as noise of one machine; 8 % was observed


@dataclass(frozen=True)
class Finding:
    """One promise and the value found. ``holds`` is False if the difference has no explanation."""

    figure: str
    promised: str
    found: str
    says: str
    holds: bool


def judge_loss(
    figure: str, then: float, now: float, *, tolerance: float, reasons: Mapping[str, str]
) -> Finding:
    """Holds if equal to the digit, or within ``tolerance`` (same unit) for one of ``reasons``.

    A reason is a difference of machine or libraries that can change the last digits.
    """
    gap = abs(now - then)
    if gap == 0:
        return Finding(figure, repr(then), repr(now), "equal to the digit", True)
    if not reasons:
        says = f"differs by {gap:.2g} although provider, processor flags and libraries are the same"
        return Finding(figure, repr(then), repr(now), says, False)
    why = "; ".join(f"{name}: {pair}" for name, pair in reasons.items())
    if gap <= tolerance:
        says = f"differs by {gap:.2g}, within the parity tolerance of {tolerance:g}; {why}"
        return Finding(figure, repr(then), repr(now), says, True)
    says = f"differs by {gap:.2g}, past the parity tolerance of {tolerance:g}; {why}"
    return Finding(figure, repr(then), repr(now), says, False)


def judge_speed(
    figure: str,
    then: Mapping[str, Any],
    now: Interval,
    *,
    more_is_faster: bool = False,
    differs: Mapping[str, str],
    busy: Mapping[str, str],
) -> Finding:
    """Judge a time in ms, or a ratio of speeds, where ``more_is_faster``.

    Holds if the intervals overlap or the run is faster. A slower run holds if it is less than 10 %
    slower, or if this is another machine than that of the certificate.
    """
    promised = _interval(then["value"], then["low"], then["high"])
    found = _interval(now.value, now.low, now.high)
    if then["low"] is None or not now.bounded:
        says = "too few blocks for intervals, so nothing to hold against each other"
        return Finding(figure, promised, found, says, True)
    if now.low <= then["high"] and then["low"] <= now.high:
        return Finding(figure, promised, found, "intervals overlap", True)
    slower = now.value < then["value"] if more_is_faster else now.value > then["value"]
    near = max(now.value / then["value"], then["value"] / now.value) <= _NEAR
    apart = f"{'slower' if slower else 'faster'} than certified, {now.value / then['value']:.2f}×"
    if differs:
        why = "; ".join(f"{name}: {pair}" for name, pair in differs.items())
        return Finding(figure, promised, found, f"{apart}, on what is not the same: {why}", True)
    if slower and near:
        says = f"{apart}, less than the 10 % that counts on one machine"
        return Finding(figure, promised, found, says, True)
    also = "".join(f"; {name} {value} before the replay" for name, value in busy.items())
    says = f"{apart}, on the same machine with the same versions{also}"
    return Finding(figure, promised, found, says, not slower)


def _interval(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.3g}" + ("" if low is None or high is None else f" ({low:.3g} to {high:.3g})")
