"""Rows of what people bring in 2026: architectures, stored forms, and what other programs write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from compress.data.blocks import conversations
from compress.models.language import load_model
from export.build.choice import choose_backend
from limbeck.app.init.inputs import teacher_source, text_source
from limbeck.contract.models.adapter_files import adapter_facts
from limbeck.contract.recipe import ChatRows
from limbeck.contract.sources.models import require_language_model
from limbeck.contract.sources.tokenizer import load_tokenizer
from limbeck.contract.sources.weights import check_weights
from tests.pico import make_tokenizer
from tests.wild.cases.adapters import (
    IDS,
    load,
    make_adapter,
    make_base,
    our_logits,
    peft_logits,
    teacher,
)
from tests.wild.cases.row import Row, loss, said

_SIZES: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": 256,
    "eos_token_id": 256, "pad_token_id": 257,
}  # fmt: skip
_WINDOW = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
_EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "num_local_experts": 4, "n_routed_experts": 4, "n_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
_EACH_LAYER = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 258,
    "num_kv_shared_layers": 0,
}
_SCALED = {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": _LINEAR,
    "qwen3_5_moe_text": _LINEAR | _EXPERTS,
    "gemma3n_text": _WINDOW | _EACH_LAYER | {
        "laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0],
        "intermediate_size": [48, 48]},
    "gemma4_text": _WINDOW | _EACH_LAYER | {"global_head_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": _SCALED | {
        "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16,
        "mamba_d_state": 8, "mamba_n_groups": 1, "num_local_experts": 0,
        "shared_intermediate_size": 48},
    "olmo3": _WINDOW,
    "ministral3": {},
    "ministral": _WINDOW,
    "smollm3": {"no_rope_layers": [1, 0]},
    "phi3": {"partial_rotary_factor": 0.75, "tie_word_embeddings": True,
             "original_max_position_embeddings": 64},
    "gpt_oss": _WINDOW | _EXPERTS,
    "apertus": {},
    "exaone4": _WINDOW,
    "seed_oss": {},
    "hunyuan_v1_dense": {},
    "cohere2": _WINDOW | {"logit_scale": 0.3},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4,
                   "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1},
}  # fmt: skip
_MARKS = ("train", "training", "train_on_turn", "loss")  # of answers that are not learned
_HYBRID = {"qwen3_5_text", "lfm2", "granitemoehybrid", "nemotron_h"}


def recent(root: Path) -> Iterator[Row]:
    """All of them, made below ``root``."""
    yield from _architectures(root / "architectures of 2026")
    yield from _folders(root / "folders of 2026")
    yield from _adapters(root / "adapters of other programs")
    yield from _texts(root / "data of other programs")


def _ours(base: Path, adapter: Path | None = None) -> str:
    return loss(our_logits([teacher("one", base, adapter)])[0])


@torch.no_grad()
def _theirs(folder: Path) -> str:
    return loss(load(folder)(input_ids=IDS).logits)


def _architectures(root: Path) -> Iterator[Row]:
    for kind, fields in _ARCHITECTURES.items():
        torch.manual_seed(1)
        config = AutoConfig.for_model(kind, **_SIZES | fields)
        model = AutoModelForCausalLM.from_config(config)
        draw = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
        model.save_pretrained(root / kind)
        yield Row(f"teacher: {kind}", _ours(root / kind), _theirs(root / kind))
        if kind in _HYBRID:
            saved = json.loads((root / kind / "config.json").read_text())
            yield Row(
                f"student: {kind}, as it is saved",
                said(lambda saved=saved: choose_backend(saved)),
                "its cache holds states, of which a graph cannot cut a token",
                "cannot be exported: it keeps something else than keys and values",
            )


def _edited(file: Path, new: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file.write_text(json.dumps(new(json.loads(file.read_text()))))


def _folders(root: Path) -> Iterator[Row]:
    def made(name: str, **fields: Any) -> Path:
        return make_base(root / name, tied=False, **fields)

    head = made("a stored head, tie_word_embeddings: true")
    _edited(head / "config.json", lambda c: c | {"tie_word_embeddings": True})
    yield Row(f"model: {head.name}", _ours(head), _theirs(head))
    tied = make_base(root / "no stored head, tie_word_embeddings: false", tied=True)
    _edited(tied / "config.json", lambda c: c | {"tie_word_embeddings": False})
    yield Row(
        f"model: {tied.name}",
        said(lambda: load_model(tied)),
        "a random head, and a warning",
        "lacks 1 of its weights .for example lm_head.weight",
    )
    shards = made("shards, and Mistral's consolidated.safetensors beside them")
    whole = load(shards)
    shutil.copy(shards / "model.safetensors", shards / "consolidated.safetensors")
    (shards / "model.safetensors").unlink()
    whole.save_pretrained(shards, max_shard_size="20KB")
    yield Row(f"model: {shards.name}", _ours(shards), _theirs(shards))
    names = {"mlx": "as mlx_lm converts it, without quantising", "pt": "in fp64"}
    for form, what in names.items():
        folder = made(what)
        weights = load_file(folder / "model.safetensors")
        wide = {n: w.double() if form == "pt" else w for n, w in weights.items()}
        save_file(wide, folder / "model.safetensors", {"format": form})
        yield Row(f"model: {what}", _ours(folder), _theirs(folder))
    yield from _fp8(root)
    other = made("in MLX's 4 bits")
    form = {"group_size": 64, "bits": 4}
    _edited(other / "config.json", lambda c: c | {"quantization": form})
    pointer = made("a clone without Git LFS")
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    cut = made("a download that was cut")
    (cut / "model.safetensors").rename(cut / "model.safetensors.incomplete")
    for folder, says in (
        (other, "stored in MLX's form of 4 bits.* mlx_lm.convert --dequantize"),
        (pointer, "a pointer of Git LFS, not the file itself. Run `git lfs pull`"),
        (cut, "no weights; expected .*safetensors"),
    ):
        yield Row(
            f"model: {folder.name}",
            said(lambda folder=folder: check_weights(folder)),
            said(lambda folder=folder: load(folder)),
            says,
        )
    wrapper = made("a model for pictures whose text sees what follows")
    inner = json.loads((wrapper / "config.json").read_text())
    kinds = {"architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma"}
    (wrapper / "config.json").write_text(json.dumps(kinds | {"text_config": inner}))
    yield Row(
        f"model: {wrapper.name}",
        said(lambda: require_language_model(wrapper)),
        said(lambda: load(wrapper)),
        "reads more than text: save its language model alone",
    )
    code = made("a tokenizer with code of its own")
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tok.Own", None]}}
    _edited(code / "tokenizer_config.json", lambda c: c | own)
    yield Row(
        code.name,
        said(lambda: load_tokenizer(code)),
        said(lambda: AutoTokenizer.from_pretrained(code, trust_remote_code=False)),
        "needs code of its own .auto_map in tokenizer_config.json., which Limbeck never runs",
    )


def _fp8(root: Path) -> Iterator[Row]:
    """Blocks of 128 with a scale each, as DeepSeek and Qwen publish; the values, as a plain model,
    are what is right."""
    plain = make_base(root / "fp8", tied=False, hidden_size=128, head_dim=32)
    values, stored = load_file(plain / "model.safetensors"), dict[str, torch.Tensor]()
    for name, weight in list(values.items()):
        stored[name] = weight
        if "proj" in name:
            scale = weight.abs().max() / 448
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            rows, columns = (-(-size // 128) for size in weight.shape)
            stored[name.replace("weight", "weight_scale_inv")] = scale.expand(rows, columns).clone()
            values[name] = stored[name].float() * scale
    folders = [root / "fp8 with scales", root / "fp8 whose scales the configuration leaves out"]
    for folder in folders:
        shutil.copytree(plain, folder)
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
    save_file(values, plain / "model.safetensors", {"format": "pt"})
    form = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    _edited(folders[0] / "config.json", lambda c: c | {"quantization_config": form})
    yield Row(f"model: {folders[0].name}", _ours(folders[0]), _theirs(plain))
    yield Row(
        f"model: {folders[1].name}",
        said(lambda: load_model(folders[1])),
        f"{_theirs(folders[1])}, and a warning",
        "weight_scale_inv, which its config.json does not provide for",
    )


def _adapters(root: Path) -> Iterator[Row]:
    base = make_base(root / "base", tied=True)
    config = root / "base" / "config.json"

    def made(name: str, **fields: Any) -> Path:
        plain = LoraConfig(target_modules=["q_proj", "v_proj"], **fields)
        return make_adapter(base, root / name, plain, seed=len(name))

    unsloth = made("unsloth")
    fixed = {"base_model_class": "LlamaForCausalLM", "parent_library": "x", "unsloth_fixed": True}
    _edited(
        unsloth / "adapter_config.json",
        lambda c: c | {"base_model_name_or_path": "unsloth/base-bnb-4bit", "auto_mapping": fixed},
    )
    continued = make_adapter(
        base,
        root / "unsloth, continued pre-training: embedding and head saved, on a tied base",
        LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    )
    factory = made("LLaMA-Factory, with its logs")
    for name in ("all_results.json", "trainer_log.jsonl", "trainer_state.json"):
        (factory / name).write_text("{}")
    (factory / "training_args.bin").write_bytes(b"pickle")
    axolotl = made("axolotl, with the configuration of the base")
    shutil.copy(config, axolotl)
    make_tokenizer().save_pretrained(axolotl)
    for adapter in (unsloth, continued, factory, axolotl):
        yield Row(
            f"adapter: {adapter.name}", _ours(base, adapter), loss(peft_logits(base, adapter))
        )
    for fields in ({"task_type": None}, {"peft_version": "0.18.0@abc"}, {"lora_dropout": 0.5}):
        adapter = made(str(fields))
        _edited(adapter / "adapter_config.json", lambda c, fields=fields: c | fields)
        yield Row(f"adapter: {fields}", _ours(base, adapter), loss(peft_logits(base, adapter)))
    yield Row(
        "init --teacher: axolotl's folder",
        str(teacher_source(str(axolotl), {})),
        str({"model": {"kind": "local", "path": str(base)}, "adapter": str(axolotl)}),
    )
    for name, new, says in (
        ("DeepSpeed ZeRO-3, not gathered", lambda n, w: (n, torch.zeros(0)), "is empty: one of"),
        ("of a wrapper for pictures",
         lambda n, w: (n.replace(".layers", ".language_model.layers"), w),
         "8 tensors in it have no place in the model"),
    ):  # fmt: skip
        adapter = made(name)
        file = adapter / "adapter_model.safetensors"
        save_file(dict(new(n, w) for n, w in load_file(file).items()), file)
        yield Row(
            f"adapter: {name}",
            said(lambda adapter=adapter: adapter_facts(adapter) and _ours(base, adapter)),
            said(lambda adapter=adapter: loss(peft_logits(base, adapter))),
            says,
        )


def _texts(root: Path) -> Iterator[Row]:
    root.mkdir()
    tokenizer = make_tokenizer()
    ask, reply = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}

    def read(row: dict[str, Any]) -> str:
        """Text and what is learned, in the form that `init` chooses."""
        (root / "rows.jsonl").write_text(json.dumps(row))
        form = ChatRows(**text_source(str(root / "rows.jsonl"))["format"])
        (found,) = conversations(root / "rows.jsonl", form, tokenizer)
        learned = [found.text[slice(*span)] for span in found.answers or ()]
        return f"{found.text} learned: {learned}"

    def right(*messages: dict[str, Any], learned: int) -> str:
        """By transformers; the last so many answers are learned."""
        text = tokenizer.apply_chat_template(list(messages), tokenize=False)
        answers = [f"{m['content']}<|end|>" for m in messages if m["role"] == "assistant"]
        return f"{text} learned: {answers[len(answers) - learned :]}"

    first = {"role": "assistant", "content": "bad"}
    marks = {"weight": 0, "loss_scale": 0} | dict.fromkeys(_MARKS, False)
    for name, mark in marks.items():
        yield Row(
            f"chat: {name}: {mark} of an answer",
            read({"messages": [ask, first | {name: mark}, ask, reply]}),
            right(ask, first, ask, reply, learned=1),
        )
    for kind in ("text", "input_text", "output_text", None):
        part = {"text": "q"} | ({"type": kind} if kind else {})
        yield Row(
            f"chat: content of a part of type {kind}",
            read({"messages": [ask | {"content": [part]}, reply]}),
            right(ask, reply, learned=1),
        )
    system = {"role": "system", "content": "s"}
    for what, row, wanted in (
        ("smoltalk2",
         {"messages": [ask, reply], "chat_template_kwargs": {"enable_thinking": False}},
         right(ask, reply, learned=1)),
        ("Nemotron", {"input": [ask], "output": "a", "system_prompt": "s", "reasoning": "off"},
         right(system, ask, reply, learned=1)),
        ("OpenOrca", {"system_prompt": "s", "question": "q", "response": "a"},
         right(system, ask, reply, learned=1)),
        ("UltraFeedback", {"prompt": "q", "chosen": [ask, reply], "rejected": [ask, first]},
         right(ask, reply, learned=1)),
        ("TRL", {"prompt": [ask], "completion": [reply]}, right(ask, reply, learned=1)),
        ("a row of a system text alone", {"messages": [system]}, right(system, learned=0)),
        ("a row that ends with the user", {"messages": [ask, reply, ask]},
         right(ask, reply, ask, learned=1)),
    ):  # fmt: skip
        yield Row(f"chat: {what}", read(row), wanted)
    picture = {"type": "image_url", "image_url": {"url": "x"}}
    for what, row, says in (
        ("a picture", {"messages": [ask | {"content": [picture]}, reply]},
         "has a part of type image_url, but only text is learned"),
        ("a weight of 0.5", {"messages": [ask, reply | {"weight": 0.5}]},
         "has weight 0.5, but an answer is learned or it is not"),
        ("Gemini's contents", {"contents": [{"role": "user", "parts": [{"text": "q"}]}]},
         "rows have contents .list., and it is unclear which is the text"),
    ):  # fmt: skip
        yield Row(f"chat: {what}", said(lambda row=row: read(row)), "-", says)
