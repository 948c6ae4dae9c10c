"""Rows of further model types and of configurations as older programs wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TrainableTokensConfig

from compress.footprint.shapes import describe, trace_line
from compress.models.language import folder_config
from serve_bench.worker.runtimes import TorchEager
from tests.pico import make_model, make_tokenizer
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
from tests.wild.cases.wrappers import planned

_GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 16}  # fmt: skip
_TYPES: dict[str, dict[str, Any]] = {
    "gptj": _GPT | {"rotary_dim": 4}, "codegen": _GPT | {"rotary_dim": 4, "n_ctx": 64},
    "gpt_bigcode": _GPT, "ctrl": _GPT | {"dff": 48},
    "gpt_neo": {"num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]],
                "window_size": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4,
             "decoder_ffn_dim": 48, "encoder_layers": 2, "encoder_attention_heads": 4,
             "encoder_ffn_dim": 48},
    "biogpt": {}, "olmo": {"clip_qkv": 0.5}, "helium": {"head_dim": 8}, "diffllama": {},
    "arcee": {}, "glm": {}, "vaultgemma": {}, "mixtral": _EXPERTS, "qwen3_moe": _EXPERTS,
    "granitemoe": _EXPERTS, "granitemoeshared": _EXPERTS, "phimoe": _EXPERTS,
    "glm4_moe": _EXPERTS | {"n_routed_experts": 4},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "lfm2_moe": _EXPERTS | {"layer_types": ["full_attention", "conv"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "rwkv": {"attention_hidden_size": 32},
}  # fmt: skip
_OLD: dict[str, Any] = {"rope_parameters": None, "rope_theta": 1e4}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
_CONFIGS: dict[str, dict[str, Any]] = {
    "rope_scaling of type dynamic": _OLD | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "rope_scaling of type yarn": _OLD | {"rope_scaling": _YARN | {"type": "yarn"}},
    "yarn with mscale and other betas": {"rope_parameters": _YARN | {
        "rope_type": "yarn", "rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 0.7,
        "beta_fast": 16, "beta_slow": 2, "truncate": False}},
    "rope_scaling beside rope_parameters": {
        "rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "rope_scaling: null": _OLD | {"rope_theta": 5e5, "rope_scaling": None},
    "sections of mrope on text": {"model_type": "qwen2"} | _OLD | {
        "rope_scaling": {"type": "default", "mrope_section": [2, 3, 3]}},
    "windows of qwen2 without layer_types": {
        "model_type": "qwen2", "layer_types": None, "use_sliding_window": True,
        "sliding_window": 4, "max_window_layers": 0},
    "windows of gemma 3 by pattern": {
        "model_type": "gemma3_text", "layer_types": None, "sliding_window_pattern": 2,
        "sliding_window": 4, "rope_local_base_freq": 1e4} | _OLD,
    "rotary_pct of gpt_neox": {"model_type": "gpt_neox", "rope_parameters": None,
                               "rotary_pct": 0.25, "rotary_emb_base": 10000},
    "dtype and torch_dtype that differ": {"dtype": "float32", "torch_dtype": "float16"},
    "dtype: torch.bfloat16": {"dtype": "torch.bfloat16"},
    "pretraining_tp, attention dropout, all outputs": {
        "pretraining_tp": 2, "attention_dropout": 0.5, "output_hidden_states": True,
        "output_attentions": True},
    "hidden_act: gelu_pytorch_tanh": {"hidden_act": "gelu_pytorch_tanh"},
}  # fmt: skip
_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "head_dim left out": ({"head_dim": None}, "8 of its weights do not fit its configuration"),
    "return_dict: false": ({"return_dict": False}, "cannot answer a test batch"),
    "flash attention": ({"attn_implementation": "flash_attention_2"},
                        "Take attn_implementation out of its config.json"),
    "an encoder that its head transforms": ({"model_type": "bert", "is_decoder": True},
                                            "gives other logits than the model's own"),
    "an encoder whose embedding is narrower": (
        {"model_type": "electra", "is_decoder": True, "embedding_size": 16},
        "ElectraForCausalLM cannot answer a test batch"),
}  # fmt: skip


def models(root: Path) -> Iterator[Row]:
    """All of them, made below ``root``."""
    root = root / "more models"
    sizes = {"vocab_size": 258, "max_position_embeddings": 64}
    for kind, fields in _TYPES.items():
        yield _row(f"teacher: {kind}", make_model(root / kind, model_type=kind, **sizes | fields))
    for kind in ("mixtral", "qwen3_moe", "granitemoe"):
        yield planned(root / kind, kind, load(root / kind))
    for what, changed in _CONFIGS.items():
        yield _row(f"model: {what}", _configured(root / what, changed))
    for what, (changed, says) in _REFUSED.items():
        yield _row(f"model: {what}", _configured(root / what, changed), says)
    shape = describe(folder_config(root / "return_dict: false"))
    yield Row(
        "plan: return_dict: false",
        said(lambda: trace_line(shape, None, rows=2, length=12, precision="fp32")),
        "-",
        "llama: cannot answer a batch without weights .AttributeError: 'tuple'",
    )
    yield from _new_tokens(root)


def _configured(folder: Path, changed: dict[str, Any]) -> Path:
    """A model whose configuration is changed after it was saved."""
    fields = dict(changed)
    kind = fields.pop("model_type", "llama")
    wide = {"embedding_size": fields.pop("embedding_size", 32)} if kind == "electra" else {}
    make_model(folder, model_type=kind, vocab_size=258, max_position_embeddings=64, **wide)
    config = json.loads((folder / "config.json").read_text()) | fields
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def _row(what: str, folder: Path, says: str = "") -> Row:
    ours = said(lambda: loss(our_logits([teacher("one", folder, None)])[0]))
    theirs = said(lambda: loss(load(folder)(input_ids=IDS).logits.detach()))
    return Row(what, ours, theirs, says)


def _new_tokens(root: Path) -> Iterator[Row]:
    """Adapters that train nothing of the embedding but the rows of two added tokens."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    new = [258, 259]
    both = {"embed_tokens": new, "lm_head": new}
    for tied in (True, False):
        base = make_base(root / f"tied-{tied}", tied=tied)
        for what, config in {
            "trainable_token_indices": LoraConfig(target_modules=Q, trainable_token_indices=new),
            "them in embedding and head": LoraConfig(
                target_modules=Q, trainable_token_indices=both
            ),
            "TrainableTokensConfig": TrainableTokensConfig(token_indices=new),
        }.items():
            adapter = make_adapter(base, root / f"{what}-{tied}", config, rows=260)
            tokenizer.save_pretrained(adapter)
            alone = not tied and what == "TrainableTokensConfig"
            theirs = loss(peft_logits(base, adapter, rows=260))
            ours = said(lambda b=base, a=adapter: loss(our_logits([teacher("one", b, a)])[0]))
            yield Row(
                f"adapter: new tokens by {what}, head {'tied' if tied else 'of its own'}",
                ours,
                "the head's new rows are random at each load" if alone else theirs,
                "the new rows of lm_head are not in it" if alone else "",
            )
            if not alone:
                arm = TorchEager(model=str(base), adapter=str(adapter), threads=1)
                scored = torch.stack([torch.from_numpy(arm.score(row.numpy())) for row in IDS])
                yield Row(f"bench: the same ({what}, {tied})", loss(scored), theirs)
