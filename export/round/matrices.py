"""Which constant matrices of a graph are rounded, how each is stored, and which activation each
reads.
"""

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
    """A constant matrix to round: [K, N] as a MatMul reads it, or [N, K] (``rows``) as embeddings
    are stored.
    """

    name: str
    width: int  # K
    channels: int  # N
    rows: bool
    how: How
    gathered: bool = False  # an embedding, or a head tied to one

    @property
    def by_rows(self) -> bool:
        """Whether the codes of a scale a channel are stored [N, K]: for embeddings, which read
        rows; products read [K, N].
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
    """Every matrix to round by name, with its layout and how it is rounded."""
    graph = proto.graph
    origin = turned(graph, tensors)
    has_head = any(value.name == "logits" for value in graph.output)  # a sentence encoder has none
    head, attention = (
        head_of(proto).output[0] if has_head else "",
        _into_attention(graph, {*tensors, *origin}),
    )
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
    """By matrix, the activation that ``scheme`` may want to know beforehand: its range where it is
    rounded with a scale of its own, its second moments where weights get few bits. In the order of
    the graph.
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
    """Names of transposed constants, and what they are made of."""
    return {
        n.output[0]: n.input[0]
        for n in graph.node
        if n.op_type == "Transpose" and n.input[0] in constants
    }


def _into_attention(graph: GraphProto, constants: Container[str]) -> set[str]:
    """Outputs of the products with constant matrices whose next product is attention itself."""
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
