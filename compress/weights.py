"""Teacher weights: how much each teacher counts at each position.

Shapes: K teachers, R rows, L positions. The entropy weights follow Meng et al. (arXiv 2507.15198);
every other kind names its source in `limbeck.contract.recipe.distillation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compress.aligned import Spans
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

# Nats added to an entropy in a denominator. An entropy near zero is mostly rounding
# (about 1e-6 in float32), so the ratio of two of them must not depend on it.
_LEAST_ENTROPY = 0.01


@dataclass(frozen=True)
class Reach:
    """Labels that each teacher can judge, if one of them has another tokenizer."""

    target_KRL: Tensor  # it has a distribution for this label
    evidence_KRL: Tensor  # the label's bytes are in a chunk whose likelihood it gives
    ends_KRL: Tensor  # that likelihood is given at this label

    @classmethod
    def of(cls, spans: Sequence[Spans | None], labels_RL: Tensor) -> Reach | None:
        """Stack the teachers' spans; None where all have the student's tokens."""
        if all(found is None for found in spans):
            return None
        everywhere = torch.ones_like(labels_RL, dtype=torch.bool)
        given = [
            (s.target_RL, s.start_RL >= 0, s.ends_RL) if s else (everywhere,) * 3 for s in spans
        ]
        return cls(*(torch.stack(part) for part in zip(*given, strict=True)))

    @property
    def joint_RL(self) -> Tensor:
        """Labels behind which every teacher that judges them has a boundary."""
        return (self.ends_KRL | ~self.evidence_KRL).all(0)

    def at(self, where: tuple[Any, ...]) -> Reach:
        """Pick positions by an index of ``[R, L]``."""
        return Reach(
            *(
                part[(slice(None), *where)]
                for part in (self.target_KRL, self.evidence_KRL, self.ends_KRL)
            )
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
    reach: Reach | None = None,
) -> Tensor:
    """Return teacher weights ``[K, R, L]``, non-negative, summing to 1 over K.

    ``entropy_KRL`` and ``label_logp_KRL`` are in nats. ``progress`` in [0, 1] drives the warm-up.
    ``global_means_2K`` holds the mean entropy and mean label log-likelihood of each teacher over
    the global batch: with it, `batch` granularity does not depend on the split into micro-batches.
    ``prior_KR`` is the evidence of `posterior` before the first label, in nats: its `log_prior`,
    and the log-likelihood of a prompt that is read and not trained on. ``reach`` is that of
    teachers with other tokenizers: a teacher without a distribution for a label has weight 0 there,
    and where no teacher has one, all weights are 0.
    """
    K = len(entropy_KRL)
    if reach is not None:
        return _within_reach(
            config, entropy_KRL, label_logp_KRL, labels_RL, names, progress, global_means_2K,
            prior_KR, reach,
        )  # fmt: skip
    weights = _raw_weights(
        config, entropy_KRL, label_logp_KRL, labels_RL, names, global_means_2K, prior_KR
    )
    floor, warmup = getattr(config, "floor", 0.0), getattr(config, "warmup", 0.0)
    weights = (1 - floor) * weights + floor / K
    if progress < warmup:
        share = progress / warmup
        weights = share * weights + (1 - share) / K
    return weights


def _within_reach(
    config: Weights,
    entropy_KRL: Tensor,
    label_logp_KRL: Tensor,
    labels_RL: Tensor,
    names: Sequence[str],
    progress: float,
    global_means_2K: Tensor | None,
    prior_KR: Tensor | None,
    reach: Reach,
) -> Tensor:
    """`weigh`, over the teachers that have a distribution for the label."""
    target_KRL, logp_KRL = reach.target_KRL, of_the_same_bytes(label_logp_KRL, reach)
    if isinstance(config, LabelWeights | CaMkdWeights) and config.granularity == "token":
        logp_KRL = of_joint_chunks(logp_KRL * (labels_RL != IGNORED), reach)
    weights = _raw_weights(
        config, entropy_KRL, logp_KRL, labels_RL, names, global_means_2K, prior_KR, target_KRL
    )
    present_KRL = target_KRL.float()
    if prior_KR is not None:  # a teacher without prior weight does not stand in for another one
        present_KRL = present_KRL * prior_KR.isfinite()[..., None]
    count_RL = present_KRL.sum(0).clamp(min=1)

    def shared(weights_KRL: Tensor) -> Tensor:
        weights_KRL = torch.nan_to_num(weights_KRL) * present_KRL
        total_RL = weights_KRL.sum(0)
        even_KRL = present_KRL / count_RL
        return torch.where(total_RL > 0, weights_KRL / total_RL.clamp(min=1e-30), even_KRL)

    floor, warmup = getattr(config, "floor", 0.0), getattr(config, "warmup", 0.0)
    weights = (1 - floor) * shared(weights) + floor * present_KRL / count_RL
    if progress < warmup:
        share = progress / warmup
        weights = share * weights + (1 - share) * present_KRL / count_RL
    return weights


def of_the_same_bytes(logp_KRL: Tensor, reach: Reach) -> Tensor:
    """Label log-likelihoods ``[K, R, L]``, with the mean of the others where a teacher gives none.

    So bytes that a teacher does not judge speak for no teacher.
    """
    given_KRL = reach.evidence_KRL
    mean_RL = (logp_KRL * given_KRL).sum(0) / given_KRL.sum(0).clamp(min=1)
    return torch.where(given_KRL, logp_KRL, mean_RL)


def of_joint_chunks(logp_KRL: Tensor, reach: Reach) -> Tensor:
    """Sums of log-likelihoods between the boundaries that all teachers share, at each position.

    Only these are of the same bytes for all of them.
    """
    joint_RL = reach.joint_RL.long()
    index_KRL = (joint_RL.cumsum(-1) - joint_RL).expand_as(logp_KRL)
    sums_KRL = torch.zeros_like(logp_KRL).scatter_add_(-1, index_KRL, logp_KRL)
    return sums_KRL.gather(-1, index_KRL)


def _raw_weights(
    config: Weights,
    entropy_KRL: Tensor,
    label_logp_KRL: Tensor,
    labels_RL: Tensor,
    names: Sequence[str],
    global_means_2K: Tensor | None,
    prior_KR: Tensor | None,
    target_KRL: Tensor | None = None,
) -> Tensor:
    """Weights before floor and warm-up.

    With ``target_KRL``, entropies are averaged and weights shared where it is true.
    """
    K, valid_RL = len(entropy_KRL), labels_RL != IGNORED
    known = valid_RL if target_KRL is None else valid_RL & target_KRL

    def softmax(score_KRL: Tensor) -> Tensor:
        if target_KRL is not None:
            score_KRL = score_KRL.masked_fill(~target_KRL, -torch.inf)
        return torch.softmax(score_KRL, dim=0)

    granularity = getattr(config, "granularity", "token")
    means_2K = global_means_2K if global_means_2K is not None else (None, None)
    # The two statistics, averaged over the span that the recipe chose.
    H_KRL = _averaged(entropy_KRL, granularity, known, means_2K[0])
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
            weights = softmax(sign * H_KRL / config.sharpness)
            return _shuffled(weights, labels_RL) if config.control == "shuffled" else weights
        case InverseEntropyWeights():
            inverse = 1 / (H_KRL + _LEAST_ENTROPY)
            return inverse / inverse.sum(0)
        case EbkdWeights():
            bounded = H_KRL + _LEAST_ENTROPY
            return _complement(bounded / bounded.sum(0))
        case CaMkdWeights():
            return _complement(torch.softmax(-logp_KRL, dim=0))
        case LabelWeights():
            return softmax(logp_KRL / config.sharpness)
        case CorrectedEntropyWeights():
            overconfidence = _overconfidence(entropy_KRL, label_logp_KRL, valid_RL, target_KRL)
            return softmax(-(entropy_KRL + overconfidence) / config.sharpness)
        case PosteriorWeights():
            # Evidence at a position is the label likelihood of the positions before it only.
            evidence = (label_logp_KRL * valid_RL).cumsum(-1) - label_logp_KRL * valid_RL
            if prior_KR is not None:
                evidence = evidence + prior_KR[..., None]
            return softmax(config.evidence * evidence - config.entropy * entropy_KRL)


def _overconfidence(
    entropy_KRL: Tensor, label_logp_KRL: Tensor, valid_RL: Tensor, target_KRL: Tensor | None
) -> Tensor:
    """Mean loss less mean entropy of each row, ``[K, R, 1]``; 0 for a calibrated teacher."""
    if target_KRL is None:
        return _row_mean(-label_logp_KRL - entropy_KRL, valid_RL)
    # The entropy is known at other positions than the evidence.
    mean_entropy = _row_mean(entropy_KRL, valid_RL & target_KRL)
    return _row_mean(-label_logp_KRL, valid_RL) - mean_entropy


def log_prior(
    config: Weights, names: Sequence[str], domains: Sequence[str], *, device: torch.device
) -> Tensor | None:
    """Log prior ``[K, R]`` of the teachers ``names``, for the domain of each row.

    Divided by the power of the evidence, so that it can be added to it. None where the weights
    have no prior.
    """
    if not (isinstance(config, PosteriorWeights) and config.prior):
        return None
    uniform = dict.fromkeys(names, 1.0)
    rows = [config.prior.get(domain, uniform) for domain in domains]
    given = [[row.get(name, 0.0) for row in rows] for name in names]
    values_KR = torch.tensor(given, device=device)
    return (values_KR / values_KR.sum(0)).log() / config.evidence


def span_of(config: Weights, *, aligned: bool = False) -> Literal["token", "sequence", "batch"]:
    """Return the span of text that the weight of one position depends on.

    ``aligned``: a teacher has another tokenizer, so its label likelihood is a chunk's.
    """
    granularity: Literal["token", "sequence", "batch"] = getattr(config, "granularity", "token")
    if aligned and granularity == "token" and isinstance(config, LabelWeights | CaMkdWeights):
        return "sequence"
    if isinstance(config, CorrectedEntropyWeights | PosteriorWeights):
        return "sequence"
    if isinstance(config, EntropyWeights) and config.control == "shuffled":
        return "sequence" if granularity == "token" else granularity
    return granularity


def sees_labels(config: Weights) -> bool:
    """Whether a weight depends on the label whose teachers it weighs, or on later ones.

    On text that was drawn from the student sum_k w_k p_k is no distribution then.
    """
    return isinstance(config, LabelWeights | CaMkdWeights | CorrectedEntropyWeights)


def _averaged(
    value_KRL: Tensor, granularity: str, valid_RL: Tensor, global_mean_K: Tensor | None
) -> Tensor:
    match granularity:
        case "sequence":
            return _row_mean(value_KRL, valid_RL).expand_as(value_KRL)
        case "batch":
            if global_mean_K is None:
                global_mean_K = (value_KRL * valid_RL).sum((1, 2)) / valid_RL.sum((-2, -1)).clamp(
                    min=1
                )
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
