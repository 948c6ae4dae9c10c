"""The environment of a peer: nothing that importing `limbeck` has set."""

from __future__ import annotations

import os

from limbeck.contract.environment import WAITING


def as_by_hand() -> dict[str, str]:
    """This environment without how OpenMP threads wait, which `limbeck` sets for itself.

    llama.cpp with sleeping threads takes three times as long for a token. Programs of ours set it
    again when they start.
    """
    return {name: value for name, value in os.environ.items() if name not in WAITING}
