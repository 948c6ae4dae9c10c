"""Size of each exported form, from a model's shapes alone: what `export.round.quantize` and the graph builders will write.

Reads modules on the meta device. Of the graph itself it knows only how it grows with depth, which was measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from export.build.genai import KNOWN
from export.round.blocks import Blockwise
from export.round.quantize import scheme_for, stored_bytes
from limbeck.contract.recipe import Form

_ATTENTION_OUT = re.compile(r"(o_proj|out_proj|c_proj|dense)$")
# Bytes of the graph file without weights: of a model, and of one of its layers in fp32, in rounded forms and, which have nodes
# for the rounding of activations, in int8-dynamic and static forms. Measured on tiny models; torch's exporter keeps notes on
# every node and writes norms as many.
_GENAI = (6_000, (4_500, 5_600, 10_500))
_DYNAMO = {
    "gpt2": (36_000, (72_000, 71_000, 74_000)),
    "gemma3_text": (36_000, (197_000, 182_000, 185_000)),
}
_OTHER_DYNAMO = (36_000, (91_000, 84_000, 87_000))


@dataclass(frozen=True)
class Matrix:
    """A constant matrix of the graph: N outputs, K inputs, and which part of the rounding scheme it falls under."""

    channels: int
    width: int
    part: Literal["head", "attention", "narrow", "body"]


def form_bytes(model: Any, form: Form, *, backend: str = "auto", provider: str = "cpu") -> int:
    """Bytes of graph and weights of ``form`` for a causal LM on the meta device, as ``backend`` builds it for ``provider``."""
    if backend == "auto":
        backend = "genai" if model.config.model_type in KNOWN else "dynamo"
    half = form.kind == "fp16" or (provider != "cpu" and form.kind != "fp32")
    number = 2 if half else 4  # torch's graphs keep what is no matrix in fp32
    matrices = list(_matrices(model))
    rest: int = sum(p.numel() for p in model.parameters()) - sum(
        m.channels * m.width for m in matrices
    )
    size = number * (rest + _rotary_numbers(model.config)) if backend == "genai" else 4 * rest
    layers = int(model.config.get_text_config().num_hidden_layers)
    scheme = scheme_for(form, int(model.get_output_embeddings().weight.shape[1]))
    whole, (fp32, rounded, dynamic) = (
        _GENAI if backend == "genai" else _DYNAMO.get(model.config.model_type, _OTHER_DYNAMO)
    )
    if scheme is None:
        return whole + layers * fp32 + size + number * sum(m.channels * m.width for m in matrices)
    layer = rounded if isinstance(scheme.body, Blockwise) else dynamic
    weights = sum(
        stored_bytes(m.channels, m.width, getattr(scheme, m.part), number) for m in matrices
    )
    return whole + layers * layer + size + weights


def _matrices(model: Any) -> Iterator[Matrix]:
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


def _rotary_numbers(config: Any) -> int:
    """The builder's tables of cosines and sines: a row a position."""
    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(text.max_position_embeddings * size)
