"""A student's own text measured against its teachers, for the test and the benchmark of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compress.chunked import fused_loss
from compress.head import IGNORED
from compress.models.language import DTYPES
from compress.tasks.language_models import LanguageModels
from compress.tasks.own_terms import evidence_of_prompts
from compress.tasks.own_text import OwnRow, OwnText, Prompt, laid_out
from limbeck.contract.recipe import ReverseKl


@dataclass(frozen=True)
class OwnMeasure:
    """A student's own continuations of some prompts."""

    reverse_kl: float  # KL(student || fused teachers), nats a token, over the whole vocabulary
    repetition: float  # share of 4-grams that the same text had before, mean over rows
    length: float  # tokens, mean over rows
    rows: Sequence[OwnRow]


@torch.no_grad()
def measure_own_text(
    task: LanguageModels, own: OwnText, prompts: Sequence[Prompt], *, micro: int = 4
) -> OwnMeasure:
    """Let the student continue ``prompts``, and measure it against the recipe's fused teachers.

    The student is left in the mode that it was in.
    """
    with task.accelerator.autocast():
        rows = own.continuations(task.student.model, prompts)
    fusion = task.recipe.fusion.model_copy(
        update={"divergence": ReverseKl(kind="reverse_kl"), "temperature": 1.0}
    )
    was_training, total = task.student.training, 0.0
    task.student.eval()
    for first in range(0, len(rows), micro):
        group = rows[first : first + micro]
        ids, labels, prompt_labels = laid_out(group, max(map(len, group)))
        ids, labels = ids.to(task.device), labels.to(task.device)
        read = torch.where(labels == IGNORED, prompt_labels.to(task.device), labels)
        with task.accelerator.autocast():
            teachers, _ = task.teachers.states(ids, labels_RL=read)
            hidden = task.student(ids, lambda hidden_RLd, _: hidden_RLd)
        total += fused_loss(
            fusion,
            hidden_RLd=hidden.to(DTYPES[task.precision]),
            head=task.student_head(),
            teachers=teachers,
            labels_RL=labels,
            denominator=1,
            names=task.names,
            prior_KR=evidence_of_prompts(task, teachers, prompt_labels),
        ).divergence
    task.student.train(was_training)
    tokens = sum(len(row.new) for row in rows)
    repeated = sum(row.repetition for row in rows)
    return OwnMeasure(total / tokens, repeated / len(rows), tokens / len(rows), rows)
