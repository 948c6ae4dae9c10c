"""Classifiers: cross-entropy with the label plus the divergence from the fused teachers.

The loss is `compress.loss` with classes in place of the vocabulary: the logits ``[R, C]``
go in as the state of one position under a head that changes nothing, so weights, divergences and
calibration are the very same code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.chunked import fused_loss
from compress.head import Head, fit_temperature
from compress.models.encoders import class_names, load_classifier
from compress.states import TeacherStates
from compress.tasks.encoder import Answers, EncoderStudent, EncoderTask, Model, Terms
from limbeck.contract.data.examples import accuracy, macro_f1
from limbeck.contract.models.encoders import read
from limbeck.contract.recipe import (
    Calibration,
    ClassFusion,
    ClassificationRecipe,
    EncoderTeacher,
    FittedCalibration,
    FixedCalibration,
)
from limbeck.contract.sources.encoders import require_classes, require_one_label


class ClassificationTask(EncoderTask):
    """See `compress.tasks.Task`."""

    loss_unit = "nats an example"

    def __init__(
        self, recipe: ClassificationRecipe, *, products: Mapping[str, Path], accelerator: Any
    ) -> None:
        self._fusion = recipe.fusion
        self.classes: list[str] = [c.name for c in recipe.data.classes]
        super().__init__(recipe, products=products, accelerator=accelerator)

    @property
    def class_names(self) -> list[str]:
        return self.classes

    def prepare(self) -> None:
        """Calibrate the teachers on the held-out examples."""
        self.labels_N = torch.from_numpy(self.heldout.groups).long().to(self.device)
        self.temperatures = [
            class_temperature(self._fusion.calibration, t.name, t.heldout, self.labels_N)
            for t in self.teachers
        ]

    @staticmethod
    def answer(model: Any, ids_RL: Tensor, mask_RL: Tensor) -> Answers:
        """Return logits ``[R, C]``."""
        logits: Tensor = read(model, ids_RL, mask_RL).logits.float()
        return logits

    def load(self, folder: Path) -> Any:
        return load_classifier(folder)

    def load_teacher(self, teacher: EncoderTeacher, folder: Path) -> Model:
        """Raises `ModelError` for other classes than the recipe's, or another order."""
        require_one_label(folder)
        loaded = load_classifier(folder).to(self.device)
        who = f"{folder}: teacher {teacher.name}"
        require_classes(class_names(loaded), self.classes, who=who)
        return lambda ids, mask: read(loaded, ids, mask).logits

    def terms(
        self, student: EncoderStudent, answers: Answers, mine: Tensor, rows: Tensor, progress: float
    ) -> Terms:
        mine = mine.to(self.device)
        labels_N = torch.from_numpy(self.train.groups).long().to(self.device)
        return class_terms(
            self._fusion,
            answers,
            [t.train[mine] for t in self.teachers],
            labels_N[mine],
            temperatures=self.temperatures,
            names=self.names,
            count=len(rows),
            progress=progress,
        )

    def measure_answers(self, answers: Answers) -> dict[str, float]:
        """Accuracy, macro F1, and nats an example."""
        predicted, labels = answers.argmax(1).cpu().numpy(), self.labels_N.cpu().numpy()
        return {
            "accuracy": accuracy(predicted, labels),
            "macro_f1": macro_f1(predicted, labels, answers.shape[1]),
            "nll": float(nn.functional.cross_entropy(answers.double(), self.labels_N)),
        }

    def loss_of_each(self, answers: Answers) -> Tensor:
        """Return nats of each held-out example."""
        return nn.functional.cross_entropy(answers.double(), self.labels_N, reduction="none")


def class_terms(
    fusion: ClassFusion,
    logits_RC: Tensor,
    teachers: Sequence[Tensor],
    labels_R: Tensor,
    *,
    temperatures: Sequence[float],
    names: Sequence[str],
    count: int,
    progress: float,
) -> Terms:
    """Return the loss of some examples of a batch of ``count``; ``teachers`` are their logits."""
    head = Head(torch.eye(logits_RC.shape[1], device=logits_RC.device))
    states = [
        TeacherStates(z_RC[:, None], head, c)
        for z_RC, c in zip(teachers, temperatures, strict=True)
    ]
    terms = fused_loss(
        fusion,
        hidden_RLd=logits_RC[:, None],
        head=head,
        teachers=states,
        labels_RL=labels_R[:, None],
        denominator=count,
        names=names,
        progress=progress,
    )
    figures = {"cross_entropy": terms.cross_entropy / count}
    if states:
        figures["fusion"] = terms.divergence / count
    return Terms(terms.loss, figures, terms.weights_KRL[..., 0], terms.entropy_KRL[..., 0])


def class_temperature(
    calibration: Calibration, name: str, logits_NC: Tensor, labels_N: Tensor
) -> float:
    """Return the calibration temperature of a teacher from its held-out logits."""
    match calibration:
        case FixedCalibration(values=values):
            return values[name]
        case FittedCalibration(bounds=bounds):
            head = Head(torch.eye(logits_NC.shape[1], device=logits_NC.device))
            return fit_temperature(logits_NC[:, None], head, labels_N[:, None], bounds=bounds)
        case _:
            return 1.0
