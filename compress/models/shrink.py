"""Cut a smaller model out of a larger one: layers, FFN neurons, KV-head groups, hidden width.

The cut keeps the most important parts, measured on text. Importance of a layer: block influence
1 - cos(state before, state after) (ShortGPT, arXiv 2403.03853). Of a neuron or a head: the norm of
its activations times the norm of the weights that read them (Wanda, arXiv 2306.11695). Of a hidden
channel: the mean absolute output of the norms (Minitron, arXiv 2407.14679).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from optimum.utils import NormalizedConfigManager
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from compress.models.language import BAD_CONFIG
from limbeck.contract.errors import ModelError
from limbeck.contract.recipe import Sizes
from limbeck.contract.sources.models import require_shrunk


@dataclass(frozen=True)
class Family:
    """Names of the parts of an architecture family, and the meaning of each parameter dimension.

    Dimensions: H hidden, F feed-forward, G fused gate and up (as two blocks), Q query heads x head
    size, K key/value heads x head size, P fused query, key and value (as three blocks), I the same
    interleaved by head; `.` is never cut. The first suffix that matches decides.
    """

    layers: str  # path of the module list
    norms: tuple[str, ...]  # in a layer
    final_norm: str
    ffn_out: str  # in a layer: reads the neurons
    attention_out: str  # in a layer: reads the heads
    ffn_field: str  # what the number of neurons is called in the configuration
    dims: tuple[tuple[str, str], ...]  # (regular expression of the name's end, dimensions)
    head_size_is_fixed: bool  # hidden / heads is the head size, so width and heads go together


_LLAMA = Family(
    layers="model.layers",
    norms=("input_layernorm", "post_attention_layernorm"),
    final_norm="model.norm",
    ffn_out="mlp.down_proj",
    ffn_field="intermediate_size",
    attention_out="self_attn.o_proj",
    dims=(
        (r"(embed_tokens|lm_head)\.weight", ".H"),
        (r"q_proj\.weight", "QH"),
        (r"[kv]_proj\.weight", "KH"),
        (r"q_proj\.bias", "Q"),
        (r"[kv]_proj\.bias", "K"),
        (r"o_proj\.weight", "HQ"),
        (r"(gate|up)_proj\.weight", "FH"),
        (r"(gate|up)_proj\.bias", "F"),
        (r"down_proj\.weight", "HF"),
        (r"(o|down)_proj\.bias", "H"),
        (r"[qk]_norm\.weight", "."),
        (r"(layernorm|norm)\.weight", "H"),
    ),
    head_size_is_fixed=False,
)
_PHI3 = replace(
    _LLAMA, dims=((r"qkv_proj\.weight", "PH"), (r"gate_up_proj\.weight", "GH"), *_LLAMA.dims)
)
_GEMMA3 = replace(
    _LLAMA, norms=("input_layernorm", "pre_feedforward_layernorm")
)  # the others norm what is added
_GPT2 = Family(
    layers="transformer.h",
    norms=("ln_1", "ln_2"),
    final_norm="transformer.ln_f",
    ffn_out="mlp.c_proj",
    ffn_field="n_inner",
    attention_out="attn.c_proj",
    dims=(
        (r"(wte|wpe|lm_head)\.weight", ".H"),
        (r"c_attn\.weight", "HP"),
        (r"c_attn\.bias", "P"),
        (r"attn\.c_proj\.weight", "QH"),
        (r"c_fc\.weight", "HF"),
        (r"c_fc\.bias", "F"),
        (r"mlp\.c_proj\.weight", "FH"),
        (r"(c_proj\.bias|ln_(1|2|f)\.(weight|bias))", "H"),
    ),
    head_size_is_fixed=True,
)
_NEOX = Family(
    layers="gpt_neox.layers",
    norms=("input_layernorm", "post_attention_layernorm"),
    final_norm="gpt_neox.final_layer_norm",
    ffn_out="mlp.dense_4h_to_h",
    ffn_field="intermediate_size",
    attention_out="attention.dense",
    dims=(
        (r"(embed_in|embed_out|lm_head)\.weight", ".H"),
        (r"query_key_value\.weight", "IH"),
        (r"query_key_value\.bias", "I"),
        (r"attention\.dense\.weight", "HQ"),
        (r"dense_h_to_4h\.weight", "FH"),
        (r"dense_h_to_4h\.bias", "F"),
        (r"dense_4h_to_h\.weight", "HF"),
        (r"(attention\.dense|dense_4h_to_h)\.bias", "H"),
        (r"(layernorm|layer_norm)\.(weight|bias)", "H"),
    ),
    head_size_is_fixed=True,
)
_OPT = Family(
    layers="model.decoder.layers",
    norms=("self_attn_layer_norm", "final_layer_norm"),
    final_norm="model.decoder.final_layer_norm",
    ffn_out="fc2",
    ffn_field="ffn_dim",
    attention_out="self_attn.out_proj",
    dims=(
        (r"(embed_tokens|embed_positions|lm_head)\.weight", ".H"),
        (r"[qkv]_proj\.weight", "QH"),
        (r"[qkv]_proj\.bias", "Q"),
        (r"out_proj\.weight", "HQ"),
        (r"fc1\.weight", "FH"),
        (r"fc1\.bias", "F"),
        (r"fc2\.weight", "HF"),
        (r"(fc2|out_proj)\.bias", "H"),
        (r"layer_norm\.(weight|bias)", "H"),
    ),
    head_size_is_fixed=True,
)
_BERT = Family(  # the encoder without a head; post-norm, so there is no final norm
    layers="encoder.layer",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    final_norm="embeddings.LayerNorm",
    ffn_out="output.dense",
    ffn_field="intermediate_size",
    attention_out="attention.output.dense",
    dims=(
        (r"embeddings\.\w+_embeddings\.weight", ".H"),
        (r"(query|key|value)\.weight", "QH"),
        (r"(query|key|value)\.bias", "Q"),
        (r"attention\.output\.dense\.weight", "HQ"),
        (r"intermediate\.dense\.weight", "FH"),
        (r"intermediate\.dense\.bias", "F"),
        (r"pooler\.dense\.weight", "HH"),
        (r"output\.dense\.weight", "HF"),
        (r"(dense|LayerNorm)\.(weight|bias)", "H"),
    ),
    head_size_is_fixed=True,
)
_DISTILBERT = Family(
    layers="transformer.layer",
    norms=("sa_layer_norm", "output_layer_norm"),
    final_norm="embeddings.LayerNorm",
    ffn_out="ffn.lin2",
    ffn_field="hidden_dim",
    attention_out="attention.out_lin",
    dims=(
        (r"embeddings\.\w+_embeddings\.weight", ".H"),
        (r"[qkv]_lin\.weight", "QH"),
        (r"[qkv]_lin\.bias", "Q"),
        (r"out_lin\.weight", "HQ"),
        (r"lin1\.weight", "FH"),
        (r"lin1\.bias", "F"),
        (r"lin2\.weight", "HF"),
        (r"(lin2|out_lin)\.bias", "H"),
        (r"(LayerNorm|layer_norm)\.(weight|bias)", "H"),
    ),
    head_size_is_fixed=True,
)
FAMILIES = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite"), _LLAMA) | {
    "phi3": _PHI3,
    "gemma3_text": _GEMMA3,
    "opt": _OPT,
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": _DISTILBERT,
}


@dataclass(frozen=True)
class Importance:
    """Scores on calibration text; larger is more important."""

    layers_l: Tensor  # block influence by layer
    neurons_lF: Tensor
    heads_lG: Tensor  # by key/value group
    hidden_H: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """By name, to be saved."""
        return {
            "layers": self.layers_l,
            "neurons": self.neurons_lF,
            "heads": self.heads_lG,
            "hidden": self.hidden_H,
        }


def shrink(
    model: Any, config: Sizes, batches: Sequence[Tensor]
) -> tuple[Any, Importance, dict[str, Any]]:
    """Cut ``model`` to the sizes of ``config``; ``batches`` are token ids [R, L] for calibration.

    Returns the smaller model (fp32, loadable by plain transformers), the importance and the sizes
    kept. Raises `ModelError` for an architecture or a size that cannot be cut.
    """
    family, source = family_of(model.config), model.config
    importance = measure_importance(model, family, batches)
    heads, groups, head_size = _heads(source)
    wanted = shrunk_sizes(source, config)
    layers = _top(importance.layers_l, wanted["layers"])
    hidden = _top(importance.hidden_H, wanted["hidden_size"])
    smaller_config = shrunk_config(source, config, layers)
    auto = AutoModelForCausalLM if _has_head(model) else AutoModel
    smaller = auto.from_config(smaller_config, dtype=torch.float32)
    state, place = model.state_dict(), re.compile(rf"^{re.escape(family.layers)}\.(\d+)\.(.*)$")
    with torch.no_grad():
        for name, target in smaller.state_dict().items():
            match = place.match(name)
            layer = layers[int(match[1])] if match else 0
            neurons = _top(importance.neurons_lF[layer], wanted["intermediate_size"])
            cuts = {
                "H": hidden,
                "F": neurons,
                "G": neurons + [importance.neurons_lF.shape[1] + n for n in neurons],
                **_head_cuts(
                    _top(importance.heads_lG[layer], wanted["kv_heads"]), heads, groups, head_size
                ),
            }
            origin = f"{family.layers}.{layer}.{match[2]}" if match else name
            target.copy_(_cut(state[origin], origin, family, cuts))
    smaller.tie_weights()
    if _has_head(model):
        smaller.generation_config = model.generation_config
    kept = {
        **wanted,
        "kept_layers": layers,
        "parameters_before": model.num_parameters(),
        "parameters": smaller.num_parameters(),
    }
    return smaller, importance, kept


def family_of(config: Any) -> Family:
    """Family of an architecture: how it is cut. Raises `ModelError` if it is unknown."""
    require_shrunk({"model_type": config.model_type})
    if config.model_type == "opt" and not (
        config.do_layer_norm_before and config.word_embed_proj_dim == config.hidden_size
    ):
        raise ModelError(
            "student.kind: shrink cuts an opt only where norms stand before what they norm and "
            "the embedding is as wide as the layers; "
            f"found do_layer_norm_before {config.do_layer_norm_before}, word_embed_proj_dim "
            f"{config.word_embed_proj_dim} and "
            f"hidden_size {config.hidden_size}. Use kind: lora or fresh."
        )
    return FAMILIES[config.model_type]


def shrunk_sizes(source: Any, config: Sizes) -> dict[str, int]:
    """Sizes that are kept of the configuration ``source``. Raises `ModelError` for a bad size."""
    family, facts = family_of(source), _facts(source)
    heads, groups, head_size = _heads(source)
    neurons = getattr(source, family.ffn_field, None) or 4 * facts.hidden_size  # gpt2 leaves it out
    sizes = {
        "layers": (config.layers, int(facts.num_layers), 1),
        "intermediate_size": (config.intermediate_size, int(neurons), config.round_to),
        "kv_heads": (config.kv_heads, groups, 1),
        "hidden_size": (config.hidden_size, int(facts.hidden_size), config.round_to),
    }
    wanted = {name: _rounded(name, *size) for name, size in sizes.items()}
    kept_heads = wanted["kv_heads"] * (heads // groups)
    if family.head_size_is_fixed and wanted["hidden_size"] != kept_heads * head_size:
        raise ModelError(
            f"student: in {source.model_type} the hidden width is heads x {head_size}; found "
            f"hidden_size {wanted['hidden_size']} and "
            f"{kept_heads} heads. Set kv_heads and hidden_size together, for example kv_heads: "
            f"{kept_heads}, hidden_size: {kept_heads * head_size}."
        )
    return wanted


def shrunk_config(source: Any, config: Sizes, layers: Sequence[int] | None = None) -> Any:
    """Configuration of the cut model; ``layers`` are the layers kept, by default the first ones."""
    family, facts, wanted = family_of(source), _facts(source), shrunk_sizes(source, config)
    heads, groups, head_size = _heads(source)
    fields: dict[str, Any] = {
        facts.NUM_LAYERS: wanted["layers"],
        family.ffn_field: wanted["intermediate_size"],
        facts.HIDDEN_SIZE: wanted["hidden_size"],
        facts.NUM_ATTENTION_HEADS: wanted["kv_heads"] * (heads // groups),
    }
    if not family.head_size_is_fixed:
        fields |= {"num_key_value_heads": wanted["kv_heads"], "head_dim": head_size}
    kept = layers if layers is not None else range(wanted["layers"])
    for name in ("layer_types", "no_rope_layers"):  # of each layer one entry
        if entries := getattr(source, name, None):
            fields[name] = [entries[layer] for layer in kept]
    if hasattr(source, "word_embed_proj_dim"):
        fields["word_embed_proj_dim"] = wanted["hidden_size"]
    try:
        return type(source).from_dict({**source.to_dict(), **fields})
    except BAD_CONFIG as error:
        cause = error.__cause__ or error
        raise ModelError(
            f"student: {source.model_type} cannot have these sizes: {cause} "
            "Change kv_heads or hidden_size."
        ) from error


@torch.no_grad()
def measure_importance(model: Any, family: Family, batches: Sequence[Tensor]) -> Importance:
    """Scores of layers, neurons, key/value groups and hidden channels on token ids [R, L]."""
    layers = model.get_submodule(family.layers)
    _, groups, _ = _heads(model.config)
    squares: dict[tuple[str, int], Tensor] = {}
    channels: list[Tensor] = []

    def read(kind: str, layer: int) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            value = inputs[0].float().flatten(0, -2).square().sum(0)
            squares[kind, layer] = squares.get((kind, layer), torch.zeros_like(value)) + value

        return hook

    def channel(_: Any, __: Any, output: Tensor) -> None:
        channels.append(output.float().flatten(0, -2).abs().mean(0))

    handles = []
    for index, layer in enumerate(layers):
        handles.append(
            layer.get_submodule(family.ffn_out).register_forward_pre_hook(read("ffn", index))
        )
        handles.append(
            layer.get_submodule(family.attention_out).register_forward_pre_hook(
                read("attention", index)
            )
        )
        handles += [
            layer.get_submodule(norm).register_forward_hook(channel) for norm in family.norms
        ]
    handles.append(model.get_submodule(family.final_norm).register_forward_hook(channel))
    influence = torch.zeros(len(layers), dtype=torch.float64)
    with _removed(handles):
        for ids in batches:
            body = getattr(model, model.base_model_prefix) if _has_head(model) else model
            options = {"use_cache": False} if _has_head(model) else {}
            states = body(input_ids=ids, output_hidden_states=True, **options).hidden_states
            for index in range(len(layers)):
                cosine = torch.nn.functional.cosine_similarity(
                    states[index].float(), states[index + 1].float(), dim=-1
                )
                influence[index] += float((1 - cosine).mean()) / len(batches)
    neurons = torch.stack(
        [
            squares["ffn", i].sqrt() * _reading_norm(layer.get_submodule(family.ffn_out))
            for i, layer in enumerate(layers)
        ]
    )
    attention = torch.stack(
        [
            squares["attention", i].sqrt()
            * _reading_norm(layer.get_submodule(family.attention_out))
            for i, layer in enumerate(layers)
        ]
    )
    grouped = attention.unflatten(1, (groups, -1)).square().sum(-1).sqrt()
    return Importance(influence.float(), neurons, grouped, torch.stack(channels).mean(0))


def _has_head(model: Any) -> bool:
    """Whether it is a language model around its body, or an encoder's body by itself."""
    return hasattr(model, model.base_model_prefix)


def _reading_norm(linear: Any) -> Tensor:
    """Norm of the weights that read each input of a Linear ([out, in]) or a Conv1D ([in, out])."""
    norm: Tensor = linear.weight.float().norm(dim=1 if type(linear).__name__ == "Conv1D" else 0)
    return norm


def _facts(config: Any) -> Any:
    kind = config.model_type.replace("gemma3_text", "gemma")  # which optimum does not list
    return NormalizedConfigManager.get_normalized_config_class(kind)(config)


def _heads(config: Any) -> tuple[int, int, int]:
    """Query heads, key/value groups and head size, whatever the configuration calls them."""
    facts = _facts(config)
    heads = int(facts.num_attention_heads)
    size = getattr(config, "head_dim", None) or facts.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, int(size)


def _rounded(name: str, wanted: int | None, present: int, multiple: int) -> int:
    if wanted is None:
        return present
    if wanted > present:
        raise ModelError(
            f"student.{name}: found {wanted}, but the base has only {present}; "
            f"choose {present} or less."
        )
    return max(multiple, wanted // multiple * multiple) if wanted < present else present


def _top(scores: Tensor, count: int) -> list[int]:
    """Places of the ``count`` greatest scores, in their old order; ties go to the earlier place."""
    order = torch.argsort(scores, descending=True, stable=True)[:count]
    return sorted(order.tolist())


def _head_cuts(kept_groups: list[int], heads: int, groups: int, size: int) -> dict[str, list[int]]:
    share = heads // groups
    kept = [g * share + i for g in kept_groups for i in range(share)]
    queries = [h * size + i for h in kept for i in range(size)]
    keys = [g * size + i for g in kept_groups for i in range(size)]
    starts = heads * size, (heads + groups) * size  # of keys and values
    return {
        "Q": queries,
        "K": keys,
        "P": queries + [start + key for start in starts for key in keys],
        "I": [(h * 3 + part) * size + i for h in kept for part in range(3) for i in range(size)],
    }


def _cut(tensor: Tensor, name: str, family: Family, cuts: dict[str, list[int]]) -> Tensor:
    for suffix, dims in family.dims:
        if re.search(rf"{suffix}$", name):
            for axis, dim in enumerate(dims):
                if dim != ".":
                    tensor = tensor.index_select(
                        axis, torch.tensor(cuts[dim], device=tensor.device)
                    )
            return tensor
    raise ModelError(
        f"student.kind: shrink does not know how to cut the parameter {name} "
        f"{tuple(tensor.shape)}; use kind: lora or fresh."
    )


@contextmanager
def _removed(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
