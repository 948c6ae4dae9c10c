"""Figures of a language model beside its loss: distance to the teachers, and greedy continuations.

Shapes: R rows, L positions, C label positions of a chunk, d width, V vocabulary.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from compress.aligned import AlignedStates
from compress.head import IGNORED, Place, chunks_of_labels
from compress.states import SparseStates, TeacherStates
from compress.tasks.language_models import LanguageModels
from limbeck.contract.data.generated import distinct, repetition

_MOST = 32  # tokens read, and as many generated after them
_BATCHES = 2  # of held-out rows a domain
Batch = tuple[Tensor, Tensor]  # token ids and labels [R, L]


@torch.no_grad()
def against_mixture(task: LanguageModels, batches: list[list[Batch]]) -> dict[str, float]:
    """Compare with the uniform mixture of the teachers at tau = 1, which no arm is trained on.

    Returns KL(mixture || student) in nats a token and the share of equal first choices. Teachers
    with another tokenizer are not in the mixture; nothing is returned where there are no others.
    """
    if all(pair is not None for pair in task.pairs.pairs):
        return {}
    divergence = agreement = count = 0.0
    head = task.student_head()
    task.student.eval()
    for ids, labels in itertools.chain.from_iterable(batches):
        with task.accelerator.autocast():
            hidden = task.student(ids.to(task.device), lambda hidden_RLd, _: hidden_RLd)
            states, _ = task.teachers.states(ids, labels_RL=labels)
        for place in chunks_of_labels(labels, 256, whole_rows=False):
            z_CV = head.logits(hidden[place].to(head.weight_Vd.dtype), task.vocabulary)
            logq_CV = torch.log_softmax(z_CV, -1)
            teachers = [
                torch.softmax(t.head.logits(t.hidden_RLd[place], task.vocabulary), -1)
                if isinstance(t, TeacherStates)
                else _with_tail(t, place, labels[place], logq_CV)
                for t in states
                if not isinstance(t, AlignedStates) and t.spans is None
            ]
            p_CV = torch.stack(teachers).mean(0)
            divergence += float((torch.special.xlogy(p_CV, p_CV) - p_CV * logq_CV).double().sum())
            agreement += float((p_CV.argmax(-1) == logq_CV.argmax(-1)).sum())
            count += len(place[0])
    return {"kl_to_mixture": divergence / count, "top1_agreement": agreement / count}


def _with_tail(teacher: SparseStates, place: Place, labels_C: Tensor, logq_CV: Tensor) -> Tensor:
    """Distribution of a teacher of whom a few tokens are known; the student spreads the rest."""
    reading = teacher.read(place, logq_CV.shape[-1])
    return reading.distribution(slice(None), labels_C, logq_BV=logq_CV)[0]


@torch.no_grad()
def calibration(task: LanguageModels, batches: list[list[Batch]]) -> dict[str, float]:
    """How far the student's confidence lies from how often it is right, on held-out text.

    Returns the expected calibration error of its first choices (15 bins of equal width, Guo et al.,
    arXiv 1706.04599).
    """
    head, confidence, right = task.student_head(), [], []
    task.student.eval()
    for ids, labels in itertools.chain.from_iterable(batches):
        with task.accelerator.autocast():
            hidden = task.student(ids.to(task.device), lambda hidden_RLd, _: hidden_RLd)
        for row, wanted in zip(hidden, labels, strict=True):
            valid = wanted != IGNORED
            logits_TV = head.logits(row[valid.to(row.device)].to(head.weight_Vd.dtype)).float()
            sure_T, choice_T = torch.softmax(logits_TV, -1).max(-1)
            confidence.append(sure_T.cpu())
            right.append(choice_T.cpu() == wanted[valid])
    return {"calibration_error": calibration_error(torch.cat(confidence), torch.cat(right))}


def calibration_error(confidence_T: Tensor, right_T: Tensor, bins: int = 15) -> float:
    """Mean over tokens of the gap between accuracy and confidence in the token's bin."""
    place_T = (confidence_T * bins).long().clamp(max=bins - 1)
    gaps = [
        float((right_T[here].double() - confidence_T[here].double()).sum().abs())
        for here in (place_T == b for b in range(bins))
    ]
    return sum(gaps) / len(confidence_T)


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
