"""Figures of text that the student wrote, for the log of one step.

Shapes: K teachers, P places that prompts come from, R rows of a micro-batch, L positions, T label
positions of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.chunked import FusionTerms
from compress.head import IGNORED
from compress.states import AnyStates, teacher_statistics
from compress.tasks.language_models import LanguageModels
from compress.tasks.own_text import OwnRow
from compress.weights import Reach, of_joint_chunks, of_the_same_bytes, sees_labels
from limbeck.contract.recipe import PosteriorWeights, Weights


class OwnTerms:
    """Sums over the own rows of one step. `figures` adds up all processes."""

    def __init__(self, places: Sequence[str], names: Sequence[str], weights: Weights) -> None:
        """``names`` are the teachers', ``weights`` how they are weighed."""
        self._places, self._names, self._known = places, names, not sees_labels(weights)
        self._divergence = self._log_ratio = self._judged = self._repetition = self._rows = 0.0
        self._weights_PK = torch.zeros(len(places), len(names), dtype=torch.float64)
        self._labels_P = torch.zeros(len(places), dtype=torch.float64)

    def add(self, terms: FusionTerms, rows: Sequence[OwnRow], labels_RL: Tensor) -> None:
        """Add one micro-batch, all of whose ``rows`` are own ones."""
        valid_RL = labels_RL != IGNORED
        self._divergence += terms.divergence
        log_ratio, judged = log_ratio_to_mixture(terms, valid_RL)
        self._log_ratio += log_ratio
        self._judged += judged
        for index, row in enumerate(rows):
            self._repetition += row.repetition
            self._labels_P[row.prompt.place] += len(row.new)
            weights_KT = terms.weights_KRL[:, index][:, valid_RL[index]]
            self._weights_PK[row.prompt.place] += weights_KT.double().sum(1).cpu()
        self._rows += len(rows)

    def figures(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Any] | None:
        """Return means over all processes, added up by ``reduce``; None without rows."""
        sums = [self._divergence, self._log_ratio, self._judged, self._repetition, self._rows]
        packed = torch.cat(
            [torch.tensor(sums, dtype=torch.float64), self._labels_P, self._weights_PK.flatten()]
        )
        P, K = self._weights_PK.shape
        head, labels_P, weights = reduce(packed).split([len(sums), P, P * K])
        divergence, log_ratio, judged, repetition, rows = head.tolist()
        tokens = float(labels_P.sum())
        if not rows:
            return None
        share_PK = (weights.reshape(P, K) / labels_P[:, None]).tolist()
        return {
            "rows": int(rows),
            "tokens": int(tokens),
            "length": tokens / rows,
            "divergence": divergence / tokens,
            "reverse_kl": log_ratio / judged if judged and self._known else None,
            "judged": int(judged),
            "repetition": repetition / rows,
            "weights": {
                place: {n: round(w, 4) for n, w in zip(self._names, share_K, strict=True)}
                for place, share_K, labels in zip(
                    self._places, share_PK, labels_P.tolist(), strict=True
                )
                if labels
            },
        }


def log_ratio_to_mixture(terms: FusionTerms, valid_RL: Tensor) -> tuple[float, int]:
    """log q of what the student drew, less log sum_k w_k p_k: a sample of KL(q || teachers).

    Returns its sum in nats, and the number of labels in it. With teachers of other tokenizers p is
    that of the chunks between boundaries that all teachers share, with the weights at the chunk's
    beginning. Left out are labels that no teacher judges, and a chunk that begins in the prompt.

    Bytes that are no UTF-8 are left out as well. So if the next text is UTF-8 with probability Q
    under the student and P under the teachers, this estimates KL(q | UTF-8 || p | UTF-8) + log Q/P.
    """
    logp_KRL, own_RL, start_RL = terms.label_logp_KRL, terms.own_logp_RL, valid_RL
    if (reach := terms.reach) is not None:
        start_RL = valid_RL & reach.evidence_KRL.any(0)
        start_RL[:, 1:] &= reach.joint_RL[:, :-1]
        valid_RL = of_joint_chunks(start_RL[None].float(), reach)[0] > 0
        own_RL = of_joint_chunks(own_RL[None], reach)[0]
        logp_KRL = of_joint_chunks(of_the_same_bytes(logp_KRL, reach), reach)
    log_mixture_N = torch.logsumexp(
        terms.weights_KRL[:, start_RL].log() + logp_KRL[:, start_RL], dim=0
    )
    log_ratio_N = own_RL[start_RL].double() - log_mixture_N.double()
    return float(log_ratio_N.sum()), int(valid_RL.sum())


def evidence_of_prompts(
    task: LanguageModels, teachers: Sequence[AnyStates], prompt_labels_RL: Tensor
) -> Tensor | None:
    """Log-likelihood ``[K, R]`` of prompts under each teacher; None unless the weights use it."""
    if not isinstance(task.recipe.fusion.weights, PosteriorWeights):
        return None
    labels_RL = prompt_labels_RL.to(task.device)
    _, logp_KRL = teacher_statistics(
        teachers, labels_RL, vocabulary=task.vocabulary, chunk=task.recipe.fusion.chunk
    )
    reach = Reach.of([teacher.spans for teacher in teachers], labels_RL)
    if reach is not None:
        logp_KRL = of_the_same_bytes(logp_KRL, reach) * (labels_RL != IGNORED)
    return logp_KRL.sum(-1)
