"""What a GGUF file says of its model, as llama.cpp reads it.

transformers takes the sizes out of a file and leaves out much that changes the answers: scaled
ropes, Llama 3's factors, biases, the width of heads, soft caps. Here its configuration gets them.
What neither it nor this module reads is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from limbeck.contract.errors import ModelError
from limbeck.contract.sources.gguf import quick_gguf, quick_reader

_FREQUENCIES = "rope_freqs.weight"
_LONG = ("rope_factors_long.weight", "rope_factors_short.weight")
_KV_HEADS = "attention.head_count_kv"
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps", "layer_norm_epsilon")
_LARGE_GEMMAS = {
    "gemma2": 46,
    "gemma3_text": 62,
}  # layers of the 27B, whose attention scale differs
_WINDOWED = ("gemma2", "gemma3_text", "phi3")
_CONTEXT_KEY = "context_length"
# The shapes of the weights prove these sizes, and the rest changes no answer.
_HARMLESS = (
    _CONTEXT_KEY, "block_count", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", _KV_HEADS, "expert_shared_count", "pooling_type",
    "rope.scaling.finetuned", "tensor_data_layout", "use_parallel_residual",
)  # fmt: skip
# Values at which a key changes nothing.
_NEUTRAL: dict[str, Collection[Any]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.scale": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_scale": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
}
# Of files that transformers cannot read at all.
UNREADABLE = (
    "Download the file again; if that does not help, name the folder of the model that it was made "
    "from, with its safetensors."
)
_REMEDY = "Name the folder of the model that it was made from, with its safetensors."


class _Metadata:
    """The keys of a file's architecture; those that were read are remembered."""

    def __init__(self, reader: Any) -> None:
        self.architecture = str(reader.fields["general.architecture"].contents())
        start = f"{self.architecture}."
        self.given: dict[str, Any] = {
            name.removeprefix(start): field.contents()
            for name, field in reader.fields.items()
            if name.startswith(start)
        }
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.unread = set(self.given)

    def take(self, name: str, default: Any = None) -> Any:
        self.unread.discard(name)
        return self.given.get(name, default)


def gguf_config(file: Path) -> Any:
    """The transformers configuration of the model in ``file``.

    Raises `ModelError` for metadata that change the model and cannot be part of a configuration,
    and what transformers raises for a file that it cannot read.
    """
    with quick_gguf():
        config = AutoConfig.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False, local_files_only=True
        )
    found = _Metadata(quick_reader()(file))
    if found.architecture in GGUF_CONFIG_ARCHS:  # transformers reads all of their own keys
        _require_neutral(file, {k: found.given[k] for k in found.given if "rope.scaling" in k})
        return config
    read = GGUF_CONFIG_MAPPING.get(config.model_type.removesuffix("_text"), {})
    found.unread -= {name for name, field in read.items() if field}
    _complete(config, found)
    context = int(found.given.get(_CONTEXT_KEY, 0))
    left = {name: found.given[name] for name in found.unread}
    if (left.get("attention.sliding_window") or 0) >= context:
        left.pop("attention.sliding_window", None)
    _require_neutral(file, left)
    if getattr(config, "rope_parameters", None) and _FREQUENCIES in found.tensors:
        _set_frequencies(config, found.tensors[_FREQUENCIES], file)
    return config


def _require_neutral(file: Path, left: Mapping[str, Any]) -> None:
    for name, value in sorted(left.items()):
        if name in _HARMLESS or any(value == neutral for neutral in _NEUTRAL.get(name, ())):
            continue
        raise ModelError(
            f"{file}: its metadata say {name} = {str(value)[:80]}, which cannot be read for this "
            f"architecture; without it the model would be another one. {_REMEDY}"
        )


def _complete(config: Any, found: _Metadata) -> None:
    """Set in ``config`` what llama.cpp reads of ``found``, with its defaults."""
    kind, heads = config.model_type, getattr(config, "num_attention_heads", None)
    if heads is None:  # mamba
        return
    width = config.hidden_size
    if kind == "gpt2":
        config.n_inner = found.take("feed_forward_length")
        config.n_positions = found.take(_CONTEXT_KEY)
    head = found.take("attention.key_length", width // heads)
    if found.given.get("attention.value_length", head) == head:
        found.unread.discard("attention.value_length")
    if getattr(config, "head_dim", None) != head and (
        head != width // heads or "head_dim" in config.to_dict()
    ):
        config.head_dim = head
    if _KV_HEADS not in found.given and "num_key_value_heads" in config.to_dict():
        config.num_key_value_heads = heads
    for name in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        field = next((field for field in _EPSILONS if hasattr(config, field)), None)
        if field is not None and name in found.given:
            setattr(config, field, found.take(name))
    if kind in _WINDOWED:
        config.sliding_window = found.take("attention.sliding_window")
    for field, tensor in {"attention_bias": "attn_q", "mlp_bias": "ffn_up"}.items():
        if hasattr(config, field):
            setattr(config, field, f"blk.0.{tensor}.bias" in found.tensors)
    if kind in ("qwen2_moe", "qwen3_moe"):
        used = int(found.given["expert_used_count"])
        size = found.take("expert_feed_forward_length", config.intermediate_size // used)
        config.moe_intermediate_size = size
        shared = found.take("expert_shared_feed_forward_length", config.intermediate_size)
        config.shared_expert_intermediate_size = shared
    if kind in _LARGE_GEMMAS:
        large = config.num_hidden_layers == _LARGE_GEMMAS[kind]
        config.query_pre_attn_scalar = width // heads if large else head
        caps = (50.0, 30.0) if kind == "gemma2" else (None, None)
        config.final_logit_softcapping = found.take("final_logit_softcapping", caps[1])
        if kind == "gemma2":
            config.attn_logit_softcapping = found.take("attn_logit_softcapping", caps[0])
    if getattr(config, "rope_parameters", None):
        _set_rope(config, found, head)


def _set_rope(config: Any, found: _Metadata, head: int) -> None:
    rope = _rope(found)
    turned = found.given.get("rope.dimension_count", head)
    if "partial_rotary_factor" in config.rope_parameters:
        rope["partial_rotary_factor"] = turned / head
        turned = head
    (found.unread.discard if turned == head else found.unread.add)("rope.dimension_count")
    if config.model_type == "gemma3_text":
        window = {"rope_type": "default", "rope_theta": found.take("rope.freq_base_swa", 10_000.0)}
        rope = {"full_attention": rope, "sliding_attention": window}
    if rope.get("rope_type") == "longrope":  # which reads it from both places
        config.original_max_position_embeddings = rope["original_max_position_embeddings"]
    config.rope_parameters = rope


def _rope(found: _Metadata) -> dict[str, Any]:
    theta = float(found.take("rope.freq_base", 10_000.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    kind = found.given.get("rope.scaling.type", "linear")
    original = found.take("rope.scaling.original_context_length", found.given.get(_CONTEXT_KEY))
    if all(name in found.tensors for name in _LONG):
        found.unread.discard("rope.scaling.type")
        factors = [found.tensors[name].data.tolist() for name in _LONG]
        return rope | {
            "rope_type": "longrope",
            "original_max_position_embeddings": original,
            "attention_factor": float(found.take("rope.scaling.attn_factor", 1.0)),
            "long_factor": factors[0],
            "short_factor": factors[1],
        }
    if kind not in ("none", "linear", "yarn"):
        return rope
    found.unread.discard("rope.scaling.type")
    factor = found.take("rope.scaling.factor", found.take("rope.scale_linear", 0.0))
    if kind == "none" or factor in (0, 1):
        return rope
    rope |= {"rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        scale = found.take("rope.scaling.attn_factor", 1.0)
        rope |= {
            "original_max_position_embeddings": original,
            "attention_factor": scale * (1 + 0.1 * math.log(factor)),
            "beta_fast": float(found.take("rope.scaling.yarn_beta_fast", 32.0)),
            "beta_slow": float(found.take("rope.scaling.yarn_beta_slow", 1.0)),
        }
    return rope


def _set_frequencies(config: Any, tensor: Any, file: Path) -> None:
    """Set the `llama3` rope that divides its frequencies by the numbers in ``tensor``.

    A file does not hold what they were computed from: the factor, the original context, and two
    bounds, of which one is a matter of scale.
    """
    rope = config.rope_parameters
    factors = torch.tensor(tensor.data.tolist(), dtype=torch.float64)
    if rope.get("rope_type") == "default":
        plain, _ = ROPE_INIT_FUNCTIONS["llama3"](_with_rope(config, _NO_FACTORS), "cpu")
        for fields in _explanations(factors, 2 * math.pi / plain.double()):
            found, _ = ROPE_INIT_FUNCTIONS["llama3"](_with_rope(config, fields), "cpu")
            if torch.allclose(found.double() * factors, plain.double(), rtol=1e-5, atol=0):
                config.rope_parameters = rope | fields
                return
    raise ModelError(
        f"{file}: its rope divides the frequencies by numbers ({_FREQUENCIES}) that no rope of "
        f"transformers gives. {_REMEDY}"
    )


_NO_FACTORS: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 1.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _with_rope(config: Any, fields: Mapping[str, Any]) -> Any:
    other = type(config).from_dict(config.to_dict())
    other.rope_parameters = config.rope_parameters | fields
    return other


def _explanations(factors: torch.Tensor, lengths: torch.Tensor) -> Sequence[dict[str, Any]]:
    """Ropes of kind `llama3` that may divide the frequencies of wave ``lengths`` by ``factors``."""
    factor = float(factors.max())
    if len(factors) != len(lengths) or factor <= 1:
        return [_NO_FACTORS] if len(factors) == len(lengths) else []
    share = (1 / factors - 1 / factor) / (1 - 1 / factor)  # 1: as it was, 0: divided by the factor
    between = (share > 1e-6) & (share < 1 - 1e-6)
    if int(between.sum()) > 1:  # share = (context / length - low) / (high - low), low = 1
        inverse = 1 / lengths[between]
        slope = float((share[between][0] - share[between][-1]) / (inverse[0] - inverse[-1]))
        offset = slope * float(inverse[0]) - float(share[between][0])
        highs = (4.0, 1 + 1 / max(offset, 1e-6))  # most models have 4
        pairs = [(high, slope * (high - 1)) for high in highs]
    elif bool(between.any()):
        pairs = [(4.0, float((3 * share[between][0] + 1) * lengths[between][0]))]
    else:  # any context between the waves that are kept and those that are not
        first = lengths[share < 0.5].min()
        kept = lengths[share > 0.5].max() if bool((share > 0.5).any()) else first / 16
        high = min(4.0, float(first / kept) ** 0.5)
        pairs = [(high, float(high * kept * first) ** 0.5)]
    return [
        _NO_FACTORS
        | {
            "factor": _rounded(factor),
            "high_freq_factor": _rounded(high),
            "original_max_position_embeddings": _rounded(context),
        }
        for high, context in pairs
    ]


def _rounded(value: float) -> float:
    """``value`` without what rounding to 32 bits has added; an integer where it is one."""
    found = float(f"{value:.6g}")
    return int(found) if found > 1000 and found.is_integer() else found


def require_all_read(file: Path, model: Any) -> None:
    """Raise `ModelError` unless every tensor of ``file`` has its place in the loaded ``model``.

    transformers leaves out what it does not know, without a word.
    """
    found = _Metadata(quick_reader()(file))
    if found.architecture in GGUF_CONFIG_ARCHS:
        return
    processor = TENSOR_PROCESSORS.get(found.architecture, TensorProcessor)
    places = get_gguf_hf_weights_map(model, processor(config={}))
    left = [
        n
        for n in found.tensors
        if n not in places and n not in (_FREQUENCIES, *_LONG) and "_exps." not in n
    ]
    if left:
        raise ModelError(
            f"{file}: {len(left)} of its tensors have no place in transformers' "
            f"{type(model).__name__} (for example {left[0]}); without them the model would be "
            f"another one. {_REMEDY}"
        )
    if found.architecture == "llama" and _KV_HEADS not in found.given:
        _undo_order(model)


def _undo_order(model: Any) -> None:
    """Order the outputs of each head in halves, as transformers does for files with both counts of
    heads only; llama.cpp turns neighbours."""
    heads = model.config.num_attention_heads
    for name, tensor in model.state_dict().items():
        if ".q_proj." in name or ".k_proj." in name:
            pairs = tensor.view(heads, -1, 2, *tensor.shape[1:])
            tensor.copy_(pairs.transpose(1, 2).reshape(tensor.shape))
