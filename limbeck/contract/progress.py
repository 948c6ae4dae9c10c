"""Progress of long work: a live bar when a terminal watches, plain lines with a clock when none
does.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from limbeck.contract.printable import printable

_PLAIN_EVERY = 10.0  # seconds between plain lines of one task


def leads() -> bool:
    """Whether this process is the only one of the job, or the first that torchrun or accelerate
    started.
    """
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """How many processes torchrun or accelerate started for this job; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def say(message: str) -> None:
    """One line for the person who waits, on standard error.

    Of several processes only the first writes it.
    """
    if leads():
        print(printable(message), file=sys.stderr, flush=True)


class Task:
    """One piece of long work, and how far it is."""

    def __init__(self, label: str, total: int | None, bar: Any = None, bar_id: Any = None) -> None:
        self.label, self.total, self.done = label, total, 0
        self._bar, self._id = bar, bar_id
        self._started = self._last = time.monotonic()

    def advance(self, steps: int = 1, **figures: float) -> None:
        """Count ``steps`` more; ``figures`` are shown beside the label, such as ``loss=3.2``."""
        self.done += steps
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.update(self._id, advance=steps, figures=shown)
        elif time.monotonic() - self._last >= _PLAIN_EVERY or self.done == self.total:
            self._last = time.monotonic()
            of = f"/{self.total}" if self.total else ""
            seconds = f"{self._last - self._started:.0f} s"
            say(f"  {self.label}: {self.done}{of}  {seconds}  {shown}".rstrip())


@contextmanager
def task(label: str, total: int | None = None, *, done: int = 0) -> Iterator[Task]:
    """Show progress of ``label``:

    ``done`` of ``total`` steps were finished earlier; a ``total`` of None is unknown.
    """
    if not (leads() and sys.stderr.isatty()):
        handle = Task(label, total)
        handle.done = done
        yield handle
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        handle = Task(
            label,
            total,
            bar,
            bar.add_task(printable(label), total=total, completed=done, figures=""),
        )
        handle.done = done
        yield handle
