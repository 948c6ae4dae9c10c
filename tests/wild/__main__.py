"""Print the table of the random cases: `python -m tests.wild [FIRST [LAST]]`.

Exit code 1 if one of them crashed, was silently different, or was taken though nobody can load it.
"""

from __future__ import annotations

import collections
import os
import sys
import tempfile
import warnings
from pathlib import Path

from tabulate import tabulate

import compress
from tests.wild.configurations import CASES, Outcome, draw_case, outcomes


def table(first: int, last: int) -> list[Outcome]:
    """Print a row for each teacher of the cases ``first`` to ``last`` - 1, and return all."""
    found: list[Outcome] = []
    for number in range(first, last):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = list(outcomes(draw_case(number), Path(folder)))
        found += rows
        print(
            tabulate([_row(o) for o in rows], tablefmt="plain", maxcolwidths=[4, 10, 90, 30, 30]),
            flush=True,
        )
    return found


def _row(outcome: Outcome) -> list[str]:
    losses = [f"{x:.5f}" if isinstance(x, float) else x for x in (outcome.ours, outcome.theirs)]
    return [str(outcome.case.number), outcome.verdict, outcome.what, *losses]


def main() -> None:
    """Run the cases that the arguments name."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    compress.quiet_libraries()
    given = [int(argument) for argument in sys.argv[1:]]
    first, last = (given + [0, CASES][len(given) :])[:2] if len(given) < 2 else given[:2]
    print("case, verdict, what it is, our loss, the loss of transformers and peft (nats a token)")
    counts = collections.Counter(outcome.verdict for outcome in table(first, last))
    print(
        f"{last - first} cases: "
        + ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()))
    )
    sys.exit(any(verdict.isupper() for verdict in counts))


if __name__ == "__main__":
    main()
