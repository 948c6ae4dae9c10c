"""Predictions of teachers for a batch: states and a head, or a few tokens of each distribution.

Shapes: K teachers, R rows, L positions, C label positions of a chunk, B of a block of it,
k kept tokens, V vocabulary, d_k width of a teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from compress.aligned import AlignedReading, AlignedStates, Spans
from compress.divergence import TINY, row_dot, softmax_and_norm
from compress.head import Head, Place, blocks_of, chunks_of_labels


@dataclass(frozen=True)
class TeacherStates:
    """One teacher on a batch: last hidden states ``[R, L, d_k]``, head, calibration temperature."""

    hidden_RLd: Tensor
    head: Head
    temperature: float = 1.0

    spans = None  # a teacher of the student's tokenizer judges every label
    renames = True

    @property
    def vocabulary(self) -> int:
        """V: rows of the head."""
        return len(self.head.weight_Vd)

    @torch.no_grad()
    def read(self, place: Place, vocabulary: int) -> Reading:
        """Return the teacher's predictions at ``place`` over the first ``vocabulary`` tokens."""
        return _DenseReading(
            self.head.product(self.hidden_RLd[place], vocabulary), self.head, self.temperature
        )


@dataclass(frozen=True)
class SparseStates:
    """One teacher on a batch, from a cache of k tokens a position with exact statistics.

    ``share_RLk`` sums to 1 - tail. The tail counts as one bucket: it is spread in proportion to the
    student's own distribution outside the k tokens, which gives the value and the gradient of the
    divergence over k + 1 outcomes.
    """

    ids_RLk: Tensor
    share_RLk: Tensor
    entropy_RL: Tensor  # exact, nats
    label_logp_RL: Tensor  # exact, nats
    vocabulary: int
    # With another tokenizer: the labels it judges, and the mass without a token here.
    spans: Spans | None = None
    lost_RL: Tensor | None = None
    renames: bool = True  # see `compress.aligned.Pair`

    def read(self, place: Place, vocabulary: int) -> Reading:
        """As `TeacherStates.read`."""
        lost_C = self.lost_RL[place] if self.lost_RL is not None else None
        reading = _SparseReading(
            self.ids_RLk[place].long(), self.share_RLk[place].float(), self.entropy_RL[place],
            self.label_logp_RL[place], vocabulary, lost_C,
        )  # fmt: skip
        return reading.within() if vocabulary < self.vocabulary else reading


AnyStates = TeacherStates | SparseStates | AlignedStates


class Reading(Protocol):
    """Predictions of one teacher for a chunk."""

    def distribution(
        self, block: slice, labels_C: Tensor, *, tau: float = 1.0, logq_BV: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return softmax(z / (c tau)) ``[B, V]``, entropy ``[B]`` and label log-likelihood ``[B]``.

        The last two are in nats at tau = 1. ``block`` picks B positions of the chunk. ``logq_BV``
        holds the student's log-probabilities, over which a tail is spread.
        """


@dataclass(frozen=True)
class _DenseReading:
    product_CV: Tensor
    head: Head
    temperature: float

    @torch.no_grad()
    def distribution(
        self, block: slice, labels_C: Tensor, *, tau: float = 1.0, logq_BV: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        z_BV = self.head.finish(self.product_CV[block])
        if self.temperature != 1.0:
            z_BV = z_BV / self.temperature
        p_BV, norm_B1 = softmax_and_norm(z_BV)
        logp_B = (z_BV.gather(1, labels_C[block, None]) - norm_B1)[:, 0]
        entropy_B = norm_B1[:, 0] - row_dot(p_BV, z_BV)
        return p_BV if tau == 1.0 else torch.softmax(z_BV / tau, dim=-1), entropy_B, logp_B


@dataclass(frozen=True)
class _SparseReading:
    ids_Ck: Tensor
    share_Ck: Tensor
    entropy_C: Tensor
    label_logp_C: Tensor
    vocabulary: int
    lost_C: Tensor | None

    def within(self) -> _SparseReading:
        """Leave out kept tokens that the student does not have, such as padding or added tokens.

        The rest is scaled up to a distribution, as the softmax of a teacher in this process is. A
        teacher of another tokenizer has no token for that mass instead.
        """
        beyond_Ck = self.ids_Ck >= self.vocabulary
        out_Ck = self.share_Ck * beyond_Ck
        # Without a share, an id repeats a known one: the tail is not spread over the ids.
        known_C1 = (~beyond_Ck).int().argmax(-1, keepdim=True)
        repeated_C1 = self.ids_Ck.gather(1, known_C1).clamp(max=self.vocabulary - 1)
        found = replace(self, ids_Ck=torch.where(beyond_Ck, repeated_C1, self.ids_Ck))
        if self.lost_C is not None:
            return replace(
                found, share_Ck=self.share_Ck - out_Ck, lost_C=self.lost_C + out_Ck.sum(-1)
            )
        left_C = (1 - out_Ck.sum(-1)).clamp(min=TINY)
        return replace(
            found,
            share_Ck=(self.share_Ck - out_Ck) / left_C[:, None],
            entropy_C=(self.entropy_C + torch.xlogy(out_Ck, out_Ck).sum(-1)) / left_C
            + left_C.log(),
            label_logp_C=self.label_logp_C - left_C.log(),
        )

    @torch.no_grad()
    def distribution(
        self, block: slice, labels_C: Tensor, *, tau: float = 1.0, logq_BV: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert tau == 1.0, "the recipe's check refuses another temperature"
        ids_Bk, share_Bk = self.ids_Ck[block], self.share_Ck[block]
        rest_B1 = 1 - share_Bk.sum(-1, keepdim=True)
        if self.lost_C is not None:
            rest_B1 = rest_B1 - self.lost_C[block, None]
        tail_B1 = rest_B1.clamp(min=0)
        if logq_BV is None:
            p_BV = torch.zeros(len(ids_Bk), self.vocabulary, device=share_Bk.device)
        else:
            p_BV = logq_BV.exp().scatter(1, ids_Bk, 0.0)
            p_BV.mul_(tail_B1 / p_BV.sum(-1, keepdim=True).clamp(min=TINY))
        p_BV.scatter_add_(1, ids_Bk, share_Bk)
        if self.lost_C is not None and logq_BV is not None:
            p_BV.addcmul_(logq_BV.exp(), self.lost_C[block, None])
        return p_BV, self.entropy_C[block], self.label_logp_C[block]


@torch.no_grad()
def teacher_statistics(
    teachers: Sequence[AnyStates],
    labels_RL: Tensor,
    *,
    vocabulary: int | None = None,
    chunk: int = 256,
) -> tuple[Tensor, Tensor]:
    """Return entropy and label log-likelihood ``[K, R, L]``, in nats at tau = 1, calibrated.

    Positions without a label hold 0.
    """
    entropy_KRL = torch.zeros(len(teachers), *labels_RL.shape, device=labels_RL.device)
    logp_KRL = torch.zeros_like(entropy_KRL)
    for place in chunks_of_labels(labels_RL, chunk, whole_rows=False):
        for k, teacher in enumerate(teachers):
            rows = vocabulary or teacher.vocabulary
            entropy_KRL[k][place], logp_KRL[k][place] = statistics_of(
                teacher.read(place, rows), labels_RL[place], rows
            )
    return entropy_KRL, logp_KRL


def statistics_of(reading: Reading, labels_C: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return entropy and label log-likelihood ``[C]`` of one teacher in a chunk."""
    if isinstance(reading, AlignedReading):
        return reading.statistics()
    if isinstance(reading, _SparseReading):
        return reading.entropy_C, reading.label_logp_C
    found = [reading.distribution(block, labels_C) for block in blocks_of(labels_C, vocabulary)]
    entropy_C = torch.cat([entropy_B for _, entropy_B, _ in found])
    return entropy_C, torch.cat([logp_B for _, _, logp_B in found])
