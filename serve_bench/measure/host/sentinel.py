"""A constant piece of work, run between blocks: when it takes longer than it did, the machine was
disturbed, not the arm.

It runs on as many threads as the arms do, in the process that waits for them, and leaves nothing
running. It looks at its own times only, never at an arm's, so voiding a block cannot choose among
results.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

LIMIT = 1.25  # of its median so far, above which a block beside it is void
_NUMBERS = 1 << 15  # of a thread's array: 256 kB, which stays in the core's own cache
_TARGET = 0.01  # seconds of one run on a quiet machine, about
_RUNS = 3  # whose median is one reading


class Sentinel:
    """Readings of the constant kernel, in seconds."""

    def __init__(self, threads: int) -> None:
        """Find out how often to repeat the kernel, and take the first reading."""
        self.threads = threads
        self._arrays = [np.linspace(1, 2, _NUMBERS) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads)
        self._repeats = 1
        once = min(self._once() for _ in range(5))
        self._repeats = max(1, round(_TARGET / once))
        self.readings: list[float] = [self._reading()]

    @property
    def median(self) -> float:
        """The usual reading so far."""
        return float(np.median(self.readings))

    def read(self) -> float:
        """Run it now."""
        self.readings.append(self._reading())
        return self.readings[-1]

    def complaint(self, before: float, after: float) -> str | None:
        """Reason why the block between two readings is void, or None."""
        slow = max(before, after) / self.median
        if slow <= LIMIT:
            return None
        return (
            f"the constant kernel took {slow:.2f} times its median "
            f"{'before' if before > after else 'after'} this block"
        )

    def close(self) -> None:
        """End its threads."""
        self._pool.shutdown()

    def _reading(self) -> float:
        return float(np.median([self._once() for _ in range(_RUNS)]))

    def _once(self) -> float:
        started = time.perf_counter()
        list(self._pool.map(self._work, self._arrays))
        return time.perf_counter() - started

    def _work(self, array: np.ndarray) -> None:
        for _ in range(self._repeats):
            np.sqrt(array)  # numpy lets other threads run meanwhile
