"""Which builder makes a language model's graph, from its configuration alone: known before anything
is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.contract.errors import ModelError
from limbeck.contract.recipe import Provider

# Model types whose fused graphs the tests export and compare with torch.
KNOWN = ("granite", "llama", "mistral", "qwen2", "qwen3")
# Kinds of rope whose fused graphs equal torch's logits (dynamic: within the context, which is all
# that a graph accepts). Fused graphs of yarn, linear and longrope differ by 10 in a logit.
_FUSED_ROPES = ("default", "llama3", "dynamic")
# Kinds that torch.export cannot trace: transformers branches on a length at run time.
_UNTRACEABLE_ROPES = ("dynamic",)
_HEAD = 16  # onnxruntime's fused attention takes heads of a multiple of this many numbers


def choose_backend(config: Mapping[str, Any], *, provider: Provider = "cpu") -> tuple[str, str]:
    """The builder that `backend: auto` takes for a transformers configuration, and why.

    ``genai`` is ONNX Runtime GenAI's builder, whose graphs have fused attention; ``dynamo`` is
    torch's exporter. Raises `ModelError` for a kind of rope that neither builds correctly.
    """
    backend, why = _choose(config, provider)
    kind = rope_kind(config)
    if backend == "dynamo" and kind in _UNTRACEABLE_ROPES:
        raise ModelError(
            f"{config.get('model_type')} with rope of kind {kind} cannot be exported ({why}), and "
            "torch.export cannot trace it; use a student with rope of another kind."
        )
    return backend, why


def _choose(config: Mapping[str, Any], provider: Provider) -> tuple[str, str]:
    architecture = (config.get("architectures") or [config.get("model_type")])[0]
    if config.get("model_type") not in KNOWN:
        known = ", ".join(KNOWN)
        return "dynamo", f"auto: GenAI's builder is not proven on {architecture}, only on {known}"
    if provider == "tensorrt":
        return "dynamo", "auto: TensorRT has no kernel for the builder's fused attention"
    if (kind := rope_kind(config)) not in _FUSED_ROPES:
        return "dynamo", f"auto: GenAI's builder is not right for rope of kind {kind}"
    heads = config.get("num_attention_heads")
    size = config.get("head_dim") or (config.get("hidden_size", 0) // heads if heads else 0)
    if size % _HEAD:
        return (
            "dynamo",
            f"auto: heads of {size} numbers; fused attention needs a multiple of {_HEAD}",
        )
    return (
        "genai",
        f"auto: ONNX Runtime GenAI's builder knows {architecture} and fuses its attention",
    )


def rope_kind(config: Mapping[str, Any]) -> str:
    """The kind of rotary embedding, by the name that either generation of transformers writes."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return str(rope.get("rope_type") or rope.get("type") or "default")
