"""Parts of `compress.loss.plain_loss`: teachers as the formula has them, one position at a time.

Shapes: R rows, L positions of the student, M positions of a teacher with another tokenizer,
T label positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.aligned import AlignedStates
from compress.head import IGNORED
from compress.states import TeacherStates


def plain_logits(teacher: TeacherStates | AlignedStates) -> Tensor:
    """Calibrated logits of the teacher's own tokens, at all its positions."""
    hidden = teacher.hidden_RLd if isinstance(teacher, TeacherStates) else teacher.hidden_RMd
    return teacher.head.logits(hidden) / teacher.temperature


def plain_read(
    teacher: TeacherStates | AlignedStates, labels_RL: Tensor, logq_TV: Tensor, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """p_k at tau ``[T, V]``; entropy and evidence at tau = 1 ``[R, L]``."""
    z_RMV = plain_logits(teacher)
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


def plain_chunks(
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
