"""The loss: K teacher distributions weighed, fused into one target and compared with the student, in chunks.

Shapes: K teachers, R rows (sequences), L positions of a row, C valid positions of a chunk, V vocabulary, d hidden width.
Formulas: Meng et al. (arXiv 2507.15198) for the entropy weights; each other choice names its source in `limbeck.recipe`.
Everything about the teachers is detached. Only label positions count; padding and ignored labels are nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.recipe import (
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
        weight, bias = self.weight_Vd[:rows], self.bias_V[:rows] if self.bias_V is not None else None
        logits_CV = torch.nn.functional.linear(hidden_Cd, weight, bias).float()
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
    def distribution(
        self, place: Place, labels_C: Tensor, rows: int, *, tau: float = 1.0, logq_CV: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """softmax(z / (c tau)) [C, rows]; entropy [C] and label log-likelihood [C] at tau = 1."""
        z_CV = self.head.logits(self.hidden_RLd[place], rows)
        if self.temperature != 1.0:
            z_CV /= self.temperature
        p_CV = torch.softmax(z_CV, dim=-1)
        # log sum exp(z) = z - log p at any token; at the likeliest one p is never 0.
        top_C1, at_C1 = p_CV.max(dim=-1, keepdim=True)
        norm_C = (z_CV.gather(1, at_C1) - top_C1.log())[:, 0]
        logp_C = z_CV.gather(1, labels_C[:, None])[:, 0] - norm_C
        entropy_C = norm_C - _dot(p_CV, z_CV)
        return p_CV if tau == 1.0 else torch.softmax(z_CV / tau, dim=-1), entropy_C, logp_C


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

    @torch.no_grad()
    def distribution(
        self, place: Place, labels_C: Tensor, rows: int, *, tau: float = 1.0, logq_CV: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As of `TeacherStates`, at tau = 1 only; ``logq_CV`` is the student's, and needed where there is a tail."""
        assert tau == 1.0, "the recipe's check refuses another temperature"
        ids_Ck, share_Ck = self.ids_RLk[place].long(), self.share_RLk[place].float()
        tail_C1 = (1 - share_Ck.sum(-1, keepdim=True)).clamp(min=0)
        if logq_CV is None:
            p_CV = torch.zeros(len(labels_C), rows, device=share_Ck.device)
        else:
            p_CV = logq_CV.exp().scatter(1, ids_Ck, 0.0)
            p_CV.mul_(tail_C1 / p_CV.sum(-1, keepdim=True).clamp(min=_TINY))
        p_CV.scatter_add_(1, ids_Ck, share_Ck)
        return p_CV, self.entropy_RL[place], self.label_logp_RL[place]


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
                [config.values[name] for name in names], dtype=torch.float32, device=entropy_KRL.device
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
            weights = torch.softmax(config.evidence * evidence - config.entropy * entropy_KRL, dim=0)
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
    return (value_KRL * valid_RL).sum(-1, keepdim=True) / valid_RL.sum(-1, keepdim=True).clamp(min=1)


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
            value_C = torch.special.xlogy(target_CV, target_CV).sum(-1) - _dot(target_CV, logq_CV)
            return value_C, q_CV - target_CV
        case ReverseKl():
            slope_CV = logq_CV - target_CV.clamp(min=_TINY).log()
            value_C = _dot(q_CV, slope_CV)
            return value_C, _through_softmax(q_CV, slope_CV)
        case Jsd(beta=beta):
            mixture_CV = (beta * target_CV + (1 - beta) * q_CV).clamp(min=_TINY)
            logm_CV = mixture_CV.log()
            slope_CV = (1 - beta) * (logq_CV - logm_CV)
            teacher_C = torch.special.xlogy(target_CV, target_CV).sum(-1) - _dot(target_CV, logm_CV)
            return beta * teacher_C + _dot(q_CV, slope_CV), _through_softmax(q_CV, slope_CV)
        case SkewKl(skew=skew):
            mixture_CV = (skew * target_CV + (1 - skew) * q_CV).clamp(min=_TINY)
            value_C = torch.special.xlogy(target_CV, target_CV).sum(-1) - _dot(target_CV, mixture_CV.log())
            return value_C, _through_softmax(q_CV, -(1 - skew) * target_CV / mixture_CV)


_TINY = torch.finfo(torch.float32).tiny


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
    up. Without teachers the loss is the cross-entropy with factor 1. Extra memory is (K + 4) C V numbers of fp32.
    The vocabulary is the rows that student and teachers share (padded rows are left out).
    """
    K, (R, L) = len(teachers), labels_RL.shape
    rows = min([len(head.weight_Vd), *(t.vocabulary for t in teachers)])
    job = _Job(config, teachers, labels_RL, denominator, names, progress, global_means_2K, head, rows)
    job.weights_KRL = torch.zeros(K, R, L, device=labels_RL.device)
    job.entropy_KRL, job.label_logp_KRL = torch.zeros_like(job.weights_KRL), torch.zeros_like(job.weights_KRL)
    if teachers and span_of(config.weights) != "token" and (config.chunk < L or span_of(config.weights) == "batch"):
        job.entropy_KRL, job.label_logp_KRL = teacher_statistics(teachers, labels_RL, rows=rows, chunk=config.chunk)
        job.weights_KRL = weigh(
            config.weights, job.entropy_KRL, job.label_logp_KRL, labels_RL,
            names=names, progress=progress, global_means_2K=global_means_2K,
        )  # fmt: skip
        job.weighed = True
    loss: Tensor = _ChunkedLoss.apply(hidden_RLd, head.weight_Vd, head.bias_V, job)  # type: ignore[no-untyped-call]
    return FusionTerms(loss, job.cross_entropy, job.divergence, job.weights_KRL, job.entropy_KRL, job.label_logp_KRL)


@torch.no_grad()
def teacher_statistics(
    teachers: Sequence[TeacherStates | SparseStates], labels_RL: Tensor, *, rows: int | None = None, chunk: int = 256
) -> tuple[Tensor, Tensor]:
    """Entropy and label log-likelihood [K, R, L] in nats at tau = 1, calibrated; 0 where there is no label."""
    entropy_KRL = torch.zeros(len(teachers), *labels_RL.shape, device=labels_RL.device)
    logp_KRL = torch.zeros_like(entropy_KRL)
    for place in chunks_of_labels(labels_RL, chunk, whole_rows=False):
        labels_C = labels_RL[place]
        for k, teacher in enumerate(teachers):
            shared = rows or teacher.vocabulary
            _, entropy_KRL[k][place], logp_KRL[k][place] = teacher.distribution(place, labels_C, shared)
    return entropy_KRL, logp_KRL


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
    def forward(ctx: Any, hidden_RLd: Tensor, weight_Vd: Tensor, bias_V: Tensor | None, job: _Job) -> Tensor:
        wants_hidden, wants_weight, wants_bias, _ = ctx.needs_input_grad
        head = Head(weight_Vd, bias_V, job.head.scale, job.head.softcap)
        grad_hidden = torch.zeros_like(hidden_RLd) if wants_hidden else None
        grad_weight = torch.zeros_like(weight_Vd, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if wants_bias and bias_V is not None else None
        whole_rows = bool(job.teachers) and not job.weighed and span_of(job.config.weights) != "token"
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
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden, weight, bias = (g.mul_(grad_loss.to(g.dtype)) if g is not None else None for g in ctx.gradients)
        weight_type, bias_type = ctx.dtypes
        return (
            hidden,
            weight.to(weight_type) if weight is not None else None,
            bias.to(bias_type) if bias is not None and bias_type is not None else None,
            None,
        )


def _chunk_loss(job: _Job, head: Head, hidden_Cd: Tensor, place: Place) -> tuple[float, Tensor]:
    """Loss of one chunk and its gradient [C, V] at the raw (uncapped, unscaled) student logits; adds to the job's terms."""
    config, labels_C = job.config, job.labels_RL[place]
    z_CV = head.logits(hidden_Cd, job.rows)
    logq_CV = torch.log_softmax(z_CV, dim=-1)
    q_CV = logq_CV.exp()
    cross_entropy = -float(logq_CV.gather(1, labels_C[:, None]).double().sum())
    job.cross_entropy += cross_entropy
    alpha, beta, divergence_sum = 1.0, 0.0, 0.0
    if job.teachers:
        alpha, beta, tau = config.cross_entropy, config.weight, config.temperature
        target_CV = _target(job, place, labels_C, logq_CV)
        if tau == 1.0:
            value_C, slope_CV = divergence(config.divergence, target_CV, logq_CV, q_CV)
        else:
            value_C, slope_CV = divergence(config.divergence, target_CV, torch.log_softmax(z_CV / tau, dim=-1))
        divergence_sum = float(value_C.double().sum()) * tau**2
        slope_CV.mul_(beta * tau).add_(q_CV, alpha=alpha)
        job.divergence += divergence_sum
    else:
        slope_CV = q_CV
    slope_CV[torch.arange(len(labels_C), device=labels_C.device), labels_C] -= alpha
    if head.softcap is not None:
        slope_CV.mul_(1 - (z_CV / head.softcap) ** 2)
    slope_CV.mul_(head.scale / job.denominator)
    return (alpha * cross_entropy + beta * divergence_sum) / job.denominator, slope_CV


def _target(job: _Job, place: Place, labels_C: Tensor, logq_CV: Tensor) -> Tensor:
    """The fused teacher distribution [C, V] at temperature tau; records weights and statistics of the chunk."""
    config = job.config
    softened: list[Tensor] = []
    for k, teacher in enumerate(job.teachers):
        p_CV, entropy_C, logp_C = teacher.distribution(
            place, labels_C, job.rows, tau=config.temperature, logq_CV=logq_CV
        )
        softened.append(p_CV)
        job.entropy_KRL[k][place], job.label_logp_KRL[k][place] = entropy_C, logp_C
    if not job.weighed:
        rows = place[0].unique() if span_of(config.weights) != "token" else None
        if rows is None:
            entropy, logp = (s[:, place[0], place[1]][:, None] for s in (job.entropy_KRL, job.label_logp_KRL))
            weights = weigh(config.weights, entropy, logp, labels_C[None], names=job.names, progress=job.progress)
            job.weights_KRL[:, place[0], place[1]] = weights[:, 0]
        else:
            job.weights_KRL[:, rows] = weigh(
                config.weights, job.entropy_KRL[:, rows], job.label_logp_KRL[:, rows], job.labels_RL[rows],
                names=job.names, progress=job.progress,
            )  # fmt: skip
    weights_KC = job.weights_KRL[:, place[0], place[1]]
    if config.space == "arithmetic":
        target_CV = softened[0].mul_(weights_KC[0][:, None])
        for p_CV, weight_C in zip(softened[1:], weights_KC[1:], strict=True):
            target_CV.addcmul_(p_CV, weight_C[:, None])
        return target_CV
    log_CV = softened[0].clamp_(min=_TINY).log_().mul_(weights_KC[0][:, None])
    for p_CV, weight_C in zip(softened[1:], weights_KC[1:], strict=True):
        log_CV.addcmul_(p_CV.clamp_(min=_TINY).log_(), weight_C[:, None])
    return torch.softmax(log_CV, dim=-1)


def chunks_of_labels(labels_RL: Tensor, chunk: int, *, whole_rows: bool) -> Iterator[tuple[Tensor, Tensor]]:
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
            slope += float((mean_C - z_CV.gather(1, labels_RL[row_C, position_C][:, None])[:, 0]).double().sum())
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
