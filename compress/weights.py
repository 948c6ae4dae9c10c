"""Teacher weights: how much each teacher counts at each position.

Shapes: K teachers, R rows, L positions. The entropy weights follow Meng et al. (arXiv 2507.15198);
every other kind names its source in `limbeck.contract.recipe.distillation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from compress.head import IGNORED
from limbeck.contract.recipe import (
    CaMkdWeights,
    CorrectedEntropyWeights,
    EbkdWeights,
    EntropyWeights,
    InverseEntropyWeights,
    LabelWeights,
    PosteriorWeights,
    StaticWeights,
    UniformWeights,
    Weights,
)


def weigh(
    config: Weights,
    entropy_KRL: Tensor,
    label_logp_KRL: Tensor,
    labels_RL: Tensor,
    *,
    names: Sequence[str] = (),
    progress: float = 1.0,
    global_means_2K: Tensor | None = None,
    prior_KR: Tensor | None = None,
) -> Tensor:
    """Return teacher weights ``[K, R, L]``, non-negative, summing to 1 over K.

    ``entropy_KRL`` and ``label_logp_KRL`` are in nats. ``progress`` in [0, 1] drives the warm-up.
    ``global_means_2K`` holds the mean entropy and mean label log-likelihood of each teacher over
    the global batch: with it, `batch` granularity does not depend on the split into micro-batches.
    ``prior_KR`` is the evidence of `posterior` before the first label, in nats: the log-likelihood
    of a prompt that is read and not trained on.
    """
    K = len(entropy_KRL)
    weights = _raw_weights(
        config, entropy_KRL, label_logp_KRL, labels_RL, names, global_means_2K, prior_KR
    )
    floor, warmup = getattr(config, "floor", 0.0), getattr(config, "warmup", 0.0)
    weights = (1 - floor) * weights + floor / K
    if progress < warmup:
        share = progress / warmup
        weights = share * weights + (1 - share) / K
    return weights


def _raw_weights(
    config: Weights,
    entropy_KRL: Tensor,
    label_logp_KRL: Tensor,
    labels_RL: Tensor,
    names: Sequence[str],
    global_means_2K: Tensor | None,
    prior_KR: Tensor | None,
) -> Tensor:
    """Weights before floor and warm-up."""
    K, valid_RL = len(entropy_KRL), labels_RL != IGNORED
    granularity = getattr(config, "granularity", "token")
    means_2K = global_means_2K if global_means_2K is not None else (None, None)
    # The two statistics, averaged over the span that the recipe chose.
    H_KRL = _averaged(entropy_KRL, granularity, valid_RL, means_2K[0])
    logp_KRL = _averaged(label_logp_KRL, granularity, valid_RL, means_2K[1])
    match config:
        case UniformWeights():
            return torch.full_like(entropy_KRL, 1 / K)
        case StaticWeights():
            given = [config.values[name] for name in names]
            values = torch.tensor(given, dtype=torch.float32, device=entropy_KRL.device)
            return (values / values.sum())[:, None, None].expand_as(entropy_KRL)
        case EntropyWeights():
            sign = 1 if config.control == "inverted" else -1
            weights = torch.softmax(sign * H_KRL / config.sharpness, dim=0)
            return _shuffled(weights, labels_RL) if config.control == "shuffled" else weights
        case InverseEntropyWeights():
            inverse = 1 / (H_KRL + 1e-6)
            return inverse / inverse.sum(0)
        case EbkdWeights():
            return _complement(H_KRL / H_KRL.sum(0).clamp(min=1e-12))
        case CaMkdWeights():
            return _complement(torch.softmax(-logp_KRL, dim=0))
        case LabelWeights():
            return torch.softmax(logp_KRL / config.sharpness, dim=0)
        case CorrectedEntropyWeights():
            overconfidence = _row_mean(-label_logp_KRL - entropy_KRL, valid_RL)
            return torch.softmax(-(entropy_KRL + overconfidence) / config.sharpness, dim=0)
        case PosteriorWeights():
            # Evidence at a position is the label likelihood of the positions before it only.
            evidence = (label_logp_KRL * valid_RL).cumsum(-1) - label_logp_KRL * valid_RL
            if prior_KR is not None:
                evidence = evidence + prior_KR[..., None]
            return torch.softmax(config.evidence * evidence - config.entropy * entropy_KRL, dim=0)


def span_of(config: Weights) -> Literal["token", "sequence", "batch"]:
    """Return the span of text that the weight of one position depends on."""
    granularity: Literal["token", "sequence", "batch"] = getattr(config, "granularity", "token")
    if isinstance(config, CorrectedEntropyWeights | PosteriorWeights):
        return "sequence"
    if isinstance(config, EntropyWeights) and config.control == "shuffled":
        return "sequence" if granularity == "token" else granularity
    return granularity


def _averaged(
    value_KRL: Tensor, granularity: str, valid_RL: Tensor, global_mean_K: Tensor | None
) -> Tensor:
    match granularity:
        case "sequence":
            return _row_mean(value_KRL, valid_RL).expand_as(value_KRL)
        case "batch":
            if global_mean_K is None:
                global_mean_K = (value_KRL * valid_RL).sum((1, 2)) / valid_RL.sum().clamp(min=1)
            return global_mean_K[:, None, None].expand_as(value_KRL)
        case _:
            return value_KRL


def _row_mean(value_KRL: Tensor, valid_RL: Tensor) -> Tensor:
    return (value_KRL * valid_RL).sum(-1, keepdim=True) / valid_RL.sum(-1, keepdim=True).clamp(
        min=1
    )


def _complement(share_KRL: Tensor) -> Tensor:
    K = len(share_KRL)
    return (1 - share_KRL) / (K - 1) if K > 1 else torch.ones_like(share_KRL)


def _shuffled(weights_KRL: Tensor, labels_RL: Tensor) -> Tensor:
    """Permute the weights of each row over its label positions.

    The labels are the seed, so that the split into micro-batches changes nothing.
    """
    shuffled = weights_KRL.clone()
    for row, labels in enumerate(labels_RL):
        places = (labels != IGNORED).nonzero().flatten()
        generator = torch.Generator().manual_seed(int(labels[places].sum()))
        order = torch.randperm(len(places), generator=generator).to(places.device)
        shuffled[:, row, places] = weights_KRL[:, row, places[order]]
    return shuffled
