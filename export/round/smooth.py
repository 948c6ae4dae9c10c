"""Move outliers of activations into weights, exactly: SmoothQuant's migration (Xiao et al. 2023,
arXiv 2211.10438).

An activation that only products with constant matrices read is divided by a factor per channel, and
the matrices are multiplied by the factors along the summed dimension. The source of the activation
must be divisible: weights of a norm, the product that meets an FFN's gate, the values of attention.
In fp32 nothing changes, and the rest is easier to round to 8 bits.

Shape letters: K inputs of a product, N outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto

from export.graphs import Graphs
from export.weights import external_array
from limbeck.contract.data.arrays import Floats

# Norms with weights along the last axis, and the inputs that hold them.
_NORMS = {
    "SimplifiedLayerNormalization": (1,),
    "SkipSimplifiedLayerNormalization": (2,),
    "LayerNormalization": (1, 2),
    "SkipLayerNormalization": (2, 3),
    "RMSNormalization": (1,),
    "Mul": (0, 1),
}


@dataclass(frozen=True)
class Part:
    """The numbers that scale an activation: a vector, or outputs of a matrix from ``first`` on."""

    name: str
    first: int = 0


@dataclass(frozen=True)
class Boundary:
    """An activation ``[K]`` that ``made_by`` can divide and only ``matrices`` read.

    ``shared`` is (groups, sharing, size) if K consists of heads, and ``sharing`` heads in a row
    have the same values.
    """

    made_by: tuple[Part, ...]
    matrices: tuple[str, ...]
    shared: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Factors:
    """Factors of matrices along their inputs ``[K]`` or outputs ``[N]``, and of whole vectors."""

    inputs: Mapping[str, Floats] = field(default_factory=dict)
    outputs: Mapping[str, Floats] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.inputs or name in self.outputs

    def apply(self, name: str, values: npt.NDArray[Any], *, rows: bool) -> npt.NDArray[Any]:
        """The initialiser ``name``, multiplied; it is ``[N, K]`` if ``rows``, else ``[K, N]``."""
        if name in self.inputs:
            values = values * (self.inputs[name] if rows else self.inputs[name][:, None])
        if name in self.outputs:
            along = values.ndim == 2 and rows
            values = values * (self.outputs[name][:, None] if along else self.outputs[name])
        return values


def find_boundaries(proto: ModelProto) -> dict[str, Boundary]:
    """Activations, by name, whose outliers can move into the products that read them.

    Those that a matrix makes come first.
    """
    graph = _Graph(proto)
    found: dict[str, Boundary] = {}
    for node in proto.graph.node:
        activation, matrices = graph.matrices_after(node)
        if not matrices:
            continue
        shared = None
        parts = graph.norm(node)
        if parts is None and node.op_type == "Mul":
            parts = next((p for p in map(graph.product, node.input) if p), None)
        if parts is None and node.op_type == "GroupQueryAttention":
            parts, shared = graph.values(node)
        wide = graph.width(matrices[0])
        widths = (
            {math.prod(shared)} if shared else {graph.channels(part.name) for part in parts or ()}
        )
        if parts and widths == {wide} and all(graph.only_reader(part.name) for part in parts):
            found[activation] = Boundary(tuple(parts), matrices, shared)
    return dict(
        sorted(found.items(), key=lambda item: not graph.is_matrix(item[1].made_by[0].name))
    )


def find_factors(
    source: Graphs,
    proto: ModelProto,
    boundaries: Mapping[str, Boundary],
    largest: Mapping[str, Floats],
    *,
    alpha: float,
) -> tuple[Factors, dict[str, Floats]]:
    """Factors for every boundary, and the divisor ``[K]`` of each activation.

    max|x|^alpha / max|w|^(1 - alpha) per channel, 1 if a channel is always 0; ``largest`` holds
    max|x| by activation, ``[K]``.
    """
    graph = _Graph(proto)
    inputs = dict[str, Floats]()
    outputs = dict[str, Floats]()
    divided = dict[str, Floats]()
    for name, boundary in boundaries.items():
        x_K, w_K = largest[name], np.zeros_like(largest[name])
        for matrix in boundary.matrices:
            rows = graph.is_turned(matrix)
            weights = np.abs(external_array(graph.tensors[matrix], source.data.parent))
            weights = Factors(outputs=outputs).apply(matrix, weights, rows=rows)
            w_K = np.maximum(w_K, weights.max(axis=0 if rows else 1))
        if boundary.shared:
            x_K, w_K = (v.reshape(boundary.shared).max(axis=1).ravel() for v in (x_K, w_K))
        alive = (x_K > 0) & (w_K > 0)
        factor = np.where(alive, x_K, 1) ** alpha / np.where(alive, w_K, 1) ** (1 - alpha)
        factor = np.where(alive, factor, 1).astype(np.float32)
        for part in boundary.made_by:
            channels = graph.channels(part.name)
            outputs.setdefault(part.name, np.ones(channels, np.float32))
            outputs[part.name][part.first : part.first + len(factor)] /= factor
        if boundary.shared:
            groups, sharing, size = boundary.shared
            factor = np.repeat(factor.reshape(groups, 1, size), sharing, axis=1).ravel()
        divided[name] = np.asarray(factor, np.float32)
        inputs |= dict.fromkeys(boundary.matrices, divided[name])
    return Factors(inputs, outputs), divided


class _Graph:
    """Producers and readers of each value."""

    def __init__(self, proto: ModelProto) -> None:
        # An adapter's inputs have defaults but are not constants.
        open_ = {value.name for value in proto.graph.input}
        self.tensors: dict[str, TensorProto] = {
            t.name: t for t in proto.graph.initializer if t.name not in open_
        }
        self.turned = {
            n.output[0]: n.input[0]
            for n in proto.graph.node
            if n.op_type == "Transpose" and n.input[0] in self.tensors
        }
        self.made_by = {name: node for node in proto.graph.node for name in node.output if name}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in proto.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self._results = {value.name for value in proto.graph.output}

    def is_turned(self, matrix: str) -> bool:
        """Whether a constant matrix is stored [N, K]."""
        return matrix in self.turned.values()

    def is_matrix(self, name: str) -> bool:
        return len(self.tensors[name].dims) == 2

    def channels(self, name: str) -> int:
        """Length of a vector, or outputs of a matrix."""
        dims = self.tensors[name].dims
        return int(dims[-1] if len(dims) == 1 or not self.is_turned(name) else dims[0])

    def width(self, matrix: str) -> int:
        """Inputs of a matrix."""
        dims = self.tensors[matrix].dims
        return int(dims[1] if self.is_turned(matrix) else dims[0])

    def only_reader(self, name: str) -> bool:
        """Whether exactly one node reads ``name``, and it is not an output of the graph."""
        return len(self.readers.get(name, ())) == 1 and name not in self._results

    def constant(self, node: NodeProto) -> str | None:
        """The constant matrix of a product that no other node reads."""
        if node.op_type != "MatMul":
            return None
        name = self.turned.get(node.input[1], node.input[1])
        own = name in self.tensors and self.only_reader(name) and self.only_reader(node.input[1])
        return name if own and self.is_matrix(name) else None

    def matrices_after(self, node: NodeProto) -> tuple[str, tuple[str, ...]]:
        """A node's output and the matrices of its products; None if anything else reads it."""
        made = node.output[0] if node.output else ""
        readers = self.readers.get(made, [])
        # torch's exporter flattens rows and columns into one dimension. Channels stay, because the
        # widths must be equal.
        if [r.op_type for r in readers] == ["Reshape"] and made not in self._results:
            made = readers[0].output[0]
            readers = self.readers.get(made, [])
        found = [self.constant(r) if r.input[0] == made else None for r in readers]
        known = tuple(name for name in found if name is not None)
        return made, (known if len(known) == len(found) and made not in self._results else ())

    def norm(self, node: NodeProto) -> list[Part] | None:
        """The weights of a norm; a norm made of small operators ends in the product with them."""
        places = [
            at for at in _NORMS.get(node.op_type, ()) if at < len(node.input) and node.input[at]
        ]
        vectors = [
            node.input[at]
            for at in places
            if len(getattr(self.tensors.get(node.input[at]), "dims", ())) == 1
        ]
        if not vectors or (node.op_type != "Mul" and len(vectors) < len(places)):
            return None
        return [Part(name) for name in vectors]

    def product(self, name: str) -> list[Part] | None:
        """The matrix whose product is ``name``, and the bias after it, if nothing else reads it."""
        if not self.only_reader(name) or name not in self.made_by:
            return None
        node, parts = self.made_by[name], list[Part]()
        if node.op_type == "Add":
            vectors = [n for n in node.input if len(getattr(self.tensors.get(n), "dims", ())) == 1]
            rest = [n for n in node.input if n not in vectors]
            if len(vectors) != 1 or not self.only_reader(rest[0]) or rest[0] not in self.made_by:
                return None
            parts, node = [Part(vectors[0])], self.made_by[rest[0]]
        matrix = self.constant(node)
        return None if matrix is None else [Part(matrix), *parts]

    def values(self, node: NodeProto) -> tuple[list[Part] | None, tuple[int, int, int] | None]:
        """The source of the values of a fused attention, and how its heads share them."""
        counts = {
            a.name: int(a.i) for a in node.attribute if a.name in ("num_heads", "kv_num_heads")
        }
        heads, groups = counts["num_heads"], counts["kv_num_heads"]
        # queries, keys and values side by side
        packed, made = (not node.input[2], node.input[2] or node.input[0])
        split = self.made_by.get(made)
        # made together, taken apart for norms of queries and keys
        if split is not None and split.op_type == "Split":
            if list(split.output)[2:] != [made] or not self.only_reader(made):
                return None, None
            packed, made = True, split.input[0]
        parts = self.product(made)
        if parts is None:
            return None, None
        size = self.channels(parts[0].name) // (heads + 2 * groups if packed else groups)
        first = (heads + groups) * size if packed else 0
        return [Part(part.name, first) for part in parts], (groups, heads // groups, size)
