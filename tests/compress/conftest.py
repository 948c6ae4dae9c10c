"""Shared ground of the tests of training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from compress.data import evals

BY_DEFAULT = {name: getattr(evals, name) for name in ("_ROWS", "_BLOCKS", "facts")}


@pytest.fixture(autouse=True, scope="session")
def short_evaluations() -> Iterator[None]:
    """A training scores a dozen rows and not a hundred, twice: a third of what a tiny one takes."""
    with pytest.MonkeyPatch.context() as patch:
        shorten_evaluations(patch)
        yield


def shorten_evaluations(patch: pytest.MonkeyPatch) -> None:
    """Let this process score few rows; a process that a test starts has to ask for it itself."""
    patch.setattr(evals, "_ROWS", 3)
    patch.setattr(evals, "_BLOCKS", 1)
    patch.setattr(evals, "facts", lambda: BY_DEFAULT["facts"]()[:3])


@pytest.fixture
def whole_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluations as they are."""
    for name, value in BY_DEFAULT.items():
        monkeypatch.setattr(evals, name, value)
