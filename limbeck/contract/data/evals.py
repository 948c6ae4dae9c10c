"""Short evaluations beside the held-out loss: what a model knows, can do, and has not forgotten.

An evaluation is a set of token rows, some tokens of which are scored, in the format of held-out
blocks. A row of `ANSWERS` is right when every scored token is the model's first choice. Rows of
`TEXTS` have a loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

EVALS = "evals.safetensors"
# Facts of facts.yaml; the last whole word of a held-out passage, after LAMBADA (arXiv 1606.06031);
# the next line of a Python source.
ANSWERS = ("facts", "last_word", "next_line")
TEXTS = ("prose", "python")  # of Python's documentation and library; few teachers are trained on it
TITLES = {  # in tables and sentences
    "facts": "facts",
    "last_word": "last words",
    "next_line": "next lines of code",
    "next_line_tokens": "tokens of next lines",
    "prose": "other prose",
    "python": "Python code",
}

Sums = Mapping[str, Mapping[str, Sequence[float]]]  # `nll` and `right` of each row, by evaluation


def shares(labels: Mapping[str, Sequence[int]], found: Sums) -> dict[str, list[float]]:
    """Right answers of each row, from 0 to 1, by evaluation.

    ``labels`` are the scored tokens of each row. ``next_line_tokens`` is the share of a line's
    tokens; in the others a row is 0 or 1.
    """
    rows = {
        name: [
            float(right == n) for right, n in zip(found[name]["right"], labels[name], strict=True)
        ]
        for name in ANSWERS
        if name in found
    }
    if "next_line" in found:
        counts = zip(found["next_line"]["right"], labels["next_line"], strict=True)
        rows["next_line_tokens"] = [right / n for right, n in counts]
    return rows


def losses(labels: Mapping[str, Sequence[int]], found: Sums) -> dict[str, float]:
    """Nats a token of each text."""
    return {name: sum(found[name]["nll"]) / sum(labels[name]) for name in TEXTS if name in found}
