"""The export of a classifier or sentence encoder: one graph a form, which also scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from export.build.backend import Built
from export.build.encoder import build_fp32
from export.check.encoder import Cases, make_cases, measure_encoder_parity
from export.check.parity import PARITY, load_arrays, require_parity, save_arrays
from export.folder.card import Card, in_torch, markdown_table, plain
from export.folder.clients import pad_on_the_right, write_sentence_transformers
from export.graphs import Graphs, form_files
from export.round.scheme import Scheme, encoder_scheme
from export.tasks.base import AnyForm, Calibrate, Checked
from limbeck.contract.artifact import Artifact
from limbeck.contract.data.examples import EXAMPLES, load_examples
from limbeck.contract.errors import ArtifactError
from limbeck.contract.recipe import AnyRecipe, Provider, StaticShapes
from limbeck.contract.recipe.encoder import EncoderForm, EncoderRecipe
from limbeck.contract.results.onnx import GgufFile, OnnxResult

_PIPELINES = {"classification": "text-classification", "embedding": "feature-extraction"}
_ALIKE = {
    "classification": "same class where torch is sure",
    "embedding": "mean cosine with torch's vector",
}


class Encoder:
    """A classifier or a sentence encoder."""

    adapter: Path | None = None  # LoRA is for language models
    provider: Provider = "cpu"
    keeps_weights: bool = False

    def __init__(
        self, recipe: AnyRecipe, student: Artifact, folder: Path, metadata: Mapping[str, str]
    ) -> None:
        self.recipe, self.student, self.folder = cast(EncoderRecipe, recipe), student, folder
        self.task = recipe.task
        self.metadata: Mapping[str, str] = {**metadata, "limbeck.task": self.task}
        self.cases: Cases = {}

    def files(self, form: str) -> Graphs:
        """Where the graph of ``form`` lies; both names of `Graphs` are of one file."""
        files = form_files(self.folder, form)
        return replace(files, all=files.last)

    def build(self) -> Built:
        """Build with torch's exporter. Raises `ModelError` for a model that it cannot export."""
        shapes = self.recipe.export.shapes
        return build_fp32(
            self.student.path / "model",
            self.files("fp32"),
            {**self.metadata, "limbeck.form": "fp32"},
            task=self.task,
            opset=self.recipe.export.opset,
            static=shapes if isinstance(shapes, StaticShapes) else None,
        )

    def answer(self, built: Built) -> None:
        """Torch's answers to held-out examples."""
        if not (self.student.path / EXAMPLES).is_file():
            raise ArtifactError(
                f"{self.student.path}: {EXAMPLES} is missing; parity is measured on held-out "
                "examples. Run the compress stage again."
            )
        examples = load_examples(self.student.path / EXAMPLES)
        self.cases = make_cases(examples, self.student.path / "model", task=self.task)
        save_arrays(self.folder / PARITY, self.cases)

    def scheme(
        self, form: AnyForm, built: Built, calibrate: Calibrate
    ) -> tuple[Scheme | None, dict[str, Any] | None]:
        """As the form says."""
        return encoder_scheme(cast(EncoderForm, form), built.width), None

    def check(self, form: str, graphs: Graphs, provider: Provider) -> Checked:
        """Parity with torch."""
        parity = measure_encoder_parity(form, graphs.last, self.cases)
        require_parity(form, parity)
        return Checked(parity)

    def ggufs(self) -> tuple[dict[str, GgufFile], dict[str, str]]:
        """None: recipes of encoders have no such form."""
        return {}, {}

    def finish(self, result: OnnxResult, built: Built, scheme: Scheme | None) -> OnnxResult:
        """The classes; a sentence encoder's folder also gets sentence-transformers' files."""
        pad_on_the_right(self.folder)
        if self.task == "embedding":
            write_sentence_transformers(self.folder, width=built.width)
        classes = self.student.result["classes"]
        return replace(result, classes=tuple(classes) if classes else None)

    def card(self, result: OnnxResult) -> Card:
        """Held-out figures of student and teachers, and parity."""
        student, shipped = self.student.result, result.shipped
        named = f" Classes: {plain(', '.join(result.classes))}." if result.classes else ""
        metrics = {"student": student["metrics"]} | {
            f"teacher {plain(name)}": report["metrics"]
            for name, report in student["teachers"].items()
        }
        columns = list(student["metrics"])
        rows = [[name, *(f"{of[c]:.4f}" for c in columns)] for name, of in metrics.items()]
        parity = [
            [
                f"`{name}`",
                f"{form.bytes / 1e6:.1f}",
                f"{form.parity['max_abs']:.2g}",
                f"{form.parity['alike']:.4f}",
            ]
            for name, form in result.forms.items()
        ]
        others = ", and its teachers" if student["teachers"] else ""
        full = {"nll": "nats an example"}
        return Card(
            pipeline=_PIPELINES[self.task],
            made=f"distilled, exported to ONNX and shipped as `{shipped}`.{named}",
            measured={self.recipe.name: student["metrics"]},
            metrics={
                metric: f"{full.get(metric, metric.replace('_', ' '))}, of {in_torch(shipped)}"
                for metric in columns
            },
            sections=[
                "## On held-out examples",
                markdown_table(["", *columns], rows),
                f"Of {in_torch(shipped)}{others}. What ships is measured by `limbeck bench`.",
                "## The graphs against the torch student",
                markdown_table(["form", "MB", "largest difference", _ALIKE[self.task]], parity),
            ],
        )

    @classmethod
    def verify(cls, folder: Path, result: OnnxResult) -> dict[str, Any]:
        """Parity again, on the examples that travel with the artifact."""
        cases = load_arrays(folder / PARITY)
        measured = {}
        for name, form in result.forms.items():
            measured[name] = measure_encoder_parity(name, folder / form.graph, cases)
            require_parity(name, measured[name])
        return measured
