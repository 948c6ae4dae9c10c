"""Encoders are trained: alone, from two teachers, stopped, in two processes, to a verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

import compress
import export
import serve_bench
from compress import loop
from compress.models.encoders import load_body, load_classifier
from limbeck.app.verify import verify
from limbeck.contract.artifact import open_artifact
from limbeck.contract.data.examples import EXAMPLES, accuracy, load_examples
from limbeck.contract.errors import ModelError
from tests.encoders import CLASSES, classifier_recipe, embedding_recipe, source


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned tiny classifier."""
    out = tmp_path_factory.mktemp("expert") / "student"
    training = {
        "examples": 320,
        "batch": 16,
        "learning_rate": 2e-3,
        "precision": "fp32",
        "threads": 1,
    }
    compress.distill(recipe=classifier_recipe(training=training), out=out)
    return out


def taught(expert: Path, names: str = "ab", **over: Any) -> Any:
    """A recipe whose teachers, of these names, are all the expert."""
    local = {"kind": "local", "path": str(expert / "model")}
    teachers = [{"name": name, "model": local} for name in names]
    student = {"kind": "shrink", "base": source(seed=3), "layers": 1, "calibration_examples": 4}
    export_ = {"forms": ["fp32", "int8-dynamic"]}
    gates = {"min_throughput_ratio": 0.01, "max_metric_loss": 1.0, "max_size_mb": 10}
    return classifier_recipe(
        teachers=teachers, student=student, export=export_, gates=gates, **over
    )


def test_fine_tuning_learns_the_classes(expert: Path) -> None:
    artifact = open_artifact(expert)
    assert artifact.result["metrics"]["accuracy"] > 0.8
    assert artifact.result["classes"] == ["code", "prose"]
    heldout = load_examples(expert / EXAMPLES)
    model = load_classifier(expert / "model")
    ids, mask = (torch.from_numpy(a) for a in heldout.batch(slice(None)))
    said = model(input_ids=ids, attention_mask=mask).logits.argmax(1).numpy()
    assert accuracy(said, heldout.groups.astype(np.int64)) == pytest.approx(
        artifact.result["metrics"]["accuracy"]
    )


def test_a_run_that_was_stopped_ends_in_the_same_weights(
    expert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {
        "examples": 64,
        "batch": 8,
        "precision": "fp32",
        "threads": 1,
        "checkpoint_every": 3,
        "evaluate_every": 3,
    }
    recipe = taught(expert, training=training)
    whole = compress.distill(recipe=recipe, out=tmp_path / "whole")
    measure = loop._measure

    def stop(run: Any, state: Any) -> None:
        measure(run, state)
        if state.step == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_measure", stop)
    with pytest.raises(KeyboardInterrupt):
        compress.distill(recipe=recipe, out=tmp_path / "stopped")
    monkeypatch.setattr(loop, "_measure", measure)
    again = compress.distill(recipe=recipe, out=tmp_path / "stopped")
    name = "model/model.safetensors"
    assert whole.manifest["files"][name] == again.manifest["files"][name]
    lines = [json.loads(line) for line in (again.path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == list(range(1, 9))


def test_teachers_of_other_classes_are_refused(expert: Path, tmp_path: Path) -> None:
    other = [CLASSES[1], CLASSES[0]]
    data = {"classes": other, "max_tokens": 40, "heldout": {"every": 3}}
    with pytest.raises(
        ModelError, match="tells apart code, prose; the recipe's classes are prose, code"
    ):
        compress.distill(recipe=taught(expert, data=data), out=tmp_path / "student")


def test_sentence_encoders_become_alike(tmp_path: Path) -> None:
    training = {
        "examples": 400,
        "batch": 16,
        "learning_rate": 2e-3,
        "precision": "fp32",
        "threads": 1,
    }
    result = compress.distill(
        recipe=embedding_recipe(training=training), out=tmp_path / "student"
    ).result
    rows = [
        json.loads(line) for line in (tmp_path / "student" / "log.jsonl").read_text().splitlines()
    ]
    steps = [row for row in rows if row["event"] == "step"]
    for term in ("cosine", "relational"):
        early, late = (np.mean([row[term] for row in part]) for part in (steps[:4], steps[-4:]))
        assert late < early, term
    assert result["metrics"]["spearman"] > 0.3
    assert set(result["teachers"]) == {"a", "b"}
    saved = load_body(tmp_path / "student" / "model")
    assert saved.config.num_hidden_layers == 1  # and no projection beside it
    assert not [name for name in saved.state_dict() if "projection" in name]


@pytest.mark.usefixtures("one_roofline", "forked_arms", "traced_once")
def test_the_whole_chain_to_a_verdict(expert: Path, tmp_path: Path) -> None:
    recipe = taught(expert, "a")  # one teacher: each is measured in a process that loads torch
    run = tmp_path / "run"
    compress.distill(recipe=recipe, out=run / "student")
    export.export_student(student=run / "student", out=run / "onnx", recipe=recipe)
    bench = serve_bench.bench(
        onnx=run / "onnx", student=run / "student", out=run / "bench", recipe=recipe
    )
    assert (
        serve_bench.bench(
            onnx=run / "onnx", student=run / "student", out=run / "bench", recipe=recipe
        )
        == bench
    )
    report = serve_bench.write_report(run=run, recipe=recipe)
    assert report.verdict.status in (
        "pass",
        "undecided",
    )  # few blocks, whose interval may reach anywhere
    gates = {gate["name"]: gate for gate in bench.result["gates"]}
    assert gates["max_metric_loss"]["status"] == gates["max_size_mb"]["status"] == "pass"
    data = json.loads(report.json.read_text())
    assert data["best_teacher"] == "teacher:a"
    teacher = data["arms"]["teacher:a"]
    assert teacher["metrics"]["accuracy"] == pytest.approx(
        open_artifact(expert).result["metrics"]["accuracy"]
    )
    student = open_artifact(run / "student").result["metrics"]["accuracy"]
    assert (
        data["arms"]["student"]["metrics"]["accuracy"]
        == data["arms"]["onnx:fp32"]["metrics"]["accuracy"]
        == student
    )
    assert [(c["batch"], c["length"]) for c in teacher["grid"]] == [
        (1, 8),
        (1, 16),
        (2, 8),
        (2, 16),
    ]
    assert "accuracy" in report.table
    page = report.html.read_text()
    assert "<style>" in page
    assert "throughput, sequences a second (logarithmic)" in page
    assert "1 − accuracy (less is better)" in page
    assert page.count("nodes run on CPUExecutionProvider") == len(data["onnx"]["forms"])
    assert "Still in float: 2 MatMul (both factors are activations" in page
    header = ModelCard.load(run / "onnx/README.md").data.to_dict()
    assert header["teachers"] == [
        {"name": "a", "model": f"local: path {expert / 'model'}", "license": "unknown"}
    ]
    assert header["digests"] == {
        "recipe": recipe.digest,
        "student": open_artifact(run / "student").digest,
    }
    assert header["license"] == "unknown"
    assert verify(run) == 0
