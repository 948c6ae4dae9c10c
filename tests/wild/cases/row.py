"""A row of the table of cases, and how its two answers are made."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from limbeck.contract.errors import LimbeckError
from tests.wild.cases.adapters import IDS


@dataclass(frozen=True)
class Row:
    """A case, our answer and theirs. Without ``wanted``, the two losses must be equal."""

    what: str
    ours: str
    theirs: str
    wanted: str = ""  # a pattern of our answer, where theirs is none that a user could want

    @property
    def verdict(self) -> str:
        """``equal`` or ``named``; upper case if it is wrong."""
        if self.wanted:
            return "named" if re.search(self.wanted, self.ours) else "WRONG"
        return "equal" if self.ours == self.theirs else "DIFFERENT"


def loss(logits_RLV: Tensor) -> str:
    loss = nn.functional.cross_entropy(logits_RLV[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    return f"{float(loss):.4f}"


def said(act: Callable[[], object]) -> str:
    """What ``act`` gives, or the error that it raises, in one line."""
    try:
        return str(act())
    except LimbeckError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
