"""The report's part on text that the student wrote during its training.

Knows the lines of the training log and of `samples.jsonl` (docs/artifacts.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SHOWN = 5  # samples of the first steps, and of the last
_PART = 10  # a tenth of the steps at either end is averaged
_FIGURES = ("reverse_kl", "repetition", "length")
Line = Mapping[str, Any]


def own_text(log: Sequence[Line], samples: Sequence[Line]) -> dict[str, Any] | None:
    """Figures of the first and the last tenth of the steps with own text, and samples of both.

    None where the student wrote nothing.
    """
    steps = [row for row in log if row["event"] == "step" and row.get("own_text")]
    if not steps:
        return None
    part = max(1, len(steps) // _PART)
    whole = sum(sum(row["step_seconds"].values()) for row in steps)
    return {
        "steps": len(steps),
        "tokens": sum(row["own_text"]["tokens"] for row in steps),
        "judged": sum(_weight(row, "reverse_kl") for row in steps)
        / sum(row["own_text"]["tokens"] for row in steps),
        "part": part,
        "first": {name: _mean(steps[:part], name) for name in _FIGURES},
        "last": {name: _mean(steps[-part:], name) for name in _FIGURES},
        "seconds": {
            name: sum(row["step_seconds"][name] for row in steps) / whole
            for name in ("generate", "teachers", "student")
        },
        "weights": _weights(steps),
        "samples": {
            "first": _between(samples[:_SHOWN]),
            "last": _between(samples[-_SHOWN:]) if len(samples) > _SHOWN else [],
        },
    }


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Lines of `samples.jsonl`, in order; empty where the student wrote nothing."""
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def _mean(steps: Sequence[Line], name: str) -> float | None:
    """Mean over what a figure is of. None where a step has no figure."""
    if any(row["own_text"][name] is None for row in steps):
        return None
    weight = sum(_weight(row, name) for row in steps)
    return float(sum(row["own_text"][name] * _weight(row, name) for row in steps) / weight)


def _weight(row: Line, name: str) -> int:
    """Number of rows or tokens that a figure of a step is the mean of."""
    own = row["own_text"]
    by = {"length": "rows", "reverse_kl": "judged"}.get(name, "tokens")
    return int(own.get(by, own["tokens"]))  # logs of earlier versions do not say what was judged


def _weights(steps: Sequence[Line]) -> list[dict[str, Any]]:
    """Mean weight of each teacher by the place of the text, on the corpus and on own text."""

    def mean(found: Sequence[Mapping[str, Mapping[str, float]]], place: str, name: str) -> Any:
        values = [weights[place][name] for weights in found if place in weights]
        return sum(values) / len(values) if values else None

    corpus = [row.get("weights") or {} for row in steps]
    own = [row["own_text"]["weights"] for row in steps]
    places = dict.fromkeys(place for weights in (*corpus, *own) for place in weights)
    names = dict.fromkeys(n for weights in own for place in weights.values() for n in place)
    if len(names) < 2:
        return []
    return [
        {"place": p, "teacher": n, "corpus": mean(corpus, p, n), "own": mean(own, p, n)}
        for p in places
        for n in names
    ]


def _between(samples: Sequence[Line]) -> list[dict[str, Any]]:
    return [{"step": s["step"], "prompt": s["prompt"], "text": s["text"]} for s in samples]
