"""Rows of models for pictures and text, read without a picture, held to transformers and peft."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from compress.footprint.shapes import describe, trace_line
from compress.models.body import Body
from compress.models.language import folder_config, load_model
from export.build.choice import choose_backend
from limbeck.contract.models.loading import WRAPPERS
from limbeck.contract.sources.models import require_language_model
from serve_bench.worker.runtimes import TorchEager
from tests.pico import make_tokenizer
from tests.wild.cases.adapters import IDS, Q, our_logits, teacher
from tests.wild.cases.row import Row, loss, said

_TEXT: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": 256,
    "eos_token_id": 256, "pad_token_id": 257,
}  # fmt: skip
_PICTURES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8, "depth": 1, "num_heads": 2, "embed_dim": 32,
    "out_hidden_size": 64, "deepstack_visual_indexes": [0], "fullatt_block_indexes": [0],
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_QWEN2 = {"rope_parameters": _ROPE}
_QWEN3 = {"rope_parameters": _ROPE | {"mrope_interleaved": True}}
_KINDS: dict[str, dict[str, Any]] = {  # the model for text inside
    "gemma3": {},
    "mistral3": {"model_type": "mistral"},
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "qwen2_5_vl": _QWEN2,
    "qwen2_vl": _QWEN2,
    "llava": {"model_type": "llama"},
    "llava_onevision": {"model_type": "qwen2"},
    "smolvlm": {"model_type": "llama"},
    "idefics3": {"model_type": "llama"},
    "internvl": {"model_type": "qwen2"},
    "lfm2_vl": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
}
_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "vision_start_token_id")


def wrappers(root: Path) -> Iterator[Row]:
    """All of them, made below ``root``."""
    assert _KINDS.keys() - {"gemma3"} == WRAPPERS  # transformers takes Gemma 3 by itself
    for number, kind in enumerate(_KINDS):
        yield from _rows(root / "wrappers" / kind, kind, tied=number % 2 == 1)


def _rows(folder: Path, kind: str, *, tied: bool) -> Iterator[Row]:
    whole = _made(folder, kind, tied=tied)
    require_language_model(folder)
    (ours,) = our_logits([teacher("one", folder, None)])
    with torch.no_grad():
        theirs = whole(input_ids=IDS, output_hidden_states=True)
        _, states = Body(load_model(folder)).states(IDS, (1, 2))
    yield Row(f"teacher: {kind}, without pictures", loss(ours), loss(theirs.logits))
    yield Row(
        f"features: {kind}, mean of each layer",
        _means([states[1], states[2]]),
        _means(theirs.hidden_states[1:]),
    )
    yield planned(folder, kind, whole)
    arm = TorchEager(model=str(folder), threads=1)
    steps = [arm.begin(IDS[:, :6].numpy(), 4)]
    for _ in range(3):
        steps.append(arm.step(steps[-1]))
    greedy = whole.generate(IDS[:, :6], do_sample=False, max_new_tokens=4, eos_token_id=None)
    yield Row(
        f"bench: {kind}",
        str(torch.tensor([step.tolist() for step in steps]).T.tolist()),
        str(greedy[:, 6:].tolist()),
    )
    config = json.loads((folder / "config.json").read_text())
    yield Row(
        f"student: {kind}",
        said(lambda: choose_backend(config)),
        "its graph would need pictures",
        f"{kind} cannot be exported: it reads more than text. It can be a teacher",
    )
    adapter = folder.with_name(f"{kind}-adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(whole, LoraConfig(target_modules=Q, task_type="CAUSAL_LM"))
        _shaken(p for p in adapted.parameters() if p.requires_grad)
        adapted.save_pretrained(adapter)
        right = PeftModel.from_pretrained(_loaded(folder), str(adapter)).eval()
    with torch.no_grad():
        right_logits = right(input_ids=IDS).logits
    (ours,) = our_logits([teacher("one", folder, adapter)])
    yield Row(f"adapter: on {kind}", loss(ours), loss(right_logits))


def planned(folder: Path, kind: str, model: Any) -> Row:
    """Parameters and operations of a forward pass, as they are planned and as torch counts them."""
    shape = describe(folder_config(folder))
    trace = trace_line(shape, None, rows=2, length=12, precision="fp32")
    if any(type(module).__name__.endswith("Experts") for module in model.modules()):
        model.set_experts_implementation("batched_mm")  # torch counts no products of groups
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(input_ids=IDS, use_cache=False)
    return Row(
        f"plan: {kind}, parameters and operations",
        f"{shape.parameters} {trace.forward:.0f}",
        f"{model.num_parameters()} {counter.get_total_flops()}",
    )


def _made(folder: Path, kind: str, *, tied: bool) -> Any:
    inner = _TEXT | _KINDS[kind] | {"tie_word_embeddings": tied}
    config = CONFIG_MAPPING[kind](
        text_config=inner,
        vision_config=_PICTURES,
        tie_word_embeddings=tied,
        **dict.fromkeys(_TOKENS, 256),
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    _shaken(model.parameters())
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return _loaded(folder)


def _loaded(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def _shaken(parameters: Any) -> None:
    draw = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)


def _means(states: Any) -> str:
    found: list[Tensor] = list(states)
    return " ".join(f"{float(state.mean()):.5f}" for state in found)
