"""How fast this machine can read memory and multiply, by kernels of known work, and how much a
decoded token must read.

Run as ``python -m serve_bench.measure.host.roofline THREADS`` it measures in a process of its own
and
prints one JSON object. Decoding one stream reads every weight once a token, so bandwidth over bytes
is the fastest it can be while weights come from memory.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limbeck.contract.errors import EnvironmentalError
from serve_bench.measure.host.machine import cache_bytes, child_environment

_LEAST, _MOST = 64 << 20, 512 << 20  # bytes of an array: far beyond the caches, within reason
_CACHES = 4  # arrays are so many times the last-level cache
_SECONDS = 0.4  # for each kernel, after one run that is not counted
_SIDE = 1024  # of the multiplied matrices


def measure_roofline(*, threads: int, device: str = "cpu") -> dict[str, Any]:
    """Bandwidth in bytes/s and compute in FLOP/s of ``device`` with ``threads`` threads.

    Raises `EnvironmentalError` when it dies.
    """
    environment = child_environment(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "serve_bench.measure.host.roofline", str(threads), device],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise EnvironmentalError(
            f"the bandwidth kernel ended with status {done.returncode}: "
            f"{done.stderr[-500:].strip()}"
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_kernels(
    threads: int, device: str, *, array_bytes: int | None = None, seconds: float = _SECONDS
) -> dict[str, Any]:
    """Measure here, in this process: the best of the runs that fit into ``seconds`` for each
    kernel.

    Triad is ``a = b + s c``: two arrays read and one written. Reading is a dot product of two
    arrays. Compute is an fp32 product of square matrices.
    """
    import torch

    torch.set_num_threads(threads)
    size = array_bytes or min(_MOST, max(_LEAST, _CACHES * (cache_bytes() or 0)))
    b, c = (torch.rand(size // 4, device=device) for _ in range(2))
    a = torch.empty_like(b)
    square = torch.rand(_SIDE, _SIDE, device=device)
    product = torch.empty_like(square)
    # int(): nothing to wait for
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else int

    def best(work: Callable[[], object], amount: float) -> float:
        fastest, until = float("inf"), 0.0
        while not until or time.perf_counter() < until:
            wait()
            started = time.perf_counter()
            work()
            wait()
            elapsed = time.perf_counter() - started
            if until:
                fastest = min(fastest, elapsed)
            else:
                until = time.perf_counter() + seconds
        return amount / fastest

    with torch.inference_mode():
        triad = best(lambda: torch.add(b, c, alpha=3.0, out=a), 3 * size)
        read = best(lambda: torch.dot(b, c), 2 * size)
        flops = best(lambda: torch.matmul(square, square, out=product), 2.0 * _SIDE**3)
    return {
        "threads": threads,
        "device": device,
        "triad_bytes_s": triad,
        "read_bytes_s": read,
        "bandwidth_bytes_s": max(triad, read),
        "flops_s": flops,
        "array_bytes": size,
    }


def graph_weight_bytes(graph: Path) -> int:
    """Bytes of weights that one decoded token reads from an ONNX graph: every initialiser that not
    only gathers look into.

    A table that is gathered from gives one row a token. One that a product reads too (a tied head)
    counts once, in full.
    """
    import onnx

    proto = onnx.load(graph, load_external_data=False).graph
    # the last two: angles
    gathered = {"Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding"}
    read = {name for node in proto.node if node.op_type not in gathered for name in node.input}
    return sum(_bytes(tensor) for tensor in proto.initializer if tensor.name in read)


def _bytes(tensor: Any) -> int:
    """Bytes of an initialiser, wherever they are kept."""
    from onnx import TensorProto, helper

    packed = {TensorProto.INT4, TensorProto.UINT4}
    count = int(math.prod(tensor.dims))
    if tensor.data_type in packed:
        return (count + 1) // 2
    return count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


if __name__ == "__main__":
    print(json.dumps(run_kernels(int(sys.argv[1]), sys.argv[2])))
