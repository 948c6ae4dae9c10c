"""Models whose files hold quantised or half weights, and adapters under other names, held to
transformers and peft."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from compress.models.language import load_model
from limbeck.contract.errors import ModelError
from limbeck.contract.models.adapters import attach, merged
from limbeck.contract.sources.preflight import preflight
from serve_bench.worker.runtimes import TorchEager
from tests.pico import make_model, make_tokenizer, pico_recipe
from tests.wild.cases.adapters import (
    IDS,
    LAYERS,
    load,
    make_adapter,
    make_base,
    our_logits,
    peft_logits,
    teacher,
)


def stored(root: Path, bits: int) -> tuple[Path, Path]:
    """A plain model, and the same as bitsandbytes stores it."""
    base = make_model(root / "base", hidden_size=64, intermediate_size=128, scale=0.1)
    config = BitsAndBytesConfig(
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            base, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
        )
        model.save_pretrained(root / "stored")
    make_tokenizer().save_pretrained(root / "stored")
    return base, root / "stored"


@pytest.mark.parametrize("bits", [8, 4])
def test_a_stored_model_teaches_as_it_is_and_students_start_from_its_values(
    tmp_path: Path, bits: int
) -> None:
    base, folder = stored(tmp_path, bits)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs = load(folder)(input_ids=IDS).logits
        values = load(folder).dequantize(torch.float32)(input_ids=IDS).logits
        assert torch.equal(our_logits([teacher("one", folder, None)])[0], theirs)
        start: Any = load_model(folder)
        assert torch.equal(start(input_ids=IDS).logits, values)
        start.save_pretrained(tmp_path / "start")
        torch.testing.assert_close(load(tmp_path / "start")(input_ids=IDS).logits, values)
        adapter = make_adapter(base, tmp_path / "adapter", LoraConfig(target_modules=["q_proj"]))
        arm = TorchEager(model=str(folder), adapter=str(adapter), threads=1)
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(load(folder), adapter).eval()(input_ids=IDS[:1]).logits
        found = torch.from_numpy(arm.score(IDS[0].numpy()))
        torch.testing.assert_close(found, adapted[0], atol=1e-4, rtol=1e-4)
    other = "nf4" if bits == 8 else "int8"
    with pytest.raises(ModelError, match=f"are stored as .*, and quantize asks for {other}"):
        load_model(folder, quantize=other)
    recipe = pico_recipe(
        student={"kind": "lora", "base": {"kind": "local", "path": str(folder)}},
        export={"adapters": "separate"},
    )
    (mistake,) = preflight(recipe)
    assert "export.adapters: separate needs plain ones" in mistake


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "hqq", "torchao", None])
def test_forms_that_need_another_library_are_refused_by_name(
    tmp_path: Path, method: str | None
) -> None:
    base = make_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    recipe = pico_recipe(student={"kind": "lora", "base": {"kind": "local", "path": str(base)}})
    (mistake,) = preflight(recipe)
    assert "but the weights are plain numbers of type F32" in mistake
    codes = {"model.layers.0.mlp.up_proj.qweight": torch.zeros(4, 32, dtype=torch.int32)}
    save_file(load_file(base / "model.safetensors") | codes, base / "model.safetensors")
    (mistake,) = preflight(recipe)
    assert f"student.base: {base}: its weights are stored as {method}" in mistake


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_base_in_shards_carries_its_adapter_everywhere(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    plain = make_base(tmp_path / "plain", tied=False)
    base = tmp_path / "base"
    shutil.copytree(plain, base, ignore=shutil.ignore_patterns("*.safetensors"))
    load(plain).to(dtype).save_pretrained(base, max_shard_size="20KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    adapter = make_adapter(base, tmp_path / "adapter", LoraConfig(target_modules=LAYERS))
    right = peft_logits(base, adapter)
    close: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(our_logits([teacher("one", base, adapter)])[0], right, **close)
    arm = TorchEager(model=str(base), adapter=str(adapter), threads=1)
    torch.testing.assert_close(torch.from_numpy(arm.score(IDS[0].numpy())), right[0], **close)
    whole = merged(attach(load(base), adapter), where="the base")
    with torch.no_grad():
        torch.testing.assert_close(whole(input_ids=IDS).logits, right, **close)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"\.(lora_[AB])\.", r".\1.my-expert."),
        (r"\.(lora_[AB])\.", r".\1.default."),
        (r"^base_model\.model\.", "base_model.model._orig_mod."),
    ],
)
def test_names_of_a_training_script_are_read(tmp_path: Path, old: str, new: str) -> None:
    """Adapters are called by any name, and torch.compile wraps the model that they are on."""
    base = make_base(tmp_path / "base", tied=False)
    adapter = make_adapter(base, tmp_path / "adapter", LoraConfig(target_modules=LAYERS))
    right, file = peft_logits(base, adapter), adapter / "adapter_model.safetensors"
    weights = {re.sub(old, new, name): tensor for name, tensor in load_file(file).items()}
    save_file(weights, file)
    folders = [teacher(f"t.{i}", base, adapter) for i in range(2)]
    for ours in our_logits(folders):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("weight_scale_inv", (1, 1)), ("weight_scale", (64, 1)), ("bias", (64,)), ("scales", (64, 2))],
)
def test_a_stored_part_that_the_configuration_leaves_out_is_named(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    """transformers takes the weight alone, and computes another model."""
    base = make_base(tmp_path / "base", tied=True)
    file, layer = base / "model.safetensors", "model.layers.0.self_attn.q_proj"
    right = load(base)(input_ids=IDS).logits
    save_file(load_file(file) | {f"{layer}.{name}": torch.ones(shape)}, file, {"format": "pt"})
    assert torch.equal(load(base)(input_ids=IDS).logits, right)
    with pytest.raises(ModelError, match=rf"{layer}\.{name}, which its config.json does not prov"):
        load_model(base)


@pytest.mark.parametrize("name", ["rotary_emb.inv_freq", "self_attn.masked_bias", "mtp.weight"])
def test_parts_that_no_weight_needs_are_left_out(tmp_path: Path, name: str) -> None:
    """Files of older releases hold buffers, and some models hold layers for other uses."""
    base = make_base(tmp_path / "base", tied=True)
    file = base / "model.safetensors"
    extra = {f"model.layers.0.{name}": torch.ones(8)}
    save_file(load_file(file) | extra, file, {"format": "pt"})
    found: Any = load_model(base)
    assert torch.equal(found(input_ids=IDS).logits, load(base)(input_ids=IDS).logits)


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_weights_of_mlx_are_named(tmp_path: Path, key: str) -> None:
    base = make_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    form = {"group_size": 64, "bits": 4, "mode": "affine"}
    (base / "config.json").write_text(json.dumps(config | {key: form}))
    recipe = pico_recipe(student={"kind": "lora", "base": {"kind": "local", "path": str(base)}})
    (mistake,) = preflight(recipe)
    assert "stored in MLX's form of 4 bits" in mistake


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "adapter_model.safetensors", "model.gguf"]
)
def test_a_clone_without_git_lfs_is_named(tmp_path: Path, name: str) -> None:
    base = make_base(tmp_path / "base", tied=True)
    adapter = make_adapter(base, tmp_path / "adapter", LoraConfig(target_modules=["q_proj"]))
    place = (adapter if name.startswith("adapter") else base) / name
    place.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 4242\n")
    model = {"kind": "gguf", "path": str(place)} if name.endswith("gguf") else None
    local = model or {"kind": "local", "path": str(base)}
    adapted = {} if model else {"adapter": str(adapter)}
    recipe = pico_recipe(teachers=[{"name": "one", "model": local} | adapted])
    assert any(f"{place}: a pointer of Git LFS" in line for line in preflight(recipe))
