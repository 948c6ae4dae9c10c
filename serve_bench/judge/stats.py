"""Statistics of paired timings and of quality: intervals, and the fewest samples for them.

Knows arrays of numbers, not arms, artifacts or gates. Every function is pure.

Timing. A block times every arm twice in mirrored order (A B C C B A), so a linear drift of the
machine affects all arms alike. An arm's value in a block is the geometric mean of its two times. A
ratio is the median over blocks of the log-ratio within each block. Its interval comes from order
statistics: the median of any distribution lies below the k-th smallest of n values with probability
P(Binomial(n, 1/2) < k). So no shape is assumed and no random number is drawn. A percentile
bootstrap over the six to twelve blocks of a typical run covers about 90 % instead of 95 %. This
interval covers at least 95 %, and one disturbed block cannot move it far.

Repeated looks. Blocks go on until the interval decides. An interval that is checked until it
decides is wrong more often than its level says. So looks are rare (after n, 2n, 4n … blocks, and at
the end of the time) and share the 5 % of error: 1/32 for the first, half of the rest for each later
one. The reported interval is the intersection of all looks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from limbeck.contract.results.bench import Interval

Array = npt.NDArray[np.float64]

CONFIDENCE = 0.95
FEWEST_BLOCKS = 6  # [min, max] holds the median in 93.75 % of cases for 5 values, 96.9 % for 6
_FIRST_LOOK = 1 / 32  # the error of [least, greatest] of six
_SAMPLES_NEEDED = {50: 1, 90: 46, 95: 93, 99: 473}  # to bound the percentile at 95 % confidence


def first_look(min_blocks: int) -> int:
    """Blocks before the first look; fewer than six allow no 95 % interval."""
    return max(min_blocks, FEWEST_BLOCKS)


def is_look(blocks: int, *, first: int) -> bool:
    """Whether there is a look after this many blocks: ``first``, twice, four times …"""
    return blocks >= first and blocks % first == 0 and (blocks // first).bit_count() == 1


def geometric_means(timed: Iterable[tuple[int, float]]) -> Array:
    """Geometric mean of each block's values, from (block, value) pairs, in the order of blocks."""
    blocks: dict[int, list[float]] = {}
    for block, value in timed:
        blocks.setdefault(block, []).append(value)
    return np.array([np.exp(np.mean(np.log(values))) for _, values in sorted(blocks.items())])


def rate(amount: float, time: Interval) -> Interval:
    """``amount`` over its time. The upper bound is infinite if the time may be zero."""
    high = amount / time.low if time.low > 0 else math.inf
    return Interval(amount / time.value, amount / time.high, high, time.n)


def median_interval(values: Sequence[float] | Array, *, error: float) -> Interval:
    """Median, and the distribution-free interval that misses it with probability ``error`` at most.

    With too few values the interval is infinite on both sides.
    """
    ordered = np.sort(np.asarray(values, np.float64))
    n = len(ordered)
    tail, rank = 0.0, 0  # of the largest k with 2 P(Binomial(n, 1/2) < k) <= error
    while rank < n // 2 and 2 * (tail + math.comb(n, rank) / 2**n) <= error:
        tail += math.comb(n, rank) / 2**n
        rank += 1
    if rank == 0:
        return Interval(float(np.median(ordered)), -math.inf, math.inf, n)
    return Interval(
        float(np.median(ordered)), float(ordered[rank - 1]), float(ordered[n - rank]), n
    )


def sequential_interval(values: Sequence[float] | Array, *, first: int) -> Interval:
    """Median over blocks in the order of timing, with an interval at 95 % over all looks together.

    Looks happened after ``first``, 2 ``first`` … blocks and after the last. The interval is their
    intersection. If that is empty, because the machine changed between looks, it is their hull,
    so it decides nothing by mistake.
    """
    array = np.asarray(values, np.float64)
    ends = [n for n in range(1, len(array)) if is_look(n, first=first)] + [len(array)]
    left = 1 - CONFIDENCE - _FIRST_LOOK
    looks = [
        median_interval(array[:end], error=_FIRST_LOOK if k == 0 else left / 2**k)
        for k, end in enumerate(ends)
    ]
    value, low, high = looks[-1].value, max(i.low for i in looks), min(i.high for i in looks)
    if low > high:
        low, high = min(i.low for i in looks), max(i.high for i in looks)
    return Interval(value, min(low, value), max(high, value), len(array))


def paired_ratio(numerator: Array, denominator: Array, *, first: int) -> Interval:
    """Median ratio of two arms over the same blocks, ``[blocks]`` each, with its interval."""
    return sequential_interval(np.log(numerator) - np.log(denominator), first=first).map_exp()


def widened(interval: Interval, noise: Interval) -> Interval:
    """A ratio's interval, widened if two copies of the same artifact differ beyond chance.

    ``noise`` is the A/A ratio. Some effects last for the life of a process (memory addresses,
    cores). Pairing within blocks cannot see those; only a second process can.
    """
    if noise.low <= 1 <= noise.high:
        return interval
    factor = math.exp(abs(math.log(noise.value)))
    return Interval(interval.value, interval.low / factor, interval.high * factor, interval.n)


def unpaired_ratio(ours: Array, theirs: Array) -> Interval:
    """Ratio of our values to theirs, ``[blocks]`` each, from two runs that share no block.

    The Hodges-Lehmann shift of the logarithms (median of all pairwise differences), with the
    interval that inverts the exact rank-sum test (Lehmann, Nonparametrics, 1975, section 2.5). It
    assumes equal spread and the same machine: no statistic of the two runs can show a drift
    between them. ``n`` is that of the smaller run.
    """
    differences = np.sort(np.subtract.outer(np.log(ours), np.log(theirs)).ravel())
    most = (1 - CONFIDENCE) / 2 * math.comb(len(ours) + len(theirs), len(ours))
    below, rank = 0, 0  # rank: of the largest k with P(U < k) <= 2.5 %
    for ways in _rank_sum_counts(len(ours), len(theirs)):
        if below + ways > most:
            break
        below, rank = below + ways, rank + 1
    fewest, value = min(len(ours), len(theirs)), float(np.median(differences))
    if rank == 0:
        return Interval(value, -math.inf, math.inf, fewest).map_exp()
    return Interval(
        value, float(differences[rank - 1]), float(differences[-rank]), fewest
    ).map_exp()


def _rank_sum_counts(n: int, m: int) -> list[int]:
    """Number of orders of ``n`` and ``m`` values with Mann-Whitney's U = 0, 1, 2 …

    These are the coefficients of the Gaussian binomial.
    """
    counts = [1] + [0] * (n * m)
    for i in range(1, m + 1):
        for u in range(n * m, n + i - 1, -1):  # times 1 - q^(n + i)
            counts[u] -= counts[u - n - i]
        for u in range(i, n * m + 1):  # over 1 - q^i
            counts[u] += counts[u - i]
    return counts


def samples_needed(percent: int) -> int:
    """Fewest samples for a reported percentile: MLPerf's rule at 95 % confidence."""
    return _SAMPLES_NEEDED[percent]


def percentile(values: Sequence[float] | Array, percent: int) -> float | None:
    """A percentile as one of the values (inverse distribution function); None if too few."""
    if len(values) < samples_needed(percent):
        return None
    if percent == 50:
        return float(np.median(values))
    return float(np.percentile(np.asarray(values, np.float64), percent, method="inverted_cdf"))


def mean_interval(values: Array) -> Interval:
    """Mean of ``values[n]`` and its percentile bootstrap interval; for display, not for gates.

    One value shows no spread, so its interval is infinite on both sides.
    """
    if len(values) < 2:
        return Interval(float(values.mean()), -math.inf, math.inf, len(values))
    picks = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    value = float(values.mean())
    low, high = np.quantile(values[picks].mean(1), [0.025, 0.975])
    return Interval(value, min(float(low), value), max(float(high), value), len(values))


def relative_rise(
    ours: Sequence[Array], theirs: Sequence[Array], labels: Sequence[Array]
) -> Interval:
    """Relative rise of our domains' mean NLL over theirs: -0.02 is 2 % better.

    Each sequence holds one array per domain, with one value per held-out block: summed NLL, and
    scored tokens. The value is exact for this text. The interval (paired percentile bootstrap,
    blocks drawn within each domain) shows how far it may move on other text of the same kind. It is
    infinite on both sides if a domain has one block alone: that shows no spread.
    """
    draw = np.random.default_rng(0)

    def mean(sums: Sequence[Array], picks: Sequence[npt.NDArray[np.int64]]) -> Array:
        per_domain = [
            s[p].sum(-1) / n[p].sum(-1) for s, n, p in zip(sums, labels, picks, strict=True)
        ]
        return np.asarray(np.mean(per_domain, axis=0), np.float64)

    whole = [np.arange(len(n))[None] for n in labels]
    picks = [draw.integers(len(n), size=(4000, len(n))) for n in labels]
    value = float(mean(ours, whole)[0] / mean(theirs, whole)[0] - 1)
    count = sum(len(n) for n in labels)
    if min(len(n) for n in labels) < 2:
        return Interval(value, -math.inf, math.inf, count)
    low, high = np.quantile(mean(ours, picks) / mean(theirs, picks) - 1, [0.025, 0.975])
    return Interval(value, min(float(low), value), max(float(high), value), count)
