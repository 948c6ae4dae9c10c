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
from compress.weights import Reach, of_the_same_bytes
from limbeck.contract.recipe import PosteriorWeights


class OwnTerms:
    """Sums over the own rows of one step. `figures` adds up all processes."""

    def __init__(self, places: Sequence[str], names: Sequence[str], *, estimates: bool) -> None:
        """``names`` are the teachers'.

        ``estimates`` is False where a teacher's likelihoods are of other tokens than the student's:
        then the reverse KL cannot be estimated from the labels.
        """
        self._places, self._names = places, names
        self._divergence = self._log_ratio = self._repetition = self._rows = 0.0
        self._estimates = estimates
        self._weights_PK = torch.zeros(len(places), len(names), dtype=torch.float64)
        self._labels_P = torch.zeros(len(places), dtype=torch.float64)

    def add(self, terms: FusionTerms, rows: Sequence[OwnRow], labels_RL: Tensor) -> None:
        """Add one micro-batch, all of whose ``rows`` are own ones."""
        valid_RL = labels_RL != IGNORED
        self._divergence += terms.divergence
        # log q of what was sampled, less log of the mixture sum_k w_k p_k: a sample of KL(q || p).
        log_mixture_T = torch.logsumexp(
            terms.weights_KRL[:, valid_RL].log() + terms.label_logp_KRL[:, valid_RL], dim=0
        )
        self._log_ratio += -terms.cross_entropy - float(log_mixture_T.double().sum())
        for index, row in enumerate(rows):
            self._repetition += row.repetition
            self._labels_P[row.prompt.place] += len(row.new)
            weights_KT = terms.weights_KRL[:, index][:, valid_RL[index]]
            self._weights_PK[row.prompt.place] += weights_KT.double().sum(1).cpu()
        self._rows += len(rows)

    def figures(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Any] | None:
        """Return means over all processes, added up by ``reduce``; None without rows."""
        sums = [self._divergence, self._log_ratio, self._repetition, self._rows]
        packed = torch.cat(
            [torch.tensor(sums, dtype=torch.float64), self._labels_P, self._weights_PK.flatten()]
        )
        P, K = self._weights_PK.shape
        head, labels_P, weights = reduce(packed).split([len(sums), P, P * K])
        divergence, log_ratio, repetition, rows = head.tolist()
        tokens = float(labels_P.sum())
        if not rows:
            return None
        share_PK = (weights.reshape(P, K) / labels_P[:, None]).tolist()
        return {
            "rows": int(rows),
            "tokens": int(tokens),
            "length": tokens / rows,
            "divergence": divergence / tokens,
            "reverse_kl": log_ratio / tokens if self._estimates else None,
            "repetition": repetition / rows,
            "weights": {
                place: {n: round(w, 4) for n, w in zip(self._names, share_K, strict=True)}
                for place, share_K, labels in zip(
                    self._places, share_PK, labels_P.tolist(), strict=True
                )
                if labels
            },
        }


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
