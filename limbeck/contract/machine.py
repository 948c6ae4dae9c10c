"""Facts about this machine: processor, cores, memory, and versions of the libraries that can change
a result.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
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
