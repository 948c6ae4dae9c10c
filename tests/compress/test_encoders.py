"""Encoders through the stages on tiny random models: text to examples, training, graphs,
measurement, verdict.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import compress
import export
import serve_bench
from compress import loop
from compress.data.examples import load_examples as examples_of
from compress.data.examples import training_order
from compress.data.mail import subject_and_body
from compress.models.encoders import (
    build_student,
    class_names,
    encoder_folder,
    load_body,
    load_classifier,
    pooled,
)
from compress.models.language import byte_tokenizer
from export.build.encoder import load_student
from export.check.encoder import measure_encoder_parity
from export.check.parity import PARITY, load_arrays, require_parity
from limbeck.app.products import plan_products
from limbeck.app.verify import verify
from limbeck.contract.artifact import Artifact, open_artifact
from limbeck.contract.data.examples import EXAMPLES, accuracy, load_examples, macro_f1
from limbeck.contract.errors import DataError, ModelError, ParityError, RecipeError, UserError
from limbeck.contract.recipe import (
    EncoderShrinkStudent,
    OnnxModel,
    load_any_recipe,
    load_recipe,
    parse_any_recipe,
    shipped_recipes,
)
from limbeck.contract.sources.places import npm_root
from limbeck.contract.sources.texts import text_files
from limbeck.runtime.encoder import Encoder
from serve_bench.worker.encoder import TorchEncoder
from tests import ROOT
from tests.encoders import (
    CLASSES,
    classifier_recipe,
    embedding_recipe,
    make_encoder_student,
    make_examples,
    source,
)

FORMS = ("fp32", "int8-weight", "int8-static", "int8-dynamic")
SMALL = ["fp32", {"kind": "int8-weight", "block_size": 16}, "int8-static", "int8-dynamic"]


# Recipes -----------------------------------------------------------------------------------------


def test_the_task_decides_the_fields() -> None:
    with pytest.raises(RecipeError, match=r"bench\.prompt_tokens: unknown key"):
        classifier_recipe(bench={"prompt_tokens": 3})
    with pytest.raises(RecipeError, match=r"task: found 'translation'"):
        parse_any_recipe({"task": "translation", "name": "a"})


def test_what_works_on_language_models_says_so(tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    path.write_text(json.dumps(classifier_recipe().resolved()))
    assert load_any_recipe(path).name == "pico-classes"
    with pytest.raises(RecipeError, match="its task is classification"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"data": {"classes": [CLASSES[0], CLASSES[0]]}}, "'code' is there 2 times"),
        ({"gates": {"max_metric_loss": 0.1}}, "gates.max_metric_loss: there are no teachers"),
        ({"training": {"examples": 4, "batch": 8}}, "at least one step"),
        ({"student": {"kind": "fresh", "config": {}}}, "tokenizer from the first teacher"),
        ({"export": {"forms": ["int8-dynamic"]}}, "put fp32 first"),
    ],
)
def test_contradictions(over: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        classifier_recipe(**over)


def test_every_shipped_recipe_is_of_a_task() -> None:
    tasks = {load_any_recipe(path).task for _, path in shipped_recipes()}
    assert {"causal-lm", "classification"} <= tasks


def test_a_teacher_recipe_of_another_task_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    teachers = [{"name": "a", "model": {"kind": "recipe", "recipe": "pico"}}]
    path.write_text(json.dumps(classifier_recipe(teachers=teachers).resolved()))
    with pytest.raises(RecipeError, match="its task is causal-lm, expected classification"):
        plan_products(load_any_recipe(path))


# Text --------------------------------------------------------------------------------------------


def test_npm_text_is_below_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"npm install --ignore-scripts .* '@a/b@1.2.3'"):
        npm_root("@a/b", "1.2.3")
    root = tmp_path / "npm" / "node_modules" / "@a" / "b"
    (root / "data").mkdir(parents=True)
    (root / "data" / "one.txt").write_text("text")
    (root / "package.json").write_text('{"version": "1.2.4"}')
    with pytest.raises(UserError, match=r"installed as 1\.2\.4, the recipe wants 1\.2\.3"):
        npm_root("@a/b", "1.2.3")
    recipe = classifier_recipe(
        data={
            "classes": [
                {
                    "name": "x",
                    "text": {
                        "kind": "npm",
                        "package": "@a/b",
                        "version": "1.2.4",
                        "paths": ["data/*"],
                    },
                },
                CLASSES[0],
            ]
        }
    )
    assert text_files(recipe.data.classes[0].text, folder=tmp_path) == [root / "data" / "one.txt"]


def test_mail_is_its_subject_and_body() -> None:
    message = (
        "From x@y Thu Aug 22 2002\nSubject: =?utf-8?q?Caf=C3=A9?=\nContent-Type: text/html\n"
        "Content-Transfer-Encoding: quoted-printable\n\n<html><style>p {}</style>"
        "<p>Two=20&amp;   three</p><br>four</html>"
    )
    assert subject_and_body(message) == "Café\n\nTwo & three\nfour"
    both = (
        'Subject: s\nContent-Type: multipart/alternative; boundary="b"\n\n--b\n'
        "Content-Type: text/plain; charset=nowhere\n\n"
        "plain\n--b\nContent-Type: text/html\n\n<p>marked</p>\n--b--\n"
    )
    assert subject_and_body(both.encode()) == "s\n\nplain"


def test_examples_are_interleaved_once_and_spread(tmp_path: Path) -> None:
    for name, letter in (("a", "x"), ("b", "y")):
        rows = [
            json.dumps({"text": f"{letter} {i // 2}"}) for i in range(24)
        ]  # each text stands there twice
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    text = {"kind": "files", "format": {"kind": "jsonl"}}
    classes = [
        {"name": n, "text": {**text, "paths": [str(tmp_path / f"{n}.jsonl")]}} for n in ("a", "b")
    ]
    recipe = classifier_recipe(
        data={"classes": classes, "max_tokens": 8, "heldout": {"every": 3, "most": 2}}
    )
    train, heldout = examples_of(recipe, byte_tokenizer())
    assert (len(train), len(heldout)) == (16, 4)
    assert heldout.groups.tolist() == [0, 0, 1, 1]
    tokenizer = byte_tokenizer()
    texts = [
        tokenizer.decode(row[:n]) for row, n in zip(heldout.input_ids, heldout.lengths, strict=True)
    ]
    assert texts == ["x 2", "x 11", "y 2", "y 11"]
    assert not {tuple(r) for r in train.input_ids.tolist()} & {
        tuple(r) for r in heldout.input_ids.tolist()
    }


def test_too_few_examples_are_named(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("only one")
    classes = [
        CLASSES[0],
        {"name": "few", "text": {"kind": "files", "paths": [str(tmp_path / "one.txt")]}},
    ]
    with pytest.raises(DataError, match=r"data.classes.1: too little text for few: 1 examples"):
        examples_of(classifier_recipe(data={"classes": classes, "max_tokens": 8}), byte_tokenizer())


def test_every_pass_has_an_order_of_its_own_and_a_longer_run_begins_alike() -> None:
    order = training_order(25, examples=10, seed=3)
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10].tolist() != order[10:20].tolist()
    assert training_order(12, examples=10, seed=3).tolist() == order[:12].tolist()


def test_figures_of_classes_by_hand() -> None:
    labels, said = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    assert accuracy(said, labels) == 0.75
    assert macro_f1(said, labels, 2) == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert macro_f1(said, labels, 3) == pytest.approx((4 / 5 + 2 / 3 + 1) / 3)


# Models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert"])
def test_cutting_nothing_changes_nothing_and_cutting_keeps_what_is_kept(model_type: str) -> None:
    folder = encoder_folder(parse_source(model_type), folder=Path())
    ids = torch.randint(1, 250, (1, 12))
    body = load_body(folder)
    whole = EncoderShrinkStudent.model_validate({"kind": "shrink", "base": source(model_type)})
    same, _, kept = build_student(whole, folder=folder, classes=None, calibration=[ids], seed=0)
    assert kept["parameters"] == kept["parameters_before"]
    mask = torch.ones_like(ids)
    torch.testing.assert_close(pooled(same.eval(), ids, mask), pooled(body, ids, mask))
    sizes = {"layers": 1, "intermediate_size": 64, "kv_heads": 2, "hidden_size": 32}
    cut = EncoderShrinkStudent.model_validate(
        {"kind": "shrink", "base": source(model_type), **sizes}
    )
    small, importance, kept = build_student(
        cut, folder=folder, classes=["no", "yes"], calibration=[ids], seed=0
    )
    assert importance is not None
    assert small.config.hidden_size == 32
    assert small(input_ids=ids).logits.shape == (1, 2)
    layer = kept["kept_layers"][0]
    assert importance.layers_l.argmax().item() == layer


def parse_source(model_type: str) -> Any:
    return classifier_recipe(student={"kind": "full", "base": source(model_type)}).student.base  # type: ignore[union-attr]


def test_an_onnx_file_is_read_back(tmp_path: Path) -> None:
    like = encoder_folder(parse_source("bert"), folder=Path())
    torch.manual_seed(5)
    from transformers import BertConfig, BertModel

    config = BertConfig.from_pretrained(like, num_hidden_layers=1, attn_implementation="eager")
    model = BertModel(config, add_pooling_layer=False).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)

    class States(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    file = tmp_path / "old.onnx"
    ids = torch.ones(2, 7, dtype=torch.long)
    free = {0: "batch", 1: "length"}
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # the old exporter, which files in the wild come from, is deprecated
        torch.onnx.export(
            States().eval(),
            (ids, ids),
            str(file),
            dynamo=False,
            input_names=["input_ids", "attention_mask"],
            output_names=["out"],
            dynamic_axes={"input_ids": free, "attention_mask": free, "out": free},
        )
    entry = {"kind": "onnx", "path": str(file), "like": {"kind": "local", "path": str(like)}}
    found = load_body(encoder_folder(OnnxModel.model_validate(entry), folder=Path()))
    assert found.config.num_hidden_layers == 1
    ids = torch.randint(1, 250, (3, 9))
    with torch.no_grad():
        torch.testing.assert_close(
            found(input_ids=ids).last_hidden_state,
            model(input_ids=ids).last_hidden_state,
            rtol=1e-4,
            atol=1e-5,
        )
    entry["path"] = str(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="no such file"):
        encoder_folder(OnnxModel.model_validate(entry), folder=Path())


def test_only_the_head_of_a_base_and_an_unused_pooler_may_be_missing(tmp_path: Path) -> None:
    folder = make_encoder_student(tmp_path / "student", "bert", task="embedding").path / "model"
    with pytest.raises(
        ModelError, match=r"as a classifier it lacks 2 of its weights \(for example classifier.bias"
    ):
        load_classifier(folder)
    with pytest.raises(ModelError, match="as a classifier it lacks 2"):
        load_student(folder, task="classification")
    with pytest.raises(ModelError, match="as a classifier it lacks 2"):
        TorchEncoder(model=str(folder), task="classification", pooling="", threads=1)
    body = load_body(folder)
    del body.pooler
    type(body).save_pretrained(body, folder)
    load_body(folder)
    load_student(folder, task="embedding")
    TorchEncoder(model=str(folder), task="embedding", pooling="mean", threads=1)
    load_classifier(folder, ["a", "b"]).save_pretrained(folder)  # whose head begins with the pooler
    assert class_names(load_classifier(folder)) == ["a", "b"]
    assert load_classifier(folder, ["a", "b", "c"]).classifier.weight.shape == (3, 64)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    for load in (load_body, load_classifier, lambda folder: load_classifier(folder, ["a", "b"])):
        with pytest.raises(
            ModelError, match=r"lacks 16 of its weights \(for example .*encoder.layer.2.attention"
        ):
            load(folder)


# Training ----------------------------------------------------------------------------------------


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


def two_teachers(expert: Path, **over: Any) -> Any:
    local = {"kind": "local", "path": str(expert / "model")}
    teachers = [{"name": "a", "model": local}, {"name": "b", "model": local}]
    student = {"kind": "shrink", "base": source(seed=3), "layers": 1, "calibration_examples": 4}
    export_ = {"forms": SMALL}
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
    recipe = two_teachers(expert, training=training)
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


PROCESSES = """
import json, sys
from pathlib import Path
import compress
from limbeck.contract.recipe import parse_any_recipe

compress.distill(recipe=parse_any_recipe(json.loads(sys.argv[1])), out=Path(sys.argv[2]))
"""


@pytest.mark.parametrize(
    "make",
    [classifier_recipe, pytest.param(embedding_recipe, marks=pytest.mark.slow)],
    ids=["classes", "vectors"],
)
def test_two_processes_train_as_one(tmp_path: Path, make: Any) -> None:
    """DDP over gloo gives the losses and the weights of one process."""
    calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base = source()
    base = {**base, "config": base["config"] | calm}
    training = {"examples": 24, "batch": 8, "precision": "fp32", "threads": 1}
    tree = make(student={"kind": "full", "base": base}, training=training).resolved()
    if make is classifier_recipe:
        head = {"id2label": {"0": "code", "1": "prose"}}
        taught = [{**base, "seed": n, "config": base["config"] | head} for n in (5, 6)]
        tree["teachers"] = [{"name": f"t{n}", "model": m} for n, m in enumerate(taught)]
    script = tmp_path / "job.py"
    script.write_text(PROCESSES)
    compress.distill(recipe=parse_any_recipe(tree), out=tmp_path / "1")
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, json.dumps(tree, default=str), str(tmp_path / "2")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = []
    for out in (tmp_path / "1", tmp_path / "2"):
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        steps = [row for row in log if row["event"] == "step"]
        found.append((steps, load_file(out / "model" / "model.safetensors")))
    (one, weights), (two, shared) = found
    assert len(one) == 3
    for mine, theirs in zip(one, two, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)
        assert theirs["weights"] == pytest.approx(mine["weights"], abs=2e-4)
    for name, tensor in weights.items():
        torch.testing.assert_close(shared[name], tensor, rtol=1e-3, atol=2e-5)


def test_teachers_of_other_classes_are_refused(expert: Path, tmp_path: Path) -> None:
    other = [CLASSES[1], CLASSES[0]]
    data = {"classes": other, "max_tokens": 40, "heldout": {"every": 3}}
    with pytest.raises(
        ModelError, match="tells apart code, prose; the recipe's classes are prose, code"
    ):
        compress.distill(recipe=two_teachers(expert, data=data), out=tmp_path / "student")


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


# Export ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """A random tiny BERT, exported in every form."""

    task: str
    student: Path
    onnx: Artifact


@pytest.fixture(scope="module", params=["classification", "embedding"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder, task = tmp_path_factory.mktemp("exported"), str(request.param)
    student = make_encoder_student(folder / "student", "bert", task=task)
    make = classifier_recipe if task == "classification" else embedding_recipe
    recipe = make(export={"forms": SMALL})
    return Exported(
        task,
        student.path,
        export.export_student(student=student.path, out=folder / "onnx", recipe=recipe),
    )


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


def test_texts_go_in(exported: Exported) -> None:
    encoder, texts = (
        Encoder(exported.onnx.path, form="fp32"),
        ["a longer text than the other", "short"],
    )
    np.testing.assert_allclose(
        encoder.encode(texts)[1:], encoder.encode(texts[1:]), rtol=1e-3, atol=1e-5
    )
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


def test_exports_are_timed_by_themselves(exported: Exported, tmp_path: Path) -> None:
    """One sequence of the largest length, every form twice in a block; the figure is the median of
    what lies in the samples.
    """
    bench = classifier_recipe().bench
    run = exported.student.parent
    found = serve_bench.time_encoders(
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
        serve_bench.time_encoders([(run, "fp32")], out=tmp_path / "long", bench=long)


# The whole chain ---------------------------------------------------------------------------------


def test_the_whole_chain_to_a_verdict(expert: Path, tmp_path: Path) -> None:
    recipe = two_teachers(expert)
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
    assert data["best_teacher"] in ("teacher:a", "teacher:b")
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
        {"name": name, "model": f"local: path {expert / 'model'}", "license": "unknown"}
        for name in ("a", "b")
    ]
    assert header["digests"] == {
        "recipe": recipe.digest,
        "student": open_artifact(run / "student").digest,
    }
    assert header["license"] == "unknown"
    assert verify(run) == 0
