"""Surgery on a decoder graph that the builders share: its head, its attention windows, and which
positions it answers.

Reads no weights: they stay in one external file that both graphs of a form name.

Shape letters: B rows, S new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

_OWN = "limbeck/"  # prefix of every name that surgery adds


def attention_windows(model: Path) -> list[int]:
    """Tokens each layer of the transformers folder ``model`` may look back, itself included; -1 is
    all of them.

    Architectures without windows ignore a sliding_window in their file, which conversions from
    other architectures leave there.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    has_windows = hasattr(type(config), "sliding_window")
    window = (config.sliding_window if has_windows else None) or -1
    kinds = layer_kinds(config) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else -1 for kind in kinds]


def layer_kinds(config: Any) -> Sequence[str] | None:
    """The kind of attention of each layer; None for an architecture whose layers are all alike.

    Such architectures ignore layer_types in their file.
    """
    return config.layer_types if hasattr(type(config), "layer_types") else None


def head_of(proto: ModelProto) -> NodeProto:
    """The product that makes the logits, past a scale, a cap or a bias on them."""
    made_by = {name: node for node in proto.graph.node for name in node.output}
    head = made_by["logits"]
    while head.op_type not in ("MatMul", "Gemm"):
        head = made_by[head.input[0]]
    return head


def width_of(proto: ModelProto, head: NodeProto) -> int:
    """Columns of ``head``'s matrix ``[width, V]``, which a Transpose of the embedding may give."""
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    turned = {
        node.output[0]: node.input[0] for node in proto.graph.node if node.op_type == "Transpose"
    }
    if head.input[1] in tensors:
        return int(tensors[head.input[1]].dims[0])
    return int(tensors[turned[head.input[1]]].dims[1])


class Maker:
    """Makes nodes and small constants under our own prefix."""

    def __init__(self, proto: ModelProto) -> None:
        self._graph = proto.graph
        self._constants: set[str] = set()

    def name(self, short: str) -> str:
        """The full name of what another call makes as ``short``."""
        return f"{_OWN}{short}"

    def constant(self, short: str, value: Any) -> str:
        """The full name of a constant of integers, which is made if it is missing."""
        name = f"{_OWN}const/{short}"
        if name not in self._constants:
            self._constants.add(name)
            self._graph.initializer.append(
                numpy_helper.from_array(np.asarray(value, np.int64), name)
            )
        return name

    def __call__(self, op: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
        return helper.make_node(
            op, inputs, [f"{_OWN}{output}"], name=f"{_OWN}{output}/{op}", **attributes
        )


def describe_input(make: Maker) -> list[NodeProto]:
    """Nodes for the count of ``rows`` and ``steps`` of the input, the ``range`` of its columns, and
    the ``mask [B, S]`` of the new tokens."""
    whole = make.constant("end", [2**63 - 1])
    one = make.constant("one", [1])
    zero = make.constant("zero", [0])
    zero_scalar, one_scalar = make.constant("zero_scalar", 0), make.constant("one_scalar", 1)
    return [
        make("Shape", ["input_ids"], "rows", start=0, end=1),
        make("Shape", ["input_ids"], "steps", start=1, end=2),
        make("Neg", [make.name("steps")], "start"),
        make("Slice", ["attention_mask", make.name("start"), whole, one], "mask"),
        make("Squeeze", [make.name("steps"), zero], "steps_scalar"),
        make("Range", [zero_scalar, make.name("steps_scalar"), one_scalar], "range"),
    ]


def choose_columns(
    proto: ModelProto, make: Maker, entry: Sequence[NodeProto], columns: str
) -> None:
    """Let the head read of each row the positions ``columns [B, C]`` only, in place: logits become
    ``[B, C, V]``.

    ``entry`` are nodes for the graph's beginning that make ``columns``, those of `describe_input`
    among them.
    """
    graph, head = proto.graph, head_of(proto)
    one, zero = make.constant("one", [1]), make.constant("zero", [0])
    zero_scalar, one_scalar = make.constant("zero_scalar", 0), make.constant("one_scalar", 1)
    choice = [
        make("Squeeze", [make.name("rows"), zero], "rows_scalar"),
        make("Range", [zero_scalar, make.name("rows_scalar"), one_scalar], "row"),
        make("Mul", [make.name("row"), make.name("steps")], "row_start"),
        make("Unsqueeze", [make.name("row_start"), one], "row_start_column"),
        make("Add", [make.name("row_start_column"), make.name(columns)], "source"),
        make(
            "Reshape",
            [head.input[0], make.constant("flat", [-1, width_of(proto, head)])],
            "hidden_flat",
        ),
        make("Gather", [make.name("hidden_flat"), make.name("source")], "hidden", axis=0),
    ]
    head.input[0] = make.name("hidden")
    nodes = list(graph.node)
    at = next(
        index
        for index, node in enumerate(nodes)
        if node.output and node.output[0] == head.output[0]
    )
    del graph.node[:]
    graph.node.extend([*entry, *nodes[:at], *choice, *nodes[at:]])
    # shapes of the builder's that no longer hold; onnxruntime infers its own
    del graph.value_info[:]


def declare_one_position(proto: ModelProto) -> None:
    """Declare the logits as ``[B, 1, V]``."""
    dims = next(
        value for value in proto.graph.output if value.name == "logits"
    ).type.tensor_type.shape.dim
    dims[1].Clear()
    dims[1].dim_value = 1
