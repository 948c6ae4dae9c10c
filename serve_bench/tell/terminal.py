"""The table that a terminal shows while arms are timed: a row for reading the prompt and one for generating, as llama-bench has it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from limbeck.contract.artifact import Artifact
from limbeck.contract.progress import say
from serve_bench.judge.figures import ENVIRONMENT, Reference, Sample, by_block
from serve_bench.judge.stats import Interval, sequential_interval

HEAD = ("model", "size", "runtime", "threads", "test", "tokens/s", "95 %")
_PLAIN_EVERY = 10.0  # seconds between lines where no terminal watches


def rows(
    reference: Reference,
    samples: Sequence[Sample],
    *,
    prompt_tokens: int,
    new_tokens: int,
    threads: int,
) -> list[list[str]]:
    """Two rows an arm: prompt tokens a second, generated tokens a second, with their intervals."""
    result = []
    for arm in reference.arms:
        size = f"{arm.bytes / 1e6:.1f} MB" if arm.bytes else ""
        for test, metric, tokens in (
            (f"pp{prompt_tokens}", "ttft", prompt_tokens),
            (f"tg{new_tokens}", "tpot", 1),
        ):
            seconds = by_block(samples, arm.id, metric)
            speed, span = "", ""
            if len(seconds):
                found = _speed(sequential_interval(seconds, first=reference.first_look), tokens)
                speed, span = (
                    f"{found.value:.1f}",
                    f"{found.low:.1f}–{found.high:.1f}" if found.bounded else "",
                )
            result.append([arm.label, size, arm.runtime, str(threads), test, speed, span])
    return result


def plain(table: Sequence[Sequence[str]]) -> str:
    """The table in aligned columns; numbers to the right."""
    whole = [list(HEAD), *table]
    widths = [max(len(row[column]) for row in whole) for column in range(len(HEAD))]
    lines = []
    for row in whole:
        cells = [
            cell.ljust(w) if i in (0, 2, 4) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * sum(widths, 2 * (len(widths) - 1)))
    return "\n".join(lines)


def of_artifact(bench: Artifact) -> str:
    """The table of a finished ``bench`` artifact, and the ratios that it found."""
    result, environment = bench.result, json.loads((bench.path / ENVIRONMENT).read_text())
    sizes, found = environment["fairness"], []
    for arm in result["arms"].values():
        size = f"{arm['bytes'] / 1e6:.1f} MB" if arm["bytes"] else ""
        for test, key in (
            (f"pp{sizes['prompt_tokens']}", "prompt_tokens_s"),
            (f"tg{sizes['new_tokens']}", "decode_tokens_s"),
        ):
            speed = arm[key]
            span = (
                f"{speed['low']:.1f}–{speed['high']:.1f}"
                if speed["low"] is not None and speed["high"] is not None
                else ""
            )
            mark = "" if arm["steady"] else " (not steady)"
            threads = "" if arm["runtime"] == "openai" else str(environment["threads"])
            found.append(
                [
                    arm["label"] + mark,
                    size,
                    arm["runtime"],
                    threads,
                    test,
                    f"{speed['value']:.1f}",
                    span,
                ]
            )
    lines = [plain(found), ""]
    for name, ratio in result["speed_of_shipped_over"].items():
        value, low, high = (ratio["tpot"][key] for key in ("value", "low", "high"))
        span = f" ({low:.2f}–{high:.2f})" if low is not None and high is not None else ""
        lines.append(
            f"{result['arms'][result['judged']]['label']} generates {value:.2f}×{span} as fast as {result['arms'][name]['label']}"
        )
    return "\n".join(lines)


@contextmanager
def live_table(
    reference: Reference, *, prompt_tokens: int, new_tokens: int, threads: int
) -> Iterator[Callable[[Sequence[Sample], str], None]]:
    """A function that shows the samples so far and a line of news: redrawn in place on a terminal, a line now and then elsewhere."""

    def now(samples: Sequence[Sample]) -> list[list[str]]:
        return rows(
            reference, samples, prompt_tokens=prompt_tokens, new_tokens=new_tokens, threads=threads
        )

    if not sys.stderr.isatty():
        last, shown = time.monotonic(), list[Sample]()

        def tell(samples: Sequence[Sample], news: str) -> None:
            nonlocal last, shown
            shown = list(samples)
            if time.monotonic() - last >= _PLAIN_EVERY:
                last = time.monotonic()
                say(f"  timing: {news}")

        yield tell
        say(plain(now(shown)))
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), auto_refresh=False) as live:
        yield lambda samples, news: live.update(_drawn(now(samples), news), refresh=True)


def _drawn(table: Sequence[Sequence[str]], news: str) -> Any:
    from rich import box
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, caption=news, caption_justify="left")
    for index, name in enumerate(HEAD):
        drawn.add_column(name, justify="left" if index in (0, 2, 4) else "right", no_wrap=index > 0)
    for row in table:
        drawn.add_row(*row)
    return drawn


def _speed(seconds: Interval, tokens: int) -> Interval:
    high = tokens / seconds.low if seconds.low > 0 else float(np.inf)
    low = tokens / seconds.high if seconds.high > 0 else 0.0
    return Interval(tokens / seconds.value, low, high, seconds.n)
