"""Model folders as users have them: loaded and saved again, they answer as in transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from compress.loop import setup
from compress.models.body import Body
from compress.models.language import load_model, random_model
from compress.models.shrink import FAMILIES
from export.build.choice import choose_backend
from limbeck.app.products import mistakes
from limbeck.contract.errors import ModelError
from limbeck.contract.models.adapter_files import adapter_facts
from limbeck.contract.recipe import Features
from limbeck.contract.sources.models import SHRUNK, require_fits, require_language_model
from limbeck.contract.sources.preflight import preflight
from serve_bench.worker.runtimes import TorchEager
from tests.pico import make_model, pico_recipe
from tests.wild.cases.adapters import IDS, load, make_base, our_logits, teacher


def test_a_stored_head_survives_a_configuration_that_ties_it(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "model", tied=False)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    right = load(folder)(input_ids=IDS).logits
    model: Any = load_model(folder)
    hidden, _ = Body(model).states(IDS)
    torch.testing.assert_close(Body(model).head.logits(hidden), right)
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(load(tmp_path / "again")(input_ids=IDS).logits, right)


SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "cohere", "logit_scale": 0.25, "pad_token_id": 0},
        {"model_type": "granite", "logits_scaling": 4.0},
        {
            "model_type": "gemma2",
            "final_logit_softcapping": 3.0,
            "head_dim": 16,
            "sliding_window": 8,
        },
        {"model_type": "phi", "tie_word_embeddings": False},  # its head has a bias
    ],
)
def test_body_and_head_are_the_whole_forward_pass(tmp_path: Path, config: dict[str, Any]) -> None:
    random_model(SIZES | config, vocab_size=258, seed=1, where="test").save_pretrained(tmp_path)
    model: Any = load_model(tmp_path)
    hidden, _ = Body(model).states(IDS)
    right = load(tmp_path)(input_ids=IDS).logits
    torch.testing.assert_close(Body(model).head.logits(hidden), right, rtol=1e-4, atol=1e-4)


def test_what_the_loss_would_bypass_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An architecture whose logits have a factor that nobody here knows."""
    random_model(
        SIZES | {"model_type": "granite", "logits_scaling": 4.0}, vocab_size=258, seed=1, where="t"
    ).save_pretrained(tmp_path)
    monkeypatch.setattr("compress.models.body._FACTORS", ())
    with pytest.raises(ModelError, match="gives other logits than the model's own forward pass"):
        load_model(tmp_path)


def test_sizes_that_do_not_go_together_are_an_error_of_the_model(tmp_path: Path) -> None:
    """transformers loads it, and its own forward pass fails."""
    config = SIZES | {"model_type": "helium", "head_dim": 128}
    folder = tmp_path / "model"
    random_model(config, vocab_size=258, seed=1, where="test").save_pretrained(folder)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        load(folder)(input_ids=IDS)
    with pytest.raises(ModelError, match="HeliumForCausalLM cannot answer a test batch"):
        load_model(folder)


def parts(folder: Path) -> Path:
    """A model in two files, as transformers saves a large one."""
    folder = make_base(folder, tied=False)
    load(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    return folder


def test_weights_of_a_larger_model_are_named(tmp_path: Path) -> None:
    """The language model of a model that reads pictures too, with a configuration of its own."""
    folder = make_base(tmp_path / "model", tied=True)
    file = folder / "model.safetensors"
    inner = {n.replace("model.", "model.language_model.", 1): w for n, w in load_file(file).items()}
    save_file(inner, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"have model.language_model.embed_tokens.weight instead"):
        load_model(folder)


def test_weights_of_a_wrapped_model_are_named(tmp_path: Path) -> None:
    """transformers loads random weights in their place, and only warns."""
    folder = make_base(tmp_path / "model", tied=True)
    file = folder / "model.safetensors"
    save_file({f"_orig_mod.{n}": w for n, w in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"saved with its wrapper .*model\._orig_mod\.save_pretr"):
        load_model(folder)


def test_a_model_in_parts_needs_all_of_them(tmp_path: Path) -> None:
    folder = parts(tmp_path / "model")
    torch.testing.assert_close(
        our_logits([teacher("one", folder, None)])[0], load(folder)(input_ids=IDS).logits
    )
    first = sorted(folder.glob("model-*.safetensors"))[1]
    first.rename(folder / "elsewhere.safetensors")
    recipe = pico_recipe(student={"kind": "lora", "base": {"kind": "local", "path": str(folder)}})
    (mistake,) = preflight(recipe)
    assert f"{folder}: {first.name} is missing, one of 1 of the " in mistake
    (folder / "model.safetensors.index.json").unlink()
    (mistake,) = preflight(recipe)
    assert "neither model.safetensors nor model.safetensors.index.json" in mistake


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"attn_implementation": "flash_attention_2"}, "Take attn_implementation out of its conf"),
        ({"pad_token_id": 999}, "AssertionError: Padding_idx must be within num_embeddings"),
        ({"use_return_dict": False}, "AttributeError: .*use_return_dict"),
    ],
)
def test_whatever_transformers_raises_is_an_error_of_the_model(
    tmp_path: Path, fields: dict[str, Any], problem: str
) -> None:
    folder = config_only(tmp_path / "model", **fields)
    with pytest.raises((ImportError, AssertionError, AttributeError)):
        load(folder)
    with pytest.raises(ModelError, match=problem):
        load_model(folder)


def test_adapters_of_other_tasks_and_programs_are_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    config = LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")
    get_peft_model(model, config).save_pretrained(adapter := tmp_path / "classes")
    with pytest.raises(ModelError, match=r"of a model for another task \(SEQ_CLS\)"):
        adapter_facts(adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapters.safetensors")
    (adapter / "adapter_config.json").write_text('{"fine_tune_type": "lora", "num_layers": 2}')
    with pytest.raises(ModelError, match=r"is an adapter of mlx-lm.*mlx_lm\.fuse"):
        adapter_facts(adapter)


def config_only(folder: Path, **fields: Any) -> Path:
    """A model folder whose config.json has other ``fields``, which are all that is read here."""
    make_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "mistake"),
    [
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
         "T5ForConditionalGeneration is an encoder with a decoder"),
        ({"architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma",
          "text_config": {}}, "PaliGemmaForConditionalGeneration reads more than text: save its"),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"},
         r"a model for another task \(ForMaskedLM\)"),
        ({"architectures": ["LlamaForSequenceClassification"]},
         r"a model for another task \(ForSequenceClassification\)"),
        ({"architectures": ["OwnForCausalLM"], "model_type": "own",
          "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}},
         "OwnForCausalLM needs code of its own"),
    ],
)  # fmt: skip
def test_models_of_other_tasks_are_refused_before_anything_is_loaded(
    tmp_path: Path, fields: dict[str, Any], mistake: str
) -> None:
    folder = config_only(tmp_path / "model", **fields)
    source = {"kind": "local", "path": str(folder)}
    recipe = pico_recipe(
        teachers=[{"name": "one", "model": source}], student={"kind": "lora", "base": source}
    )
    found = preflight(recipe)
    assert [line.partition(":")[0] for line in found] == ["teachers.0", "student.base"]
    assert all(re.search(mistake, line) for line in found)


@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
         "text_config": {}},
        {"auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}},
        {"architectures": []},
    ],
)  # fmt: skip
def test_models_that_transformers_loads_as_language_models_are_not(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    source = {"kind": "local", "path": str(config_only(tmp_path / "model", **fields))}
    student = {"kind": "lora", "base": {"kind": "random", "config": {"model_type": "llama"}}}
    recipe = pico_recipe(teachers=[{"name": "one", "model": source}], student=student)
    assert preflight(recipe) == []


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 16},
         "chooses among experts"),
        ({"model_type": "mixtral", "num_local_experts": 4}, "chooses among experts"),
        ({"model_type": "bloom"}, "takes no position_ids"),
        ({"model_type": "mamba"}, "takes no position_ids"),
        ({"model_type": "openai-gpt"}, "keeps no keys and values"),
        (
            {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
            "keeps something else than keys and values",
        ),
        ({"model_type": "falcon_h1"}, "keeps something else than keys and values"),
        ({"model_type": "jamba", "use_mamba_kernels": False}, "chooses among experts"),
        ({"model_type": "gemma3", "text_config": {}}, "reads more than text"),
    ],
)  # fmt: skip
def test_a_student_that_cannot_be_exported_is_refused_before_training(
    config: dict[str, Any], why: str
) -> None:
    student = {"kind": "fresh", "config": SIZES | {"vocab_size": 258} | config}
    teachers = [{"name": "one", "model": {"kind": "random", "config": {"model_type": "llama"}}}]
    (mistake,) = mistakes(pico_recipe(student=student, teachers=teachers), timed=False)
    assert f"student.config: {config['model_type']} cannot be exported: it {why}" in mistake
    fine = student | {"config": SIZES | {"model_type": "gemma2"}}
    assert mistakes(pico_recipe(student=fine, teachers=teachers), timed=False) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"],
         "mamba_n_heads": 4, "mamba_d_head": 16, "num_local_experts": 0},
        {"model_type": "bamba", "mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1]},
    ],
    ids=["granite 4", "bamba"],
)  # fmt: skip
def test_a_hybrid_is_refused_as_it_is_saved(tmp_path: Path, fields: dict[str, Any]) -> None:
    """transformers writes an infinite limit of theirs as an object."""
    fields = SIZES | {"num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 2} | fields
    AutoConfig.for_model(**fields).save_pretrained(tmp_path)
    assert "__float__" in (tmp_path / "config.json").read_text()
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ModelError, match="keeps something else than keys and values"):
        choose_backend(config)


def test_a_base_that_cannot_be_cut_is_refused_before_training(tmp_path: Path) -> None:
    assert set(SHRUNK) == FAMILIES.keys()
    folder = config_only(tmp_path / "model", model_type="phi", architectures=["PhiForCausalLM"])
    base = {"kind": "local", "path": str(folder)}
    recipe = pico_recipe(student={"kind": "shrink", "base": base, "layers": 1})
    (mistake,) = preflight(recipe)
    assert "student.kind: shrink does not know the architecture 'phi'; known: bert," in mistake
    assert preflight(pico_recipe(student={"kind": "lora", "base": base})) == []


@pytest.mark.parametrize("place", ["teacher one", "the student"])
def test_states_of_two_widths_cannot_be_aligned(tmp_path: Path, place: str) -> None:
    """OPT-350m projects from 1024 numbers in its layers to 512 before its head."""
    kind = {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 16}
    opt = make_model(tmp_path / "opt", **kind)
    base = {"kind": "local", "path": str(make_model(tmp_path / "llama"))}
    other = {"kind": "local", "path": str(opt)}
    teacher, student = (other, base) if place.startswith("teacher") else (base, other)
    recipe = pico_recipe(
        teachers=[{"name": "one", "model": teacher}],
        student={"kind": "lora", "base": student, "init": "base"},
        features={"weight": 0.1},
        data={
            "domains": [{"name": "code", "text": {"kind": "stdlib", "paths": ["argparse.py"]}}],
            "block": 32,
            "heldout": {"piece_chars": 256},
        },
    )
    with pytest.raises(ModelError, match=f"{place}: its layers give 32 .* features.weight to 0"):
        setup(recipe=recipe, products={}, work=tmp_path / "work", key="key")
    plain = recipe.model_copy(update={"features": Features(weight=0)})
    setup(recipe=plain, products={}, work=tmp_path / "work", key="key")


def test_configurations_that_no_model_has(tmp_path: Path) -> None:
    """Building the layers first would take minutes."""
    for config in ({"num_hidden_layers": 10**7}, {"text_config": {"num_hidden_layers": 10**7}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=r"config.json says 10,000,000 layers"):
            require_language_model(tmp_path)
    for odd in ({"architectures": 5}, {"architectures": [1]}, {"text_config": "x"}):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | odd))
        require_language_model(tmp_path)
        require_fits(tmp_path, block=64)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "openai-gpt", "recurrent_gemma", "rwkv"])
def test_the_bench_continues_a_text_with_and_without_a_cache(tmp_path: Path, kind: str) -> None:
    """Some architectures keep another state than keys and values, or none."""
    sizes: dict[str, Any] = {"mamba": {"state_size": 8}, "rwkv": {}}.get(kind, {})
    if kind == "mamba2":
        sizes = {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1}
    elif kind == "openai-gpt":
        sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
    elif kind == "recurrent_gemma":
        sizes = {"head_dim": 8, "attention_window_size": 8, "lru_width": 32, "num_hidden_layers": 3}
    config = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "model_type": kind,
        "num_attention_heads": 4,
    }
    ends = dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"], 0)
    model: Any = random_model(SIZES | config | ends | sizes, vocab_size=258, seed=1, where="test")
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    model.save_pretrained(tmp_path)
    arm = TorchEager(model=str(tmp_path), threads=1)
    read, theirs = IDS[:, :6], load(tmp_path)
    found = arm.begin(read.numpy(), 4)
    for _ in range(4):
        with torch.no_grad():
            right = theirs(input_ids=read, use_cache=False).logits[:, -1].argmax(-1)
        assert found.tolist() == right.tolist()
        read = torch.cat([read, right[:, None]], 1)
        found = arm.step(found)
    assert arm.facts["kv_cache"] == (kind in ("mamba", "mamba2"))
