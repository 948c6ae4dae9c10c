"""What the report needs of a task: its table for a terminal and its parts of the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from limbeck.contract.artifact import Artifact
from serve_bench.judge.task import Judged, JudgingTask


@dataclass(frozen=True)
class Page:
    """The sections of a task on the page of the report."""

    sections: str
    """Template with quality and speed."""
    inputs: str
    """Template of the inputs: recipe, artifacts, machine and libraries."""
    context: Mapping[str, Any]
    """More values for the templates, besides those of every task."""


class TellingTask(JudgingTask, Protocol):
    """How a task is shown."""

    def heldout(self, judged: Judged) -> Mapping[str, Any]:
        """Sizes of the held-out text, for report.json."""

    @property
    def names(self) -> str:
        """The short names of the table in words; empty where there are none."""

    def table(self, data: Mapping[str, Any]) -> list[list[str]]:
        """Rows of the table in the terminal, the head first: two columns of words, then numbers."""

    def page(
        self,
        data: Mapping[str, Any],
        judged: Judged,
        student: Artifact,
        certificate: Mapping[str, Any],
    ) -> Page:
        """The sections of the page. ``data`` is the content of report.json."""
