"""The distillation loss: several teachers, weighed and fused into one target for the student.

After Meng et al. (arXiv 2507.15198), at every label position, with K teachers and vocabulary V:

    p_k   = softmax(z_k / (c_k tau))             teacher distribution; c_k is its calibration
    H_k   = -sum_v p_k(v) log p_k(v)             entropy, at tau = 1
    w_k   = weights of `compress.weights`        dynamic teacher weighting, for example
            (1 - floor) softmax_k(-H_k / sharpness) + floor / K
    p     = sum_k w_k p_k                        output fusion: `arithmetic`, or
            prod_k p_k^w_k, normalised           `geometric`
    q     = softmax(z / tau)                     student
    loss  = (alpha CE(label, softmax(z)) + beta tau^2 D(p, q)) / N

N is the number of label positions of the global batch, D a divergence of `compress.divergence`.
Everything about the teachers is detached. Padding and ignored labels count nowhere.

A teacher of another tokenizer (`compress.aligned`) has a p_k where the label begins at a common
boundary, projected into the student's vocabulary, and weight 0 elsewhere; a label without any
teacher has alpha = 1 and no D. It is in p with `across: projected`, and with `auto` if its tokens
are the student's under other ids. Else it has a loss of its own, and the whole is, with S the
teachers in p and W the sum of their weights,

    (alpha CE + beta (W tau^2 D(p_S, q) + sum_{k not in S} w_k l_k)) / N

and l_k is the binary cross-entropy of a chunk's likelihoods (once a chunk), or the distance of
sorted probabilities.

`plain_loss` writes out this formula and keeps ``[K, T, V]`` in memory, for reading and for tests.
Training uses `compress.chunked`, which computes the same value and gradient in chunks; the tests
hold one to the other.

Shapes: K teachers, R rows (sequences), L positions of a row, M positions of a teacher with another
tokenizer, T label positions of a batch, V vocabulary, d hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.aligned import AlignedStates
from compress.divergence import plain_divergence, safe_log
from compress.head import IGNORED, Head
from compress.states import AnyStates, TeacherStates
from compress.weights import Reach, weigh
from limbeck.contract.recipe import Fusion


def plain_loss(
    config: Fusion,
    *,
    hidden_RLd: Tensor,
    head: Head,
    teachers: Sequence[TeacherStates | AlignedStates],
    labels_RL: Tensor,
    denominator: int,
    names: Sequence[str] = (),
    progress: float = 1.0,
    prior_KR: Tensor | None = None,
    uncovered: float = 1.0,
) -> Tensor:
    """Compute the loss as the formula at the top of this file has it, a scalar with gradient.

    Arguments as in `compress.chunked.fused_loss`.
    """
    valid_RL = labels_RL != IGNORED
    labels_T, z_TV = labels_RL[valid_RL], head.logits(hidden_RLd[valid_RL])
    cross_entropy_T = torch.nn.functional.cross_entropy(z_TV, labels_T, reduction="none")
    if not teachers:
        return cross_entropy_T.sum() / denominator
    tau, K = config.temperature, len(teachers)
    reach = Reach.of([t.spans for t in teachers], labels_RL)
    with torch.no_grad():
        logq_TV = torch.log_softmax(z_TV, dim=-1)
        read = [_read(t, labels_RL, logq_TV, tau) for t in teachers]
        p_KTV, entropy_KRL, logp_KRL = (torch.stack(part) for part in zip(*read, strict=True))
        weights_KRL = weigh(
            config.weights, entropy_KRL, logp_KRL, labels_RL,
            names=names, progress=progress, prior_KR=prior_KR, reach=reach,
        )  # fmt: skip
        weights_KT = weights_KRL[:, valid_RL]
        mixed = [k for k in range(K) if is_fused(config, teachers[k])]
        share_T = weights_KT[mixed].sum(0)
        weights_KT1 = (weights_KT[mixed] / share_T.clamp(min=1e-30))[..., None]
        if config.space == "arithmetic":
            logp_TV = (weights_KT1 * p_KTV[mixed]).sum(0).log()
        else:
            logp_TV = torch.log_softmax((weights_KT1 * safe_log(p_KTV[mixed])).sum(0), dim=-1)
        logp_TV = logp_TV.clamp(min=-1e4)  # a token that no teacher expects counts 0, and not NaN
    logq_TV = torch.log_softmax(z_TV / tau, dim=-1)
    fusion = torch.zeros(())
    for t in share_T.nonzero()[:, 0].tolist():
        value = plain_divergence(config.divergence, logp_TV[t, None], logq_TV[t, None])
        fusion = fusion + share_T[t] * tau**2 * value
    has_RL = weights_KRL.sum(0) > 0
    own_RL = torch.zeros(labels_RL.shape).masked_scatter(valid_RL, -cross_entropy_T)
    for k in set(range(K)) - set(mixed):
        teacher = teachers[k]
        assert isinstance(teacher, AlignedStates)
        if config.across != "uld":
            fusion = fusion + _chunks(teacher, weights_KRL[k], logp_KRL[k], own_RL, tau)
            has_RL = has_RL | (teacher.spans.start_RL >= 0)
        else:
            fusion = fusion + _ranked(teacher, weights_KRL[k], valid_RL, z_TV)
    alpha_T = torch.where(has_RL[valid_RL], config.cross_entropy, uncovered)
    return ((alpha_T * cross_entropy_T).sum() + config.weight * fusion) / denominator


def is_fused(config: Fusion, teacher: AnyStates) -> bool:
    """Whether a teacher is in the fused target p; the others have a loss of their own."""
    return (
        teacher.spans is None
        or config.across == "projected"
        or (config.across == "auto" and teacher.renames)
    )


# Teachers as the formula has them, one position at a time --------------------------------------


def _logits(teacher: TeacherStates | AlignedStates) -> Tensor:
    """Calibrated logits of the teacher's own tokens, at all its positions."""
    hidden = teacher.hidden_RLd if isinstance(teacher, TeacherStates) else teacher.hidden_RMd
    return teacher.head.logits(hidden) / teacher.temperature


def _read(
    teacher: TeacherStates | AlignedStates, labels_RL: Tensor, logq_TV: Tensor, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """p_k at tau ``[T, V]``; entropy and evidence at tau = 1 ``[R, L]``."""
    z_RMV = _logits(teacher)
    logp_RMV = torch.log_softmax(z_RMV, dim=-1)
    entropy_RM = -(logp_RMV.exp() * logp_RMV).sum(-1)
    p_RMV, valid_RL = torch.softmax(z_RMV / tau, dim=-1), labels_RL != IGNORED
    if isinstance(teacher, TeacherStates):
        label_logp = logp_RMV.gather(2, labels_RL.clamp(min=0)[..., None])[..., 0]
        return p_RMV[valid_RL], entropy_RM * valid_RL, label_logp * valid_RL
    a, target_V = teacher.alignment, teacher.target_V[: z_RMV.shape[-1]]
    p_TV = torch.zeros_like(logq_TV)
    entropy_RL, evidence_RL = torch.zeros(labels_RL.shape), torch.zeros(labels_RL.shape)
    for t, (r, i) in enumerate(valid_RL.nonzero().tolist()):
        m = int(a.at_RL[r, i])
        if m >= 0:
            mapped = target_V >= 0
            p_TV[t].index_add_(0, target_V[mapped], p_RMV[r, m, mapped])
            p_TV[t] += p_RMV[r, m, ~mapped].sum() * logq_TV[t].exp()
            entropy_RL[r, i] = entropy_RM[r, m] * a.rate_R[r]
        for n in range(int(a.first_RL[r, i]), int(a.last_RL[r, i])):
            evidence_RL[r, i] += logp_RMV[r, n, a.ids_RM[r, n + 1]]
    return p_TV, entropy_RL, evidence_RL


def _chunks(
    teacher: AlignedStates, weights_RL: Tensor, evidence_RL: Tensor, own_RL: Tensor, tau: float
) -> Tensor:
    """Weighted binary cross-entropy of the likelihoods of all chunks, to the power of 1 / tau."""
    total = torch.zeros((), dtype=torch.float64)
    for r, end in teacher.spans.ends_RL.nonzero().tolist():
        start = int(teacher.spans.start_RL[r, end])
        ours = (own_RL[r, start : end + 1].double().sum() / tau).exp()
        theirs = (evidence_RL[r, end].double() / tau).exp()
        value = torch.nn.functional.binary_cross_entropy(ours, theirs)
        total = total + weights_RL[r, start] * value
    return total.float()


def _ranked(teacher: AlignedStates, weights_RL: Tensor, valid_RL: Tensor, z_TV: Tensor) -> Tensor:
    """Weighted sum of the differences between the ranked probabilities of both (ULD)."""
    p_RMV = torch.softmax(_logits(teacher), dim=-1).sort(-1, descending=True).values
    q_TV = torch.softmax(z_TV, dim=-1).sort(-1, descending=True).values
    total = torch.zeros(())
    for q_V, (r, i) in zip(q_TV, valid_RL.nonzero().tolist(), strict=True):
        if (m := int(teacher.alignment.at_RL[r, i])) >= 0:
            width = max(p_RMV.shape[-1], len(q_V))
            p_V, q_V = (torch.nn.functional.pad(x, (0, width - len(x))) for x in (p_RMV[r, m], q_V))
            total = total + weights_RL[r, i] * (p_V - q_V).abs().sum()
    return total
