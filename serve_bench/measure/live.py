"""The table in a terminal while arms are timed: a row for each arm and timed quantity."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from tabulate import tabulate

from limbeck.contract.progress import say
from limbeck.contract.results.bench import Interval
from serve_bench.judge.figures import Cell, Reference, Sample, by_block
from serve_bench.judge.stats import rate, sequential_interval

_PLAIN_EVERY = 10.0  # seconds between lines where no terminal watches
_ALIGN = ("left", "right", "left", "right", "left", "right", "right")

# title, metric of `Sample`, cell, amount done in its seconds
Test = tuple[str, str, Cell | None, float]
Live = AbstractContextManager[Callable[[Sequence[Sample], str], None]]


def head(unit: str) -> list[str]:
    """Column names; ``unit`` is `tokens/s` or `sequences/s`."""
    return ["model", "size", "runtime", "threads", "test", unit, "95 %"]


def rows(
    reference: Reference, samples: Sequence[Sample], tests: Sequence[Test], *, threads: int
) -> list[list[str]]:
    """One row an arm and test, with the rate and its interval."""
    result = []
    for arm in reference.arms:
        for title, metric, cell, amount in tests:
            seconds, found = by_block(samples, arm.id, metric, cell), None
            if len(seconds):
                found = rate(amount, sequential_interval(seconds, first=reference.first_look))
            result.append(row(arm.label, arm.bytes, arm.runtime, str(threads), title, found))
    return result


def row(
    label: str, size: int, runtime: str, threads: str, title: str, found: Interval | None
) -> list[str]:
    """Cells of one row; a rate that is not known yet is empty."""
    speed = "" if found is None else f"{found.value:.1f}"
    span = f"{found.low:.1f}–{found.high:.1f}" if found is not None and found.bounded else ""
    return [label, f"{size / 1e6:.1f} MB" if size else "", runtime, threads, title, speed, span]


def plain(table: Sequence[Sequence[str]], unit: str) -> str:
    """The table in aligned columns; numbers to the right."""
    return str(
        tabulate(table, head(unit), tablefmt="simple", colalign=_ALIGN, disable_numparse=True)
    )


@contextmanager
def live_table(
    reference: Reference, unit: str, tests: Sequence[Test], *, threads: int
) -> Iterator[Callable[[Sequence[Sample], str], None]]:
    """A function that shows the samples so far and a line of news.

    A terminal shows the table in place; elsewhere a line appears now and then, and the table in the
    end.
    """

    def now(samples: Sequence[Sample]) -> list[list[str]]:
        return rows(reference, samples, tests, threads=threads)

    if not sys.stderr.isatty():
        last, shown = time.monotonic(), list[Sample]()

        def tell(samples: Sequence[Sample], news: str) -> None:
            nonlocal last, shown
            shown = list(samples)
            if time.monotonic() - last >= _PLAIN_EVERY:
                last = time.monotonic()
                say(f"  timing: {news}")

        yield tell
        say(plain(now(shown), unit))
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), auto_refresh=False) as live:
        yield lambda samples, news: live.update(_drawn(now(samples), unit, news), refresh=True)


def _drawn(table: Sequence[Sequence[str]], unit: str, news: str) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Labels and news as texts: a folder's name may hold brackets, which are markup otherwise.
    drawn = Table(box=box.SIMPLE_HEAD, caption=Text(news), caption_justify="left")
    for name, side in zip(head(unit), _ALIGN, strict=True):
        drawn.add_column(name, justify=side, no_wrap=name != "model")  # type: ignore[arg-type]
    for cells in table:
        drawn.add_row(*map(Text, cells))
    return drawn
