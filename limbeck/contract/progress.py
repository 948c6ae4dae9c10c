"""Progress of long work: a live bar on a terminal, plain lines with a clock elsewhere."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from limbeck.contract.printable import printable

_PLAIN_EVERY = 10.0  # seconds between plain lines of one task


def leads() -> bool:
    """Whether this process is the only one of the job, or the first of several."""
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


@functools.cache
def say_once(message: str) -> None:
    """As `say`, but a message that this process wrote before is left out."""
    say(message)


Later = Callable[[float], float | None]
_later: list[Later] = []  # of the jobs that run, the outer one first


@contextmanager
def before(later: Later) -> Iterator[None]:
    """Do a part of a job: its main tasks show the time left of the whole job beside their own.

    ``later`` estimates the seconds of all parts after this one, from the seconds that the main task
    of this part takes; None where it cannot. Inside another `before`, both are counted.
    """
    _later.append(later)
    try:
        yield
    finally:
        _later.pop()


def about(seconds: float) -> str:
    """An estimated time in words: `40 s`, `17 min` or `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Task:
    """One piece of long work, and how far it is."""

    def __init__(
        self,
        label: str,
        total: int | None,
        *,
        done: int = 0,
        unit: str = "",
        main: bool = False,
        seconds: float | None = None,
        bar: Any = None,
        bar_id: Any = None,
    ) -> None:
        """See `task`. ``bar`` and ``bar_id`` are rich's, where a terminal is watching."""
        self.label, self.total, self.done = label, total, done
        self._unit, self._main, self._seconds, self._first = unit, main, seconds, done
        self._bar, self._id = bar, bar_id
        self._started = self._last = time.monotonic()

    def advance(self, steps: int = 1, **figures: float) -> None:
        """Count ``steps`` more; ``figures`` are shown beside the label, such as ``loss=3.2``."""
        self.done += steps
        unit = f" {self._unit}" if self._unit else ""
        shown = "  ".join(f"{name} {value:.4g}{unit}" for name, value in figures.items())
        if self._bar is not None:
            whole = f"{self._whole()}  " if self._main else ""
            self._bar.update(self._id, advance=steps, figures=f"{whole}{shown}")
        elif time.monotonic() - self._last >= _PLAIN_EVERY or self.done == self.total:
            self._last = time.monotonic()
            of = f"/{self.total}" if self.total else ""
            clock = f"{self._passed():.0f} s"
            if self.done != self.total:
                clock += self._time_left()
            say(f"  {self.label}: {self.done}{of}  {clock}  {shown}".rstrip())

    def _passed(self) -> float:
        return time.monotonic() - self._started

    def _left(self) -> float | None:
        """Estimated seconds to the end of this task; None where they are not known."""
        if self._seconds is not None:
            return max(self._seconds - self._passed(), 0.0)
        if not self.total or self.done == self._first:
            return None
        return self._passed() / (self.done - self._first) * (self.total - self.done)

    def _time_left(self) -> str:
        if (left := self._left()) is None:
            return ""
        whole = self._whole() if self._main else ""
        return f", about {about(left)} left{f' ({whole})' if whole else ''}"

    def _whole(self) -> str:
        """The estimated rest of the whole job; empty where this task is all of it."""
        left = self._left()
        if left is None or not _later:
            return ""
        rest = [later(self._passed() + left) for later in _later]
        known = [seconds for seconds in rest if seconds is not None]
        return f"whole job: about {about(left + sum(known))}" if len(known) == len(rest) else ""


@contextmanager
def task(
    label: str,
    total: int | None = None,
    *,
    done: int = 0,
    unit: str = "",
    main: bool = False,
    seconds: float | None = None,
) -> Iterator[Task]:
    """Show progress of ``label``: ``done`` of ``total`` steps were finished earlier.

    A ``total`` of None is unknown; ``seconds`` is the time that such a task is given. Each of
    its figures is in ``unit``. A ``main`` task takes most of the time of its part of a job, so the
    rest of the whole job (see `before`) is estimated from it.
    """
    options: dict[str, Any] = {"done": done, "unit": unit, "main": main, "seconds": seconds}
    if not (leads() and sys.stderr.isatty()):
        yield Task(label, total, **options)
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
        TextColumn("  {task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        bar_id = bar.add_task(printable(label), total=total, completed=done, figures="")
        yield Task(label, total, bar=bar, bar_id=bar_id, **options)
