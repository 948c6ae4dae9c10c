"""Sentence encoders: distance to each teacher's vector, and likeness of similarities in the batch.

With unit vectors s_i of the student and e_ki of teacher k, and similarities within the batch:

    p_ki = softmax_{j != i}(e_ki . e_kj / tau)     q_i = softmax_{j != i}(s_i . s_j / tau)
    H_ki = -sum_j p_ki(j) log p_ki(j)              weights w_ki of `compress.weights` from it
    cosine      1/R sum_i sum_k w_ki (1 - cos(P_k s_i, e_ki))
    relational  1/R sum_i KL(sum_k w_ki p_ki || q_i), or
                the mean over i != j of (sum_k w_ki e_ki.e_kj - s_i.s_j)^2

Entropy weights follow Meng et al. (arXiv 2507.15198), with the entropy of the similarities. The KL
between similarity distributions follows CompRess (arXiv 2010.14713) and SEED (arXiv 2101.04731),
the squared form RKD (arXiv 1904.05068). P_k is a Linear for each teacher and starts as the
identity where widths agree: the teachers' spaces are unrelated, so no one vector could be near all
of them. It lies outside the student and is thrown away.

Shapes: K teachers, R examples of a batch, N of the whole, d student and d_k teacher width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from compress.features import Projections, feature_loss
from compress.models.encoders import load_body, pooled
from compress.tasks.encoder import Answers, EncoderStudent, EncoderTask, Model, Terms
from compress.weights import weigh
from limbeck.contract.models.loading import unused_pooler
from limbeck.contract.recipe import EmbeddingRecipe, EmbeddingTeacher, EncoderTeacher, Weights
from limbeck.contract.sources.encoders import require_pooling


class EmbeddingTask(EncoderTask):
    """See `compress.tasks.Task`."""

    loss_unit = "(distances, no unit)"

    def __init__(
        self, recipe: EmbeddingRecipe, *, products: Mapping[str, Path], accelerator: Any
    ) -> None:
        self._fusion = recipe.fusion
        super().__init__(recipe, products=products, accelerator=accelerator)

    def prepare(self) -> None:
        """Keep the similarities that held-out answers are compared with."""
        self.reference = mixed_similarities([t.heldout for t in self.teachers])
        for name, parameter in self.student.model.named_parameters():
            # Nothing reads it, and processes that share the training wait for every gradient.
            if unused_pooler(self.student.model, name):
                parameter.requires_grad_(False)

    def _projections(self, model: Any) -> Projections:
        return Projections(
            student_width=model.config.hidden_size,
            teacher_widths=[t.train.shape[1] for t in self.teachers],
            pairs=[[(1, 1)]] * len(self.teachers),
        )

    @staticmethod
    def answer(model: Any, ids_RL: Tensor, mask_RL: Tensor) -> Answers:
        """Return unit vectors ``[R, d]``."""
        return pooled(model, ids_RL, mask_RL)

    def load(self, folder: Path) -> Any:
        return load_body(folder)

    def load_teacher(self, teacher: EncoderTeacher, folder: Path) -> Model:
        assert isinstance(teacher, EmbeddingTeacher)
        require_pooling(folder, teacher)
        loaded, pooling = load_body(folder).to(self.device), teacher.pooling
        return lambda ids, mask: pooled(loaded, ids, mask, pooling=pooling)

    def terms(
        self, student: EncoderStudent, answers: Answers, mine: Tensor, rows: Tensor, progress: float
    ) -> Terms:
        """See `EncoderTask`. Similarities are those of the global batch, on every process."""
        fusion, accelerator = self._fusion, self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        everyone, order = answers, torch.arange(len(rows))
        if world > 1:
            # Vectors of other processes carry no gradient: each process adds its own part.
            parts = list(accelerator.gather(answers.detach()).chunk(world))
            parts[rank] = answers
            everyone = torch.cat(parts)
            order = torch.cat([torch.arange(r, len(rows), world) for r in range(world)])
        theirs = [t.train[rows[order].to(self.device)] for t in self.teachers]
        weights_KR, entropy_KR = similarity_weights(
            fusion.weights,
            theirs,
            temperature=fusion.temperature,
            names=self.names,
            progress=progress,
        )
        own = slice(rank * len(mine), (rank + 1) * len(mine))
        assert student.projections is not None
        cosine = feature_loss(
            student.projections({1: answers[:, None]}),
            [[t[own, None]] for t in theirs],
            weights_KR[:, own, None],
            torch.ones(len(mine), 1, dtype=torch.bool, device=self.device),
            distance="cosine",
            denominator=len(rows),
        )
        relational = relational_loss(
            everyone, theirs, weights_KR, temperature=fusion.temperature, relation=fusion.relation
        )
        value = float(relational.detach())
        return Terms(
            fusion.cosine * cosine + fusion.relational * relational,
            {"cosine": float(cosine.detach()), "relational": value / world},
            weights_KR[:, own],
            entropy_KR[:, own],
            shared=fusion.relational * value,
        )

    def measure_answers(self, answers: Answers) -> dict[str, float]:
        """Spearman correlation of all pairs' similarities with their mean over the teachers."""
        return {"spearman": spearman(answers @ answers.T, self.reference)}

    def loss_of_each(self, answers: Answers) -> Tensor:
        """Return 1 - the rank correlation of each example's similarities with the teachers'."""
        ours_NN, N = answers @ answers.T, len(answers)
        others = ~np.eye(N, dtype=bool)
        pairs = zip(ours_NN.cpu().numpy(), self.reference.cpu().numpy(), others, strict=True)
        found = [stats.spearmanr(a[o], b[o]).statistic for a, b, o in pairs]
        return torch.tensor([1 - value for value in found], dtype=torch.float64)


def similarity_logits(vectors_Rd: Tensor, temperature: float) -> Tensor:
    """Return cosine similarities over the temperature ``[R, R]`` of unit vectors.

    The similarity of an example with itself is left out: -inf.
    """
    logits = vectors_Rd @ vectors_Rd.T / temperature
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    return logits.masked_fill(own, -math.inf)


def similarity_weights(
    config: Weights,
    teachers: Sequence[Tensor],
    *,
    temperature: float,
    names: Sequence[str],
    progress: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return weights and entropies ``[K, R]`` of the teachers, entropy in nats.

    ``teachers`` are their unit vectors ``[R, d_k]`` of one batch.
    """
    p_KRR = torch.stack(
        [torch.softmax(similarity_logits(v, temperature), dim=-1) for v in teachers]
    )
    entropy_KR = -torch.special.xlogy(p_KRR, p_KRR).sum(-1)
    no_labels = torch.zeros(p_KRR.shape[1], 1, dtype=torch.long, device=p_KRR.device)
    entropy_KR1 = entropy_KR[..., None]
    weights = weigh(
        config,
        entropy_KR1,
        torch.zeros_like(entropy_KR1),
        no_labels,
        names=names,
        progress=progress,
    )
    return weights[..., 0], entropy_KR


def relational_loss(
    student_Rd: Tensor,
    teachers: Sequence[Tensor],
    weights_KR: Tensor,
    *,
    temperature: float,
    relation: str,
) -> Tensor:
    """Return the relational term of the loss, a scalar. ``relation`` is `kl` or `mse`."""
    R = len(student_Rd)
    if relation == "mse":
        target_RR = torch.stack(
            [w[:, None] * (v @ v.T) for w, v in zip(weights_KR, teachers, strict=True)]
        ).sum(0)
        others = ~torch.eye(R, dtype=torch.bool, device=student_Rd.device)
        squares: Tensor = (student_Rd @ student_Rd.T - target_RR)[others].square()
        return squares.mean()
    p_RR = torch.zeros(R, R, device=student_Rd.device)
    for w, v in zip(weights_KR, teachers, strict=True):
        p_RR += w[:, None] * torch.softmax(similarity_logits(v, temperature), dim=-1)
    own = torch.eye(R, dtype=torch.bool, device=student_Rd.device)
    logq_RR = torch.log_softmax(similarity_logits(student_Rd, temperature), dim=-1).masked_fill(
        own, 0.0
    )
    kl_R: Tensor = (torch.special.xlogy(p_RR, p_RR) - p_RR * logq_RR).sum(-1)
    return kl_R.mean()


def mixed_similarities(teachers: Sequence[Tensor]) -> Tensor:
    """Return the mean over the teachers of the cosine similarities of all pairs, ``[N, N]``."""
    return torch.stack([v.double() @ v.double().T for v in teachers]).mean(0)


def spearman(ours_NN: Tensor, theirs_NN: Tensor) -> float:
    """Return the rank correlation over the pairs i < j."""
    above = np.triu_indices(len(ours_NN), 1)
    return float(
        stats.spearmanr(ours_NN.cpu().numpy()[above], theirs_NN.cpu().numpy()[above]).statistic
    )
