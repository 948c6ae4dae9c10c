"""Chunked fusion loss against the plain one: peak extra memory, time and gradients in one run.

K = 2 teachers, V = 49,152, 2,048 tokens, d = 576, fp32 on the CPU, LoRA case (head frozen).
Prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from compress.chunked import fused_loss
from compress.head import Head
from compress.loss import plain_loss
from compress.states import TeacherStates
from limbeck.contract.recipe import EntropyWeights, Fusion
from tests.benchmarks.memory import peak_growth

K, V, T, D, ROUNDS = 2, 49_152, 2_048, 576, 5


def peak_bytes(work: Callable[[], object]) -> int:
    """Highest resident memory during ``work`` above what was resident before it."""
    with peak_growth() as growth:
        work()
    return growth.bytes


def main() -> None:
    """Run both, interleaved."""
    torch.manual_seed(0)
    student_head = Head(torch.randn(V, D) * 0.05)
    parts = {
        "head": student_head,
        "teachers": [
            TeacherStates(torch.randn(8, T // 8, D), Head(torch.randn(V, D) * 0.05))
            for _ in range(K)
        ],
        "labels_RL": torch.randint(0, V, (8, T // 8)),
        "denominator": T,
    }
    hidden = torch.randn(8, T // 8, D)
    config = Fusion(weights=EntropyWeights(kind="entropy"))

    def run(loss: Callable[..., Tensor]) -> Tensor:
        leaf = hidden.clone().requires_grad_()
        loss(config, hidden_RLd=leaf, **parts).backward()
        assert leaf.grad is not None
        return leaf.grad

    arms: dict[str, Callable[..., Tensor]] = {
        "chunked": lambda *a, **k: fused_loss(*a, **k).loss,
        "dense": plain_loss,
    }
    grads = {name: run(loss) for name, loss in arms.items()}
    difference = float((grads["chunked"] - grads["dense"]).norm() / grads["dense"].norm())
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    memory = {}
    for _ in range(ROUNDS):
        for name, loss in arms.items():
            started = time.perf_counter()
            memory[name] = max(memory.get(name, 0), peak_bytes(lambda loss=loss: run(loss)))
            seconds[name].append(time.perf_counter() - started)
    print(
        json.dumps(
            {
                "memory_ratio": round(memory["chunked"] / memory["dense"], 4),
                "time_ratio": round(
                    statistics.median(a / b for a, b in zip(*seconds.values(), strict=True)), 3
                ),
                "max_relative_gradient_difference": difference,
                "megabytes": {name: round(value / 1e6) for name, value in memory.items()},
                "seconds": {
                    name: round(statistics.median(value), 2) for name, value in seconds.items()
                },
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
