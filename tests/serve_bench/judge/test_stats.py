"""Statistics of the bench: numbers worked out by hand, and the promises kept on simulated
machines.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy
from hypothesis import given
from hypothesis import strategies as st

from limbeck.contract.results.bench import Interval
from serve_bench.judge.stats import (
    _rank_sum_counts,
    first_look,
    is_look,
    mean_interval,
    median_interval,
    paired_ratio,
    percentile,
    rate,
    relative_rise,
    samples_needed,
    sequential_interval,
    unpaired_ratio,
    widened,
)


def test_six_values_hold_the_median_between_least_and_greatest() -> None:
    # P(all six on one side) = 2 / 2^6 = 1/32.
    interval = median_interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0], error=1 / 32)
    assert interval == Interval(3.5, 1.0, 6.0, 6)
    five = median_interval([1.0, 2.0, 3.0, 4.0, 5.0], error=0.05)  # 2 / 2^5 = 6.25 %
    assert not five.bounded
    assert five.value == 3.0


def test_twelve_values_by_hand() -> None:
    # 2 (1 + 12) / 2^12 = 0.63 % for the second from either end; 2 (1 + 12 + 66) / 2^12 = 3.9 % for
    # the third.
    values = np.arange(1.0, 13.0)
    assert (
        median_interval(values, error=0.009).low,
        median_interval(values, error=0.009).high,
    ) == (2.0, 11.0)
    assert (median_interval(values, error=0.04).low, median_interval(values, error=0.04).high) == (
        3.0,
        10.0,
    )


@given(st.integers(6, 60), st.floats(0.002, 0.2))
def test_interval_never_promises_more_than_the_binomial_gives(n: int, error: float) -> None:
    interval = median_interval(np.arange(n, dtype=float), error=error)
    if interval.bounded:
        rank = int(interval.low) + 1
        missed = 2 * sum(Fraction(math.comb(n, k), 2**n) for k in range(rank))
        assert missed <= Fraction(error)


def test_looks_double() -> None:
    assert [n for n in range(1, 60) if is_look(n, first=6)] == [6, 12, 24, 48]
    assert [n for n in range(1, 60) if is_look(n, first=7)] == [7, 14, 28, 56]
    assert (first_look(3), first_look(9)) == (6, 9)


def test_a_block_more_never_loses_the_interval() -> None:
    values = [1.0, 1.1, 0.9, 1.05, 0.95, 1.02]
    six, seven = sequential_interval(values, first=6), sequential_interval([*values, 1.0], first=6)
    assert (six.low, six.high) == (0.9, 1.1)
    assert (seven.low, seven.high, seven.n) == (
        0.9,
        1.1,
        7,
    )  # seven alone cannot carry the second look's 99 %


def test_looks_that_contradict_each_other_decide_nothing() -> None:
    before, after = np.full(6, 1.0), np.full(18, 2.0)
    interval = sequential_interval(np.concatenate([before, after]), first=6)
    assert (interval.low, interval.high) == (1.0, 2.0)


def test_paired_ratio_takes_the_drift_out() -> None:
    drift = np.exp(np.linspace(0, 2, 8))
    ratio = paired_ratio(5 * drift, 2 * drift, first=6)
    assert ratio.value == pytest.approx(2.5)
    assert ratio.low == pytest.approx(2.5)
    assert ratio.high == pytest.approx(2.5)


def test_unpaired_ratio_by_hand() -> None:
    # Of the 20 orders of three and three values, 1 in 10 (two-sided) has U = 0: no 95 % interval.
    # Of four and four it is 2 / 70.
    assert not unpaired_ratio(np.ones(3), np.ones(3)).bounded
    ours, theirs = np.exp([4.0, 5.0, 6.0, 7.0]), np.exp([0.0, 1.0, 2.0, 3.0])
    found = unpaired_ratio(ours, theirs)
    assert np.log([found.value, found.low, found.high]) == pytest.approx([4, 1, 7])
    assert found.n == 4


@given(st.integers(1, 7), st.integers(1, 7))
def test_rank_sum_counts_every_order(n: int, m: int) -> None:
    expected = [0] * (n * m + 1)
    for places in itertools.combinations(range(n + m), n):
        expected[sum(place - i for i, place in enumerate(places))] += 1
    assert _rank_sum_counts(n, m) == expected


def test_unpaired_intervals_cover_the_true_ratio() -> None:
    draw, covered = np.random.default_rng(4), 0
    for _ in range(1000):
        n, m = draw.integers(6, 25, 2)
        found = unpaired_ratio(
            1.05 * np.exp(0.03 * draw.standard_t(3, n)), np.exp(0.03 * draw.standard_t(3, m))
        )
        covered += found.low <= 1.05 <= found.high
    assert covered / 1000 >= 0.94


def test_widening_only_when_two_copies_differ() -> None:
    interval = Interval(4.0, 3.9, 4.1, 6)
    assert widened(interval, Interval(1.01, 0.99, 1.03, 6)) == interval
    wider = widened(interval, Interval(1.05, 1.02, 1.08, 6))
    assert (wider.low, wider.high) == (pytest.approx(3.9 / 1.05), pytest.approx(4.1 * 1.05))
    assert widened(interval, Interval(1 / 1.05, 0.9, 0.98, 6)).high == pytest.approx(4.1 * 1.05)


def test_percentiles_need_samples() -> None:
    assert [samples_needed(p) for p in (50, 90, 95, 99)] == [1, 46, 93, 473]
    values = np.arange(1.0, 101.0)
    assert (percentile(values, 50), percentile(values, 90), percentile(values, 95)) == (
        50.5,
        90.0,
        95.0,
    )
    assert percentile(values, 99) is None
    assert percentile(values[:45], 90) is None


def test_relative_rise_by_hand() -> None:
    # Means of domains: ours (10/10 + 30/10) / 2 = 2, theirs (10/10 + 28/10) / 2 = 1.9.
    labels = [np.array([5.0, 5.0]), np.array([5.0, 5.0])]
    ours, theirs = (
        [np.array([4.0, 6.0]), np.array([15.0, 15.0])],
        [np.array([4.0, 6.0]), np.array([14.0, 14.0])],
    )
    rise = relative_rise(ours, theirs, labels)
    assert rise.value == pytest.approx(2 / 1.9 - 1)
    assert rise.low <= rise.value <= rise.high
    assert relative_rise(ours, ours, labels) == Interval(0.0, 0.0, 0.0, 4)
    assert relative_rise(ours, theirs, labels) == rise  # no hidden randomness


def test_one_block_shows_no_spread() -> None:
    # The interval of a mean has n - 1 in its denominator: one value has none.
    two, one = np.array([4.0, 6.0]), np.array([9.0])
    rise = relative_rise([two, one], [two, one + 1], [two, one])
    assert (rise.value, rise.bounded, rise.n) == (pytest.approx(2 / (1 + 10 / 9) - 1), False, 3)
    assert mean_interval(one) == Interval(9.0, -math.inf, math.inf, 1)


def test_the_interval_of_a_rise_is_that_of_scipys_bootstrap() -> None:
    draw = np.random.default_rng(1)
    labels = draw.integers(50, 100, 40).astype(float)
    theirs = labels * draw.normal(3, 0.4, 40)
    ours = theirs + labels * draw.normal(0.06, 0.1, 40)
    found = relative_rise([ours], [theirs], [labels])
    expected = scipy.stats.bootstrap(
        (ours, theirs), lambda a, b, axis: a.sum(axis) / b.sum(axis) - 1, paired=True,
        vectorized=True, method="percentile", n_resamples=20_000, rng=2,
    ).confidence_interval  # fmt: skip
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.05 * width)
    assert found.high == pytest.approx(expected.high, abs=0.05 * width)


def test_a_rate_by_hand() -> None:
    assert rate(10, Interval(0.5, 0.25, 2.0, 7)) == Interval(20, 5, 40, 7)
    assert rate(10, Interval(0.5, 0.0, 2.0, 7)).high == math.inf


# Simulated machines -------------------------------------------------------------------------------


def machine(
    draw: np.random.Generator, blocks: int, *, ratio: float, noise: float = 0.02
) -> np.ndarray:
    """Log-ratios of two arms over mirrored blocks, on a machine that drifts and is sometimes
    disturbed for a while.
    """
    slots = np.arange(4 * blocks)  # A B B A of each block
    speed = np.cumsum(draw.normal(0, 0.006, len(slots))) + 0.1 * np.sin(slots / 9)
    bursts = draw.random(len(slots)) < 0.04
    speed += 0.4 * (bursts | np.roll(bursts, 1))
    seconds = (speed + draw.normal(0, noise, len(slots))).reshape(blocks, 4)
    return math.log(ratio) + (seconds[:, 0] + seconds[:, 3] - seconds[:, 1] - seconds[:, 2]) / 2


def stopped(values: np.ndarray, *, bound: float, first: int = 6) -> Interval:
    """The interval at the moment the sequential rule stops, as `measure.time_blocks` applies it."""
    for done in range(1, len(values) + 1):
        if is_look(done, first=first):
            interval = sequential_interval(values[:done], first=first)
            if interval.low > bound or interval.high < bound:
                return interval
    return sequential_interval(values, first=first)


def test_no_more_than_one_false_alarm_in_twenty() -> None:
    draw = np.random.default_rng(0)
    alarms = 0
    for _ in range(2000):
        interval = stopped(machine(draw, int(draw.integers(6, 40)), ratio=1.0), bound=0.0)
        alarms += not interval.low <= 0 <= interval.high
    assert alarms / 2000 <= 0.05


def test_intervals_cover_the_true_ratio_wherever_the_run_stops() -> None:
    draw = np.random.default_rng(1)
    covered = 0
    for _ in range(2000):
        ratio, bound = float(np.exp(draw.normal(0, 0.1))), float(draw.normal(0, 0.1))
        interval = stopped(machine(draw, int(draw.integers(6, 40)), ratio=ratio), bound=bound)
        covered += interval.low <= math.log(ratio) <= interval.high
    assert covered / 2000 >= 0.95


def test_a_real_regression_is_found() -> None:
    draw = np.random.default_rng(2)
    found = sum(stopped(machine(draw, 24, ratio=1.05), bound=0.0).low > 0 for _ in range(500))
    assert found / 500 >= 0.9


def test_looks_that_contradict_each_other_give_the_widest_interval() -> None:
    """A machine that got slower for good: the first look lies wholly below the last."""
    values = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, *[100.0] * 60]
    found = sequential_interval(values, first=6)
    assert (found.value, found.low, found.high) == (100.0, 1.0, 100.0)
