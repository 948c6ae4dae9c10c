"""The last layer of a model, and what needs nothing else: chunks of labels, scores, a temperature.

Shapes: R rows (sequences), L positions of a row, T label positions, C label positions of a chunk,
V vocabulary, d hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.divergence import row_dot

IGNORED = -100  # label of a position that no term counts
# Logits that are worked on at once: 4 MB, so that about five such tensors fit in a CPU's cache.
CACHED = 1 << 20

Place = tuple[Tensor, Tensor]  # row and position of each label position of a chunk


@dataclass(frozen=True)
class Head:
    """The last layer: logits = softcap(scale * (hidden W^T + b)).

    softcap(z) = c tanh(z / c), and is left out where ``softcap`` is None.
    """

    weight_Vd: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_Cd: Tensor, rows: int | None = None) -> Tensor:
        """Return fp32 logits ``[C, rows]`` of the first ``rows`` vocabulary entries."""
        return self.finish(self.product(hidden_Cd, rows))

    def product(self, hidden_Cd: Tensor, rows: int | None = None) -> Tensor:
        """Return hidden W^T + b, in the number type of the weights."""
        weight = self.weight_Vd[:rows]
        bias = self.bias_V[:rows] if self.bias_V is not None else None
        return torch.nn.functional.linear(hidden_Cd, weight, bias)

    def finish(self, product_CV: Tensor) -> Tensor:
        """Return fp32 logits of some rows of a `product`; may return an fp32 input itself."""
        logits_CV = product_CV.float()
        if self.scale != 1.0:
            logits_CV = logits_CV * self.scale
        if self.softcap is not None:
            logits_CV = self.softcap * torch.tanh(logits_CV / self.softcap)
        return logits_CV

    def label_logp(self, product_CV: Tensor, labels_C: Tensor) -> Tensor:
        """Log-likelihood ``[C]`` of the labels in nats, from a `product`."""
        found = []
        for block in blocks_of(labels_C, product_CV.shape[1]):
            z_BV = self.finish(product_CV[block])
            label_B = z_BV.gather(1, labels_C[block, None])[:, 0]
            found.append(label_B - z_BV.logsumexp(-1))
        return torch.cat(found)


def chunks_of_labels(
    labels_RL: Tensor, chunk: int, *, whole_rows: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (row, position) of label positions, ``chunk`` at a time.

    With ``whole_rows`` a chunk holds as many whole rows as fit, at least one.
    """
    R, L = labels_RL.shape
    if whole_rows:
        step = max(1, chunk // L)
        for first in range(0, R, step):
            row_C, position_C = (labels_RL[first : first + step] != IGNORED).nonzero(as_tuple=True)
            if len(row_C):
                yield row_C + first, position_C
        return
    row_T, position_T = (labels_RL != IGNORED).nonzero(as_tuple=True)
    for row_C, position_C in zip(row_T.split(chunk), position_T.split(chunk), strict=True):
        if len(row_C):
            yield row_C, position_C


def blocks_of(labels_C: Tensor, vocabulary: int) -> Iterator[slice]:
    """Split a chunk into blocks of positions: as many as fit in a CPU's cache, all on a GPU."""
    size = len(labels_C) if labels_C.is_cuda else max(1, CACHED // vocabulary)
    return (slice(first, first + size) for first in range(0, len(labels_C), size))


@torch.no_grad()
def fit_temperature(
    hidden_RLd: Tensor,
    head: Head,
    labels_RL: Tensor,
    *,
    bounds: tuple[float, float],
    positions: int = 1024,
    chunk: int = 256,
) -> float:
    """Return the temperature c within ``bounds`` that minimises the NLL of softmax(z / c).

    Newton's method on 1 / c, at ``positions`` label positions, evenly spread.

    The NLL is convex in 1 / c: slope mean(E_p[z] - z_label), curvature mean(Var_p[z]).
    """
    row_T, position_T = (labels_RL != IGNORED).nonzero(as_tuple=True)
    if not len(row_T):
        return 1.0
    pick = torch.linspace(0, len(row_T) - 1, min(positions, len(row_T))).round().long()
    row_T, position_T = row_T[pick], position_T[pick]
    inverse, (low, high) = 1.0, (1 / bounds[1], 1 / bounds[0])
    for _ in range(6):
        slope = curvature = 0.0
        for row_C, position_C in zip(row_T.split(chunk), position_T.split(chunk), strict=True):
            z_CV = head.logits(hidden_RLd[row_C, position_C])
            p_CV = torch.softmax(z_CV * inverse, dim=-1)
            mean_C = row_dot(p_CV, z_CV)
            label_C = z_CV.gather(1, labels_RL[row_C, position_C][:, None])[:, 0]
            slope += float((mean_C - label_C).double().sum())
            curvature += float((row_dot(p_CV, z_CV**2) - mean_C**2).double().sum())
        step = slope / max(curvature, 1e-12)
        updated = min(max(inverse - step, low), high)
        if math.isclose(updated, inverse, rel_tol=1e-3):
            return 1 / updated
        inverse = updated
    return 1 / inverse


@torch.no_grad()
def label_nll(hidden_RLd: Tensor, head: Head, labels_RL: Tensor, *, chunk: int = 256) -> Tensor:
    """Return the summed label NLL of each row ``[R]``, in nats, float64."""
    total_R = torch.zeros(len(labels_RL), dtype=torch.float64)
    for place in chunks_of_labels(labels_RL, chunk, whole_rows=False):
        z_CV = head.logits(hidden_RLd[place])
        nll_C = torch.nn.functional.cross_entropy(z_CV, labels_RL[place], reduction="none")
        total_R.index_add_(0, place[0].cpu(), nll_C.double().cpu())
    return total_R
