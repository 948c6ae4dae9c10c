"""What differs between tasks while a student is exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from export.build.backend import Built
from export.folder.card import Card
from export.graphs import Graphs
from export.round.calibrate import Calibration
from export.round.scheme import Scheme
from limbeck.contract.artifact import Artifact
from limbeck.contract.recipe import AnyRecipe, Form, Provider
from limbeck.contract.recipe.encoder import EncoderForm
from limbeck.contract.results.onnx import GgufFile, OnnxResult

AnyForm: TypeAlias = Form | EncoderForm
Calibrate = Callable[[Scheme], Calibration | None]


@dataclass(frozen=True)
class Checked:
    """How far a form is from torch.

    ``base`` is of the base alone, where the adapter is kept apart.
    """

    parity: dict[str, Any]
    base: dict[str, Any] | None = None
    greedy: Sequence[Mapping[str, Any]] = ()


class Task(Protocol):
    """One student's export. `export.stage` calls the methods in this order."""

    metadata: Mapping[str, str]  # of every graph
    provider: Provider  # that all forms but fp32 are made for
    adapter: Path | None  # a file of the folder, where the adapter is kept apart
    keeps_weights: bool  # whether rounding has to start from the student's own weights

    def __init__(
        self, recipe: AnyRecipe, student: Artifact, folder: Path, metadata: Mapping[str, str]
    ) -> None: ...

    def files(self, form: str) -> Graphs:
        """Where the graphs of ``form`` lie."""
        ...

    def build(self) -> Built:
        """Write the fp32 graphs."""
        ...

    def answer(self, built: Built) -> None:
        """Keep torch's answers, which every form is compared with, in the folder."""
        ...

    def scheme(
        self, form: AnyForm, built: Built, calibrate: Calibrate
    ) -> tuple[Scheme | None, dict[str, Any] | None]:
        """How ``form`` is rounded, and the record of the choice of bits by matrix."""
        ...

    def check(self, form: str, graphs: Graphs, provider: Provider) -> Checked:
        """Compare ``graphs`` with torch's answers. Raises `ParityError` past tolerance."""
        ...

    def ggufs(self) -> tuple[dict[str, GgufFile], dict[str, str]]:
        """Write the GGUF files of the recipe: those that pass, and why others do not."""
        ...

    def finish(self, result: OnnxResult, built: Built, scheme: Scheme | None) -> OnnxResult:
        """Add this task's own results; ``scheme`` is the shipped form's."""
        ...

    def card(self, result: OnnxResult) -> Card:
        """The task's own parts of the model card."""
        ...

    @classmethod
    def verify(cls, folder: Path, result: OnnxResult) -> dict[str, Any]:
        """Parity of every form again, without torch. Raises `ParityError` past tolerance."""
        ...
