"""Shrunk students: cut right for every family, by importance, and loaded by plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compress
from compress.models.language import random_model
from compress.models.shrink import FAMILIES, measure_importance, shrink
from limbeck.contract.errors import ModelError
from limbeck.contract.recipe import ShrinkStudent, parse_recipe
from tests.architectures import BASES, cut
from tests.compress.test_compress import tiny

IDS = [torch.randint(0, 90, (2, 20), generator=torch.Generator().manual_seed(i)) for i in range(2)]


def base(kind: str) -> Any:
    return random_model(
        {"model_type": kind, **BASES[kind]}, vocab_size=90, seed=0, where="t"
    ).eval()


@pytest.mark.parametrize("kind", BASES)
def test_every_family_is_cut_to_size_and_loads(tmp_path: Path, kind: str) -> None:
    smaller, _, kept = shrink(
        base(kind),
        ShrinkStudent.model_validate(
            {"kind": "shrink", "base": {"kind": "random", "config": {}}, **cut(kind)}
        ),
        IDS,
    )
    smaller.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(IDS[0]).logits, smaller.eval()(IDS[0]).logits)
    assert loaded.config.num_hidden_layers == 2
    assert loaded.config.hidden_size == 48
    assert kept["parameters"] == loaded.num_parameters() < kept["parameters_before"]


@pytest.mark.parametrize("kind", BASES)
def test_cutting_nothing_changes_nothing(kind: str) -> None:
    model = base(kind)
    same, _, _ = shrink(
        model,
        ShrinkStudent.model_validate({"kind": "shrink", "base": {"kind": "random", "config": {}}}),
        IDS,
    )
    torch.testing.assert_close(same.eval()(IDS[0]).logits, model(IDS[0]).logits)


@pytest.mark.parametrize("kind", BASES)
def test_dead_parts_are_cut_first_and_cost_nothing(kind: str) -> None:
    """Silence half the neurons and one layer: a cut of exactly these does not change the logits."""
    model, family = base(kind), FAMILIES[kind]
    layers = model.get_submodule(family.layers)
    with torch.no_grad():
        for layer in layers:
            out = layer.get_submodule(family.ffn_out)
            (
                out.weight[::3] if type(out).__name__ == "Conv1D" else out.weight[:, ::3]
            ).zero_()  # 32 of 96 neurons
        for name in (family.ffn_out, family.attention_out):
            dead = layers[1].get_submodule(name)
            dead.weight.zero_()
            if dead.bias is not None:
                dead.bias.zero_()
    expected = model(IDS[0]).logits
    sizes = {"layers": 2, "intermediate_size": 64}
    smaller, importance, kept = shrink(
        model,
        ShrinkStudent.model_validate(
            {"kind": "shrink", "base": {"kind": "random", "config": {}}, **sizes}
        ),
        IDS,
    )
    assert kept["kept_layers"] == [0, 2]
    assert importance.layers_l[1] == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(smaller.eval()(IDS[0]).logits, expected, rtol=1e-4, atol=1e-5)


def test_importance_shapes_and_determinism() -> None:
    model = base("llama")
    first, second = (measure_importance(model, FAMILIES["llama"], IDS) for _ in range(2))
    assert [tuple(t.shape) for t in first.tensors().values()] == [(3,), (3, 96), (3, 2), (64,)]
    for name, tensor in first.tensors().items():
        torch.testing.assert_close(tensor, second.tensors()[name])


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        ("llama", {"layers": 9}, r"student\.layers: found 9, but the base has only 3"),
        (
            "gpt2",
            {"hidden_size": 32},
            r"hidden width is heads x 16.*for example kv_heads: 4, hidden_size: 64",
        ),
        (
            "llama",
            {"hidden_size": 33, "round_to": 1},
            "llama cannot have these sizes: .*multiple.* Change kv_heads",
        ),
    ],
)
def test_sizes_that_cannot_be_cut_are_refused(
    kind: str, sizes: dict[str, int], message: str
) -> None:
    config = ShrinkStudent.model_validate(
        {"kind": "shrink", "base": {"kind": "random", "config": {}}, **sizes}
    )
    with pytest.raises(ModelError, match=message):
        shrink(base(kind), config, IDS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bloom", "n_layer": 2, "n_head": 4},
         r"the architecture 'bloom'; known: bert, distilbert, gemma3"),
        ({"model_type": "opt", **BASES["opt"], "word_embed_proj_dim": 32},
         r"found .* word_embed_proj_dim 32 and hidden"),
        ({"model_type": "opt", **BASES["opt"], "do_layer_norm_before": False},
         r"found do_layer_norm_before False"),
    ],
)  # fmt: skip
def test_architectures_that_cannot_be_cut_are_refused(config: dict[str, Any], message: str) -> None:
    model = random_model(config, vocab_size=90, seed=0, where="t")
    with pytest.raises(ModelError, match=message):
        shrink(
            model,
            ShrinkStudent.model_validate(
                {"kind": "shrink", "base": {"kind": "random", "config": {}}}
            ),
            IDS,
        )


def test_a_shrunk_student_is_trained_from_its_teachers(tmp_path: Path) -> None:
    config = {"model_type": "llama", **BASES["llama"]}
    student = {
        "kind": "shrink",
        "base": {"kind": "random", "config": config},
        "layers": 2,
        "hidden_size": 32,
        "calibration_blocks": 2,
    }
    recipe = parse_recipe({**tiny(tmp_path).resolved(), "student": student})
    recipe._folder = tmp_path
    artifact = compress.distill(recipe=recipe, out=tmp_path / "student")
    assert artifact.result["shrink"]["hidden_size"] == 32
    assert artifact.result["parameters"]["total"] == artifact.result["parameters"]["trained"]
    assert load_file(artifact.path / "importance.safetensors")["hidden"].shape == (64,)
    assert not (artifact.path / "adapter").exists()
