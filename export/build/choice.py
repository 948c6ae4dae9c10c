"""Which builder makes a language model's graph, from its configuration alone: known before anything
is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.contract.recipe import Provider

# Model types whose fused graphs the tests export and compare with torch.
KNOWN = ("granite", "llama", "mistral", "qwen2", "qwen3")
# Rope kinds whose fused graphs the tests compare with torch's logits.
_ROPES = ("default", "llama3")
_HEAD = 16  # onnxruntime's fused attention takes heads of a multiple of this many numbers


def choose_backend(config: Mapping[str, Any], *, provider: Provider = "cpu") -> tuple[str, str]:
    """The builder that `backend: auto` takes for a transformers configuration, and why.

    ``genai`` is ONNX Runtime GenAI's builder, whose graphs have fused attention; ``dynamo`` is
    torch's exporter.
    """
    architecture = (config.get("architectures") or [config.get("model_type")])[0]
    if config.get("model_type") not in KNOWN:
        known = ", ".join(KNOWN)
        return "dynamo", f"auto: GenAI's builder is not proven on {architecture}, only on {known}"
    if provider == "tensorrt":
        return "dynamo", "auto: TensorRT has no kernel for the builder's fused attention"
    if (kind := rope_kind(config)) not in _ROPES:
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
