"""Peak resident memory of this process over what it held before, read from the kernel (Linux)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Growth:
    """Filled in when the block ends."""

    bytes: int = 0


def resident(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    line = next(
        x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)
    )
    return int(line.split()[1]) * 1024


@contextmanager
def peak_growth() -> Iterator[Growth]:
    """Measure the block: highest resident memory in it, less what was resident before it."""
    growth = Growth()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    yield growth
    growth.bytes = resident("VmHWM") - before
