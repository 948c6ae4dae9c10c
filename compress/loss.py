"""The loss: K teacher distributions weighed, fused into one target and compared with the student, in chunks.

Shapes: K teachers, R rows (sequences), L positions of a row, C valid positions of a chunk, V vocabulary, d hidden width.
Formulas: Meng et al. (arXiv 2507.15198) for the entropy weights; each other choice names its source in `limbeck.contract.recipe`.
Everything about the teachers is detached. Only label positions count; padding and ignored labels are nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from limbeck.contract.recipe import (
    CaMkdWeights,
    CorrectedEntropyWeights,
    Divergence,
    EbkdWeights,
    EntropyWeights,
    ForwardKl,
    Fusion,
    InverseEntropyWeights,
    Jsd,
    LabelWeights,
    PosteriorWeights,
    ReverseKl,
    SkewKl,
    StaticWeights,
    UniformWeights,
    Weights,
)

IGNORED = -100
CACHED = (
    1 << 20
)  # logits that are worked on at once: 4 MB, some five tensors of which a processor's caches hold

Place = tuple[Tensor, Tensor]  # row and position of each label position of a chunk


@dataclass(frozen=True)
class Head:
    """The last layer: logits = softcap(scale * (hidden W^T + b)); softcap(z) = c tanh(z / c), absent when none."""

    weight_Vd: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_Cd: Tensor, rows: int | None = None) -> Tensor:
        """fp32 logits [C, rows] of the first ``rows`` vocabulary entries."""
        return self.finish(self.product(hidden_Cd, rows))

    def product(self, hidden_Cd: Tensor, rows: int | None = None) -> Tensor:
        """hidden W^T + b, in the number type of the weights."""
        weight, bias = (
            self.weight_Vd[:rows],
            self.bias_V[:rows] if self.bias_V is not None else None,
        )
        return torch.nn.functional.linear(hidden_Cd, weight, bias)

    def finish(self, product_CV: Tensor) -> Tensor:
        """fp32 logits of some rows of a product; a tensor that is fp32 already may come back as it is."""
        logits_CV = product_CV.float()
        if self.scale != 1.0:
            logits_CV = logits_CV * self.scale
        if self.softcap is not None:
            logits_CV = self.softcap * torch.tanh(logits_CV / self.softcap)
        return logits_CV


@dataclass(frozen=True)
class TeacherStates:
    """What a teacher says about a batch: last hidden states [R, L, d_k], its head, its calibration temperature."""

    hidden_RLd: Tensor
    head: Head
    temperature: float = 1.0

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return len(self.head.weight_Vd)

    @torch.no_grad()
    def read(self, place: Place, rows: int) -> Reading:
        """What it says at some label positions of the first ``rows`` vocabulary entries."""
        return _DenseReading(
            self.head.product(self.hidden_RLd[place], rows), self.head, self.temperature
        )


@dataclass(frozen=True)
class SparseStates:
    """What a teacher said about a batch, k tokens a position, with statistics of the whole distribution.

    ``share_RLk`` sums to 1 - tail. The tail counts as one bucket: it is spread in proportion to the student's own
    distribution outside the k tokens, which gives the value and the gradient of the divergence over k + 1 outcomes.
    """

    ids_RLk: Tensor
    share_RLk: Tensor
    entropy_RL: Tensor  # exact, nats
    label_logp_RL: Tensor  # exact, nats
    vocabulary: int

    def read(self, place: Place, rows: int) -> Reading:
        """As of `TeacherStates`."""
        kept = (self.ids_RLk[place].long(), self.share_RLk[place].float())
        return _SparseReading(*kept, self.entropy_RL[place], self.label_logp_RL[place], rows)


class Reading(Protocol):
    """What one teacher says of a chunk."""

    def distribution(
        self, block: slice, labels_C: Tensor, *, tau: float = 1.0, logq_BV: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """softmax(z / (c tau)) [B, V]; entropy [B] and label log-likelihood [B] at tau = 1, of a ``block`` of B positions.

        ``logq_BV``, the student's, is needed where there is a tail.
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
        p_BV, norm_B1 = _softmax(z_BV)
        logp_B = (z_BV.gather(1, labels_C[block, None]) - norm_B1)[:, 0]
        entropy_B = norm_B1[:, 0] - _dot(p_BV, z_BV)
        return p_BV if tau == 1.0 else torch.softmax(z_BV / tau, dim=-1), entropy_B, logp_B


@dataclass(frozen=True)
class _SparseReading:
    ids_Ck: Tensor
    share_Ck: Tensor
    entropy_C: Tensor
    label_logp_C: Tensor
    rows: int

    @torch.no_grad()
    def distribution(
        self, block: slice, labels_C: Tensor, *, tau: float = 1.0, logq_BV: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert tau == 1.0, "the recipe's check refuses another temperature"
        ids_Bk, share_Bk = self.ids_Ck[block], self.share_Ck[block]
        tail_B1 = (1 - share_Bk.sum(-1, keepdim=True)).clamp(min=0)
        if logq_BV is None:
            p_BV = torch.zeros(len(ids_Bk), self.rows, device=share_Bk.device)
        else:
            p_BV = logq_BV.exp().scatter(1, ids_Bk, 0.0)
            p_BV.mul_(tail_B1 / p_BV.sum(-1, keepdim=True).clamp(min=_TINY))
        p_BV.scatter_add_(1, ids_Bk, share_Bk)
        return p_BV, self.entropy_C[block], self.label_logp_C[block]


@dataclass(frozen=True)
class FusionTerms:
    """Raw terms of one batch, each summed over its label positions; weights and statistics per position."""

    loss: Tensor  # scalar with gradient: (cross_entropy CE + weight tau^2 D) / denominator
    cross_entropy: float
    divergence: float
    weights_KRL: Tensor
    entropy_KRL: Tensor  # nats, of the calibrated teachers at tau = 1
    label_logp_KRL: Tensor  # nats


# Weights ---------------------------------------------------------------------------------------------------------


def weigh(
    config: Weights,
    entropy_KRL: Tensor,
    label_logp_KRL: Tensor,
    labels_RL: Tensor,
    *,
    names: Sequence[str] = (),
    progress: float = 1.0,
    global_means_2K: Tensor | None = None,
) -> Tensor:
    """Teacher weights [K, R, L], non-negative, summing to 1 over K.

    ``progress`` in [0, 1] drives the warm-up. ``global_means_2K`` holds the mean entropy and mean label
    log-likelihood of each teacher over the global batch, which `batch` granularity needs to be independent of the
    split into micro-batches; without it the means of this batch are taken.
    """
    K = len(entropy_KRL)
    valid_RL = labels_RL != IGNORED

    def spread(value_KRL: Tensor, row: int) -> Tensor:
        granularity = getattr(config, "granularity", "token")
        if granularity == "sequence":
            return _row_mean(value_KRL, valid_RL).expand_as(value_KRL)
        if granularity == "batch":
            if global_means_2K is not None:
                mean_K = global_means_2K[row]
            else:
                mean_K = (value_KRL * valid_RL).sum((1, 2)) / valid_RL.sum().clamp(min=1)
            return mean_K[:, None, None].expand_as(value_KRL)
        return value_KRL

    match config:
        case UniformWeights():
            weights = torch.full_like(entropy_KRL, 1 / K)
        case StaticWeights():
            values = torch.tensor(
                [config.values[name] for name in names],
                dtype=torch.float32,
                device=entropy_KRL.device,
            )
            weights = (values / values.sum())[:, None, None].expand_as(entropy_KRL)
        case EntropyWeights():
            sign = 1 if config.control == "inverted" else -1
            weights = torch.softmax(sign * spread(entropy_KRL, 0) / config.sharpness, dim=0)
            if config.control == "shuffled":
                weights = _shuffled(weights, labels_RL)
        case InverseEntropyWeights():
            inverse = 1 / (spread(entropy_KRL, 0) + 1e-6)
            weights = inverse / inverse.sum(0)
        case EbkdWeights():
            entropy = spread(entropy_KRL, 0)
            weights = _complement(entropy / entropy.sum(0).clamp(min=1e-12))
        case CaMkdWeights():
            weights = _complement(torch.softmax(-spread(label_logp_KRL, 1), dim=0))
        case LabelWeights():
            weights = torch.softmax(spread(label_logp_KRL, 1) / config.sharpness, dim=0)
        case CorrectedEntropyWeights():
            overconfidence = _row_mean(-label_logp_KRL - entropy_KRL, valid_RL)
            weights = torch.softmax(-(entropy_KRL + overconfidence) / config.sharpness, dim=0)
        case PosteriorWeights():
            evidence = (label_logp_KRL * valid_RL).cumsum(-1) - label_logp_KRL * valid_RL
            weights = torch.softmax(
                config.evidence * evidence - config.entropy * entropy_KRL, dim=0
            )
    floor, warmup = getattr(config, "floor", 0.0), getattr(config, "warmup", 0.0)
    weights = (1 - floor) * weights + floor / K
    if progress < warmup:
        share = progress / warmup
        weights = share * weights + (1 - share) / K
    return weights


def span_of(config: Weights) -> str:
    """What a weight depends on: `token`, `sequence` or `batch`."""
    if isinstance(config, CorrectedEntropyWeights | PosteriorWeights):
        return "sequence"
    if isinstance(config, EntropyWeights) and config.control == "shuffled":
        return "sequence" if config.granularity == "token" else config.granularity
    return getattr(config, "granularity", "token")


def _row_mean(value_KRL: Tensor, valid_RL: Tensor) -> Tensor:
    return (value_KRL * valid_RL).sum(-1, keepdim=True) / valid_RL.sum(-1, keepdim=True).clamp(
        min=1
    )


def _complement(share_KRL: Tensor) -> Tensor:
    K = len(share_KRL)
    return (1 - share_KRL) / (K - 1) if K > 1 else torch.ones_like(share_KRL)


def _shuffled(weights_KRL: Tensor, labels_RL: Tensor) -> Tensor:
    """Permute the weights of each row over its label positions, seeded by the labels: the split changes nothing."""
    shuffled = weights_KRL.clone()
    for row, labels in enumerate(labels_RL):
        places = (labels != IGNORED).nonzero().flatten()
        generator = torch.Generator().manual_seed(int(labels[places].sum()))
        order = torch.randperm(len(places), generator=generator).to(places.device)
        shuffled[:, row, places] = weights_KRL[:, row, places[order]]
    return shuffled


# Divergences -----------------------------------------------------------------------------------------------------


def divergence(
    config: Divergence, target_CV: Tensor, logq_CV: Tensor, q_CV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """D(target, q) per position [C] in nats, and its gradient [C, V] at the logits that gave ``logq_CV``.

    ``q_CV`` = exp(``logq_CV``), for a caller that has it.
    """
    q_CV = logq_CV.exp() if q_CV is None else q_CV
    match config:
        case ForwardKl():
            value_C = _log(target_CV).sub_(logq_CV).mul_(target_CV).sum(-1)
            return value_C, q_CV - target_CV
        case ReverseKl():
            slope_CV = logq_CV - _log(target_CV)
            value_C = _dot(q_CV, slope_CV)
            return value_C, _through_softmax(q_CV, slope_CV)
        case Jsd(beta=beta):
            mixture_CV = (beta * target_CV + (1 - beta) * q_CV).clamp(min=_TINY)
            logm_CV = mixture_CV.log()
            slope_CV = (1 - beta) * (logq_CV - logm_CV)
            teacher_C = _dot(target_CV, _log(target_CV)) - _dot(target_CV, logm_CV)
            return beta * teacher_C + _dot(q_CV, slope_CV), _through_softmax(q_CV, slope_CV)
        case SkewKl(skew=skew):
            mixture_CV = (skew * target_CV + (1 - skew) * q_CV).clamp(min=_TINY)
            value_C = _dot(target_CV, _log(target_CV)) - _dot(target_CV, mixture_CV.log())
            return value_C, _through_softmax(q_CV, -(1 - skew) * target_CV / mixture_CV)


_TINY = torch.finfo(torch.float32).tiny


def _softmax(z_CV: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(z) and log sum exp(z) [C, 1], which is z - log p at any token; at the likeliest one p is never 0."""
    p_CV = torch.softmax(z_CV, dim=-1)
    return p_CV, z_CV.amax(-1, keepdim=True) - p_CV.amax(-1, keepdim=True).log()


def _log(p_CV: Tensor) -> Tensor:
    """log p, finite at 0."""
    return p_CV.clamp(min=_TINY).log_()


def _dot(a_CV: Tensor, b_CV: Tensor) -> Tensor:
    """Row-wise inner product without a [C, V] product; 0 * -inf counts as 0 because logarithms are clamped."""
    product: Tensor = torch.linalg.vecdot(a_CV, b_CV)
    return product


def _through_softmax(q_CV: Tensor, slope_CV: Tensor) -> Tensor:
    """Gradient at the logits of a function with gradient ``slope_CV`` at q = softmax(logits)."""
    return q_CV * (slope_CV - _dot(q_CV, slope_CV)[:, None])


# The chunked loss ------------------------------------------------------------------------------------------------


def fused_loss(
    config: Fusion,
    *,
    hidden_RLd: Tensor,
    head: Head,
    teachers: Sequence[TeacherStates | SparseStates],
    labels_RL: Tensor,
    denominator: int,
    names: Sequence[str] = (),
    progress: float = 1.0,
    global_means_2K: Tensor | None = None,
) -> FusionTerms:
    """Cross-entropy plus divergence to the fused teachers, with the gradient at hidden states and head.

    ``denominator`` is the number of label positions of the *global* batch, so that micro-batches and processes add
    up. Without teachers the loss is the cross-entropy with factor 1. Extra memory is K + 2 products [C, V] in the
    heads' number type (one is of the chunk before), and a few blocks of them in fp32; on a GPU a block is the chunk.
    The vocabulary is the rows that student and teachers share (padded rows are left out).
    """
    K, (R, L) = len(teachers), labels_RL.shape
    rows = min([len(head.weight_Vd), *(t.vocabulary for t in teachers)])
    job = _Job(
        config, teachers, labels_RL, denominator, names, progress, global_means_2K, head, rows
    )
    job.weights_KRL = torch.zeros(K, R, L, device=labels_RL.device)
    job.entropy_KRL, job.label_logp_KRL = (
        torch.zeros_like(job.weights_KRL),
        torch.zeros_like(job.weights_KRL),
    )
    if (
        teachers
        and span_of(config.weights) != "token"
        and (config.chunk < L or span_of(config.weights) == "batch")
    ):
        job.entropy_KRL, job.label_logp_KRL = teacher_statistics(
            teachers, labels_RL, rows=rows, chunk=config.chunk
        )
        job.weights_KRL = weigh(
            config.weights, job.entropy_KRL, job.label_logp_KRL, labels_RL,
            names=names, progress=progress, global_means_2K=global_means_2K,
        )  # fmt: skip
        job.weighed = True
    loss: Tensor = _ChunkedLoss.apply(hidden_RLd, head.weight_Vd, head.bias_V, job)  # type: ignore[no-untyped-call]
    return FusionTerms(
        loss,
        job.cross_entropy,
        job.divergence,
        job.weights_KRL,
        job.entropy_KRL,
        job.label_logp_KRL,
    )


@torch.no_grad()
def teacher_statistics(
    teachers: Sequence[TeacherStates | SparseStates],
    labels_RL: Tensor,
    *,
    rows: int | None = None,
    chunk: int = 256,
) -> tuple[Tensor, Tensor]:
    """Entropy and label log-likelihood [K, R, L] in nats at tau = 1, calibrated; 0 where there is no label."""
    entropy_KRL = torch.zeros(len(teachers), *labels_RL.shape, device=labels_RL.device)
    logp_KRL = torch.zeros_like(entropy_KRL)
    for place in chunks_of_labels(labels_RL, chunk, whole_rows=False):
        for k, teacher in enumerate(teachers):
            reading = teacher.read(place, rows or teacher.vocabulary)
            entropy_KRL[k][place], logp_KRL[k][place] = _statistics(
                reading, labels_RL[place], rows or teacher.vocabulary
            )
    return entropy_KRL, logp_KRL


def _statistics(reading: Reading, labels_C: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Entropy and label log-likelihood [C] of one teacher in a chunk."""
    found = [reading.distribution(block, labels_C)[1:] for block in _blocks(labels_C, rows)]
    return torch.cat([entropy_B for entropy_B, _ in found]), torch.cat(
        [logp_B for _, logp_B in found]
    )


def _blocks(labels_C: Tensor, rows: int) -> Iterator[slice]:
    """Positions of a chunk, a few at a time: on a CPU what is computed of them stays in its caches, on a GPU all at once."""
    size = len(labels_C) if labels_C.is_cuda else max(1, CACHED // rows)
    return (slice(first, first + size) for first in range(0, len(labels_C), size))


@dataclass
class _Job:
    """What the autograd function needs beside tensors, and what it hands back beside the loss."""

    config: Fusion
    teachers: Sequence[TeacherStates | SparseStates]
    labels_RL: Tensor
    denominator: int
    names: Sequence[str]
    progress: float
    global_means_2K: Tensor | None
    head: Head
    rows: int
    weighed: bool = False
    cross_entropy: float = 0.0
    divergence: float = 0.0
    weights_KRL: Tensor = None  # type: ignore[assignment]
    entropy_KRL: Tensor = None  # type: ignore[assignment]
    label_logp_KRL: Tensor = None  # type: ignore[assignment]


class _ChunkedLoss(torch.autograd.Function):
    """Value and gradient in one pass over chunks; nothing of size T x V outlives its chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden_RLd: Tensor, weight_Vd: Tensor, bias_V: Tensor | None, job: _Job
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias, _ = ctx.needs_input_grad
        head = Head(weight_Vd, bias_V, job.head.scale, job.head.softcap)
        grad_hidden = torch.zeros_like(hidden_RLd) if wants_hidden else None
        grad_weight = torch.zeros_like(weight_Vd, dtype=torch.float32) if wants_weight else None
        grad_bias = (
            torch.zeros_like(bias_V, dtype=torch.float32)
            if wants_bias and bias_V is not None
            else None
        )
        whole_rows = (
            bool(job.teachers) and not job.weighed and span_of(job.config.weights) != "token"
        )
        loss = torch.zeros((), dtype=torch.float64)
        for place in chunks_of_labels(job.labels_RL, job.config.chunk, whole_rows=whole_rows):
            hidden_Cd = hidden_RLd[place]
            value, slope_CV = _chunk_loss(job, head, hidden_Cd, place)
            loss += value
            if wants_hidden or wants_weight:
                slope_CV = slope_CV.to(hidden_Cd.dtype)
            if grad_hidden is not None:
                grad_hidden[place] = slope_CV @ weight_Vd[: job.rows].to(slope_CV.dtype)
            if grad_weight is not None:
                grad_weight[: job.rows] += slope_CV.T @ hidden_Cd
            if grad_bias is not None:
                grad_bias[: job.rows] += slope_CV.sum(0)
        ctx.gradients = grad_hidden, grad_weight, grad_bias
        ctx.dtypes = weight_Vd.dtype, bias_V.dtype if bias_V is not None else None
        return loss.float().to(hidden_RLd.device)

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden, weight, bias = (
            g.mul_(grad_loss.to(g.dtype)) if g is not None else None for g in ctx.gradients
        )
        weight_type, bias_type = ctx.dtypes
        return (
            hidden,
            weight.to(weight_type) if weight is not None else None,
            bias.to(bias_type) if bias is not None and bias_type is not None else None,
            None,
        )


def _chunk_loss(job: _Job, head: Head, hidden_Cd: Tensor, place: Place) -> tuple[float, Tensor]:
    """Loss of one chunk and its gradient [C, V] at the raw (uncapped, unscaled) student logits; adds to the job's terms."""
    labels_C = job.labels_RL[place]
    product_CV = head.product(hidden_Cd, job.rows)
    readings = [teacher.read(place, job.rows) for teacher in job.teachers]
    if readings and not job.weighed and span_of(job.config.weights) != "token":
        for k, reading in enumerate(
            readings
        ):  # softmax is taken again below: cheaper than keeping K of them
            job.entropy_KRL[k][place], job.label_logp_KRL[k][place] = _statistics(
                reading, labels_C, job.rows
            )
        _weigh(job, place[0].unique())
    total = 0.0
    for block in _blocks(labels_C, job.rows):
        value, slope_BV = _block_loss(job, head, product_CV, readings, place, block)
        product_CV[block] = slope_BV
        total += value
    return total, product_CV


def _block_loss(
    job: _Job,
    head: Head,
    product_CV: Tensor,
    readings: Sequence[Reading],
    place: Place,
    block: slice,
) -> tuple[float, Tensor]:
    """As of `_chunk_loss`, of a block of it."""
    config, labels_B1 = job.config, job.labels_RL[place][block, None]
    z_BV = head.finish(product_CV[block])
    q_BV, norm_B1 = _softmax(z_BV)
    logq_BV = z_BV.sub_(norm_B1)  # in place: nobody reads these logits again
    cross_entropy = -float(logq_BV.gather(1, labels_B1).double().sum())
    job.cross_entropy += cross_entropy
    alpha, beta, divergence_sum = 1.0, 0.0, 0.0
    if readings:
        alpha, beta, tau = config.cross_entropy, config.weight, config.temperature
        target_BV = _target(job, readings, place, block, logq_BV)
        if tau == 1.0:
            value_B, slope_BV = divergence(config.divergence, target_BV, logq_BV, q_BV)
        else:
            value_B, slope_BV = divergence(
                config.divergence, target_BV, torch.log_softmax(logq_BV / tau, dim=-1)
            )
        divergence_sum = float(value_B.double().sum()) * tau**2
        slope_BV.mul_(beta * tau).add_(q_BV, alpha=alpha)
        job.divergence += divergence_sum
    else:
        slope_BV = q_BV
    slope_BV.scatter_add_(1, labels_B1, torch.full_like(slope_BV[:, :1], -alpha))
    if head.softcap is not None:
        slope_BV.mul_(1 - ((logq_BV + norm_B1) / head.softcap) ** 2)
    slope_BV.mul_(head.scale / job.denominator)
    return (alpha * cross_entropy + beta * divergence_sum) / job.denominator, slope_BV


def _target(
    job: _Job, readings: Sequence[Reading], place: Place, block: slice, logq_BV: Tensor
) -> Tensor:
    """The fused teacher distribution [B, V] at temperature tau; records statistics and, where a token has its own, weights."""
    config, labels_C, softened = job.config, job.labels_RL[place], []
    row_B, position_B = place[0][block], place[1][block]
    for k, reading in enumerate(readings):
        p_BV, entropy_B, logp_B = reading.distribution(
            block, labels_C, tau=config.temperature, logq_BV=logq_BV
        )
        softened.append(p_BV)
        job.entropy_KRL[k, row_B, position_B], job.label_logp_KRL[k, row_B, position_B] = (
            entropy_B,
            logp_B,
        )
    if not job.weighed and span_of(config.weights) == "token":
        _weigh(job, row_B, position_B)
    weights_KB1 = job.weights_KRL[:, row_B, position_B, None]
    if config.space == "arithmetic":
        target_BV = softened[0].mul_(weights_KB1[0])
        for p_BV, weight_B1 in zip(softened[1:], weights_KB1[1:], strict=True):
            target_BV.addcmul_(p_BV, weight_B1)
        return target_BV
    log_BV = _log(softened[0]).mul_(weights_KB1[0])
    for p_BV, weight_B1 in zip(softened[1:], weights_KB1[1:], strict=True):
        log_BV.addcmul_(_log(p_BV), weight_B1)
    return torch.softmax(log_BV, dim=-1)


def _weigh(job: _Job, row_B: Tensor, position_B: Tensor | None = None) -> None:
    """Set the weights of some positions, or of whole rows, from the statistics that stand there."""
    at = (
        (slice(None), row_B)
        if position_B is None
        else (slice(None), row_B[:, None], position_B[:, None])
    )
    job.weights_KRL[at] = weigh(
        job.config.weights, job.entropy_KRL[at], job.label_logp_KRL[at], job.labels_RL[at[1:]], names=job.names, progress=job.progress
    )  # fmt: skip


def chunks_of_labels(
    labels_RL: Tensor, chunk: int, *, whole_rows: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices (row, position) of label positions, about ``chunk`` at a time, or as many whole rows as fit (at least one)."""
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


# Calibration and scoring -----------------------------------------------------------------------------------------


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
    """The temperature c that minimises the NLL of softmax(z / c), by Newton's method on 1 / c, within ``bounds``.

    The NLL is convex in 1 / c: its slope is mean(E_p[z] - z_label) and its curvature mean(Var_p[z]).
    ``positions`` label positions, evenly spread, are used.
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
            mean_C = _dot(p_CV, z_CV)
            slope += float(
                (mean_C - z_CV.gather(1, labels_RL[row_C, position_C][:, None])[:, 0])
                .double()
                .sum()
            )
            curvature += float((_dot(p_CV, z_CV**2) - mean_C**2).double().sum())
        step = slope / max(curvature, 1e-12)
        updated = min(max(inverse - step, low), high)
        if math.isclose(updated, inverse, rel_tol=1e-3):
            return 1 / updated
        inverse = updated
    return 1 / inverse


@torch.no_grad()
def label_nll(hidden_RLd: Tensor, head: Head, labels_RL: Tensor, *, chunk: int = 256) -> Tensor:
    """Summed label NLL [R] in nats of each row, float64."""
    total_R = torch.zeros(len(labels_RL), dtype=torch.float64)
    for place in chunks_of_labels(labels_RL, chunk, whole_rows=False):
        z_CV = head.logits(hidden_RLd[place])
        nll_C = torch.nn.functional.cross_entropy(z_CV, labels_RL[place], reduction="none")
        total_R.index_add_(0, place[0].cpu(), nll_C.double().cpu())
    return total_R
