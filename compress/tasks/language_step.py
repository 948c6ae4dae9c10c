"""One optimiser step of a language model: micro-batches, their loss, and terms for the log.

Shapes: K teachers, D domains, R rows of a micro-batch, L positions, P aligned layer pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from compress.chunked import FusionTerms, fused_loss
from compress.features import feature_loss
from compress.head import IGNORED
from compress.models.language import DTYPES
from compress.states import AnyStates, teacher_statistics
from compress.tasks.language_models import LanguageModels
from compress.tasks.own_terms import OwnTerms, evidence_of_prompts
from compress.tasks.own_text import Batch, Written, now
from compress.weights import Reach, log_prior, of_the_same_bytes, span_of
from limbeck.contract.recipe import Fusion, fingerprint


class LanguageStep:
    """See `compress.tasks.Step`. Raw terms are summed over micro-batches and processes."""

    def __init__(
        self,
        task: LanguageModels,
        index: int,
        batch: Batch,
        progress: float,
        written: Written | None = None,
    ) -> None:
        """``batch`` is the global one of step ``index``; ``written`` replaces some of its rows."""
        self.task, self.index, self.progress, self.written = task, index, progress, written
        self.domains, self.ids_RL, self.labels_RL = batch
        rank, world = task.accelerator.process_index, task.accelerator.num_processes
        mine, micro = torch.arange(rank, len(self.ids_RL), world), task.recipe.training.micro_batch
        self.corpus_count = self.count = int((self.labels_RL != IGNORED).sum())
        self.parts: Sequence[Tensor] = mine.split(micro)
        self._seconds = {"generate": 0.0, "teachers": 0.0}
        if written is not None:
            self.ids_RL, self.labels_RL = written.ids_RL, written.labels_RL
            self._count_labels(written)
            # Micro-batches hold rows of one kind, because the factor of the cross-entropy differs.
            own = written.is_own_R[mine]
            self.parts = [*_split(mine[~own], micro), *_split(mine[own], micro)]
            self._seconds["generate"] = written.seconds
            self._own_rows = {row.prompt.row: row for row in written.rows}
            places = task.own.places if task.own else ()
            self._own = OwnTerms(places, task.names, task.recipe.fusion.weights)
            self._begun = now(task)
        teachers = task.teachers
        K, D = len(teachers), len(task.blocks)
        self._loss = self._cross_entropy = self._fusion = self._features = 0.0
        self._weights_DK = torch.zeros(D, K, dtype=torch.float64)
        self._labels_D = torch.zeros(D, dtype=torch.float64)
        self._entropy_K = torch.zeros(K, dtype=torch.float64)
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._means_2K = None
        self._targets_K = torch.zeros(K, dtype=torch.float64)  # labels with a distribution
        if K and span_of(task.recipe.fusion.weights) == "batch":
            self._means_2K = self._global_means()

    def _count_labels(self, written: Written) -> None:
        """Count the labels of all processes. Each knows the corpus, and its own rows alone."""
        corpus = self.labels_RL[~written.is_own_R]
        self.corpus_count = int((corpus != IGNORED).sum())
        mine = torch.tensor(sum(len(row.new) for row in written.rows), device=self.task.device)
        self.count = self.corpus_count + int(self.task.accelerator.reduce(mine, reduction="sum"))

    def fingerprint(self) -> str:
        return fingerprint(self.ids_RL.tolist())[:16]

    def loss(self, student: Any, part: Tensor) -> Tensor:
        task, device = self.task, self.task.device
        ids, labels = self.ids_RL[part].to(device), self.labels_RL[part].to(device)
        written = self.written
        own = written is not None and bool(written.is_own_R[part[0]])
        if own:  # padding behind the longest row is left out
            longest = max(len(self._own_rows[int(row)]) for row in part)
            ids, labels = ids[:, :longest], labels[:, :longest]
        states, inner = self._ask_teachers(ids, self._read_labels(part, labels, own=own))
        fusion = task.recipe.fusion
        domains = self._domains_of(part, own=own)
        prior_KR = log_prior(fusion.weights, task.names, domains, device=device)
        if own and written is not None:
            # The label is what the student drew: cross-entropy would only confirm it.
            fusion = fusion.model_copy(update={"cross_entropy": 0.0})
            prompts = written.prompt_labels_RL[part, : labels.shape[1]]
            evidence_KR = evidence_of_prompts(task, states, prompts)
            if evidence_KR is not None:
                prior_KR = evidence_KR if prior_KR is None else evidence_KR + prior_KR
        use = functools.partial(
            self._terms, labels_RL=labels, teachers=states, teacher_states=inner,
            fusion=fusion, prior_KR=prior_KR, uncovered=0.0 if own else 1.0,
        )  # fmt: skip
        with task.accelerator.autocast():
            loss, terms, gap = student(ids, use)
        self._features += gap
        if own:
            self._fusion += terms.divergence
            self._own.add(terms, [self._own_rows[int(row)] for row in part], labels)
        else:
            self._add(terms, labels, part)
        self._loss += float(loss.detach())
        found: Tensor = loss
        return found

    def _domains_of(self, part: Tensor, *, own: bool) -> list[str]:
        """Name of each row's domain, or of the place that its prompt comes from."""
        if own and self.task.own is not None:
            places = self.task.own.places
            return [places[self._own_rows[int(row)].prompt.place] for row in part]
        return [self.task.blocks[int(self.domains[row])].name for row in part]

    def _read_labels(self, part: Tensor, labels_RL: Tensor, *, own: bool) -> Tensor:
        """Labels of a micro-batch, and labels of the prompts that give evidence."""
        if not own or self.written is None:
            return labels_RL
        prompts_RL = self.written.prompt_labels_RL[part, : labels_RL.shape[1]]
        return torch.where(labels_RL == IGNORED, prompts_RL.to(labels_RL.device), labels_RL)

    def _ask_teachers(
        self, ids_RL: Tensor, labels_RL: Tensor
    ) -> tuple[Sequence[AnyStates], Sequence[Sequence[Tensor]]]:
        """Return what the teachers say of a micro-batch, and their inner states."""
        task = self.task
        if not task.teachers:
            return [], []
        begun = now(task) if self.written is not None else 0.0
        with task.accelerator.autocast():
            found = task.teachers.states(ids_RL, task.teacher_layers, labels_RL=labels_RL)
        if self.written is not None:
            self._seconds["teachers"] += now(task) - begun
        return found

    def _terms(
        self,
        hidden_RLd: Tensor,
        projected: Sequence[Sequence[Tensor]],
        *,
        labels_RL: Tensor,
        teachers: Sequence[Any],
        teacher_states: Sequence[Sequence[Tensor]],
        fusion: Fusion,
        prior_KR: Tensor | None,
        uncovered: float,
    ) -> tuple[Tensor, FusionTerms, float]:
        """Loss of a micro-batch with gradient, its raw terms, and its feature term."""
        task, features = self.task, self.task.recipe.features
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
                prior_KR=prior_KR,
                uncovered=uncovered,
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
        sums_3K = torch.zeros(3, len(task.teachers), device=task.device)
        for part in self.parts:
            labels = self.labels_RL[part].to(task.device)
            with task.accelerator.autocast():
                states, _ = task.teachers.states(
                    self.ids_RL[part].to(task.device), labels_RL=labels
                )
            entropy_KRL, logp_KRL = teacher_statistics(
                states, labels, vocabulary=task.vocabulary, chunk=task.recipe.fusion.chunk
            )
            has_KRL = (labels != IGNORED).expand_as(logp_KRL)
            reach = Reach.of([state.spans for state in states], labels)
            if reach is not None:
                logp_KRL = of_the_same_bytes(logp_KRL, reach) * has_KRL
                has_KRL = has_KRL & reach.target_KRL
            sums_3K += torch.stack([part.sum((1, 2)) for part in (entropy_KRL, logp_KRL, has_KRL)])
        total: Tensor = task.accelerator.reduce(sums_3K, reduction="sum")
        entropy_K = total[0] / total[2].clamp(min=1)
        return torch.stack([entropy_K, total[1] / self.count])

    def _add(self, terms: FusionTerms, labels_RL: Tensor, part: Tensor) -> None:
        """Add the terms of a micro-batch of corpus rows, which ``part`` names."""
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
            compared = valid
            if terms.reach is not None:  # the teachers' likelihoods of the same bytes
                self._targets_K += (terms.reach.target_KRL & valid).double().sum((1, 2)).cpu()
                compared = valid & (terms.reach.target_KRL & terms.reach.ends_KRL).all(0)
            else:
                self._targets_K += int(valid.sum())
            weights_KT = terms.weights_KRL[:, compared]
            logp_KT = terms.label_logp_KRL[:, compared]
            self._pairs.append((weights_KT.cpu(), logp_KT.cpu()))

    def figures(self) -> dict[str, Any]:
        """Return the terms per label position of the global batch, the same on every process."""
        task, N, corpus = self.task, self.count, self.corpus_count
        terms = [self._loss, self._cross_entropy, self._fusion, self._features]
        packed = torch.cat(
            [
                torch.tensor(terms, dtype=torch.float64),
                self._entropy_K,
                self._targets_K,
                self._weights_DK.flatten(),
                self._labels_D,
            ]
        )
        total = self._of_all(packed)
        K, D = len(task.teachers), len(task.blocks)
        head, entropy_K, targets_K, weights, labels_D = total.split([4, K, K, D * K, D])
        loss, cross_entropy, fusion, features = head.tolist()
        share_DK = (weights.reshape(D, K) / labels_D[:, None]).tolist()
        mean_K = (entropy_K / targets_K.clamp(min=1)).tolist() if corpus else []
        own = {} if self.written is None else self._own_figures()
        return {
            "loss": loss,
            "cross_entropy": cross_entropy / corpus if corpus else None,
            "fusion": fusion / N if K else None,
            "features": features if task.student.projections is not None else None,
            "weights": {
                task.blocks[d].name: _by_name(task.names, share_DK[d])
                for d in range(D)
                if K and labels_D[d]
            },
            "entropy": _by_name(task.names, mean_K) if corpus else {},
            "weight_label_correlation": self._correlation() if K > 1 else None,
            **own,
        }

    def _of_all(self, sums: Tensor) -> Tensor:
        """Add the sums of all processes."""
        found: Tensor = self.task.accelerator.reduce(sums.to(self.task.device), reduction="sum")
        return found.cpu()

    def _own_figures(self) -> dict[str, Any]:
        """Figures of own text, and where the seconds of this process went."""
        spent = {name: round(seconds, 4) for name, seconds in self._seconds.items()}
        student = now(self.task) - self._begun - self._seconds["teachers"]
        return {
            "own_text": self._own.figures(self._of_all),
            "step_seconds": spent | {"student": round(student, 4)},
        }

    def samples(self) -> list[dict[str, Any]]:
        own, written = self.task.own, self.written
        if own is None or written is None:
            return []
        mine = [own.sample(self.index + 1, row) for row in written.rows]
        return sorted(gather_object(mine), key=lambda sample: int(sample["row"]))

    def _correlation(self) -> float | None:
        """Pearson correlation of w_k - 1/K with log p_k(label) less its mean over the teachers.

        It shows whether the weights follow the better teacher.
        """
        if not self._pairs:
            return None
        weights = torch.cat([w - w.mean(0) for w, _ in self._pairs], dim=1).flatten()
        logp = torch.cat([p - p.mean(0) for _, p in self._pairs], dim=1).flatten()
        scale = float(weights.norm() * logp.norm())
        return round(float(weights @ logp) / scale, 4) if scale > 1e-12 else None


def _split(rows: Tensor, size: int) -> Sequence[Tensor]:
    return rows.split(size) if len(rows) else ()


def _by_name(names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in zip(names, values, strict=True)}
