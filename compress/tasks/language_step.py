"""One optimiser step of a language model: micro-batches, their loss, and terms for the log.

Shapes: K teachers, D domains, R rows of a micro-batch, L positions, P aligned layer pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compress.features import feature_loss
from compress.head import IGNORED
from compress.loss import FusionTerms, fused_loss
from compress.models.language import DTYPES
from compress.states import SparseStates, TeacherStates, teacher_statistics
from compress.tasks.language_models import LanguageModels
from compress.weights import span_of
from limbeck.contract.recipe import fingerprint


class LanguageStep:
    """See `compress.tasks.Step`. Raw terms are summed over micro-batches and processes."""

    def __init__(
        self,
        task: LanguageModels,
        batch: tuple[npt.NDArray[np.int64], Tensor, Tensor],
        progress: float,
    ) -> None:
        """``batch`` is the global one: domains ``[R]``, token ids and labels ``[R, L]``."""
        self.task, self.progress = task, progress
        self.domains, self.ids_RL, self.labels_RL = batch
        self.count = int((self.labels_RL != IGNORED).sum())
        rank, world = task.accelerator.process_index, task.accelerator.num_processes
        mine = torch.arange(rank, len(self.ids_RL), world)
        self.parts: Sequence[Tensor] = mine.split(task.recipe.training.micro_batch)
        teachers = task.teachers
        K, D = len(teachers), len(task.blocks)
        self._loss = self._cross_entropy = self._fusion = self._features = 0.0
        self._weights_DK = torch.zeros(D, K, dtype=torch.float64)
        self._labels_D = torch.zeros(D, dtype=torch.float64)
        self._entropy_K = torch.zeros(K, dtype=torch.float64)
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._means_2K = None
        if K and span_of(task.recipe.fusion.weights) == "batch":
            self._means_2K = self._global_means()

    def fingerprint(self) -> str:
        """See `compress.tasks.Step`."""
        return fingerprint(self.ids_RL.tolist())[:16]

    def loss(self, student: Any, part: Tensor) -> Tensor:
        """See `compress.tasks.Step`."""
        task, device = self.task, self.task.device
        ids, labels = self.ids_RL[part].to(device), self.labels_RL[part].to(device)
        states: Sequence[TeacherStates | SparseStates] = []
        inner: Sequence[Sequence[Tensor]] = []
        if task.teachers:
            with task.accelerator.autocast():
                states, inner = task.teachers.states(ids, task.teacher_layers)
        use = functools.partial(
            self._terms, labels_RL=labels, teachers=states, teacher_states=inner
        )
        with task.accelerator.autocast():
            loss, terms, gap = student(ids, use)
        self._features += gap
        self._add(terms, labels, part)
        self._loss += float(loss.detach())
        found: Tensor = loss
        return found

    def _terms(
        self,
        hidden_RLd: Tensor,
        projected: Sequence[Sequence[Tensor]],
        *,
        labels_RL: Tensor,
        teachers: Sequence[Any],
        teacher_states: Sequence[Sequence[Tensor]],
    ) -> tuple[Tensor, FusionTerms, float]:
        """Loss of a micro-batch with gradient, its raw terms, and its feature term."""
        task = self.task
        fusion, features = task.recipe.fusion, task.recipe.features
        # The loss chooses its own number types.
        with torch.autocast(task.device.type, enabled=False):
            terms = fused_loss(
                fusion,
                hidden_RLd=hidden_RLd.to(DTYPES[task.precision]),
                head=task.student_head(),
                teachers=teachers,
                labels_RL=labels_RL,
                denominator=self.count,
                names=task.names,
                progress=self.progress,
                global_means_2K=self._means_2K,
            )
            if not projected:
                return terms.loss, terms, 0.0
            gap = feature_loss(
                projected,
                teacher_states,
                terms.weights_KRL,
                labels_RL != IGNORED,
                distance=features.distance,
                denominator=self.count,
            )
        rise = min(1.0, self.progress / features.warmup if features.warmup else 1.0)
        return terms.loss + features.weight * rise * gap, terms, float(gap.detach())

    def _global_means(self) -> Tensor:
        """Return mean entropy and label log-likelihood ``[2, K]`` over the global batch."""
        task = self.task
        sums_2K = torch.zeros(2, len(task.teachers), device=task.device)
        for part in self.parts:
            labels = self.labels_RL[part].to(task.device)
            with task.accelerator.autocast():
                states, _ = task.teachers.states(self.ids_RL[part].to(task.device))
            found = teacher_statistics(states, labels, chunk=task.recipe.fusion.chunk)
            for row, statistic_KRL in enumerate(found):
                sums_2K[row] += statistic_KRL.sum((1, 2))
        total: Tensor = task.accelerator.reduce(sums_2K, reduction="sum")
        return total / self.count

    def _add(self, terms: FusionTerms, labels_RL: Tensor, part: Tensor) -> None:
        """Add the terms of one micro-batch; ``part`` are its rows in the global batch."""
        self._cross_entropy += terms.cross_entropy
        self._fusion += terms.divergence
        valid = labels_RL != IGNORED
        for row, place in enumerate(part.tolist()):
            domain = int(self.domains[place])
            self._labels_D[domain] += int(valid[row].sum())
            if len(self.task.teachers):
                weights_KL = terms.weights_KRL[:, row][:, valid[row]]
                self._weights_DK[domain] += weights_KL.double().sum(1).cpu()
        if len(self.task.teachers):
            self._entropy_K += terms.entropy_KRL[:, valid].double().sum(1).cpu()
            weights_KT, logp_KT = terms.weights_KRL[:, valid], terms.label_logp_KRL[:, valid]
            self._pairs.append((weights_KT.cpu(), logp_KT.cpu()))

    def figures(self) -> dict[str, Any]:
        """Return the terms per label position of the global batch, the same on every process."""
        task, N = self.task, self.count
        terms = [self._loss, self._cross_entropy, self._fusion, self._features]
        packed = torch.cat(
            [
                torch.tensor(terms, dtype=torch.float64),
                self._entropy_K,
                self._weights_DK.flatten(),
                self._labels_D,
            ]
        )
        total = task.accelerator.reduce(packed.to(task.device), reduction="sum").cpu()
        K, D = len(task.teachers), len(task.blocks)
        head, entropy_K, weights, labels_D = total.split([4, K, D * K, D])
        loss, cross_entropy, fusion, features = head.tolist()
        share_DK = (weights.reshape(D, K) / labels_D[:, None]).tolist()
        mean_K = (entropy_K / N).tolist()
        return {
            "loss": loss,
            "cross_entropy": cross_entropy / N,
            "fusion": fusion / N if K else None,
            "features": features if task.student.projections is not None else None,
            "weights": {
                task.blocks[d].name: _by_name(task.names, share_DK[d])
                for d in range(D)
                if K and labels_D[d]
            },
            "entropy": _by_name(task.names, mean_K),
            "weight_label_correlation": self._correlation() if K > 1 else None,
        }

    def _correlation(self) -> float | None:
        """Pearson correlation of w_k - 1/K with log p_k(label) less its mean over the teachers.

        It says whether the weights follow the better teacher.
        """
        weights = torch.cat([w - w.mean(0) for w, _ in self._pairs], dim=1).flatten()
        logp = torch.cat([p - p.mean(0) for _, p in self._pairs], dim=1).flatten()
        scale = float(weights.norm() * logp.norm())
        return round(float(weights @ logp) / scale, 4) if scale > 1e-12 else None


def _by_name(names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in zip(names, values, strict=True)}
