"""Facts about this machine: processor, cores, memory, versions of libraries that matter."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_VERSIONED = (
    "limbeck", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers",
    "optimum", "onnx", "onnxruntime",
    "onnxruntime-gpu", "onnxruntime-genai", "onnxruntime-genai-cuda", "numpy",
)  # fmt: skip
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


@functools.cache
def versions() -> dict[str, str]:
    """Version of Python and of every installed library that can change a result."""
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def host() -> dict[str, Any]:
    """This machine: processor, its vector flags, cores this process may use, memory in bytes."""
    processor, flags = platform.processor() or platform.machine(), set[str]()
    # Not py-cpuinfo: it takes 0.6 s of processor time for these same two lines (measured).
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                processor = value.strip()
            elif name.strip() == "flags":
                flags = set(value.split())
                break
    except OSError:
        pass  # not Linux: only the processor's name is known
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": processor,
        "flags": [flag for flag in _FLAGS if flag in flags],
        "cores": available_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def sums_overflow() -> bool:
    """Whether signed 8-bit weights can overflow: x86 without VNNI sums pairs of products in 16
    bits.

    True for an x86 processor whose flags are unknown, as on macOS.
    """
    flags = set(host()["flags"])
    if not flags and platform.machine().lower() in ("x86_64", "amd64"):
        return platform.system() != "Linux"
    return "avx2" in flags and not flags & {"avx512_vnni", "avx_vnni", "amx_int8"}


def available_cores() -> int:
    """Processor cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class OtherWork:
    """Processor time that other programs took, in cores."""

    cores: float
    of: int  # cores that this process may use
    programs: Mapping[str, float]  # the largest that can be seen, by name

    @property
    def is_busy(self) -> bool:
        """Whether it was enough to make a timing here too slow."""
        return self.cores > _BUSY * self.of

    def __str__(self) -> str:
        seen = ", ".join(f"{name} {cores:.1f}" for name, cores in self.programs.items())
        return f"other programs took {self.cores:.1f} of {self.of} cores{f' ({seen})' * bool(seen)}"


_BUSY = 0.15  # share of the cores
_NAMED, _SMALLEST = 3, 0.05  # programs that are named at most, and cores that one of them takes


@contextmanager
def watch_other_work() -> Iterator[Callable[[], OtherWork]]:
    """A function that returns what other programs have taken since the block began."""
    import psutil

    def taken() -> tuple[float, float, dict[int, tuple[str, float]]]:
        cpus = psutil.cpu_times(percpu=True)
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(cpus))
        idle = sum(cpus[i].idle + getattr(cpus[i], "iowait", 0.0) for i in allowed)
        own = os.times()
        each = {}
        for process in psutil.process_iter(["pid", "name", "cpu_times"]):
            times = process.info["cpu_times"]
            if process.pid != os.getpid() and times is not None:  # None: not ours to read
                each[process.pid] = process.info["name"], times.user + times.system
        return idle, own.user + own.system + own.children_user + own.children_system, each

    started, before = time.monotonic(), taken()

    def found() -> OtherWork:
        wall, now, cores = time.monotonic() - started, taken(), available_cores()
        busy = cores - (now[0] - before[0]) / wall - (now[1] - before[1]) / wall
        programs: dict[str, float] = {}
        for pid, (name, seconds) in now[2].items():
            more = (seconds - before[2].get(pid, ("", 0.0))[1]) / wall
            programs[name] = programs.get(name, 0.0) + more
        named = sorted(programs.items(), key=lambda item: -item[1])[:_NAMED]
        shown = {name: round(used, 2) for name, used in named if used >= _SMALLEST}
        return OtherWork(round(min(max(busy, 0.0), float(cores)), 2), cores, shown)

    yield found
