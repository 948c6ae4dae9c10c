"""Stages of every test here are stand-ins, each in a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import compress
import export
import serve_bench
from limbeck.app import plan
from limbeck.app import run as pipeline
from limbeck.contract.artifact import Artifact, find_artifact, open_artifact, write_artifact
from limbeck.contract.recipe import Recipe, load_recipe
from limbeck.contract.results.bench import Verdict
from serve_bench.tell.report import Report
from tests.app.run.stages import GOOD, KEPT, Stages, recipe


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    stages = Stages()

    def work(stage: str, kind: str, out: Path, recipe: Recipe, **parents: Path) -> Artifact:
        stages.called.append((stage, recipe.name))
        digests = {role: open_artifact(path).digest for role, path in parents.items()}
        key = json.dumps([stage, recipe.resolved() if stage == "bench" else recipe.digest, digests])
        if found := find_artifact(out, kind=kind, key=key):
            return found
        stages.made.append((stage, recipe.name))
        with write_artifact(out, kind=kind, key=key, parents=digests, recipe=recipe) as draft:
            (draft.folder / "file").write_text(recipe.name)
            draft.result = {}
        return open_artifact(out)

    def distill(*, recipe: Recipe, out: Path, products: dict[str, Path]) -> Artifact:
        stages.products[recipe.name] = products
        return work("compress", "student", out, recipe, **products)

    def export_student(*, student: Path, out: Path, recipe: Recipe) -> Artifact:
        return work("export", "onnx", out, recipe, student=student)

    def measure(*, onnx: Path, student: Path, out: Path, recipe: Recipe) -> Artifact:
        return work("bench", "bench", out, recipe, onnx=onnx, student=student)

    def write_report(*, run: Path, recipe: Recipe) -> Report:
        stages.called.append(("report", recipe.name))
        return Report(
            run / "report.html",
            run / "report.json",
            Verdict(stages.status, "so it is.", ()),
            "| table |",
        )

    monkeypatch.setattr(compress, "distill", distill)
    monkeypatch.setattr(export, "export_student", export_student)
    monkeypatch.setattr(serve_bench, "bench", measure)
    monkeypatch.setattr(serve_bench, "write_report", write_report)
    # The plan takes seconds; tests/app/test_plan.py has it.
    monkeypatch.setattr(plan, "training_operations", lambda recipe: float(len(recipe.name)))
    return stages


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def finished(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(export, "verify_parity", lambda folder: GOOD)
    monkeypatch.setattr(serve_bench, "replay", lambda **_: [KEPT])
    pipeline.run(load_recipe(recipe("alone")), out=Path("out"))
    Path("out/certificate.json").write_text("{}")
    return Path("out")
