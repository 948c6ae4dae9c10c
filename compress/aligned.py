"""A teacher of another tokenizer on a batch: its predictions in the student's vocabulary.

At a student position whose text ends at a common boundary (see
`limbeck.contract.models.alignment`), the
teacher's distribution over its own next tokens is *projected*: each of its tokens counts for the
student's token that begins the same bytes. Elsewhere it has no distribution. Its *evidence* at the
last label of a chunk is its log-probability of the whole chunk, so that sums over text are nats of
the same bytes as the student's, and nothing looks ahead.

Shapes: R rows, L positions of the student, M positions of the teacher, C label positions of a
chunk of work, B of a block of it, N teacher positions that a chunk of work needs, V vocabulary of
the student, V_T of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from compress.divergence import row_dot, softmax_and_norm, through_softmax
from compress.head import CACHED, IGNORED, Head, Place, chunks_of_labels
from limbeck.contract.models.alignment import Aligned, Aligner

ANY_ROWS = 1 << 62  # vocabulary rows that such a teacher can weigh: all
_LARGEST = -1e-6  # log q(chunk), at most, so that log(1 - q) is finite


class Rendered(Protocol):
    """Conversations as a teacher's own chat template renders them."""

    digest: str

    def align(self, aligner: Aligner, ids: Sequence[int]) -> Aligned | None:
        """Align the row of the student's tokens that a conversation is; None: it is none."""


@dataclass(frozen=True)
class Pair:
    """The student's tokenizer and another one."""

    aligner: Aligner
    target_V: Tensor  # [V_T]: student's token that begins each teacher token; -1: none
    conversations: Rendered | None = None  # as the teacher reads them

    @cached_property
    def renames(self) -> bool:
        """Whether the teacher has the student's tokens, perhaps under other ids: no two of its
        tokens meet, and 99 % of the student's are met."""
        met = self.target_V[self.target_V >= 0]
        return len(met) == len(met.unique()) >= 0.99 * len(self.aligner.own)

    def target(self, rows: int, device: torch.device) -> Tensor:
        """``target_V`` for a head of ``rows`` rows, of which the last may belong to no token."""
        found = torch.full((rows,), -1, dtype=torch.long, device=device)
        known = self.target_V[:rows].to(device)
        found[: len(known)] = known
        return found

    def align(self, ids_RL: Tensor, labels_RL: Tensor | None = None) -> Alignment:
        """Write a batch in the teacher's tokens. Text after the last label is left out.

        ``labels_RL`` are next-token labels; None: every token but the first is a label.
        """
        ids = ids_RL.cpu().numpy()
        if labels_RL is None:
            labels = np.full(ids.shape, IGNORED, np.int64)
            labels[:, :-1] = ids[:, 1:]
        else:
            labels = labels_RL.cpu().numpy()
        valid = labels != IGNORED
        rows = []
        for row, mine in zip(ids, valid, strict=True):
            length = int(mine.nonzero()[0][-1]) + 2 if mine.any() else 0
            tokens = row[:length].tolist()
            found = self.conversations.align(self.aligner, tokens) if self.conversations else None
            rows.append(found or self.aligner.row(tokens))
        return Alignment.of(rows, valid, device=ids_RL.device)


@dataclass(frozen=True)
class Spans:
    """Labels that a teacher of another tokenizer can judge."""

    target_RL: Tensor  # whether it has a distribution for this label
    start_RL: Tensor  # label position where the chunk of this label begins; -1: in no chunk
    ends_RL: Tensor  # whether a chunk ends with this label, and its evidence is here

    def rows(self, rows: Tensor | slice) -> Spans:
        """Those of some rows."""
        return Spans(self.target_RL[rows], self.start_RL[rows], self.ends_RL[rows])


@dataclass(frozen=True)
class Alignment:
    """A batch in the teacher's tokens."""

    ids_RM: Tensor  # teacher's tokens, right-padded with 0
    length_R: Tensor  # of them in each row
    at_RL: Tensor  # teacher position with the text up to here before its next token; -1: none
    start_RL: Tensor  # label position where the chunk of this label begins; -1: in no chunk
    # Teacher positions [first, last) that predict the chunk whose last label this is; else 0, 0.
    first_RL: Tensor
    last_RL: Tensor
    rate_R: Tensor  # teacher tokens for each student token of the same text

    @classmethod
    def of(cls, rows: Sequence[Aligned], valid: np.ndarray, *, device: torch.device) -> Alignment:
        """Stack rows. Only chunks count whose tokens are all labels ``valid`` [R, L]."""
        R, L = valid.shape
        ids = np.zeros((R, max(1, *(len(row.ids) for row in rows))), np.int64)
        at, start = np.full((R, L), -1, np.int64), np.full((R, L), -1, np.int64)
        first, last, rate = np.zeros((R, L), np.int64), np.zeros((R, L), np.int64), np.ones(R)
        for r, row in enumerate(rows):
            ids[r, : len(row.ids)] = row.ids
            at[r, : len(row.at)] = row.at
            ours = theirs = 0
            for begin, end, their_begin, their_end in row.chunks.tolist():
                ours, theirs = ours + end - begin, theirs + their_end - their_begin
                if begin < 1 or their_begin < 1 or not valid[r, begin - 1 : end - 1].all():
                    continue
                start[r, begin - 1 : end - 1] = begin - 1
                first[r, end - 2], last[r, end - 2] = their_begin - 1, their_end - 1
            rate[r] = theirs / ours if ours else 1.0
        lengths = np.array([len(row.ids) for row in rows])
        arrays = (ids, lengths, at, start, first, last, rate.astype(np.float32))
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))

    def to(self, device: torch.device) -> Alignment:
        """The same on a device."""
        return Alignment(*(getattr(self, f.name).to(device) for f in fields(self)))

    @property
    def spans(self) -> Spans:
        """Labels that the teacher can judge."""
        return Spans(self.at_RL >= 0, self.start_RL, self.last_RL > self.first_RL)

    @property
    def labels_RM(self) -> Tensor:
        """The teacher's own next token where a chunk needs it, else ignored."""
        labels_RM = torch.full_like(self.ids_RM, IGNORED)
        for row, end in self.spans.ends_RL.nonzero().tolist():
            at = slice(int(self.first_RL[row, end]), int(self.last_RL[row, end]))
            labels_RM[row, at] = self.ids_RM[row, at.start + 1 : at.stop + 1]
        return labels_RM

    @property
    def texts(self) -> list[list[int]]:
        """The teacher's tokens of each row, without padding."""
        rows = zip(self.ids_RM.tolist(), self.length_R.tolist(), strict=True)
        return [ids[:length] for ids, length in rows]

    def gathered(self, states_RMd: Tensor) -> Tensor:
        """Teacher states at the student's positions ``[R, L, d]``; any state where there is none.

        A position without a teacher has weight 0.
        """
        index_RL1 = self.at_RL.clamp(min=0)[..., None].expand(-1, -1, states_RMd.shape[-1])
        return states_RMd.gather(1, index_RL1)


@dataclass(frozen=True)
class AlignedStates:
    """One teacher of another tokenizer on a batch: states ``[R, M, d_k]`` of its own tokens."""

    hidden_RMd: Tensor
    head: Head
    alignment: Alignment
    target_V: Tensor
    temperature: float = 1.0
    renames: bool = False  # see `Pair`

    vocabulary = ANY_ROWS

    @property
    def spans(self) -> Spans:
        """See `Alignment.spans`."""
        return self.alignment.spans

    def read(self, place: Place, vocabulary: int) -> AlignedReading:
        """As `compress.states.TeacherStates.read`."""
        a, width = self.alignment, self.hidden_RMd.shape[1]
        row_C, own_C = place[0], a.at_RL[place]
        first_C, count_C = a.first_RL[place], (a.last_RL - a.first_RL)[place]
        base_C = row_C * width
        # Every position of each chunk that ends here, and those whose distribution is asked for.
        total = int(count_C.sum())
        offset_C = count_C.cumsum(0) - count_C
        within = torch.arange(total, device=row_C.device) - offset_C.repeat_interleave(count_C)
        evidence = (base_C + first_C).repeat_interleave(count_C) + within
        need_N = torch.cat([evidence, (base_C + own_C)[own_C >= 0]]).unique()
        hidden_Nd = self.hidden_RMd.flatten(0, 1)[need_N]
        next_N = (need_N + 1).clamp(max=a.ids_RM.numel() - 1)
        return AlignedReading(
            product_NV=self.head.product(hidden_Nd),
            head=self.head,
            temperature=self.temperature,
            label_N=a.ids_RM.flatten()[next_N],
            own_C=torch.where(own_C >= 0, torch.searchsorted(need_N, base_C + own_C), -1),
            first_C=torch.searchsorted(need_N, base_C + first_C),
            count_C=count_C,
            rate_C=a.rate_R[row_C],
            target_V=self.target_V,
            vocabulary=vocabulary,
        )


@dataclass(frozen=True)
class AlignedReading:
    """See `compress.states.Reading`."""

    product_NV: Tensor
    head: Head
    temperature: float
    label_N: Tensor  # teacher's own next token
    own_C: Tensor  # place among the N of the state with the text up to here; -1: none
    first_C: Tensor  # place among the N of the first position that predicts the chunk ending here
    count_C: Tensor  # of such positions; 0: no chunk ends here
    rate_C: Tensor
    target_V: Tensor
    vocabulary: int

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """Norm, entropy and label log-likelihood ``[N]`` of the teacher's own tokens at tau = 1."""
        found = []
        for block in self._blocks(len(self.product_NV)):
            z_BV = self._logits(block)
            p_BV, norm_B1 = softmax_and_norm(z_BV)
            logp_B = (z_BV.gather(1, self.label_N[block, None]) - norm_B1)[:, 0]
            found.append((norm_B1[:, 0], norm_B1[:, 0] - row_dot(p_BV, z_BV), logp_B))
        if not found:
            none = torch.zeros(0, device=self.product_NV.device)
            return none, none, none
        norm_N, entropy_N, logp_N = (torch.cat(parts) for parts in zip(*found, strict=True))
        return norm_N, entropy_N, logp_N

    @torch.no_grad()
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Entropy and evidence ``[C]`` in nats, at tau = 1.

        The entropy is a token's of the teacher, times its tokens for each student token: bits a
        byte, in the units of the other teachers. 0 where there is no distribution, or where no
        chunk ends.
        """
        _, entropy_N, logp_N = self._statistics
        sums = torch.cat([logp_N.new_zeros(1), logp_N.double().cumsum(0)])
        evidence_C = (sums[self.first_C + self.count_C] - sums[self.first_C]).float()
        has_C = self.own_C >= 0
        entropy_C = torch.zeros_like(self.rate_C)
        entropy_C[has_C] = entropy_N[self.own_C[has_C]] * self.rate_C[has_C]
        return entropy_C, evidence_C * (self.count_C > 0)

    @torch.no_grad()
    def distribution(
        self, block: slice, labels_C: Tensor, *, tau: float = 1.0, logq_BV: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Reading.distribution`; rows without a distribution are 0.

        Mass of tokens that begin no student token is spread over the student's own distribution,
        as the tail of `SparseStates` is.
        """
        entropy_C, evidence_C = self.statistics()
        own_B = self.own_C[block]
        p_BV = torch.zeros(len(own_B), self.vocabulary + 1, device=self.product_NV.device)
        # The last column takes what has no token in the student's vocabulary.
        target_V = torch.where(
            (self.target_V < 0) | (self.target_V >= self.vocabulary), self.vocabulary, self.target_V
        )
        has = (own_B >= 0).nonzero()[:, 0]
        for part in self._blocks(len(has)):
            rows = has[part]
            p_BV[rows] = _projected(self._probabilities(own_B[rows], tau), target_V, p_BV.shape[1])
        lost_B1, p_BV = p_BV[:, -1:], p_BV[:, :-1]
        if logq_BV is not None:
            p_BV = p_BV.addcmul(logq_BV.exp(), lost_B1)
        return p_BV, entropy_C[block], evidence_C[block]

    def lost(self) -> Tensor:
        """Mass of each distribution ``[C]`` that has no token in the student's vocabulary."""
        p_CV, _, _ = self.distribution(slice(None), self.own_C)
        return torch.where(self.own_C >= 0, 1 - p_CV.sum(-1), 0.0)

    @torch.no_grad()
    def ranked(self, block: slice) -> Tensor:
        """Probabilities of the teacher's own tokens ``[B, V_T]``, the largest first; else 0."""
        own_B = self.own_C[block]
        p_BV = self._probabilities(own_B.clamp(min=0), 1.0) * (own_B >= 0)[:, None]
        return p_BV.sort(-1, descending=True).values

    def _probabilities(self, index_B: Tensor, tau: float) -> Tensor:
        z_BV = self._logits(index_B)
        if tau != 1.0:
            return torch.softmax(z_BV / tau, dim=-1)
        return z_BV.sub_(self._statistics[0][index_B, None]).exp_()

    def _logits(self, index: slice | Tensor) -> Tensor:
        z_BV = self.head.finish(self.product_NV[index])
        return z_BV if self.temperature == 1.0 else z_BV / self.temperature

    def _blocks(self, count: int) -> list[slice]:
        size = max(1, CACHED // self.product_NV.shape[1])
        if self.product_NV.is_cuda:
            size = max(1, count)
        return [slice(first, first + size) for first in range(0, count, size)]


def _projected(p_BV: Tensor, target_V: Tensor, width: int) -> Tensor:
    """Add the columns of ``p_BV`` up by target; a head may have fewer rows than its tokenizer."""
    out = torch.zeros(len(p_BV), width, device=p_BV.device)
    return out.index_add_(1, target_V[: p_BV.shape[1]], p_BV)


# Other losses than the projected one -------------------------------------------------------------


def chunk_loss(teacher_N: Tensor, student_N: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Approximate likelihood matching (ALM, arXiv 2503.20083): value and slope of each chunk.

    Takes log-probabilities of chunks under teacher and student, in nats. The value is
    -a log b - (1 - a) log(1 - b) with a = p_T(chunk)^(1/tau) and b = p_S(chunk)^(1/tau), and is
    least at b = a. The slope is at log p_S(chunk).
    """
    log_a, log_b = ((x.double() / tau).clamp(max=_LARGEST) for x in (teacher_N, student_N))
    a, b = log_a.exp(), log_b.exp()
    rest = -torch.expm1(log_b)  # 1 - b
    value = -(a * log_b + (1 - a) * rest.log())
    slope = torch.where(student_N / tau > _LARGEST, 0.0, (b - a) / rest / tau)
    return value, slope


def chunk_terms(
    spans: Sequence[Spans],
    weights: Sequence[Tensor],
    evidence: Sequence[Tensor],
    own_RL: Tensor,
    valid_RL: Tensor,
    tau: float,
) -> tuple[float, Tensor]:
    """Sum w_k times `chunk_loss` over all chunks, and give its slope at log q(label) ``[R, L]``.

    ``own_RL`` are the student's label log-likelihoods. A chunk has its first position's weight.
    Only chunks count whose labels are all ``valid_RL``: others reach into a prompt.
    """
    total, slope_RL = 0.0, torch.zeros_like(own_RL)
    missing_RL = (~valid_RL).long().cumsum(1)
    for a, weights_RL, evidence_RL in zip(spans, weights, evidence, strict=True):
        row_N, end_N = a.ends_RL.nonzero(as_tuple=True)
        start_N = a.start_RL[row_N, end_N]
        whole_N = valid_RL[row_N, start_N] & (
            missing_RL[row_N, end_N] == missing_RL[row_N, start_N]
        )
        row_N, end_N, start_N = row_N[whole_N], end_N[whole_N], start_N[whole_N]
        sums = own_RL.double().cumsum(1)
        own_N = sums[row_N, end_N] - sums[row_N, start_N] + own_RL[row_N, start_N]
        weight_N = weights_RL[row_N, start_N].double()
        value_N, slope_N = chunk_loss(evidence_RL[row_N, end_N], own_N, tau)
        total += float((weight_N * value_N).sum())
        of_end = torch.zeros_like(own_RL)
        of_end[row_N, start_N] = (weight_N * slope_N).to(of_end.dtype)
        has = a.start_RL >= 0
        slope_RL += torch.where(has, of_end.gather(1, a.start_RL.clamp(min=0)), 0.0)
    return total, slope_RL


def ranked_loss(teacher_BV: Tensor, q_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Universal logit distillation (ULD, arXiv 2402.12030): value ``[B]``, gradient at the logits.

    The value is the sum of |p - q| over ranks, where the shorter distribution ends in zeros.
    ``teacher_BV`` comes sorted.
    """
    sorted_BV, order_BV = q_BV.sort(-1, descending=True)
    width = max(sorted_BV.shape[1], teacher_BV.shape[1])
    p_BV, mine_BV = (
        torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (teacher_BV, sorted_BV)
    )
    gap_BV = mine_BV - p_BV
    sign_BV = torch.zeros_like(q_BV).scatter_(1, order_BV, gap_BV[:, : q_BV.shape[1]].sign())
    return gap_BV.abs().sum(-1), through_softmax(q_BV, sign_BV)


@torch.no_grad()
def student_logp(
    hidden_RLd: Tensor, head: Head, labels_RL: Tensor, *, rows: int, chunk: int
) -> Tensor:
    """Label log-likelihood ``[R, L]`` of the student, in nats; 0 without a label."""
    found_RL = torch.zeros(labels_RL.shape, device=labels_RL.device)
    for place in chunks_of_labels(labels_RL, chunk, whole_rows=False):
        product_CV = head.product(hidden_RLd[place], rows)
        found_RL[place] = head.label_logp(product_CV, labels_RL[place])
    return found_RL
