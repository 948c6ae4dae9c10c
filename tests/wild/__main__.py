"""Print two tables, of the reported and of random cases: `python -m tests.wild [FIRST [LAST]]`.

`--export` takes the models of the random cases through the export instead, half a minute each.
Exit code 1 if one of them is wrong, crashed, was silently different, or was taken though nobody
can load it.
"""

from __future__ import annotations

import collections
import contextlib
import os
import sys
import tempfile
import warnings
from pathlib import Path
from unittest.mock import patch

from tabulate import tabulate

import compress
from tests.wild.cases.configurations import CASES, Outcome, draw_case, outcomes
from tests.wild.cases.exports import exported
from tests.wild.cases.fresh import fresh
from tests.wild.cases.rows import rows


def reported() -> list[str]:
    """Print a row for each case that users reported, and return the verdicts."""
    with (
        tempfile.TemporaryDirectory() as name,
        contextlib.chdir(name),
        warnings.catch_warnings(),
        patch.dict(os.environ, LIMBECK_CACHE=f"{name}/cache"),
    ):
        warnings.simplefilter("ignore")
        found = [*rows(Path(name)), *fresh(Path(name))]
        cells = [
            [r.verdict, r.what, *(s.replace(f"{name}/", "") for s in (r.ours, r.theirs))]
            for r in found
        ]
    heads = ["verdict", "what it is", "Limbeck", "transformers, peft"]
    print(tabulate(cells, heads, disable_numparse=True, maxcolwidths=[9, 40, 60, 60]))
    return [row.verdict for row in found]


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


def exports(first: int, last: int) -> list[str]:
    """Print a row for the export of each case's model, and return the verdicts."""
    verdicts = []
    for number in range(first, last):
        with tempfile.TemporaryDirectory() as folder:
            verdict, what, found = exported(number, Path(folder))
        cells = [[str(number), verdict, what, found]]
        print(tabulate(cells, tablefmt="plain", maxcolwidths=[4, 10, 70, 70]), flush=True)
        verdicts.append(verdict)
    return verdicts


def _row(outcome: Outcome) -> list[str]:
    losses = [f"{x:.5f}" if isinstance(x, float) else x for x in (outcome.ours, outcome.theirs)]
    return [str(outcome.case.number), outcome.verdict, outcome.what, *losses]


def main() -> None:
    """Run the cases that the arguments name."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    compress.quiet_libraries()
    given = [int(argument) for argument in sys.argv[1:] if argument != "--export"]
    first, last = (given + [0, CASES][len(given) :])[:2] if len(given) < 2 else given[:2]
    if "--export" in sys.argv:
        sys.exit(any(verdict.isupper() for verdict in exports(first, last)))
    wrong = any(verdict.isupper() for verdict in reported())
    print("\ncase, verdict, what it is, our loss, the loss of transformers and peft (nats a token)")
    counts = collections.Counter(outcome.verdict for outcome in table(first, last))
    print(
        f"{last - first} cases: "
        + ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()))
    )
    sys.exit(wrong or any(verdict.isupper() for verdict in counts))


if __name__ == "__main__":
    main()
