"""The size of each exported form from a model's shapes alone: what rounding and the graph builders
will write.

Reads modules on the meta device. How the graph file grows with depth was measured on tiny models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn

from export.build.choice import choose_backend, rope_kinds, ropes_of
from export.build.rope import COMPUTED, LARGE
from export.gguf.architecture import architecture, layers_of
from export.gguf.write import arch_number, tensor_bytes
from export.round.blocks import Blockwise
from export.round.scheme import Scheme, encoder_scheme, scheme_for, stored_bytes
from export.tasks.base import AnyForm
from limbeck.contract.recipe import Form, Provider
from limbeck.contract.recipe.encoder import EncoderForm
from limbeck.contract.recipe.export import GgufForm

_ATTENTION_OUT = re.compile(r"(o_proj|out_proj|c_proj|dense)$")
# Bytes of the graph file without weights: of a model, and of one of its layers in fp32, in
# blockwise forms, and in forms with nodes that round activations.
_Growth = tuple[int, tuple[int, int, int]]
_GENAI: _Growth = (6_000, (4_500, 5_600, 10_500))
_DYNAMO: _Growth = (6_300, (2_500, 4_350, 6_000))  # of GPT-2, GPT-NeoX and OPT
_ENCODER: _Growth = (11_500, (2_100, 4_100, 7_200))  # of BERT, RoBERTa and DistilBERT
_WITH_PROMPT = 2.3  # times the bytes of a graph that is shipped with one for long prompts
_INLINE = 256  # bytes below which torch's exporter keeps a tensor in the graph of an encoder


@dataclass(frozen=True)
class Matrix:
    """A constant matrix of the graph: N outputs, K inputs, and its part of the rounding scheme."""

    channels: int
    width: int
    part: Literal["head", "attention", "narrow", "body"]

    @property
    def numbers(self) -> int:
        """Weights in it."""
        return self.channels * self.width


def form_bytes(
    model: Any,
    form: AnyForm | GgufForm,
    *,
    task: str = "causal-lm",
    backend: str = "auto",
    provider: Provider = "cpu",
) -> int:
    """Bytes of ``form`` for a model of ``task`` on the meta device: of a graph and its weights.

    ``backend`` and ``provider`` are for a language model; an encoder has no choice.
    Raises `ModelError` for a kind of rope that no builder gets right, or an architecture that
    llama.cpp does not know.
    """
    if isinstance(form, GgufForm):
        return _gguf_bytes(model, form.kind)
    if task == "causal-lm":
        return _decoder_bytes(model, form, backend, provider)
    return _encoder_bytes(model, cast(EncoderForm, form), task)


def _decoder_bytes(model: Any, form: Form, backend: str, provider: Provider) -> int:
    config = model.config
    backend, _ = choose_backend(config.to_dict(), backend=backend, provider=provider)
    fused = backend == "genai"
    half = form.kind == "fp16" or (provider != "cpu" and form.kind != "fp32")
    number = 2 if half else 4
    matrices = list(_decoder_matrices(model))
    rest: int = sum(p.numel() for p in model.parameters()) - sum(m.numbers for m in matrices)
    # Torch's graphs keep vectors in fp32; the builder's have tables of cosines and sines.
    size = number * (rest + _rotary_numbers(config)) if fused else 4 * rest
    scheme = scheme_for(form, int(model.get_output_embeddings().weight.shape[1]))
    layers = int(config.get_text_config().num_hidden_layers)
    graph = _graph_bytes(_GENAI if fused else _DYNAMO, layers, scheme)
    if form.kind == "int8-weight" and provider == "cpu":
        graph = round(_WITH_PROMPT * graph)
    return size + graph + _stored(matrices, scheme, number)


_TOKEN = 20  # bytes of a token in a GGUF file: text, type, score or merge, about


def _gguf_bytes(model: Any, form: str) -> int:
    """Tensors exactly, tokens by rule of thumb: a plan has no tokenizer."""
    from gguf import get_tensor_name_map

    config = model.config.to_dict()
    names = get_tensor_name_map(arch_number(architecture(config)), layers_of(config))
    total, seen = _TOKEN * int(config["vocab_size"]), set()
    for name, parameter in model.named_parameters():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        shape = tuple(parameter.shape)
        if type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D":
            shape = shape[::-1]
        if target is not None and id(parameter) not in seen:
            seen.add(id(parameter))
            total += tensor_bytes(form, target, shape)
    return total


def _encoder_bytes(model: Any, form: EncoderForm, task: str) -> int:
    config = model.config
    matrices = list(_encoder_matrices(model, task))
    # A sentence encoder's graph ends at the token states, before the pooler.
    used = [
        p
        for name, p in model.named_parameters()
        if task == "classification" or not name.startswith("pooler.")
    ]
    size: int = 4 * (sum(p.numel() for p in used) - sum(m.numbers for m in matrices))
    size += sum(b.numel() * b.element_size() for b in model.buffers())  # positions, token types
    scheme = encoder_scheme(form, int(config.hidden_size))
    layers = int(config.num_hidden_layers)
    return size + _graph_bytes(_ENCODER, layers, scheme) + _stored(matrices, scheme, 4)


def _graph_bytes(growth: _Growth, layers: int, scheme: Scheme | None) -> int:
    whole, (fp32, blockwise, integer) = growth
    if scheme is None:
        return whole + layers * fp32
    return whole + layers * (blockwise if isinstance(scheme.body, Blockwise) else integer)


def _stored(matrices: list[Matrix], scheme: Scheme | None, number: int) -> int:
    if scheme is None:
        return number * sum(m.numbers for m in matrices)
    return sum(stored_bytes(m.channels, m.width, getattr(scheme, m.part), number) for m in matrices)


def _decoder_matrices(model: Any) -> Iterator[Matrix]:
    """Every matrix that becomes a MatMul or a Gather; a tied head is one matrix."""
    outputs, seen = model.get_output_embeddings(), set()
    for name, module in model.named_modules():
        conv1d = type(module).__name__ == "Conv1D"
        if (
            not (conv1d or isinstance(module, nn.Linear | nn.Embedding))
            or id(module.weight) in seen
        ):
            continue
        seen.add(id(module.weight))
        first, second = module.weight.shape
        channels, width = (second, first) if conv1d else (first, second)
        if module is outputs or isinstance(module, nn.Embedding):
            yield Matrix(channels, width, "head")
        elif re.search(r"att(ention|n)", name) and not _ATTENTION_OUT.search(name):
            yield Matrix(channels, width, "attention")
        else:
            yield Matrix(channels, width, "narrow" if width > channels else "body")


def _encoder_matrices(model: Any, task: str) -> Iterator[Matrix]:
    """Every matrix that becomes a MatMul or a Gather.

    All products are rounded alike but the head's.
    """
    read = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
    head = read[-1][1] if task == "classification" else None
    for name, module in read:
        unused = task == "embedding" and name.startswith("pooler.")
        if unused or 4 * module.weight.numel() < _INLINE:
            continue
        channels, width = module.weight.shape
        is_head = module is head or isinstance(module, nn.Embedding)
        yield Matrix(channels, width, "head" if is_head else "body")


def _rotary_numbers(config: Any) -> int:
    """The builder's tables of cosines and sines: a row a position. See `compute_tables`."""
    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    ropes = ropes_of(config.to_dict())
    numbers = int(text.max_position_embeddings * size * len(ropes))
    computed = rope_kinds(config.to_dict()) in COMPUTED and 4 * numbers >= LARGE
    return 0 if computed else numbers
