"""Tiny real models for tests: random weights, a byte-level tokenizer, and the artifacts a stage
expects to find.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.contract.artifact import Artifact, write_artifact
from limbeck.contract.data.heldout import (
    CALIBRATION,
    HELDOUT,
    Blocks,
    all_but_first,
    save_calibration,
    save_heldout,
)
from limbeck.contract.recipe import Recipe, parse_recipe

CHAT = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer() -> Any:
    """A byte-level tokenizer of 258 tokens: the bytes, an end and a padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    for special in ("<|end|>", "<|pad|>"):
        vocabulary[special] = len(vocabulary)
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def make_model(
    folder: Path, *, seed: int = 0, model_type: str = "llama", scale: float = 0.3, **sizes: Any
) -> Path:
    """Save a random causal LM and its tokenizer to ``folder``.

    ``scale`` spreads the weights so that logits differ.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values: dict[str, Any] = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "initializer_range": scale,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "pad_token_id": 257,
    } | sizes
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_blocks(*, seed: int = 0, rows: int = 3, length: int = 24) -> dict[str, Blocks]:
    """Random held-out blocks of two domains, ragged."""
    draw = np.random.default_rng(seed)
    domains = {}
    for name in ("letters", "numbers"):
        lengths = draw.integers(length // 2, length + 1, rows).astype(np.int32)
        ids = draw.integers(0, 256, (rows, length)).astype(np.int32) * (
            np.arange(length) < lengths[:, None]
        )
        domains[name] = Blocks(
            ids.astype(np.int32), lengths, lengths - 1, all_but_first(lengths, length)
        )
    return domains


def make_student(path: Path, model: Path) -> Artifact:
    """Wrap the transformers folder ``model`` (moved) as a student artifact at ``path``."""
    from limbeck.contract.artifact import open_artifact

    with write_artifact(path, kind="student", key=f"pico {path.name}", parents={}) as draft:
        model.rename(draft.folder / "model")
        save_heldout(draft.folder / HELDOUT, make_blocks())
        rows = [
            b.input_ids[row, : b.lengths[row]]
            for b in make_blocks(seed=1).values()
            for row in range(len(b))
        ]
        save_calibration(draft.folder / CALIBRATION, rows)
        teacher = {
            "name": "one",
            "model": "/models/one",
            "adapter": None,
            "quantize": "none",
            "dtype": "fp32",
        }
        (draft.folder / "teachers.json").write_text(json.dumps([teacher]))
        (draft.folder / "log.jsonl").write_text("")
        draft.result = {"nll": {"letters": 5.0, "numbers": 5.1}, "mean_nll": 5.05}
        draft.result["teachers"] = {
            "one": {"nll": {"letters": 4.5, "numbers": 4.75}, "temperature": 1.0}
        }
    return open_artifact(path)


def pico_recipe(**over: Any) -> Recipe:
    """A recipe of the tiniest sizes; ``over`` replaces whole sections."""
    return parse_recipe(
        {
            "name": "pico",
            "data": {
                "domains": [{"name": "code", "text": {"kind": "stdlib", "paths": ["abc.py"]}}],
                "block": 32,
            },
            "student": {
                "kind": "lora",
                "base": {"kind": "random", "config": {"model_type": "llama", "hidden_size": 32}},
            },
            "training": {"tokens": 64, "batch_tokens": 32},
        }
        | over
    )
