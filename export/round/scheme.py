"""The rounding of each part of a model in a form, and its size in bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from export.round.blocks import Blockwise, block_size_for
from limbeck.contract.machine import sums_overflow
from limbeck.contract.recipe import (
    Form,
    Fp16Form,
    Fp32Form,
    Int4WeightForm,
    Int8DynamicForm,
    Int8StaticForm,
    Int8TrtForm,
    Int8WeightForm,
)
from limbeck.contract.recipe.encoder import EncoderForm

How: TypeAlias = "Blockwise | PerChannel | Static"


@dataclass(frozen=True)
class PerChannel:
    """MatMulIntegerToFloat: signed 8-bit weights up to ``most``, one scale per column.

    Activations are rounded to 8 bits at run time, with one scale per token.
    """

    most: int = 127


@dataclass(frozen=True)
class Static:
    """A MatMul between quantise and dequantise operators: signed 8-bit weights, scale per column.

    Activations have 8 bits and one scale, measured beforehand.
    """

    most: int = 127  # of the weights' codes
    # signed activations, which TensorRT asks for; else unsigned ones with a zero point
    symmetric: bool = False
    activations: bool = True  # else weights alone


@dataclass(frozen=True)
class Scheme:
    """How a form rounds each part.

    ``narrow`` is for products with more inputs than outputs: FFN outputs, whose inputs have
    outliers of a hundred times the rest. ``attention`` is for products that make queries, keys and
    values. ``head`` is for the head and every embedding, which share codes if they are tied.
    ``exceptions`` are matrices of the fp32 graph, by name, with another rounding.
    """

    body: How
    attention: How
    narrow: How
    head: How
    exceptions: Mapping[str, Blockwise] = field(default_factory=dict)


def scheme_for(form: Form, width: int) -> Scheme | None:
    """Rounding of ``form`` for a model of hidden size ``width``; None for fp32 and fp16."""
    head = Blockwise(8, block_size_for(width))
    match form:
        case Fp32Form() | Fp16Form():
            return None
        case Int8WeightForm():
            both = Blockwise(8, form.block_size or block_size_for(width))
            return Scheme(body=both, attention=both, narrow=both, head=both)
        case Int8DynamicForm():
            each: How = PerChannel(most_of(form))
            return Scheme(body=each, attention=each, narrow=head, head=head)
        case Int8StaticForm():
            each = Static(most_of(form))
            return Scheme(body=each, attention=each, narrow=head, head=head)
        case Int8TrtForm():
            signed = Static(symmetric=True)
            return Scheme(
                body=signed,
                attention=signed,
                narrow=signed,
                head=Static(activations=False, symmetric=True),
            )
        case Int4WeightForm():
            body = Blockwise(4, form.block_size, zero_points=True)
            return Scheme(body=body, attention=head, narrow=head, head=head)


def encoder_scheme(form: EncoderForm, width: int) -> Scheme | None:
    """As for decoders, but with integer products everywhere: fastest for many rows at a time."""
    if isinstance(form, Int8DynamicForm | Int8StaticForm):
        most = most_of(form)
        each = PerChannel(most) if isinstance(form, Int8DynamicForm) else Static(most)
        return Scheme(
            body=each, attention=each, narrow=each, head=Blockwise(8, block_size_for(width))
        )
    return scheme_for(form, width)


def most_of(form: Int8DynamicForm | Int8StaticForm) -> int:
    """The largest code of a weight; 7 bits (`reduce_range`) if pair sums would overflow 16 bits."""
    return 63 if (sums_overflow() if form.reduce_range is None else form.reduce_range) else 127


def stored_bytes(channels: int, width: int, how: How, number: int = 4) -> int:
    """Bytes in the weights file of a matrix with ``channels`` outputs and ``width`` inputs.

    Counts codes, zero points, and scales of ``number`` bytes each.
    """
    if not isinstance(how, Blockwise):
        return channels * width + number * channels
    row = math.ceil(width / how.block)
    # a row ends on a whole byte
    zeros = channels * math.ceil(row * how.bits / 8) if how.zero_points else 0
    return channels * row * (how.block * how.bits // 8 + number) + zeros


def is_calibrated(how: How) -> bool:
    return (
        how.bits < 8 if isinstance(how, Blockwise) else isinstance(how, Static) and how.activations
    )
