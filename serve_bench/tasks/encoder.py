"""How an encoder (a classifier or a sentence encoder) is measured, judged and shown."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from limbeck.contract.artifact import Artifact
from limbeck.contract.data.arrays import Logits
from limbeck.contract.data.examples import EXAMPLES, load_examples
from limbeck.contract.progress import task
from limbeck.contract.recipe import EncoderRecipe
from limbeck.contract.results.bench import Arm, EncoderResult, Gate, Verdict
from serve_bench.judge import encoder as figures
from serve_bench.judge.certificate import FP32
from serve_bench.judge.changes import Row, exact_row
from serve_bench.judge.encoder import Evidence, Quality
from serve_bench.judge.figures import Cell, Reference, Sample
from serve_bench.judge.stats import first_look
from serve_bench.judge.task import Judged, Measured
from serve_bench.measure.arms import form_arm, require_context, teachers_of, weights_on_disk
from serve_bench.measure.live import Test
from serve_bench.measure.units import Batch, batch
from serve_bench.measure.workers import Workers
from serve_bench.tell import encoder_page
from serve_bench.tell.task import Page

ANSWERS = "answers.safetensors"


class Encoder:
    """The tasks `classification` and `embedding`: a `MeasuringTask` and a `TellingTask`."""

    version = 2

    def __init__(self, recipe: EncoderRecipe) -> None:
        self.recipe, self.name = recipe, recipe.task
        bench = recipe.bench
        self.min_blocks, self.minutes, self.threads = bench.min_blocks, bench.minutes, bench.threads
        self.cells = [Cell(rows, length) for rows in bench.batches for length in bench.lengths]
        self.metrics: list[tuple[str, str, Cell | None]] = [
            (f"ms, batch {cell.batch} of {cell.length} tokens", "e2el", cell) for cell in self.cells
        ]
        self._runs: dict[tuple[str, Cell], int] = {}

    # Measuring ------------------------------------------------------------------------------------

    def open(self, onnx: Artifact, student: Artifact) -> list[Arm]:
        arms = list_arms(onnx=onnx, student=student)
        require_context(arms, self.recipe.bench, student.path / "model")
        self.open_data(student.path)
        return arms

    def open_data(self, folder: Path) -> None:
        self._examples, self._heldout = folder / EXAMPLES, load_examples(folder / EXAMPLES)

    def units(self, block: int) -> list[Batch]:
        return [Batch(cell, batch(self._heldout, cell, block), self._runs) for cell in self.cells]

    def live(self, threads: int) -> tuple[str, list[Test]]:
        tests: list[Test] = [
            (f"{cell.batch} × {cell.length}", "e2el", cell, cell.batch) for cell in self.cells
        ]
        return "sequences/s", tests

    def decided(self, samples: Sequence[Sample], reference: Reference) -> bool:
        found = figures.timing_evidence(samples, self.recipe, reference)
        gates = figures.timing_gates(found, self.quality, self.recipe, reference)
        return all(gate.status != "undecided" for gate in gates)

    def before_timing(
        self, workers: Workers, arms: Sequence[Arm], reference: Reference, out: Path, work: Path
    ) -> None:
        """Answer the held-out examples: the speed gate needs to know the better teacher."""
        answers, scored = {}, [arm for arm in arms if arm.scored]
        with task("held-out examples", len(scored)) as progress:
            for arm in scored:
                answers[arm.id] = _answers(workers, arm, self._examples, work)
                progress.advance()
        save_file(answers, out / ANSWERS)
        shutil.copyfile(self._examples, out / EXAMPLES)  # so that a replay needs no student
        self.quality = Quality(self.recipe, answers, self._heldout.groups, arms)

    def after_timing(
        self, workers: Workers, samples: Sequence[Sample], raw: IO[str], out: Path, work: Path
    ) -> None:
        """Nothing."""

    def alone(self, raw: IO[str], environment: dict[str, Any], work: Path) -> None:
        """Nothing."""

    def finish(
        self, rows: Sequence[dict[str, Any]], environment: dict[str, Any], out: Path
    ) -> None:
        """Nothing: the answers are written already."""

    def replay_quality(
        self,
        workers: Workers,
        arm: Arm,
        certificate: Mapping[str, Any],
        bench: Artifact,
        work: Path,
    ) -> list[tuple[str, float, float]]:
        """The metrics of the shipped form, and the largest change of one of its answers."""
        saved = load_file(bench.path / ANSWERS)
        found = _answers(workers, arm, bench.path / EXAMPLES, work)
        apart = float(np.abs(found - saved[arm.id]).max())
        scored = [Arm(name, name, _role(name), "torch", 0) for name in saved]
        quality = Quality(self.recipe, saved | {arm.id: found}, self._heldout.groups, scored)
        promised, now = certificate["figures"]["quality"], quality.all_metrics[arm.id]
        figures_now = [(name.replace("_", " "), promised[name], now[name]) for name in promised]
        return [("answers, largest change", 0.0, apart), *figures_now]

    # Judging --------------------------------------------------------------------------------------

    def reference(self, shipped: str, arms: Sequence[Arm], judged: str = "") -> Reference:
        looks, random = first_look(self.min_blocks), self.recipe.stand_in
        return Reference(self.recipe.name, shipped, tuple(arms), looks, judged, random)

    read_sample = staticmethod(Sample.of_batch)

    def read_quality(self, bench: Artifact, reference: Reference) -> Quality:
        answers, groups = load_file(bench.path / ANSWERS), load_examples(bench.path / EXAMPLES)
        return Quality(self.recipe, answers, groups.groups, reference.arms)

    def evidence(self, measured: Measured) -> Evidence:
        return figures.evidence(measured.samples, measured.quality, self.recipe, measured.reference)

    def gates(self, measured: Measured, evidence: Evidence) -> list[Gate]:
        return figures.all_gates(evidence, measured.quality, self.recipe, measured.reference)

    def result(self, measured: Measured, evidence: Evidence, verdict: Verdict) -> EncoderResult:
        return figures.result(
            measured.samples,
            measured.quality,
            measured.environment,
            evidence,
            verdict,
            self.recipe,
            measured.reference,
        )

    def promises(self, judged: Judged) -> dict[str, Any]:
        evidence, reference = judged.evidence, judged.measured.reference
        teachers = {arm.id: arm.label for arm in reference.with_role("teacher")}
        losses = {teachers.get(arm, arm): loss for arm, loss in evidence.losses.items()}
        fp32 = evidence.throughput.get(FP32)
        return {
            "e2el_ms": evidence.latency.as_json() if evidence.latency else None,
            "speed_over": {
                label: evidence.throughput[arm].as_json() for arm, label in teachers.items()
            },
            "speed_over_fp32": {"e2el": fp32.as_json()} if fp32 else None,
            "metric_loss_against": {name: loss.as_json() for name, loss in losses.items()},
            "quality": dict(judged.measured.quality.all_metrics[reference.shipped_arm.id]),
        }

    @property
    def replayed(self) -> Sequence[tuple[str, str, Cell | None]]:
        return [("one sequence", "e2el", figures.longest(self.recipe))]

    def tolerance(self, onnx: Artifact) -> float:
        """The parity tolerance of the shipped form's answers."""
        shipped = onnx.result["forms"][onnx.result["shipped"]]
        return float(shipped["parity"]["tolerance"]["max_abs"])

    def data(self, bench: Artifact) -> dict[str, Any]:
        groups = load_examples(bench.path / EXAMPLES).groups
        names = [name for _, name, _ in self.recipe.groups()]
        return {
            "heldout": bench.manifest["files"][EXAMPLES]["sha256"],
            "groups": {name: int((groups == index).sum()) for index, name in enumerate(names)},
        }

    def protocol(self) -> dict[str, Any]:
        bench = self.recipe.bench
        return {"batches": list(bench.batches), "lengths": list(bench.lengths)}

    def losses(
        self, old: Measured, new: Measured, tolerance: float, *, same_text: bool
    ) -> Iterator[Row]:
        """Each metric; its relative loss is above zero where the new run is worse."""
        then, now = (run.quality.all_metrics[run.reference.shipped_arm.id] for run in (old, new))
        for name in now:
            title = name.replace("_", " ")
            before, after = f"{then[name]:.4f}", f"{now[name]:.4f}"
            if not same_text:
                yield Row(title, "quality", before, after, None, tolerance, "not compared")
                continue
            loss = 1 - now[name] / then[name] if then[name] else 0.0
            yield exact_row(title, "quality", before, after, loss, tolerance)

    def scenarios(
        self, old: Measured, new: Measured, tolerance: float, anchors: Sequence[str]
    ) -> tuple[list[Row], list[str]]:
        """See `JudgingTask`; there are no scenarios for encoders."""
        return [], []

    # Telling --------------------------------------------------------------------------------------

    def heldout(self, judged: Judged) -> Mapping[str, Any]:
        names = [name for _, name, _ in self.recipe.groups()]
        sizes: dict[str, int] = judged.measured.quality.sizes(names)
        return sizes

    names = ""

    table = staticmethod(encoder_page.table)

    def page(
        self,
        data: Mapping[str, Any],
        judged: Judged,
        student: Artifact,
        certificate: Mapping[str, Any],
    ) -> Page:
        return encoder_page.page(self.recipe, data, student, certificate)


def _role(arm: str) -> Any:
    return "teacher" if arm.startswith("teacher:") else "form"


def _answers(workers: Workers, arm: Arm, examples: Path, work: Path) -> Logits:
    """Logits or unit vectors of every held-out example."""
    file = work / "answers.npy"
    workers[arm].ask("answers", examples=str(examples), out=str(file))
    found: Logits = np.load(file)
    return found


def list_arms(*, onnx: Artifact, student: Artifact) -> list[Arm]:
    """Teachers and student in torch, every form under onnxruntime, and a copy of the shipped form.

    Raises `ArtifactError` when a teacher's folder is gone.
    """
    name, arms = str(student.result["task"]), list[Arm]()
    for teacher in teachers_of(student):
        folder = Path(teacher["model"])
        spec = {"model": str(folder), "task": name, "pooling": teacher["pooling"]}
        label, size = teacher["name"], weights_on_disk(folder)
        arms.append(Arm(f"teacher:{label}", label, "teacher", "torch", size, spec))
    model = student.path / "model"
    spec = {"model": str(model), "task": name, "pooling": "mean"}
    arms.append(Arm("student", "student", "student", "torch", weights_on_disk(model), spec))
    forms = [form_arm(onnx, form) for form in onnx.result["forms"]]
    return [*arms, *forms, form_arm(onnx, str(onnx.result["shipped"]), twin=True)]
