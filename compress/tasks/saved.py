"""A task's description of the student that it saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from limbeck.contract.results.student import EncoderFigures, LanguageFigures, Parameters


@dataclass(frozen=True)
class Saved:
    """Fields of a `StudentResult` that are not the loop's."""

    parameters: Parameters
    shrink: Mapping[str, Any] | None
    sources: Mapping[str, Any]
    language: LanguageFigures | None = None
    encoder: EncoderFigures | None = None
