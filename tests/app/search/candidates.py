"""Candidates, recipes and losses of the search's tests."""

from __future__ import annotations

import json
from typing import Any

from limbeck.app.search.candidates import Candidate
from limbeck.contract.recipe import Recipe, load_recipe

BUDGET = {"size_mb": 0.6, "tpot_ms": 5.0}


def pico(**over: Any) -> Recipe:
    settings = {"budget": BUDGET, "search.rungs": [512, 1024], **over}
    return load_recipe(
        "pico", overrides=[f"{key}={json.dumps(value)}" for key, value in settings.items()]
    )


def candidate(
    student: str, form: str = "int8-weight", *, size: int = 100, layers: int = 4
) -> Candidate:
    return Candidate(student, form, student, size, layers)


LOSSES = {"a": 3.0, "b": 4.0, "c": 3.5, "d": 5.0}


class Killed(BaseException):
    """A process that ends in the middle."""


def _measured(told: list[str], finalist: Candidate, passes: bool) -> None:
    told.append(finalist.student)
    finalist.measured = {"nll": 3.0}
    finalist.verdict = "pass" if passes else "fail"
