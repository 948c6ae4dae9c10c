"""Recipes shrunk to pico: every choice is kept, and models and text are small."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig
from typer.testing import CliRunner

from compress.models.language import model_config
from compress.models.shrink import FAMILIES, shrunk_sizes
from limbeck.app import pico
from limbeck.app import run as pipeline
from limbeck.app.cli import app
from limbeck.app.library import library
from limbeck.contract.errors import ModelError
from limbeck.contract.recipe import (
    EncoderRecipe,
    Recipe,
    ShrinkStudent,
    load_any_recipe,
    parse_recipe,
)
from tests.pico import make_model, pico_recipe

LIBRARY = [entry.name for entry in library()]


@pytest.mark.parametrize("name", LIBRARY)
def test_shrinking_keeps_every_choice(name: str) -> None:
    recipe = load_any_recipe(name)
    small = pico.shrink_to_pico(recipe)
    assert small.digest != recipe.digest
    for part in ("fusion", "export", "seed"):
        assert getattr(small, part) == getattr(recipe, part)
    assert [t.model_dump(exclude={"model", "adapter"}) for t in small.teachers] == [
        t.model_dump(exclude={"model", "adapter"}) for t in recipe.teachers
    ]
    assert {t.model.kind for t in small.teachers} <= {"random"}
    assert small.student.kind == recipe.student.kind
    if isinstance(small, Recipe):
        assert isinstance(recipe, Recipe)
        assert [d.name for d in small.data.domains] == [d.name for d in recipe.data.domains]
    else:
        assert isinstance(recipe, EncoderRecipe)
        assert [name for _, name, _ in small.groups()] == [name for _, name, _ in recipe.groups()]
        assert {text.kind for _, _, text in small.groups()} == {"stdlib"}


@pytest.mark.parametrize("kind", sorted({*pico._BY_NAME.values(), "opt"} & FAMILIES.keys()))
def test_a_cut_in_heads_and_width_can_be_made_of_every_shrunk_architecture(kind: str) -> None:
    config = {"model_type": kind, "num_hidden_layers": 2}
    student = {
        "kind": "shrink",
        "base": {"kind": "random", "config": config},
        "kv_heads": 3,
        "hidden_size": 96,
    }
    small = pico.shrink_to_pico(pico_recipe(student=student)).student
    assert isinstance(small, ShrinkStudent)
    assert shrunk_sizes(model_config(small.base, folder=Path()), small)["hidden_size"] == 32


def test_a_recovery_is_shrunk_as_the_training_is() -> None:
    asked = {"export": {"recover": {"tokens": 2_000_000}}, "gates": {"max_quantization_loss": 0.01}}
    small = pico.shrink_to_pico(pico_recipe(**asked))
    assert small.export.recover is not None
    assert small.export.recover.tokens == small.training.tokens


def test_shrinking_tells_the_architecture_by_configuration_or_name(tmp_path: Path) -> None:
    make_model(tmp_path / "mine", model_type="gpt2", n_embd=32, n_head=4, n_layer=1)
    tree = pico_recipe().resolved()
    local = {"name": "t", "model": {"kind": "local", "path": str(tmp_path / "mine")}}
    teacher = pico.shrink_to_pico(parse_recipe(tree | {"teachers": [local]})).teachers[0]
    assert teacher.model.model_dump()["config"]["model_type"] == "gpt2"
    gguf = {"name": "t", "model": {"kind": "gguf", "path": "smollm2/Qwen3-0.6B-Q8_0.gguf"}}
    teacher = pico.shrink_to_pico(parse_recipe(tree | {"teachers": [gguf]})).teachers[0]
    assert teacher.model.model_dump()["config"]["model_type"] == "qwen3"
    odd = {"name": "t", "model": {"kind": "hub", "id": "someone/something"}}
    with pytest.raises(
        ModelError, match=r"teachers\.0: the architecture of someone/something cannot be found"
    ):
        pico.shrink_to_pico(parse_recipe(tree | {"teachers": [odd]}))
    result = CliRunner().invoke(app, ["run", "pico", "--shrink-to", "nano"])
    assert (result.exit_code, "expected pico" in result.stderr) == (2, True)


def test_a_fresh_student_keeps_its_architecture_as_a_teacher_too(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12}
    wise = {"name": "wise", "model": {"kind": "random", "config": {"model_type": "llama"}}}
    fresh = pico_recipe(student={"kind": "fresh", "config": config}, teachers=[wise])
    small = pico.shrink_to_pico(fresh).student.model_dump()["config"]
    assert small["model_type"] == "gpt2"
    assert AutoConfig.for_model(**small).hidden_size < 100
    (tmp_path / "made.yaml").write_text(yaml.safe_dump(fresh.resolved()))
    made = {"name": "t", "model": {"kind": "recipe", "recipe": str(tmp_path / "made.yaml")}}
    teacher = pico.shrink_to_pico(parse_recipe(pico_recipe().resolved() | {"teachers": [made]}))
    assert teacher.teachers[0].model.model_dump()["config"]["model_type"] == "gpt2"


def test_graphs_of_fixed_shape_are_shrunk_to_the_context() -> None:
    shapes = {"kind": "static", "batch": 2, "length": 4096}
    recipe = pico_recipe(
        export={"backend": "dynamo", "shapes": shapes}, bench={"prompt_tokens": 16, "new_tokens": 8}
    )
    small = pico.shrink_to_pico(recipe)
    length = small.export.shapes.model_dump()["length"]
    assert small.base is not None
    config = model_config(small.base, folder=Path())
    assert length == config.max_position_embeddings


@pytest.mark.slow  # the quick tests run one recipe of a language model and one of a classifier
@pytest.mark.parametrize("name", LIBRARY)
def test_every_recipe_runs_to_its_verdict_shrunk(name: str, tmp_path: Path) -> None:
    report = pipeline.run(pico.shrink_to_pico(load_any_recipe(name)), out=tmp_path / "run")
    assert report is not None
    assert report.exit_code == 0
    assert "it runs here; this says nothing of quality." in report.verdict.sentence
    assert report.html.is_file()
