"""Rows of stranger configurations, stored weights and adapters, held to transformers and peft.

They take half a minute, so they are a table of their own.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from limbeck.app.init.inputs import teacher_source
from limbeck.contract.models.adapter_files import adapter_facts
from limbeck.contract.sources.models import require_fits, require_language_model
from limbeck.contract.sources.weights import check_weights
from tests.pico import make_model, pico_recipe
from tests.wild.cases.adapters import (
    IDS,
    Q,
    load,
    make_adapter,
    make_base,
    our_logits,
    peft_logits,
    teacher,
)
from tests.wild.cases.row import Row, loss, said

_OLD: dict[str, Any] = {"rope_parameters": None}  # as transformers 4 wrote it
_GONE = "no such field"
_STRICT = "transformers cannot load it .*Strict[A-Za-z]*ValidationError"
_SIZE = "of its weights do not fit its configuration"
_LACKS = "it lacks [0-9]+ of its weights"
_BATCH = "cannot answer a test batch"
_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {  # fields, and how it is refused
    "rope_scaling of type linear, factor 2": (
        _OLD | {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}}, ""),
    "rope_scaling with type and rope_type that differ": (
        _OLD | {"rope_theta": 1e4, "rope_scaling": {
            "type": "dynamic", "rope_type": "linear", "factor": 2.0}}, ""),
    "rope_scaling of yarn with attention_factor": (
        _OLD | {"rope_theta": 1e4, "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7,
            "original_max_position_embeddings": 16}}, ""),
    "rope_scaling of yarn without its original context": (
        _OLD | {"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ""),
    "rope_scaling: default": (
        _OLD | {"rope_theta": 1e4, "rope_scaling": {"rope_type": "default"}}, ""),
    "rope dynamic, text longer than the context": (
        _OLD | {"rope_theta": 1e4, "max_position_embeddings": 8,
                "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        "takes 12 of its tokens, but it reads 8 at most"),
    "rope_theta as an integer": (_OLD | {"rope_theta": 500000}, ""),
    "no rope_theta": (_OLD, ""),
    "rope_theta beside rope_parameters": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 5e5}, ""),
    "rope_parameters without rope_theta": (
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, ""),
    "partial_rotary_factor of llama": (
        _OLD | {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, ""),
    "partial_rotary_factor of phi": (
        _OLD | {"model_type": "phi", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, ""),
    "rope_local_base_freq and linear rope of gemma 3": (
        _OLD | {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, ""),
    "use_sliding_window: false": (
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4,
         "max_window_layers": 0, "layer_types": None}, ""),
    "use_sliding_window: false, and layer_types with windows": (
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4,
         "layer_types": ["sliding_attention", "full_attention"]}, _BATCH),
    "windows of qwen3 from layer 1 on": (
        {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 4,
         "max_window_layers": 1, "layer_types": None}, ""),
    "windows of phi3": ({"model_type": "phi3", "sliding_window": 4}, ""),
    "windows of starcoder2": ({"model_type": "starcoder2", "sliding_window": 4}, ""),
    "sliding_window: 0": ({"model_type": "mistral", "sliding_window": 0}, _BATCH),
    "layer_types of llama": (
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}, ""),
    "layer_types too short": ({"model_type": "qwen3", "layer_types": ["full_attention"]}, _STRICT),
    "pad_token_id past the end": (
        {"pad_token_id": 258}, "transformers cannot load it .*Padding_idx"),
    "eos_token_id past the end": ({"eos_token_id": 99999}, ""),
    "eos_token_id as text": ({"eos_token_id": "</s>"}, _STRICT),
    "vocab_size larger than the tensor": ({"vocab_size": 300}, _SIZE),
    "vocab_size smaller than the tensor": (
        {"vocab_size": 250}, "tokenizer has 258 tokens, but its embedding has 250 rows"),
    "rms_norm_eps as text": ({"rms_norm_eps": "1e-06"}, _STRICT),
    "hidden_act: SiLU": ({"hidden_act": "SiLU"}, "KeyError: 'SiLU'"),
    "attention_bias without biases": ({"attention_bias": True}, _LACKS),
    "mlp_bias without biases": ({"mlp_bias": True}, _LACKS),
    "no num_key_value_heads": ({"num_key_value_heads": None}, _SIZE),
    "a layer more than there is": ({"num_hidden_layers": 3}, _LACKS),
    "a layer fewer": ({"num_hidden_layers": 1}, ""),
    "auto_map beside a known type": (
        {"auto_map": {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "configuration_x.X"}},
        ""),
    **{f"quantization_config of {kind}": ({"quantization_config": {"quant_method": kind}},
                                          f"{kind}.* the weights are plain")
       for kind in ("quark", "bitnet", "modelopt", "fbgemm_fp8")},
    **{f"quantization_config of a merged model: {kept}": (
        {"quantization_config": kept}, "the weights are plain .* F32.* Take quantization_config")
       for kept in ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {"load_in_8bit": True},
                    {"quant_method": "gptq", "bits": 4}, {})},
    "model_type: Llama": ({"model_type": "llama", "late": "Llama"}, "model type `Llama`"),
    "no model_type": ({"model_type": "llama", "late": None}, "should have a `model_type`|Should"),
    "architectures of a reward model": (
        {"architectures": ["LlamaForRewardModel"]}, "a model for another task"),
    "architectures of another type": ({"architectures": ["MistralForCausalLM"]}, ""),
    "architectures of a body": ({"architectures": ["LlamaModel"]}, ""),
    "torch_dtype: torch.float16": ({"dtype": None, "torch_dtype": "torch.float16"}, ""),
    "settings of generation from transformers 4": (
        {"temperature": 0.7, "max_length": 20, "do_sample": True, "repetition_penalty": 1.3}, ""),
    **{f"{name} of another type": ({name: 0.1}, "")
       for name in ("logit_scale", "logits_scaling", "lm_head_multiplier",
                    "final_logit_softcapping", "logits_soft_cap")},
    "use_bidirectional_attention of gemma 3": (
        {"model_type": "gemma3_text", "use_bidirectional_attention": True},
        "a row with other tokens behind gives other logits"),
    "query_pre_attn_scalar of gemma 3": (
        {"model_type": "gemma3_text", "query_pre_attn_scalar": 64}, ""),
    "hidden_activation of gemma 2": ({"model_type": "gemma2", "hidden_activation": "gelu"}, ""),
    "logits_scaling of granite": (
        {"model_type": "granite", "logits_scaling": 8.0, "residual_multiplier": 0.2}, ""),
    "no_rope_layer_interval": (
        {"model_type": "smollm3", "no_rope_layers": None, "no_rope_layer_interval": 2}, ""),
    "use_parallel_residual: false": (
        {"model_type": "gpt_neox", "use_parallel_residual": False}, ""),
}  # fmt: skip


def fresh(root: Path) -> Iterator[Row]:
    """All of them, made below ``root``."""
    yield from _configs(root / "fresh configurations")
    yield from _stored(root / "fresh weights")
    yield from _adapters(root / "fresh adapters")
    yield from _names(root / "fresh names")


def _names(root: Path) -> Iterator[Row]:
    """Models as people name them, for `init` and in recipes."""
    hub = root / "hub/models--org--name"
    snapshot = make_base(hub / "snapshots/abc", tied=True)
    gguf = make_base(root / "gguf", tied=True)
    (gguf / "model.safetensors").rename(gguf / "x.gguf")
    for given, says in {
        "hf://org/name": "'id': 'org/name'",
        "https://huggingface.co/org/name/tree/v1": "'id': 'org/name', 'revision': 'v1'",
        "https://huggingface.co/org/name/blob/main/x.gguf": "give owner/name, or download",
        "org/name@v1": "'id': 'org/name', 'revision': 'v1'",
        str(hub): "Did you mean .*snapshots/abc",
        str(snapshot / "model.safetensors"): "a file of a model; give its folder",
    }.items():
        found = said(lambda given=given: teacher_source(given, {}))
        yield Row(f"init --teacher: {Path(given).name} of {given[:5]}", found, "-", says)
    lora = make_adapter(snapshot, root / "adapter", LoraConfig(target_modules=Q))
    on_it = Path(shutil.copytree(lora, root / "adapter on an adapter"))
    _edited(on_it / "adapter_config.json", base_model_name_or_path=str(lora))
    packed = Path(shutil.make_archive(str(root / "packed"), "zip", lora))
    for path, says in {
        on_it: "that is an adapter too; merge it into its base first",
        packed: "an archive; unpack it",
        lora / "adapter_model.safetensors": "a file of a model; give its folder",
    }.items():
        found = said(lambda path=path: teacher_source(str(path), {}))
        yield Row(f"init --teacher: {path.name}", found, "-", says)
    found = said(lambda: adapter_facts(packed))
    yield Row("adapter: a packed one", found, "-", "name the folder of the adapter, unpacked")
    for path, says in {
        hub: "snapshots/abc is one",
        gguf: "x.gguf is a GGUF file: name that file, with kind: gguf",
        gguf / "x.gguf": "no GGUF file",
        lora: "Of an encoder, merge both with peft",
    }.items():
        yield Row(f"model: {path.name}", said(lambda path=path: check_weights(path)), "-", says)
    for name in ("https://huggingface.co/org/name", " org/name", "../x", "a/b/c", ""):
        wrong = {"name": "t", "model": {"kind": "hub", "id": name}}
        yield Row(
            f"recipe: id {name!r} of the hub",
            said(lambda wrong=wrong: pico_recipe(teachers=[wrong])),
            "-",
            "teachers.0.model.id: found .*; it should be (org/name|owner/name)",
        )


def _ours(base: Path, adapter: Path | None = None) -> str:
    def read() -> str:
        check_weights(base)
        require_language_model(base)
        require_fits(base)
        return loss(our_logits([teacher("one", base, adapter)])[0])

    return said(read)


def _theirs(base: Path) -> str:
    return said(lambda: loss(load(base)(input_ids=IDS).logits.detach()))


def _edited(file: Path, **fields: Any) -> None:
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: v for name, v in config.items() if v != _GONE}))


def _configs(root: Path) -> Iterator[Row]:
    for what, (given, says) in _CONFIGS.items():
        fields = {name: _GONE if value is None else value for name, value in given.items()}
        kind, folder = fields.pop("model_type", "llama"), root / what
        if "late" in fields:
            fields["model_type"] = fields.pop("late")
        make_model(folder, model_type=kind, vocab_size=258, max_position_embeddings=64)
        _edited(folder / "config.json", **fields)
        yield Row(f"model: {what}", _ours(folder), _theirs(folder), says)


def _renamed(file: Path, new: Callable[[str], str]) -> None:
    save_file({new(n): w for n, w in load_file(file).items()}, file, {"format": "pt"})


def _stored(root: Path) -> Iterator[Row]:
    base = make_model(root / "base", vocab_size=258, max_position_embeddings=64)
    layer = "model.layers.0.self_attn.q_proj"

    def copy(name: str) -> Path:
        return Path(shutil.copytree(base, root / name))

    names: dict[str, tuple[Callable[[str], str], str]] = {
        "module. before each": (lambda n: f"module.{n}", "saved with its wrapper .module."),
        "language_model. before each": (lambda n: f"language_model.{n}", _LACKS),
        "base_model.model. before each": (lambda n: f"base_model.model.{n}", _LACKS),
        "_fsdp_wrapped_module. inside": (
            lambda n: n.replace("layers.0.", "layers.0._fsdp_wrapped_module."), _LACKS),
        "base_layer of peft": (
            lambda n: n.replace("q_proj.weight", "q_proj.base_layer.weight"), _LACKS),
        "model. twice": (lambda n: f"model.{n}", ""),
    }  # fmt: skip
    for what, (new, says) in names.items():
        folder = copy(what)
        _renamed(folder / "model.safetensors", new)
        yield Row(f"weights: {what}", _ours(folder), _theirs(folder), says)
    extras: dict[str, tuple[str, tuple[int, ...], str]] = {
        "an adapter that was not merged": (
            f"{layer}.lora_A.default.weight", (8, 32), "merge the adapter with `merge_and_unload`"),
        "a bias": (f"{layer}.bias", (64,), "q_proj.weight alone is another model"),
        "AutoGPTQ's parts": (f"{layer}.qweight", (4, 64), "q_proj.weight alone is another model"),
        "the head of a reward model": ("score.weight", (1, 32), ""),
        "TRL's head of values": ("v_head.summary.weight", (1, 32), ""),
    }  # fmt: skip
    for what, (name, shape, says) in extras.items():
        folder = copy(f"extra {what}")
        file = folder / "model.safetensors"
        save_file(load_file(file) | {name: torch.ones(shape)}, file, {"format": "pt"})
        yield Row(f"weights: beside {what}", _ours(folder), _theirs(folder), says)
    mixed = copy("mixed")
    weights = load_file(mixed / "model.safetensors")
    halves = {n: w.bfloat16() if "proj" in n else w.half() for n, w in weights.items()}
    save_file(halves, mixed / "model.safetensors", {"format": "pt"})
    yield Row("weights: bf16 and fp16 mixed", _ours(mixed), _theirs(mixed))
    parts = copy("parts")
    whole = load(parts)
    (parts / "model.safetensors").unlink()
    whole.save_pretrained(parts, max_shard_size="20KB")
    index = parts / "model.safetensors.index.json"
    save_file({"model.stray": torch.zeros(2)}, parts / "model-stray.safetensors")
    yield Row("weights: a part that the index does not list", _ours(parts), _theirs(parts))
    for what, change, says in (
        ("metadata", {"metadata": _GONE}, "expected two objects, metadata and weight_map"),
        ("a file", {"metadata": {}, "weight_map": {"model.extra": "model-99.safetensors"}},
         "model-99.safetensors is missing, one of 1 of the 1 files"),
    ):  # fmt: skip
        _edited(index, **change)
        yield Row(f"weights: an index without {what}", _ours(parts), _theirs(parts), says)


def _adapters(root: Path) -> Iterator[Row]:
    bases = {tied: make_base(root / f"tied {tied}", tied=tied) for tied in (True, False)}
    gpt2 = make_model(
        root / "gpt2", model_type="gpt2", n_embd=32, n_head=4, n_layer=2, n_positions=64,
        vocab_size=258,
    )  # fmt: skip
    made = iter(range(1000))

    def adapter(base: Path, **options: Any) -> Path:
        number = next(made)
        options.setdefault("target_modules", Q)
        return make_adapter(base, root / f"{number}", LoraConfig(**options), seed=number)

    def row(what: str, base: Path, folder: Path, says: str = "") -> Row:
        right = said(lambda: loss(peft_logits(base, folder)))
        return Row(f"adapter: {what}", _ours(base, folder), right, says)

    embedding = [*Q, "embed_tokens"]
    configs: dict[str, tuple[Any, dict[str, Any]]] = {
        **{f"init {start}": (bases[False], {"init_lora_weights": start})
           for start in ("eva", "olora", "pissa", "orthogonal", "mica")},
        "all-linear": (bases[False], {"target_modules": "all-linear"}),
        "a pattern": (bases[False], {"target_modules": r"(?i).*Q_PROJ"}),
        "exclude_modules": (
            bases[False], {"target_modules": [*Q, "k_proj"], "exclude_modules": ["k_proj"]}),
        "layers_to_transform: 1": (bases[False], {"layers_to_transform": 1}),
        "names from the top": (
            bases[False], {"target_modules": ["model.layers.0.self_attn.q_proj",
                                              "model.layers.1.mlp.up_proj"]}),
        "a target that is not there": (bases[False], {"target_modules": [*Q, "Wqkv"]}),
        "modules_to_save of a classifier": (bases[False], {"modules_to_save": ["score"]}),
        "DoRA, head and norm saved": (
            bases[False], {"use_dora": True, "modules_to_save": ["lm_head", "norm"]}),
        "tied: tokens and LoRA on the head": (
            bases[True], {"target_modules": [*Q, "lm_head"], "trainable_token_indices": [3, 5]}),
        "tied: LoRA on the embedding, saved head": (
            bases[True], {"target_modules": embedding, "modules_to_save": ["lm_head"]}),
        "tied: LoRA on both, of two ranks": (
            bases[True], {"target_modules": [*embedding, "lm_head"], "use_rslora": True,
                          "rank_pattern": {"lm_head": 2}}),
        "tied: biases and a saved embedding": (
            bases[True], {"bias": "all", "modules_to_save": ["embed_tokens"]}),
        "gpt2: DoRA and the embedding": (
            gpt2, {"target_modules": ["c_attn", "c_fc", "wte"], "use_dora": True}),
    }  # fmt: skip
    for what, (base, options) in configs.items():
        yield row(what, base, adapter(base, **options))
    folder = adapter(bases[True], modules_to_save=["lm_head"], trainable_token_indices=[3, 5])
    says = "peft cannot run this adapter in one model with its base: merge it"
    yield row("tied: tokens and a saved head", bases[True], folder, says)
    changed: dict[str, tuple[dict[str, Any], str]] = {
        "target_modules: all-linear, as text": (
            {"target_modules": "all-linear"}, "of its tensors are not in it"),
        "fan_in_fan_out on Linear": ({"fan_in_fan_out": True}, ""),
        "keys of peft 0.2": ({"merge_weights": False, "enable_lora": None}, ""),
        "an alpha of 7.5": ({"lora_alpha": 7.5}, ""),
        "no alpha": ({"lora_alpha": _GONE}, ""),
        "r: 0": ({"r": 0}, "should be a positive integer"),
        "no rank_pattern": ({"rank_pattern": None}, "does not fit"),
        "bias: null": ({"bias": None}, "does not fit"),
        "peft_type: lora": ({"peft_type": "lora"}, "peft writes the name in capitals: LORA"),
        **{f"peft_type: {kind}": ({"peft_type": kind}, f"kind {kind} are not .* Train an adapter")
           for kind in ("LILY", "POLY", "SHADOW", "XLORA", "CPT")},
    }  # fmt: skip
    for what, (fields, says) in changed.items():
        folder = adapter(bases[False], target_modules=[*Q, "up_proj"])
        _edited(folder / "adapter_config.json", **fields)
        yield row(what, bases[False], folder, says)
    for fan in (True, False):
        folder = adapter(gpt2, target_modules=["c_attn", "c_fc"])
        _edited(folder / "adapter_config.json", fan_in_fan_out=fan)
        yield row(f"gpt2: fan_in_fan_out: {fan}", gpt2, folder)
    for dtype in (torch.float16, torch.float64, torch.float8_e4m3fn):
        folder = adapter(bases[False])
        file = folder / "adapter_model.safetensors"
        save_file({n: w.to(dtype) for n, w in load_file(file).items()}, file)
        yield row(f"in {dtype}, without metadata", bases[False], folder)
    places = {
        "bare": ("^base_model.model.", ""), "DDP": ("^", "module."),
        "torchtune": ("lora_([AB])", r"LORA_\1"),
        "FSDP": (r"layers\.0\.", "layers.0._fsdp_wrapped_module."),
        "checkpoint_wrapper": (r"layers\.0\.", "layers.0._checkpoint_wrapped_module."),
    }  # fmt: skip
    for what, (old, new) in places.items():
        folder = adapter(bases[False])
        _renamed(folder / "adapter_model.safetensors", lambda n, o=old, w=new: re.sub(o, w, n))
        yield row(f"names of {what}", bases[False], folder, "tensors in it have no place")
    for base in ("/home/ubuntu/models/Llama-3", "./base", ""):
        folder = adapter(bases[False])
        _edited(folder / "adapter_config.json", base_model_name_or_path=base)
        yield row(f"made on {base!r}", bases[False], folder)
        yield Row(
            f"init --teacher: adapter made on {base!r}",
            said(lambda folder=folder: teacher_source(str(folder), {})),
            "-",
            "add --base PATH with the folder of",
        )
        assert adapter_facts(folder).base == (base or None)
