"""Divergences between the fused teachers and the student, plain and with a gradient.

Shapes: C (or T) positions, V vocabulary. All values in nats, all tensors in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.contract.recipe import Divergence, EntropySwitch, ForwardKl, Jsd, ReverseKl, SkewKl

TINY = torch.finfo(torch.float32).tiny
_FORWARD, _REVERSE = ForwardKl(kind="forward_kl"), ReverseKl(kind="reverse_kl")


def plain_divergence(config: Divergence, logp_TV: Tensor, logq_TV: Tensor) -> Tensor:
    """D(p, q) summed over positions, by torch's `kl_div`: the reference for `divergence`."""
    match config:
        case ForwardKl():
            return _kl(logp_TV, logq_TV)
        case ReverseKl():
            return _kl(logq_TV, logp_TV)
        case Jsd(beta=beta):
            log_m = _log_mixture(beta, logp_TV, logq_TV)
            return beta * _kl(logp_TV, log_m) + (1 - beta) * _kl(logq_TV, log_m)
        case SkewKl(skew=skew):
            return _kl(logp_TV, _log_mixture(skew, logp_TV, logq_TV))
        case EntropySwitch(threshold=threshold):
            high_T = -(logp_TV.exp() * logp_TV).sum(-1) >= threshold
            forward = _kl(logp_TV[high_T], logq_TV[high_T])
            return forward + _kl(logq_TV[~high_T], logp_TV[~high_T])


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) = sum a (log a - log b)."""
    return torch.nn.functional.kl_div(log_b, log_a, reduction="sum", log_target=True)


def _log_mixture(share: float, logp_TV: Tensor, logq_TV: Tensor) -> Tensor:
    """log(share p + (1 - share) q)."""
    if share == 0:
        return logq_TV
    log = torch.tensor([share, 1 - share]).log()
    return torch.logsumexp(torch.stack([log[0] + logp_TV, log[1] + logq_TV]), dim=0)


def divergence(
    config: Divergence, target_CV: Tensor, logq_CV: Tensor, q_CV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute D(target, q) per position ``[C]`` and its gradient ``[C, V]`` at the logits.

    ``logq_CV`` is log q = log_softmax(logits); ``q_CV`` is its exp, for a caller that has it.
    For every divergence but the forward KL, ``slope`` is dD/dq up to a constant per position, which
    the softmax removes, because the q of one position sum to 1.
    """
    q_CV = logq_CV.exp() if q_CV is None else q_CV
    match config:
        case ForwardKl():
            # dD/dq = -p / q, and through the softmax that is q - p: no division, finite everywhere.
            value_C = safe_log(target_CV).sub_(logq_CV).mul_(target_CV).sum(-1)
            return value_C, q_CV - target_CV
        case ReverseKl():
            slope_CV = logq_CV - safe_log(target_CV)
            value_C = row_dot(q_CV, slope_CV)
            return value_C, through_softmax(q_CV, slope_CV)
        case Jsd(beta=beta):
            mixture_CV = (beta * target_CV + (1 - beta) * q_CV).clamp(min=TINY)
            logm_CV = mixture_CV.log()
            slope_CV = (1 - beta) * (logq_CV - logm_CV)
            teacher_C = row_dot(target_CV, safe_log(target_CV)) - row_dot(target_CV, logm_CV)
            return beta * teacher_C + row_dot(q_CV, slope_CV), through_softmax(q_CV, slope_CV)
        case SkewKl(skew=skew):
            mixture_CV = (skew * target_CV + (1 - skew) * q_CV).clamp(min=TINY)
            value_C = row_dot(target_CV, safe_log(target_CV)) - row_dot(target_CV, mixture_CV.log())
            return value_C, through_softmax(q_CV, -(1 - skew) * target_CV / mixture_CV)
        case EntropySwitch(threshold=threshold):
            high_C = -row_dot(target_CV, safe_log(target_CV)) >= threshold
            value_C, slope_CV = torch.empty_like(q_CV[:, 0]), torch.empty_like(q_CV)
            for rows_C, one in ((high_C, _FORWARD), (~high_C, _REVERSE)):
                value_C[rows_C], slope_CV[rows_C] = divergence(
                    one, target_CV[rows_C], logq_CV[rows_C], q_CV[rows_C]
                )
            return value_C, slope_CV


def softmax_and_norm(z_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax(z) and log sum exp(z) ``[C, 1]``.

    The norm is z - log p at any token; it is taken at the likeliest one, where p is never 0.
    """
    p_CV = torch.softmax(z_CV, dim=-1)
    return p_CV, z_CV.amax(-1, keepdim=True) - p_CV.amax(-1, keepdim=True).log()


def safe_log(p_CV: Tensor) -> Tensor:
    """log p, finite at 0."""
    return p_CV.clamp(min=TINY).log_()


def row_dot(a_CV: Tensor, b_CV: Tensor) -> Tensor:
    """Inner product of each row ``[C]``, without a ``[C, V]`` product in memory.

    0 * log 0 counts as 0, because logarithms come from `safe_log`.
    """
    product: Tensor = torch.linalg.vecdot(a_CV, b_CV)
    return product


def through_softmax(q_CV: Tensor, slope_CV: Tensor) -> Tensor:
    """Carry ``slope_CV``, a gradient at q = softmax(logits), back to the logits.

    The Jacobian of the softmax is diag(q) - q q^T.
    """
    return q_CV * (slope_CV - row_dot(q_CV, slope_CV)[:, None])
