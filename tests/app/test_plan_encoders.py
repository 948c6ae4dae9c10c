"""The plan of encoders: what it counts is what modules, exporter and loop do; tiny random ones
stand in for any architecture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

import compress
from compress.footprint.encoders import (
    describe,
    example_counts,
    meta_model,
    student_config,
    trace_encoder,
)
from compress.footprint.tracing import Live
from compress.models.encoders import (
    build_student,
    encoder_config,
    encoder_folder,
    load_classifier,
    pooled,
)
from export.plan import form_bytes
from limbeck.app import pico, plan
from limbeck.app.cli import app
from limbeck.contract.errors import ModelError, RecipeError
from limbeck.contract.recipe import EncoderRecipe, RandomModel, load_any_recipe
from tests.encoders import CLASSES, CONFIGS, SMALL, classifier_recipe, embedding_recipe, source
from tests.factory import Factory
from tests.tokenizers import END, byte_level

TASKS = ("classification", "embedding")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    compress.quiet_libraries()


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def recipe_of(task: str, **over: Any) -> EncoderRecipe:
    return classifier_recipe(**over) if task == "classification" else embedding_recipe(**over)


# Counting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", ["full", "shrink", "fresh"])
@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_a_shape_counts_what_the_real_student_has(model_type: str, kind: str, task: str) -> None:
    base = source(model_type)
    student: dict[str, Any] = {"kind": kind, "base": base}
    if kind == "fresh":
        student = {"kind": kind, "config": base["config"]}
    if kind == "shrink":
        student |= {"layers": 1, "intermediate_size": 64, "kv_heads": 2, "hidden_size": 32}
    recipe = recipe_of(task, student=student, teachers=[{"name": "t", "model": base}])
    folder = encoder_folder(recipe.teachers[0].model, folder=Path())
    classes = ["code", "prose"] if task == "classification" else None
    ids = torch.randint(1, 250, (1, 12))
    real, _, _ = build_student(
        recipe.student, folder=folder, classes=classes, calibration=[ids], seed=0
    )
    config = encoder_config(recipe.teachers[0].model, folder=Path())  # type: ignore[arg-type]
    shape = describe(
        student_config(recipe, base=config, vocabulary=257), name="the student", recipe=recipe
    )
    assert shape.parameters == real.num_parameters()
    assert shape.weights == 4 * shape.parameters
    assert (shape.layers, shape.width) == (real.config.num_hidden_layers, real.config.hidden_size)


@pytest.mark.parametrize("task", TASKS)
def test_the_traced_step_keeps_what_a_real_one_keeps(task: str) -> None:
    recipe = recipe_of(task, student={"kind": "full", "base": source(num_hidden_layers=3)})
    config = encoder_config(recipe.student.base, folder=Path())  # type: ignore[union-attr]
    shape = describe(config, name="the student", recipe=recipe)
    traced = trace_encoder(shape, rows=2, length=24, precision="fp32", trains=True)
    with torch.random.fork_rng():
        with torch.device("cpu"):
            model = type(meta_model(config, task))(config).train()
    ids = torch.randint(1, 250, (2, 24))
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    with Live([*model.parameters(), *model.buffers(), ids, mask]) as live:
        if task == "classification":
            said = model(input_ids=ids, attention_mask=mask).logits
        else:
            said = pooled(model, ids, mask)
        assert live.now == pytest.approx(traced.kept, rel=0.02)
        assert live.peak == pytest.approx(traced.forward_peak, rel=0.05)
        live.peak = live.now
        said.backward(torch.ones_like(said))
    assert traced.backward_peak >= traced.kept > 0
    assert traced.backward > traced.forward > 0


def test_layers_lie_on_a_line() -> None:
    recipe = classifier_recipe(student={"kind": "full", "base": source(num_hidden_layers=7)})
    shapes = {}
    for layers in (4, 7):
        config = encoder_config(recipe.student.base, folder=Path())  # type: ignore[union-attr]
        config.num_hidden_layers = layers
        shapes[layers] = describe(config, name="the student", recipe=recipe)
    four, seven = (
        trace_encoder(s, rows=2, length=8, precision="fp32", trains=True) for s in shapes.values()
    )
    two = trace_encoder(
        describe(_with_layers(shapes[4].config, 2), name="", recipe=recipe),
        rows=2,
        length=8,
        precision="fp32",
        trains=True,
    )
    assert seven.forward == pytest.approx(four.forward + 3 * (four.forward - two.forward) / 2)
    assert seven.kept == pytest.approx(four.kept + 3 * (four.kept - two.kept) / 2, abs=2)


def _with_layers(config: Any, layers: int) -> Any:
    config.num_hidden_layers = layers
    return config


def test_examples_are_counted_as_the_text_would_give_them() -> None:
    classes = [{**CLASSES[0], "most": 100}, {**CLASSES[1], "most": 50}]
    data = {"classes": classes, "heldout": {"every": 5, "most": 12}}
    recipe = classifier_recipe(data=data, training={"examples": 1000, "batch": 8})
    assert example_counts(recipe) == (80 + 40, 12 + 10)
    assert (
        example_counts(classifier_recipe(data=data, training={"examples": 100, "batch": 8}))[0]
        == 96
    )
    classes[1]["most"] = None
    assert example_counts(
        classifier_recipe(data=data, training={"examples": 1000, "batch": 8})
    ) == (1000, 24)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "model_type", [n if n == "bert" else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS]
)
def test_sizes_of_forms_are_what_the_exporter_writes(
    model_type: str, task: str, tiny: Factory
) -> None:
    made = tiny.exported_encoder(model_type, task, forms=SMALL)
    recipe = recipe_of(task, export={"forms": SMALL})
    model = meta_model(load_config(tiny.encoder(model_type, task).path / "model"), task)
    for form in recipe.export.forms:
        entry = made.result["forms"][form.kind]
        weights = (made.path / entry["graph"]).with_suffix(".onnx_data").stat().st_size
        # The weights follow from the shapes; of the graph the plan knows only its growth.
        said = form_bytes(model, form, task=task)
        assert said - weights == pytest.approx(entry["bytes"] - weights, rel=0.2), form.kind


def load_config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


# Planning -----------------------------------------------------------------------------------------


def write(path: Path, recipe: EncoderRecipe, **over: Any) -> Path:
    path.write_text(json.dumps(recipe.resolved() | {"name": path.stem} | over))
    return path


def test_plan_of_a_classifier_from_teachers_that_are_made_first(tmp_path: Path) -> None:
    write(
        tmp_path / "a.yaml",
        classifier_recipe(student={"kind": "full", "base": source(num_hidden_layers=4)}),
    )
    teachers = [
        {"name": "a", "model": {"kind": "recipe", "recipe": "a.yaml"}},
        {"name": "b", "model": source("distilbert", id2label={"0": "code", "1": "prose"})},
    ]
    student = {"kind": "shrink", "base": source(), "layers": 1}
    child = write(tmp_path / "child.yaml", classifier_recipe(), teachers=teachers, student=student)
    found = plan.plan_recipe(load_any_recipe(child))
    assert found.first == ("a",)
    assert found.teachers["a"] > found.teachers["b"] > found.student > 0
    assert found.trained == found.student
    assert list(found.forms) == ["fp32", "int8-dynamic"]
    assert found.forms["int8-dynamic"] < found.forms["fp32"]
    assert found.worst_moment == "training (a, made first)"
    assert found.memory["optimizer"] == 12 * found.teachers["a"]
    assert found.operations > 0 < found.operations_first
    assert found.seconds is None
    assert "made first            a" in found.as_text()
    assert plan.form_sizes(load_any_recipe(child)) == found.forms


def test_a_sentence_encoder_trains_its_projections_too() -> None:
    found = plan.plan_recipe(embedding_recipe())
    assert found.trained == found.student + 2 * 64 * 64
    assert "teacher a" in found.as_text()


@pytest.mark.parametrize("task", TASKS)
def test_a_trial_gives_a_time(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "TRIAL_SECONDS", 0.1)
    found = plan.plan_recipe(
        recipe_of(task, student={"kind": "full", "base": source("roberta")}), trial=True
    )
    assert found.seconds is not None
    assert 0 < found.seconds < 600


def test_an_onnx_file_is_counted_by_the_names_in_it(tmp_path: Path) -> None:
    like = encoder_folder(classifier_recipe().student.base, folder=Path())  # type: ignore[union-attr]
    entry = {
        "kind": "onnx",
        "path": str(tmp_path / "old.onnx"),
        "like": {"kind": "local", "path": str(like)},
    }
    base = embedding_recipe(student={"kind": "full", "base": entry}).student.base  # type: ignore[union-attr]
    names = b"".join(
        b"\x0a\x22encoder.layer.%d.attention.self.query.bias\x00" % layer for layer in (0, 2, 1)
    )
    (tmp_path / "old.onnx").write_bytes(b"\x08\x07" + names)
    assert encoder_config(base, folder=Path()).num_hidden_layers == 3
    for content in (b"", b"no names"):
        (tmp_path / "old.onnx").write_bytes(content)
        with pytest.raises(ModelError, match="no layers of an encoder are named in it"):
            encoder_config(base, folder=Path())


def test_the_command_plans_encoders(tmp_path: Path) -> None:
    path = write(tmp_path / "classes.yaml", classifier_recipe())
    result = call("plan", str(path), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["forms"]["int8-dynamic"] > 0
    result = call("plan", str(path), "--shrink-to", "pico")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("recipe                classes-pico")


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (
            {"teachers": [{"name": "t", "model": {"kind": "recipe", "recipe": "pico"}}]},
            "its task is causal-lm, expected classification",
        ),
        (
            {"teachers": [{"name": "t", "model": {"kind": "recipe", "recipe": "bad.yaml"}}]},
            "made from itself",
        ),
        (
            {"student": {"kind": "full", "base": {"kind": "local", "path": "none"}}},
            "bad: student.base: ",
        ),
        (
            {"student": {"kind": "shrink", "base": source(), "layers": 9}},
            "student.layers: found 9, but the base has only 2",
        ),
        (
            {"data": {"classes": CLASSES, "max_tokens": 65}},
            "data.max_tokens: found 65, but student.base reads 64 at most",
        ),
        (
            {"student": {"kind": "full", "base": source(hidden_size=63)}},
            "bert: transformers cannot build it",
        ),
    ],
)
def test_bad_input_is_reported_in_one_line(
    over: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "bad.yaml", classifier_recipe(), **over)
    result = call("plan", str(path))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr


# Shrunk to pico -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sentence-transformers/all-MiniLM-L12-v2", "bert"),
        ("distilbert-base-uncased", "distilbert"),
        ("sentence-transformers/all-distilroberta-v1", "roberta"),
        ("FacebookAI/xlm-roberta-base", "xlm-roberta"),
        ("albert-base-v2", "albert"),
        ("google-bert/bert-base-uncased", "bert"),
    ],
)
def test_the_architecture_of_an_encoder_is_told_by_its_name(name: str, expected: str) -> None:
    recipe = embedding_recipe(student={"kind": "full", "base": {"kind": "hub", "id": name}})
    base = pico.shrink_to_pico(recipe).student.base  # type: ignore[union-attr]
    assert base.config["model_type"] == expected


def test_what_cannot_be_told_or_given_text_is_named() -> None:
    odd = embedding_recipe(
        student={"kind": "full", "base": {"kind": "hub", "id": "someone/mobilebert"}}
    )
    with pytest.raises(
        ModelError, match=r"student\.base: the architecture of someone/mobilebert cannot be found"
    ):
        pico.shrink_to_pico(odd)
    many = [{**CLASSES[0], "name": f"c{index}"} for index in range(2000)]
    with pytest.raises(RecipeError, match="has built-in text for"):
        pico.shrink_to_pico(classifier_recipe(data={"classes": many}))


def test_a_shrunk_teacher_knows_the_classes() -> None:
    recipe = pico.shrink_to_pico(classifier_recipe(teachers=[{"name": "t", "model": source()}]))
    folder = encoder_folder(recipe.teachers[0].model, folder=Path())  # type: ignore[arg-type]
    model, again = load_classifier(folder), load_classifier(folder)
    assert model.config.id2label == {0: "code", 1: "prose"}
    torch.testing.assert_close(
        model.classifier.weight, again.classifier.weight
    )  # saved, not drawn anew


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("command", ["validate", "plan"])
def test_encoders_of_two_tokenizers_are_refused_before_any_work(
    task: str, command: str, tmp_path: Path
) -> None:
    labels = {"id2label": {"0": "code", "1": "prose"}} if task == "classification" else {}
    made = encoder_folder(RandomModel.model_validate(source(**labels)), folder=tmp_path)
    for name in ("base", "same", "other"):
        shutil.copytree(made, tmp_path / name)
    other = PreTrainedTokenizerFast(tokenizer_object=byte_level(257), pad_token=END, eos_token=END)
    other.save_pretrained(tmp_path / "other")
    student = {"kind": "full", "base": {"kind": "local", "path": "base"}}
    for names, code in ((["same"], 0), (["same", "other"], 2)):
        teachers = [{"name": n, "model": {"kind": "local", "path": n}} for n in names]
        over = {"teachers": teachers, "student": student}
        found = call(command, str(write(tmp_path / "mine.yaml", recipe_of(task), **over)))
        assert found.exit_code == code, found.output
    mine, theirs = (
        AutoTokenizer.from_pretrained(f).get_vocab() for f in (made, tmp_path / "other")
    )
    different = sum(mine.get(t) != theirs.get(t) for t in mine.keys() | theirs.keys())
    said = " ".join(found.output.split())
    assert f"teachers: the student and other have different tokenizers: {different} of" in said
