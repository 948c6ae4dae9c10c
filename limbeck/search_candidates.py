"""The students of a search in their forms, and the law that says how fast the ones that were not timed are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

SPEEDS = ("tpot_ms", "ttft_ms")


@dataclass
class Candidate:
    """One student in one form. Sizes in bytes, times in ms, losses in nats a token; none is not known yet."""

    student: str
    form: str
    shape: str
    size: int  # planned
    layers: int
    predicted: dict[str, float] = field(default_factory=dict)
    timed: bool = False  # whether `predicted` was measured on an untrained export
    nll: float | None = None  # of the student in torch, after the longest round it reached
    tokens: int = 0  # of that round
    out: str | None = None  # why it is out; none where it reached the finals
    late: bool = False  # whether more hours would take it further
    # Of finalists: size, tpot_ms, ttft_ms, nll and, of the best teacher in the same bench, best_teacher.
    measured: dict[str, float] = field(default_factory=dict)
    verdict: str | None = None
    run: str | None = None

    @property
    def name(self) -> str:
        """Student and form."""
        return f"{self.student}-{self.form}"


@dataclass(frozen=True)
class SpeedModel:
    """Times as fixed cost + cost a layer + cost a byte of each form, none of them negative; and how far off that is.

    ``error`` is the greatest relative error on a measured point that the fit had not seen; none where too few were measured.
    """

    forms: tuple[str, ...]
    coefficients: tuple[float, ...]
    error: float | None

    def __call__(self, candidate: Candidate) -> float:
        """Predicted time in ms."""
        row = _features(candidate, self.forms)
        return float(sum(a * b for a, b in zip(row, self.coefficients, strict=True)))


def fit_speed(candidates: Sequence[Candidate], times_ms: Sequence[float]) -> SpeedModel:
    """Least squares in relative error over measured candidates, with each left out once for the error."""
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
    return SpeedModel(forms, tuple(map(float, _solve(rows, times))), float(max(errors)) if errors else None)


def _solve(rows: np.ndarray[Any, Any], times: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import numpy as np
    from scipy.optimize import nnls

    solution: np.ndarray[Any, Any] = nnls(rows / times[:, None], np.ones(len(times)))[0]
    return solution


def _features(candidate: Candidate, forms: Sequence[str]) -> list[float]:
    return [1.0, float(candidate.layers), *(candidate.size / 1e6 if candidate.form == form else 0.0 for form in forms)]
