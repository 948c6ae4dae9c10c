"""Recipes, text and models of encoders."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from compress.data.examples import load_examples as examples_of
from compress.data.examples import training_order
from compress.data.mail import subject_and_body
from compress.models.encoders import (
    base_folder,
    build_student,
    class_names,
    encoder_folder,
    load_body,
    load_classifier,
    pooled,
)
from compress.models.language import byte_tokenizer
from export.build.encoder import load_student
from limbeck.app.products import plan_products
from limbeck.contract.data.examples import accuracy, macro_f1
from limbeck.contract.errors import DataError, ModelError, RecipeError, UserError
from limbeck.contract.recipe import (
    EncoderShrinkStudent,
    FreshStudent,
    OnnxModel,
    RecipeModel,
    load_any_recipe,
    load_recipe,
    parse_any_recipe,
    shipped_recipes,
)
from limbeck.contract.sources.places import npm_root
from limbeck.contract.sources.texts import text_files
from serve_bench.worker.encoder import TorchEncoder
from tests.encoders import CLASSES, classifier_recipe, make_encoder_student, source

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
    refused_onnx(file, like, entry, tmp_path)
    graph = onnx.load(file)
    tensor = next(t for t in graph.graph.initializer if t.name.endswith("word_embeddings.weight"))
    weights = onnx.numpy_helper.to_array(tensor).copy()
    weights[-1, 0] = np.nan  # of a token that no comparison of outputs needs to meet
    tensor.CopyFrom(onnx.numpy_helper.from_array(weights, tensor.name))
    onnx.save(graph, tmp_path / "nan.onnx")
    entry["path"] = str(tmp_path / "nan.onnx")
    with pytest.raises(ModelError, match=r"nan.onnx: 1 of .*word_embeddings.weight are NaN"):
        encoder_folder(OnnxModel.model_validate(entry), folder=Path())
    entry["path"] = str(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="no such file"):
        encoder_folder(OnnxModel.model_validate(entry), folder=Path())


def refused_onnx(file: Path, like: Path, entry: dict[str, Any], folder: Path) -> None:
    """Files whose weights are not found, or with which ``like`` computes something else."""
    graph = onnx.load(file)
    for thing in (*graph.graph.node, *graph.graph.initializer):
        thing.name = thing.name.replace("encoder", "tower")
    for node in graph.graph.node:
        node.input[:] = [name.replace("encoder", "tower") for name in node.input]
    onnx.save(graph, folder / "renamed.onnx")
    with pytest.raises(ModelError, match=r"renamed.onnx: \d+ weights of a bert are not found in i"):
        encoder_folder(
            OnnxModel.model_validate(entry | {"path": str(folder / "renamed.onnx")}), folder=Path()
        )
    other = Path(shutil.copytree(like, folder / "other"))
    config = json.loads((other / "config.json").read_text()) | {"hidden_act": "relu"}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"computes something else \(difference"):
        encoder_folder(
            OnnxModel.model_validate(entry | {"like": {"kind": "local", "path": str(other)}}),
            folder=Path(),
        )


def test_a_teacher_that_is_made_first_and_the_tokenizer_of_a_fresh_student(tmp_path: Path) -> None:
    made = RecipeModel(kind="recipe", recipe="teacher.yaml")
    assert encoder_folder(made, folder=Path(), product=tmp_path) == tmp_path / "model"
    teachers = [tmp_path / "a", tmp_path / "b"]
    fresh = FreshStudent(kind="fresh", config={"model_type": "bert"})
    assert base_folder(fresh, folder=Path(), teachers=teachers) == tmp_path / "a"


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
