"""Figures of a language model beside its loss: distance to the teachers, and greedy continuations.

Shapes: R rows, L positions, C label positions of a chunk, d width, V vocabulary.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from compress.head import IGNORED, chunks_of_labels
from compress.states import TeacherStates
from compress.tasks.language_models import LanguageModels
from limbeck.contract.generated import distinct, repetition

_MOST = 32  # tokens read, and as many generated after them
_BATCHES = 2  # of held-out rows a domain
Batch = tuple[Tensor, Tensor]  # token ids and labels [R, L]


@torch.no_grad()
def against_mixture(task: LanguageModels, batches: list[list[Batch]]) -> dict[str, float]:
    """Compare with the uniform mixture of the teachers at tau = 1, which no arm is trained on.

    Returns KL(mixture || student) in nats a token and the share of equal first choices.
    """
    divergence = agreement = count = 0.0
    head = task.student_head()
    task.student.eval()
    for ids, labels in itertools.chain.from_iterable(batches):
        with task.accelerator.autocast():
            hidden = task.student(ids.to(task.device), lambda hidden_RLd, _: hidden_RLd)
            states, _ = task.teachers.states(ids)
        for place in chunks_of_labels(labels, 256, whole_rows=False):
            logq_CV = torch.log_softmax(head.logits(hidden[place].to(head.weight_Vd.dtype)), -1)
            teachers = [
                torch.softmax(t.head.logits(t.hidden_RLd[place]), -1)
                for t in states
                if isinstance(t, TeacherStates)
            ]
            p_CV = torch.stack(teachers).mean(0)
            divergence += float((torch.special.xlogy(p_CV, p_CV) - p_CV * logq_CV).double().sum())
            agreement += float((p_CV.argmax(-1) == logq_CV.argmax(-1)).sum())
            count += len(place[0])
    return {"kl_to_mixture": divergence / count, "top1_agreement": agreement / count}


@torch.no_grad()
def continuations(task: LanguageModels, batches: list[list[Batch]]) -> dict[str, float]:
    """Continue held-out text greedily.

    Returns the share of tokens that are the text's own, of different pairs, and of repeated pieces;
    nothing where every row is too short.
    """
    model = task.accelerator.unwrap_model(task.student).model.eval()
    half = min(_MOST, task.recipe.data.block // 2)
    rows, agreed = [], []
    for ids, labels in itertools.chain.from_iterable(domain[:_BATCHES] for domain in batches):
        long_enough = (labels[:, : 2 * half] != IGNORED).sum(1) >= 2 * half - 1
        text = ids[long_enough, : 2 * half].to(task.device)
        if not len(text):
            continue
        with task.accelerator.autocast():
            made = model.generate(
                input_ids=text[:, :half],
                attention_mask=torch.ones_like(text[:, :half]),
                do_sample=False,
                min_new_tokens=half,
                max_new_tokens=half,
                pad_token_id=0,
            )[:, half:]
        rows += made.tolist()
        agreed += (made == text[:, half:]).float().mean(1).tolist()
    if not rows:
        return {}
    return {
        "text_match": float(np.mean(agreed)),
        "distinct_2": distinct(rows, 2),
        "repetition": float(np.mean([repetition(row) for row in rows])),
    }
