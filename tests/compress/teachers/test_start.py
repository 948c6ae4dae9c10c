"""Students that start from a merge of their teachers, and merges as students."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from compress import distill
from compress.ablate import ablate
from compress.models.language import load_model
from compress.models.merge import BASE, parameters_of
from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import RecipeError
from limbeck.contract.recipe import parse_recipe
from tests.compress.models.test_merge import by_peft, make_adapter
from tests.pico import make_model, pico_recipe

DATA = {
    "domains": [{"name": "code", "text": {"kind": "stdlib", "paths": ["abc.py", "bisect.py"]}}],
    "block": 32,
    "heldout": {"every": 3, "piece_chars": 512},
}
LORA = {"kind": "lora", "rank": 3, "alpha": 6}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("teachers")
    base = make_model(root / "base")
    return base, {
        "one": make_adapter(base, root / "one", seed=1, rank=2),
        "two": make_adapter(base, root / "two", seed=2, rank=4),
    }


def student(out: Path, base: Path, adapters: dict[str, Path], config: dict[str, Any]) -> Artifact:
    source = {"kind": "local", "path": str(base)}
    teachers = [
        {"name": name, "model": source, "adapter": str(path)} for name, path in adapters.items()
    ]
    recipe = pico_recipe(teachers=teachers, student={"base": source} | config, data=DATA)
    return distill(recipe=recipe, out=out)


def test_a_merge_as_a_student_is_the_merge_that_peft_makes(
    adapters: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    base, paths = adapters
    config = {"kind": "merge", "method": "average", "weights": {"one": 0.5, "two": 0.75}}
    made = student(tmp_path / "student", base, paths, config)
    found = parameters_of(load_model(made.path / "model"))
    expected = by_peft(base, paths, [0.5, 0.75], "cat")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert made.result["steps"] == 0
    assert made.result["start"]["merge"] == "average of one (0.5) and two (0.75)"


def test_the_adapter_of_a_student_from_a_merge_loads_beside_the_true_base(
    adapters: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    base, paths = adapters
    made = student(tmp_path / "student", base, paths, LORA | {"init": "merge"})
    assert json.loads((made.path / "adapter" / "adapter_config.json").read_text())["r"] >= 3
    beside = PeftModel.from_pretrained(load_model(base), str(made.path / "adapter"))
    expected = parameters_of(load_model(made.path / "model"))
    for name, value in parameters_of(beside.merge_and_unload()).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    assert made.result["base"] == str(base)


def lora_teacher(base: Path, out: Path, **options: Any) -> Path:
    """A LoRA adapter of any options, with weights that change the model."""
    torch.manual_seed(7)
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    with warnings.catch_warnings():  # of peft, about options that cannot be merged
        warnings.simplefilter("ignore")
        model = get_peft_model(load_model(base), LoraConfig(**settings))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(out)
    return out


@pytest.mark.parametrize(
    ("teacher", "config", "joined"),
    [
        ({}, {"rslora": True}, True),
        ({"use_rslora": True}, {}, True),
        ({"alpha_pattern": {"q_proj": 7}}, {}, True),
        ({"target_modules": r".*\.(q|v)_proj"}, {}, True),
        ({"target_modules": "all-linear", "exclude_modules": ["v_proj"]}, {}, True),
        # Only the teacher has v_proj, and only in one layer.
        ({"layers_to_transform": [1]}, {"targets": ["q_proj"]}, True),
        ({"exclude_modules": ["layers.0.self_attn.v_proj"]}, {"targets": ["q_proj"]}, True),
        ({}, {"dora": True}, False),  # its norms are those of the merged weights
        ({"use_dora": True}, {}, False),
        ({"init_lora_weights": "pissa"}, {}, False),  # changes the base when it is loaded
    ],
    ids=str,
)
def test_a_student_from_a_merge_has_an_adapter_that_gives_its_model_or_none(
    teacher: dict[str, Any], config: dict[str, Any], joined: bool, tmp_path: Path
) -> None:
    """peft's answer with the adapter beside the true base is that of the saved model."""
    base = make_model(tmp_path / "base")
    paths = {"one": lora_teacher(base, tmp_path / "one", **teacher)}
    made = student(tmp_path / "student", base, paths, LORA | config | {"init": "merge"})
    assert (made.path / "adapter").is_dir() == joined
    assert made.result["base"] == (str(base) if joined else None)
    if joined:
        ids = torch.arange(1, 25)[None]
        beside = PeftModel.from_pretrained(load_model(base), str(made.path / "adapter"))
        expected = load_model(made.path / "model")(ids).logits
        torch.testing.assert_close(beside(ids).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", [{"dora": True}, {"rslora": True}], ids=str)
def test_the_adapter_of_a_student_from_its_base_is_kept_as_it_is(
    config: dict[str, Any],
    adapters: tuple[Path, dict[str, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, paths = adapters
    monkeypatch.setattr("compress.teachers.start.candidates", lambda names: [BASE])
    made = student(tmp_path / "student", base, paths, LORA | config)
    assert made.result["start"]["merge"] == "the base"
    ids = torch.arange(1, 25)[None]
    beside = PeftModel.from_pretrained(load_model(base), str(made.path / "adapter"))
    expected = load_model(made.path / "model")(ids).logits
    torch.testing.assert_close(beside(ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_a_teacher_that_peft_cannot_merge_teaches_without_being_merged(
    adapters: tuple[Path, dict[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, paths = adapters
    biased = lora_teacher(base, tmp_path / "biased", lora_bias=True)
    made = student(tmp_path / "student", base, {"one": paths["one"], "biased": biased}, LORA)
    assert set(made.result["start"]["scores"]) == {"average of one (1)", "the base"}
    assert set(made.result["teachers"]) == {"one", "biased"}
    assert "teacher biased is in no merge" in capsys.readouterr().err


def test_a_teacher_with_a_weight_that_cannot_be_merged_is_an_error(
    adapters: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    base, paths = adapters
    deep = {"kind": "local", "path": str(make_model(tmp_path / "deep", num_hidden_layers=3))}
    source = {"kind": "local", "path": str(base)}
    teachers = [
        {"name": "one", "model": source, "adapter": str(paths["one"])},
        {"name": "deep", "model": deep},
    ]
    config = {"kind": "merge", "base": source, "weights": {"one": 0.5, "deep": 0.5}}
    with pytest.raises(RecipeError, match=r"student.weights: deep cannot be merged"):
        distill(
            recipe=pico_recipe(teachers=teachers, student=config, data=DATA), out=tmp_path / "out"
        )


def test_a_student_from_a_merge_begins_at_the_merge(
    adapters: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    """The first measurement is before the first step: the merge's own loss."""
    base, paths = adapters
    only = {"one": paths["one"]}
    made = student(tmp_path / "student", base, only, LORA | {"init": "merge"})
    merge = student(tmp_path / "merge", base, only, {"kind": "merge"})
    lines = (made.path / "log.jsonl").read_text().splitlines()
    first = next(e for e in map(json.loads, lines) if e["event"] == "evaluate")
    assert first["step"] == 0
    assert first["mean_nll"] == pytest.approx(merge.result["mean_nll"], rel=2e-3)  # bf16 and fp32
    teacher = merge.result["teachers"]["one"]["mean_nll"]
    assert merge.result["mean_nll"] == pytest.approx(teacher, rel=2e-3)


def test_auto_keeps_to_the_base_where_no_teacher_has_its_shape(
    adapters: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    base, _ = adapters
    deep = make_model(tmp_path / "deep", num_hidden_layers=3)
    recipe: dict[str, Any] = {
        "data": DATA,
        "teachers": [{"name": "deep", "model": {"kind": "local", "path": str(deep)}}],
        "student": LORA | {"base": {"kind": "local", "path": str(base)}},
    }
    made = distill(recipe=pico_recipe(**recipe), out=tmp_path / "auto")
    assert made.result["start"] is None
    recipe["student"] = recipe["student"] | {"init": "merge"}
    with pytest.raises(RecipeError, match="no teacher has the shape of the student's base"):
        distill(recipe=pico_recipe(**recipe), out=tmp_path / "merge")


def test_auto_takes_what_reads_the_training_text_best(
    adapters: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    base, paths = adapters
    made = student(tmp_path / "student", base, paths, LORA)
    scores, chosen = made.result["start"]["scores"], made.result["start"]["merge"]
    assert scores[chosen] == min(scores.values())
    assert {"the base", "average of one (1)", "average of two (1)"} < set(scores)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LORA | {"init": "merge", "quantize": "int8"}, "a base in int8 cannot take merged weights"),
        (
            {"kind": "merge", "weights": {"three": 1.0}},
            "student.weights.three: there is no teacher",
        ),
    ],
)
def test_what_cannot_be_merged_is_an_error_of_the_recipe(
    config: dict[str, Any], message: str
) -> None:
    source = {"kind": "random", "config": {"model_type": "llama", "hidden_size": 32}}
    tree = pico_recipe().resolved() | {
        "teachers": [{"name": "one", "model": source}],
        "student": {"base": source} | config,
    }
    with pytest.raises(RecipeError, match=message):
        parse_recipe(tree)


def test_merges_are_arms_of_the_ablation_where_teachers_can_be_merged(
    adapters: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    base, paths = adapters
    source = {"kind": "local", "path": str(base)}
    teachers = [
        {"name": name, "model": source, "adapter": str(path)} for name, path in paths.items()
    ]
    recipe = pico_recipe(teachers=teachers, student=LORA | {"base": source}, data=DATA)
    arms = ["merge-average"]
    found = ablate(recipe=recipe, products={}, out=tmp_path / "one", arms=arms, seeds=1)
    assert list(found["arms"]) == ["ce-only", "merge-average"]
    merge = student(tmp_path / "merge", base, paths, {"kind": "merge", "method": "average"})
    loss = merge.result["mean_nll"]
    assert found["arms"]["merge-average"]["mean_loss"] == pytest.approx(loss, rel=2e-3)

    deep = {"kind": "local", "path": str(make_model(tmp_path / "deep", num_hidden_layers=3))}
    others = [{"name": name, "model": deep} for name in ("one", "two")]
    recipe = pico_recipe(teachers=others, student=LORA | {"base": source}, data=DATA)
    with pytest.raises(RecipeError, match="nothing to merge"):
        ablate(recipe=recipe, products={}, out=tmp_path / "two", arms=arms, seeds=1)
