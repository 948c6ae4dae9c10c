"""The fusion loss written the plain way, K x T x V and autograd, as the reference that the chunked one must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.loss import IGNORED, Head, TeacherStates, weigh
from limbeck.contract.recipe import ForwardKl, Fusion, Jsd, ReverseKl, SkewKl


def dense_loss(
    config: Fusion,
    *,
    hidden_RLd: Tensor,
    head: Head,
    teachers: Sequence[TeacherStates],
    labels_RL: Tensor,
    denominator: int,
    names: Sequence[str] = (),
    progress: float = 1.0,
) -> Tensor:
    """alpha CE + beta tau^2 D over ``denominator``; every [T, V] matrix is kept."""
    valid_RL = labels_RL != IGNORED
    labels_T = labels_RL[valid_RL]
    z_TV = head.logits(hidden_RLd[valid_RL])
    cross_entropy = torch.nn.functional.cross_entropy(z_TV, labels_T, reduction="sum")
    if not teachers:
        return cross_entropy / denominator
    tau = config.temperature
    with torch.no_grad():
        z_KTV = torch.stack(
            [t.head.logits(t.hidden_RLd[valid_RL]) / t.temperature for t in teachers]
        )
        logp_KTV = torch.log_softmax(z_KTV, dim=-1)
        entropy_KRL = torch.zeros(len(teachers), *labels_RL.shape)
        label_logp_KRL = torch.zeros_like(entropy_KRL)
        entropy_KRL[:, valid_RL] = -(logp_KTV.exp() * logp_KTV).sum(-1)
        label_logp_KRL[:, valid_RL] = logp_KTV.gather(
            2, labels_T[None, :, None].expand(len(teachers), -1, 1)
        )[..., 0]
        weights_KRL = weigh(
            config.weights, entropy_KRL, label_logp_KRL, labels_RL, names=names, progress=progress
        )
        log_weights_KT1 = weights_KRL[:, valid_RL].log()[..., None]
        logp_tau_KTV = torch.log_softmax(z_KTV / tau, dim=-1)
        if config.space == "arithmetic":
            logp_TV = torch.logsumexp(log_weights_KT1 + logp_tau_KTV, dim=0)
        else:
            logp_TV = torch.log_softmax((log_weights_KT1.exp() * logp_tau_KTV).sum(0), dim=-1)
    logq_TV = torch.log_softmax(z_TV / tau, dim=-1)
    return (
        config.cross_entropy * cross_entropy
        + config.weight * tau**2 * dense_divergence(config, logp_TV, logq_TV)
    ) / denominator


def dense_divergence(config: Fusion, logp_TV: Tensor, logq_TV: Tensor) -> Tensor:
    """Sum over positions, by torch's own `kl_div`."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.kl_div(b, a, reduction="sum", log_target=True)

    def mix(share: float) -> Tensor:
        if share == 0:
            return logq_TV
        log = torch.tensor([share, 1 - share]).log()
        return torch.logsumexp(torch.stack([log[0] + logp_TV, log[1] + logq_TV]), dim=0)

    match config.divergence:
        case ForwardKl():
            return kl(logp_TV, logq_TV)
        case ReverseKl():
            return kl(logq_TV, logp_TV)
        case Jsd(beta=beta):
            return beta * kl(logp_TV, mix(beta)) + (1 - beta) * kl(logq_TV, mix(beta))
        case SkewKl(skew=skew):
            return kl(logp_TV, mix(skew))
