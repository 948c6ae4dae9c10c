"""Candidates of a search (a student in one form), and the model that predicts their speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from limbeck.contract.recipe import AnyBudget, AnyRecipe

METRICS = ("accuracy", "macro_f1", "spearman")  # that encoders are judged by


@dataclass
class Candidate:
    """One student in one form. Sizes in bytes, times in ms; None is not known yet.

    Losses: nats per token of a language model, nats per example of a classifier,
    1 - Spearman's correlation of a sentence encoder.
    """

    student: str
    form: str
    shape: str
    size: int  # planned
    layers: int
    predicted: dict[str, float] = field(default_factory=dict)
    timed: bool = False  # whether `predicted` was measured on an untrained export
    nll: float | None = None  # of the student in torch, after the longest round it reached
    tokens: int = 0  # of that round; of an encoder, examples
    # of an encoder: its task's metric by name, after that round
    metric: dict[str, float] = field(default_factory=dict)
    # billions of operations, where time grows with those rather than with size
    work: float | None = None
    out: str | None = None  # why it is out; None if it reached the finals
    late: bool = False  # whether more hours would take it further
    # Finalists only: size, the times of the budget, NLL or the metric, and best_teacher (the best
    # teacher in the same bench).
    measured: dict[str, float] = field(default_factory=dict)
    verdict: str | None = None
    run: str | None = None

    @property
    def name(self) -> str:
        """Student and form."""
        return f"{self.student}-{self.form}"

    @property
    def known_metric(self) -> tuple[str, float] | None:
        """Name and value of an encoder's metric: measured, or after the longest round."""
        return next(
            ((n, v) for n, v in (self.metric | self.measured).items() if n in METRICS), None
        )

    @property
    def loss(self) -> float | None:
        """Final loss for comparing students: nats per token, or 1 - the metric of an encoder."""
        if (found := self.known_metric) is not None:
            return 1 - found[1]
        return self.measured.get("nll", self.nll)


@dataclass(frozen=True)
class Search:
    """What every part of a search works on."""

    recipe: AnyRecipe
    students: Mapping[str, dict[str, Any]]  # as a recipe has them, by name
    candidates: Sequence[Candidate]
    budget: AnyBudget
    folder: Path


def still_in(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates that are not ruled out."""
    return [c for c in candidates if c.out is None]


@dataclass(frozen=True)
class SpeedModel:
    """Time = fixed + cost per layer + cost per byte (or operation) of each form, none negative.

    ``error`` is the largest relative error on a measured point that was left out of the fit; None
    with too few points.
    """

    forms: tuple[str, ...]
    coefficients: tuple[float, ...]
    error: float | None

    def __call__(self, candidate: Candidate) -> float:
        """Predicted time in ms."""
        row = _features(candidate, self.forms)
        return float(sum(a * b for a, b in zip(row, self.coefficients, strict=True)))


def fit_speed(candidates: Sequence[Candidate], times_ms: Sequence[float]) -> SpeedModel:
    """Least squares in relative error over measured candidates; ``error`` by leaving one out."""
    import numpy as np

    forms = tuple(dict.fromkeys(c.form for c in candidates))
    rows, times = np.array([_features(c, forms) for c in candidates]), np.array(times_ms)
    errors = []
    for left_out in range(len(times)):
        rest = np.arange(len(times)) != left_out
        seen = {c.form for c, kept in zip(candidates, rest, strict=True) if kept}
        if candidates[left_out].form in seen and rest.sum() > len(forms):
            guess = rows[left_out] @ _solve(rows[rest], times[rest])
            errors.append(abs(guess / times[left_out] - 1))
    return SpeedModel(
        forms, tuple(map(float, _solve(rows, times))), float(max(errors)) if errors else None
    )


def _solve(rows: np.ndarray[Any, Any], times: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import numpy as np
    from scipy.optimize import nnls

    solution: np.ndarray[Any, Any] = nnls(rows / times[:, None], np.ones(len(times)))[0]
    return solution


def _features(candidate: Candidate, forms: Sequence[str]) -> list[float]:
    work = candidate.size / 1e6 if candidate.work is None else candidate.work
    return [
        1.0,
        float(candidate.layers),
        *(work if candidate.form == form else 0.0 for form in forms),
    ]
