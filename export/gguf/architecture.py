"""How llama.cpp sees a transformers configuration: its name of the architecture, its metadata, and
how its tensors differ from transformers'.

The rules follow llama.cpp's `convert_hf_to_gguf.py`. A configuration that llama.cpp would compute
differently is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from limbeck.contract.data.arrays import Floats
from limbeck.contract.errors import ModelError

# llama.cpp's name of each architecture of transformers that the tests write and read back.
ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
# llama.cpp rotates neighbouring numbers in these, transformers the two halves of a head.
_PERMUTED = ("llama",)
_ACTIVATIONS = {"gemma3": "gelu_pytorch_tanh", "gpt2": "gelu_new"}  # all others have SiLU
_PERIOD = 6  # of gemma3: every sixth layer reads the whole text
_SLIDING_THETA = 10_000.0  # of gemma3: what llama.cpp takes for the layers with a window


def architecture(config: Mapping[str, Any]) -> str:
    """llama.cpp's name of the architecture of ``config``, a whole transformers configuration.

    Raises `ModelError` naming what llama.cpp does not know or would compute differently.
    """
    model_type = str(config.get("model_type"))
    name = ARCHITECTURES.get(model_type)
    if name is None:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(
            f"no GGUF can be written of a {model_type} model; the architectures are {known}. "
            "Leave the gguf forms out of export.forms."
        )
    for what in _differences(name, config):
        raise ModelError(
            f"no GGUF can be written of this {model_type} model: llama.cpp has no {what}. "
            "Leave the gguf forms out of export.forms."
        )
    return name


def whole_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with transformers' defaults filled in. Raises `ModelError`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        made = AutoConfig.for_model(**{"model_type": None, **config})
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ModelError(f"transformers cannot read the configuration: {error}") from None
    # transformers ignores fields of other architectures, which conversions leave in a file.
    return {
        name: value
        for name, value in made.to_dict().items()
        if hasattr(type(made), name) or name == "head_dim"
    }


def _differences(name: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Parts of ``config`` that llama.cpp's ``name`` does not compute."""
    activation = config.get("hidden_activation") or config.get("hidden_act")
    activation = config.get("activation_function") or activation
    if activation != (expected := _ACTIVATIONS.get(name, "silu")):
        yield f"activation {activation} there, only {expected}"
    for number, rope in _ropes(config):
        kind = rope.get("rope_type", "default")
        known = ("default", "linear", "llama3") if name in _PERMUTED else ("default", "linear")
        if kind not in known or (number and kind != "default"):
            yield f"rope of kind {kind} there"
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            yield "partial rope there"
    if name == "gpt2":
        if not config.get("scale_attn_weights", True):
            yield "unscaled attention"
        if config.get("scale_attn_by_inverse_layer_idx"):
            yield "attention scaled by the layer's number"
        return
    if name == "gemma3":
        yield from _gemma_differences(config)
    elif _window(config):
        yield f"sliding window of {_window(config)} tokens there"
    if name == "qwen3" and config.get("attention_bias"):
        yield "attention bias there"
    width = head_size(config) * int(config["num_attention_heads"])
    if name == "qwen2" and width != config["hidden_size"]:
        yield f"heads of {width} numbers in layers of {config['hidden_size']} there"


def _gemma_differences(config: Mapping[str, Any]) -> Iterator[str]:
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(field) is not None:
            yield f"{field} there"
    if config.get("query_pre_attn_scalar") != config.get("head_dim"):
        yield f"attention scale {config.get('query_pre_attn_scalar')} ** -0.5"
    if config.get("use_bidirectional_attention"):
        yield "attention in both directions"
    if config.get("attention_bias"):
        yield "attention bias there"
    expected = [
        "full_attention" if (layer + 1) % _PERIOD == 0 else "sliding_attention"
        for layer in range(int(config["num_hidden_layers"]))
    ]
    if list(config.get("layer_types") or expected) != expected:
        yield f"other order of windows than one full layer in {_PERIOD}"
    if len(expected) < _PERIOD:
        yield f"model of {len(expected)} layers, none of which reads the whole text"
    sliding = dict(_ropes(config)).get(1, {})
    if sliding.get("rope_theta", _SLIDING_THETA) != _SLIDING_THETA:
        yield f"rope_theta {sliding['rope_theta']} in layers with a window"


def _window(config: Mapping[str, Any]) -> int | None:
    """Size of the sliding window, if it is shorter than the longest text."""
    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return None
    return None if window >= config["max_position_embeddings"] else int(window)


def _ropes(config: Mapping[str, Any]) -> list[tuple[int, Mapping[str, Any]]]:
    """Ropes of layers that read the whole text (0), and of those with a window (1)."""
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope:
        return [(0, rope["full_attention"]), (1, rope.get("sliding_attention") or {})]
    return [(0, rope)] if rope else []


def head_size(config: Mapping[str, Any]) -> int:
    """Numbers of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def write_metadata(writer: Any, name: str, config: Mapping[str, Any]) -> None:
    """Write the sizes and constants of ``config`` with gguf's ``writer``."""
    if name == "gpt2":
        width = int(config["n_embd"])
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(width)
        writer.add_feed_forward_length(config.get("n_inner") or 4 * width)
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_vocab_size(config["vocab_size"])
    rope = dict(_ropes(config)).get(0, {})
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
    if rope.get("rope_type") == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if name == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
    else:
        writer.add_rope_dimension_count(head_size(config))


def layers_of(config: Mapping[str, Any]) -> int:
    """Number of decoder layers."""
    return int(config.get("num_hidden_layers") or config["n_layer"])


def as_llama_cpp(name: str, tensor: str, value: Floats, config: Mapping[str, Any]) -> Floats:
    """The ``value`` of a transformers ``tensor`` as llama.cpp's ``name`` stores it."""
    if name in _PERMUTED and (kind := next((k for k in _HEADS if f".{k}_proj." in tensor), None)):
        return _interleave(value, int(config[_HEADS[kind]]))
    if name == "gemma3" and tensor.endswith("norm.weight"):
        return value + 1  # transformers multiplies by 1 + weight
    if name == "gpt2" and tensor.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return np.ascontiguousarray(value.T)  # its linear layers store [inputs, outputs]
    return value


_HEADS = {"q": "num_attention_heads", "k": "num_key_value_heads"}


def _interleave(value: Floats, heads: int) -> Floats:
    """Order the outputs of each head so that rope turns neighbours: 0, d/2, 1, d/2 + 1, …"""
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(value.shape)


def rope_factors(config: Mapping[str, Any]) -> Floats | None:
    """What llama.cpp divides each frequency of a `llama3` rope by; None for other ropes."""
    rope = dict(_ropes(config)).get(0, {})
    if rope.get("rope_type") != "llama3":
        return None
    size = head_size(config)
    factor, context = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    found = []
    for at in range(0, size, 2):
        turns = context / (2 * math.pi * float(rope["rope_theta"]) ** (at / size))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - smooth) / factor + smooth))
    return np.asarray(found, np.float32)
