"""Freed memory stays with the process that trains, and goes back when it is done."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# In a process of its own: what malloc is told cannot be taken back.
FAULTS = """
import resource, torch
from pathlib import Path
from compress.host import give_memory_back, prepare_host
def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("VmRSS")).split()[1]) * 1024
def step():
    held = [torch.ones(size << 20, dtype=torch.uint8) for size in (40, 50, 60)]
def faults():
    for _ in range(5):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize()
plain = faults()
prepare_host(1)
prepared, held = faults(), resident()
give_memory_back()
print(plain, prepared, held - resident(), torch.get_num_threads())
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another C library keeps its own rules"
)
def test_freed_memory_is_used_again_and_given_back_at_the_end() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True
    )
    # Bytes of pages taken anew in eight steps, and bytes given back at the end.
    plain, prepared, returned, threads = map(int, done.stdout.split())
    step = 150 << 20
    assert plain > 6 * step  # every tensor's pages are taken anew
    assert prepared < 2 * step
    assert returned > step / 2
    assert threads == 1
