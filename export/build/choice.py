"""The builder of a language model's graph, chosen from its configuration alone."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from limbeck.contract.errors import ModelError
from limbeck.contract.files import temporary_folder
from limbeck.contract.models.loading import know_wrapper
from limbeck.contract.recipe import Provider

# Kinds of rope whose fused graphs equal torch's logits (dynamic: within the context, which is all
# that a graph accepts). Fused graphs of yarn, linear and longrope differ by 10 in a logit.
_FUSED_ROPES = frozenset({"default", "llama3", "dynamic"})
# Model types whose fused graphs the tests export and compare with torch, and their ropes.
KNOWN: dict[str, frozenset[str]] = {
    **dict.fromkeys(("granite", "llama", "mistral", "qwen2", "qwen3"), _FUSED_ROPES),
    **dict.fromkeys(
        ("ernie4_5", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3"), frozenset({"default"})
    ),
}
# Kinds that torch.export cannot trace: transformers branches on a length at run time.
_UNTRACEABLE_ROPES = frozenset({"dynamic"})
# Further model types whose graphs of torch's exporter the tests compare with torch.
_TRACED = (
    "cohere2", "glm4", "gpt2", "gpt_neox", "nemotron", "olmo2", "opt", "phi", "stablelm",
    "starcoder2",
)  # fmt: skip
_HEAD = 16  # onnxruntime's fused attention takes heads of a multiple of this many numbers


def choose_backend(
    config: Mapping[str, Any], *, backend: str = "auto", provider: Provider = "cpu"
) -> tuple[str, str]:
    """The builder that ``backend`` of a recipe takes for a transformers configuration, and why.

    ``genai`` is ONNX Runtime GenAI's builder, whose graphs have fused attention; ``dynamo`` is
    torch's exporter. Raises `ModelError` for a kind of rope that the builder gets wrong, and
    for attention in both directions.
    """
    named, why = (
        (backend, "the recipe names it") if backend != "auto" else _choose(config, provider)
    )
    model_type, kinds = config.get("model_type"), rope_kinds(config)
    if str(model_type).startswith("gemma") and config.get("use_bidirectional_attention"):
        raise ModelError(
            f"{model_type} with use_bidirectional_attention cannot be exported: each token reads "
            "the tokens behind it, so keys and values cannot be kept while text is written. Use a "
            "student without it."
        )
    for kind in kinds & _UNTRACEABLE_ROPES if named == "dynamo" else ():
        raise ModelError(
            f"{model_type} with rope of kind {kind} cannot be exported ({why}): torch.export "
            "cannot trace it. Use a student with rope of another kind."
        )
    if named == "dynamo" and model_type not in (*KNOWN, *_TRACED):
        _require_traceable(config)
    fused = KNOWN.get(str(model_type), _FUSED_ROPES)
    for kind in sorted(kinds - fused) if named == "genai" else ():
        raise ModelError(
            f"{model_type} with rope of kind {kind} cannot be exported by GenAI's builder: its "
            "graph would give other logits. Set export.backend to auto."
        )
    if named == "genai" and _names_partial_rope(config):
        raise ModelError(
            f"{model_type} with a partial_rotary_factor cannot be exported by GenAI's builder: its "
            "graph does not run. Set export.backend to auto."
        )
    return named, why


def _require_traceable(config: Mapping[str, Any]) -> None:
    """Raise `ModelError` for an architecture that torch's exporter would refuse after training."""
    # They take seconds to import, and few students need this.
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    model_type = config.get("model_type")
    try:
        with temporary_folder() as folder:  # files spell numbers that `for_model` does not read
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
            read = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        know_wrapper(read.model_type)
        with torch.device("meta"):  # without weights
            model = AutoModelForCausalLM.from_config(read)
    except Exception:  # almost anything; the run tells why transformers cannot build it
        return
    why, takes = None, inspect.signature(model.forward).parameters
    cached = {type(layer) for layer in DynamicCache(config=model.config).layers}
    known = {DynamicLayer, DynamicSlidingWindowLayer}
    if "text_config" in config:
        why = "reads more than text"
    elif any(type(module).__name__.endswith("Experts") for module in model.modules()):
        why = "chooses among experts, which torch's exporter cannot write"
    elif "position_ids" not in takes:
        why = "takes no position_ids, so its padded batches cannot be made right"
    elif "past_key_values" not in takes:
        why = "keeps no keys and values, so every token would read the whole text again"
    elif getattr(model, "_is_stateful", False) or not cached <= known:
        why = "keeps something else than keys and values of each token"
    if why is not None:
        raise ModelError(
            f"{model_type} cannot be exported: it {why}. It can be a teacher; use a student of an "
            "architecture of docs/architectures.md."
        )


def _choose(config: Mapping[str, Any], provider: Provider) -> tuple[str, str]:
    architecture = (config.get("architectures") or [config.get("model_type")])[0]
    fused = KNOWN.get(str(config.get("model_type")))
    if fused is None:
        known = ", ".join(KNOWN)
        return "dynamo", f"auto: GenAI's builder is not proven on {architecture}, only on {known}"
    if provider == "tensorrt":
        return "dynamo", "auto: TensorRT has no kernel for the builder's fused attention"
    if wrong := sorted(rope_kinds(config) - fused):
        return "dynamo", f"auto: GenAI's builder is not right for rope of kind {wrong[0]}"
    if _names_partial_rope(config):
        return "dynamo", "auto: GenAI's builder is not right for a partial_rotary_factor"
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


def rope_kinds(config: Mapping[str, Any]) -> frozenset[str]:
    """The kinds of rotary embedding, by the name that either generation of transformers writes.

    Some architectures, such as gemma3, have one for each type of layer.
    """
    return frozenset(
        str(rope.get("rope_type") or rope.get("type") or "default") for rope in ropes_of(config)
    )


def ropes_of(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rope of a configuration, or that of each type of layer."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return [inner for inner in rope.values() if isinstance(inner, Mapping)] or [rope]


def _names_partial_rope(config: Mapping[str, Any]) -> bool:
    """Whether a share of each head's numbers is named that rope turns.

    The architectures in `KNOWN` turn all of them all the same.
    """
    return any(
        place.get("partial_rotary_factor") not in (None, 1) for place in (config, *ropes_of(config))
    )
