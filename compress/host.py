"""How this process uses its processor: threads, number types, and memory kept between steps."""

from __future__ import annotations

import ctypes
import platform

import torch

from limbeck.contract.machine import available_cores, host

# Names and values of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _NEVER = -1, -3, 2**31 - 1


def prepare_host(threads: int | None) -> None:
    """Compute with ``threads`` threads and keep freed memory from step to step.

    None for ``threads`` means every core of this process. By default glibc hands every large
    tensor back to the kernel when it is freed, and the next step pays for the same pages again,
    zeroed one by one: a fifth of a step on a CPU (docs/experiments). Other C libraries are left
    alone.
    """
    torch.set_num_threads(threads or available_cores())
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        if not (
            libc.mallopt(_M_MMAP_THRESHOLD, _NEVER) and libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
        ):
            raise RuntimeError("glibc refused a malloc threshold of 2 GiB")


def give_memory_back() -> None:
    """Hand freed memory back to the kernel."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return `fp32` or `bf16`; `auto` becomes bf16 where the hardware computes it, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if {"avx512_bf16", "amx_bf16"} & set(host()["flags"]) else "fp32"
