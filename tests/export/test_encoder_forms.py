"""Every form of tiny random encoders against torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import export
from compress.models.language import byte_tokenizer
from export.build.encoder import load_student
from export.check.encoder import measure_encoder_parity
from export.check.parity import PARITY, load_arrays, require_parity
from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import ArtifactError, DataError, ParityError
from limbeck.runtime.decoder import Decoder
from limbeck.runtime.encoder import Encoder
from serve_bench.tasks.exports import time_encoders
from tests.encoders import CONFIGS, SMALL, classifier_recipe, make_encoder_student, make_examples
from tests.factory import Factory

FORMS = ("fp32", "int8-weight", "int8-static", "int8-dynamic")


@dataclass(frozen=True)
class Exported:
    """A random tiny BERT, exported in every form."""

    task: str
    student: Path
    onnx: Artifact


@pytest.fixture(scope="module", params=["classification", "embedding"])
def exported(request: pytest.FixtureRequest, tiny: Factory) -> Exported:
    task = str(request.param)
    made = tiny.exported_encoder("bert", task, forms=SMALL)
    return Exported(task, made.path.parent / "student", made)


@pytest.mark.parametrize(
    "form", ["int8-weight", pytest.param("int8-static", marks=pytest.mark.slow)]
)
def test_positions_that_all_rows_share_are_rounded(
    tiny: Factory, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """RoFormer looks its table of positions up once for all rows."""
    monkeypatch.setitem(CONFIGS, "roformer", CONFIGS["bert"])
    made = tiny.exported_encoder("roformer", "embedding", forms=["fp32", form])
    assert made.result["forms"][form]["parity"]["failures"] == []  # against torch


def test_every_form_of_a_tiny_bert(exported: Exported) -> None:
    forms = exported.onnx.result["forms"]
    assert tuple(forms) == FORMS
    assert forms["int8-dynamic"]["bytes"] < 0.6 * forms["fp32"]["bytes"]
    assert export.verify_parity(exported.onnx.path).keys() == forms.keys()
    for name, products in (
        ("int8-dynamic", "MatMulIntegerToFloat int8"),
        ("int8-static", "MatMul int8"),
    ):
        operators = forms[name]["census"]["operators"]
        assert operators[products] == 12 + (
            exported.task == "classification"
        )  # six a layer, and the pooler
        assert operators["QuantizeLinear"] == 8 + (
            exported.task == "classification"
        )  # q, k and v share one
    for form in forms.values():
        assert [(p["operator"], p["count"]) for p in form["census"]["float_products"]] == [
            ("MatMul", 4)
        ]  # two a layer
        assert form["census"]["runs_on"].keys() == {"CPUExecutionProvider"}
        assert form["census"]["runs_on"]["CPUExecutionProvider"]["Softmax"] == 2
    encoder = Encoder(exported.onnx.path, form="fp32")
    ids, mask = make_examples(seed=7).batch(slice(None))
    student = load_student(exported.student / "model", task=exported.task)
    with torch.inference_mode():
        expected = student(torch.from_numpy(ids), torch.from_numpy(mask))[-1]
    np.testing.assert_allclose(encoder.run(ids, mask), expected.numpy(), rtol=1e-3, atol=1e-4)
    with pytest.raises(DataError, match="reads 64 at most"):
        encoder.run(np.ones((1, 65)))
    with pytest.raises(DataError, match=r"shape \(5,\); expected \[rows, tokens\]"):
        encoder.run(np.ones(5))


def test_folders_and_forms_that_are_no_encoder(exported: Exported, tiny: Factory) -> None:
    with pytest.raises(ArtifactError, match="no form 'int3'; it has fp32, int8-weight"):
        Encoder(exported.onnx.path, form="int3")
    with pytest.raises(ArtifactError, match=r"holds an encoder, .* open it with .*Encoder\."):
        Decoder(exported.onnx.path)
    with pytest.raises(ArtifactError, match=r"holds a language model; use .*decoder\.Decoder"):
        Encoder(tiny.exported().path)


def test_texts_are_cut_where_the_tokenizer_says_and_padded_on_the_right(
    tiny: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' tokenizer and model, one text at a time, say what is right."""
    byte_tokenizer().save_pretrained(tmp_path)
    sides = {"truncation_side": "left", "padding_side": "left"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, **sides)
    monkeypatch.setattr("compress.models.language.byte_tokenizer", lambda: tokenizer)
    make_encoder_student(tmp_path / "student", "bert", task="classification")
    model = tmp_path / "student" / "model"
    recipe = classifier_recipe(export={"forms": ["fp32"]})
    with tiny.traced_once():
        made = export.export_student(student=model.parent, out=tmp_path / "onnx", recipe=recipe)
    texts = ["the end of this text is all that is read", "short", "and of this one too"]
    encoder, torchs = Encoder(made.path), AutoModelForSequenceClassification.from_pretrained(model)
    own, exported = (AutoTokenizer.from_pretrained(p) for p in (model, made.path))
    assert own.truncation_side == own.padding_side == "left"
    cut = {"truncation": True, "max_length": 8}
    with torch.no_grad():
        alone = [torchs.eval()(**own(t, return_tensors="pt", **cut)).logits[0] for t in texts]
    right = torch.stack(alone).numpy()
    np.testing.assert_allclose(encoder.encode(texts, max_tokens=8), right, rtol=1e-3, atol=1e-4)
    batch = exported(texts, padding=True, return_tensors="np", **cut)
    assert batch["attention_mask"][1].tolist()[-1] == 0
    found = encoder.run(batch["input_ids"], batch["attention_mask"])
    np.testing.assert_allclose(found, right, rtol=1e-3, atol=1e-4)


def test_texts_go_in(exported: Exported) -> None:
    encoder, texts = (
        Encoder(exported.onnx.path, form="fp32"),
        ["a longer text than the other", "short"],
    )
    np.testing.assert_allclose(
        encoder.encode(texts)[1:], encoder.encode(texts[1:]), rtol=1e-3, atol=1e-5
    )
    with pytest.raises(DataError, match="found no texts, expected at least one"):
        encoder.encode([])
    card = (exported.onnx.path / "README.md").read_text()
    whose = "of the student in torch, before it was rounded to int8-dynamic"
    names = {
        result.metric_type: result.metric_name for result in ModelCard(card).data.eval_results or ()
    }
    if exported.task == "classification":
        assert set(encoder.classify(texts)) <= {"no", "yes", "maybe"}
        assert "text-classification" in card
        assert names == {
            "accuracy": f"accuracy, {whose}",
            "macro_f1": f"macro f1, {whose}",
            "nll": f"nats an example, {whose}",
        }
    else:
        assert np.linalg.norm(encoder.encode(texts), axis=1) == pytest.approx(1.0, abs=1e-5)
        assert json.loads((exported.onnx.path / "1_Pooling" / "config.json").read_text())[
            "pooling_mode_mean_tokens"
        ]
        assert "feature-extraction" in card
        assert names == {"spearman": f"spearman, {whose}"}
        with pytest.raises(DataError, match="sentence encoder"):
            encoder.classify(texts)


def test_a_row_does_not_depend_on_its_batch(exported: Exported) -> None:
    encoder = Encoder(exported.onnx.path)  # int8-dynamic, the shipped one
    ids, mask = make_examples().batch(slice(None))
    together = encoder.run(ids, mask)
    alone = [encoder.run(row[None, kept == 1])[0] for row, kept in zip(ids, mask, strict=True)]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-3, atol=1e-4)


def test_parity_sees_a_graph_that_computes_something_else(exported: Exported) -> None:
    graph = exported.onnx.path / exported.onnx.result["forms"]["fp32"]["graph"]
    cases = load_arrays(exported.onnx.path / PARITY)
    assert measure_encoder_parity("fp32", graph, cases)["failures"] == []
    cases["ragged"]["answers"] = -cases["ragged"]["answers"]
    parity = measure_encoder_parity("fp32", graph, cases)
    assert parity["failures"][0].startswith("ragged: max_abs is")
    with pytest.raises(ParityError, match="ragged: max_abs"):
        require_parity("fp32", parity)


def test_exports_are_timed_by_themselves(tiny: Factory, tmp_path: Path) -> None:
    """One sequence of the largest length, every form twice in a block; the figure is the median of
    what lies in the samples.
    """
    bench = classifier_recipe().bench
    run = tiny.exported_encoder("bert", "classification", forms=SMALL).path.parent
    found = time_encoders(
        [(run, "fp32"), (run, "int8-static")], out=tmp_path / "timing", bench=bench
    )
    lines = (tmp_path / "timing" / "samples.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["event"] == "sample"]
    assert {(row["batch"], row["length"]) for row in rows} == {(1, 16)}
    blocks = {row["block"] for row in rows}
    assert len(blocks) >= bench.min_blocks
    assert len(rows) == 4 * len(blocks)
    for form, told in zip(("fp32", "int8-static"), found, strict=True):
        pairs = [
            [r["seconds"] for r in rows if r["arm"].endswith(form) and r["block"] == block]
            for block in blocks
        ]
        assert told == pytest.approx(1e3 * np.median([np.sqrt(a * b) for a, b in pairs]))
    long = bench.model_copy(update={"lengths": (8, 65)})
    with pytest.raises(DataError, match=r"bench\.lengths: found 65; .* reads 64 tokens at most"):
        time_encoders([(run, "fp32")], out=tmp_path / "long", bench=long)
