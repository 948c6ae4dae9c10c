"""Random problems of several teachers, and gradients of their losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.head import IGNORED, Head
from compress.states import TeacherStates
from limbeck.contract.recipe import (
    CaMkdWeights,
    CorrectedEntropyWeights,
    EbkdWeights,
    EntropySwitch,
    EntropyWeights,
    ForwardKl,
    InverseEntropyWeights,
    Jsd,
    LabelWeights,
    PosteriorWeights,
    ReverseKl,
    SkewKl,
    StaticWeights,
    UniformWeights,
)

NAMES = ("a", "b", "c")


DIVERGENCES = [
    ForwardKl(kind="forward_kl"),
    ReverseKl(kind="reverse_kl"),
    Jsd(kind="jsd", beta=0.3),
    SkewKl(kind="skew_kl", skew=0.2),
    EntropySwitch(kind="entropy_switch", threshold=2.0),
]


WEIGHTS = [
    UniformWeights(kind="uniform"),
    StaticWeights(kind="static", values={"a": 1, "b": 2, "c": 5}),
    *(EntropyWeights(kind="entropy", granularity=g) for g in ("token", "sequence", "batch")),
    EntropyWeights(kind="entropy", control="inverted"),
    EntropyWeights(kind="entropy", control="shuffled"),
    EntropyWeights(kind="entropy", warmup=0.9),
    InverseEntropyWeights(kind="inverse_entropy"),
    EbkdWeights(kind="ebkd"),
    CaMkdWeights(kind="ca_mkd"),
    *(LabelWeights(kind="label", granularity=g) for g in ("token", "sequence")),
    CorrectedEntropyWeights(kind="corrected_entropy"),
    PosteriorWeights(kind="posterior", entropy=0.5, evidence=0.7),
]


def problem(
    *,
    seed: int = 0,
    K: int = 3,
    R: int = 4,
    L: int = 7,
    V: int = 23,
    widths: tuple[int, ...] = (8, 5, 6),
    masked: float = 0.3,
    softcap: float | None = None,
    scale: float = 1.0,
) -> dict[str, Any]:
    """A small batch: student and teachers of different widths, labels with holes."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    labels = torch.randint(0, V, (R, L), generator=g)
    labels[torch.rand(R, L, generator=g) < masked] = IGNORED
    teachers = [
        TeacherStates(
            2 * draw(R, L, widths[k]),
            Head(draw(V, widths[k]), draw(V) if k == 0 else None, 1.0, 5.0 if k == 1 else None),
            1 + 0.1 * k,
        )
        for k in range(K)
    ]
    return {
        "hidden_RLd": draw(R, L, 8).requires_grad_(),
        "head": Head(draw(V, 8).requires_grad_(), draw(V).requires_grad_(), scale, softcap),
        "teachers": teachers,
        "labels_RL": labels,
        "denominator": max(1, int((labels != IGNORED).sum())),
        "names": NAMES[:K],
    }


def gradients(loss: Tensor, parts: dict[str, Any]) -> list[Tensor]:
    head: Head = parts["head"]
    assert head.bias_V is not None
    return list(torch.autograd.grad(loss, [parts["hidden_RLd"], head.weight_Vd, head.bias_V]))
