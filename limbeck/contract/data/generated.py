"""Figures of generated tokens: how varied they are, how often they repeat, how long two agree."""

from __future__ import annotations

from collections.abc import Sequence

Tokens = Sequence[int]
_REPEATED = 4  # tokens of a repeated piece


def common_prefix(ours: Tokens, theirs: Tokens) -> int:
    """Number of tokens before the first difference.

    After it the two rows continue different texts.
    """
    return next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )


def distinct(rows: Sequence[Tokens], n: int) -> float:
    """Distinct n-grams divided by all n-grams (Li et al., arXiv 1510.03055)."""
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def repetition(row: Tokens) -> float:
    """Share of a row's 4-grams that occurred in it before."""
    grams = [tuple(row[i : i + _REPEATED]) for i in range(len(row) - _REPEATED + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
