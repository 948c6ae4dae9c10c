"""Constant matrices of a graph that are rounded: their storage, and the activation each reads."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import onnx
from onnx import GraphProto, ModelProto, TensorProto

from export.build.surgery import head_of
from export.graphs import Graphs
from export.round.scheme import How, Scheme, Static, is_calibrated


@dataclass(frozen=True)
class Matrix:
    """A constant matrix to round: [K, N] for a MatMul, or [N, K] (``rows``) for an embedding."""

    name: str
    width: int  # K
    channels: int  # N
    rows: bool
    how: How
    gathered: bool = False  # an embedding, or a head tied to one

    @property
    def by_rows(self) -> bool:
        """Whether codes with one scale per channel are stored [N, K].

        Embeddings read rows; products read [K, N].
        """
        return self.gathered and isinstance(self.how, Static)

    def names(self, *kinds: str) -> list[str]:
        return [f"{self.name}_{kind}" for kind in kinds]


def matrices_of(source: Graphs, scheme: Scheme) -> dict[str, Matrix]:
    """Every matrix of the fp32 ``source`` that ``scheme`` rounds, by its name there."""
    proto = onnx.load(source.last, load_external_data=False)
    return find_matrices(proto, {t.name: t for t in proto.graph.initializer}, scheme)


def find_matrices(
    proto: ModelProto, tensors: Mapping[str, TensorProto], scheme: Scheme
) -> dict[str, Matrix]:
    """Every matrix to round by name, with its layout and its rounding."""
    graph = proto.graph
    origin = turned(graph, tensors)
    has_head = any(value.name == "logits" for value in graph.output)  # a sentence encoder has none
    head = head_of(proto).output[0] if has_head else ""
    attention = _into_attention(graph, {*tensors, *origin})
    embeddings = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    found: dict[str, Matrix] = {}
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gather"):
            continue
        read = node.input[1] if node.op_type == "MatMul" else node.input[0]
        tensor = tensors.get(origin.get(read, read))
        if (
            tensor is None
            or tensor.data_type != TensorProto.FLOAT
            or len(tensor.dims) != 2
            or not tensor.external_data
        ):
            continue
        rows = (node.op_type == "Gather") != (read in origin)
        first, second = (int(dim) for dim in tensor.dims)
        is_head = node.op_type == "Gather" or node.output[0] == head
        if is_head or tensor.name not in found:
            width, channels = (second, first) if rows else (first, second)
            if is_head:
                how: How = scheme.head
            elif node.output[0] in attention:
                how = scheme.attention
            else:
                how = scheme.narrow if width > channels else scheme.body
            how = scheme.exceptions.get(tensor.name, how)
            found[tensor.name] = Matrix(
                tensor.name, width, channels, rows, how, tensor.name in embeddings
            )
    return found


def calibrated_reads(source: Graphs, scheme: Scheme) -> dict[str, str]:
    """The activation to measure for each matrix of ``scheme``, in the order of the graph.

    Needed are ranges for activations with a scale of their own, and second moments for weights of
    few bits.
    """
    proto = onnx.load(source.last, load_external_data=False)
    tensors = {t.name: t for t in proto.graph.initializer}
    matrices, origin = find_matrices(proto, tensors, scheme), turned(proto.graph, tensors)
    read = [
        (n.input[0], origin.get(n.input[1], n.input[1]))
        for n in proto.graph.node
        if n.op_type == "MatMul"
    ]
    return {name: x for x, name in read if name in matrices and is_calibrated(matrices[name].how)}


def turned(graph: GraphProto, constants: Container[str]) -> dict[str, str]:
    """Names of transposed constants, with the constants they come from."""
    return {
        n.output[0]: n.input[0]
        for n in graph.node
        if n.op_type == "Transpose" and n.input[0] in constants
    }


def _into_attention(graph: GraphProto, constants: Container[str]) -> set[str]:
    """Outputs of products with constant matrices that attention reads next."""
    made_by = {name: node for node in graph.node for name in node.output if name}
    found: set[str] = set()
    seen: set[str] = set()
    todo: list[str] = []
    for node in graph.node:
        if node.op_type == "GroupQueryAttention" or (
            node.op_type == "MatMul" and node.input[1] not in constants
        ):
            todo += node.input
    while todo:
        name = todo.pop()
        maker = made_by.get(name)
        if maker is None or name in seen:
            continue
        seen.add(name)
        if maker.op_type == "MatMul" and maker.input[1] in constants:
            found.add(name)
        else:
            todo += maker.input
    return found
