"""Faults that are put into exported graphs on purpose, to see whether parity finds them.

A fault is a set of initialisers with other values. It imitates mistakes of exporters and of
rounding: a wrong scale, a wrong zero point, another theta of the rotary positions, a bias that is
left out.

Shape letters: K inputs of a product, N outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from export.round.matrices import turned
from export.weights import external_array

Array = npt.NDArray[Any]
Fault = Mapping[str, Array]  # new values by initialiser


@dataclass(frozen=True)
class Product:
    """A product with a constant matrix: its initialisers, and the axis of N in ``weights``."""

    weights: str
    scales: str | None
    zeros: str | None
    axis: int


def broken_graphs(graph: Path, *, layers: int) -> Iterator[tuple[str, Path]]:
    """Write each fault of ``graph`` as a graph beside it; yields what is wrong, and the file.

    ``layers`` is the depth of the model: faults of one matrix are put into a layer in the middle.
    """
    proto = onnx.load(graph, load_external_data=False)
    for name, fault in _faults(proto, graph.parent, layers):
        changed = ModelProto()
        changed.CopyFrom(proto)
        for at, tensor in enumerate(changed.graph.initializer):
            if tensor.name in fault:
                changed.graph.initializer[at].CopyFrom(
                    numpy_helper.from_array(np.array(fault[tensor.name], order="C"), tensor.name)
                )
        path = graph.with_name("broken.onnx")
        onnx.save(changed, path)
        yield name, path
        path.unlink()


def products(proto: ModelProto) -> list[Product]:
    """Products with constant matrices in the order of the graph, rounded or not."""
    tensors = {t.name: t for t in proto.graph.initializer}
    origin = turned(proto.graph, tensors)
    dequantised = {
        n.output[0]: n
        for n in proto.graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in tensors
    }
    found = []
    for node in proto.graph.node:
        given = list(node.input)
        if node.op_type == "MatMulNBits":
            zeros = given[3] if len(given) > 3 and given[3] else None
            found.append(Product(given[1], given[2], zeros, 0))
        elif node.op_type == "MatMulIntegerToFloat":
            found.append(Product(given[1], given[3], None, 1))
        elif node.op_type == "MatMul" and given[1] in dequantised:
            codes, scales = list(dequantised[given[1]].input)[:2]
            found.append(Product(codes, scales, None, 1))
        elif node.op_type == "MatMul" and origin.get(given[1], given[1]) in tensors:
            name = origin.get(given[1], given[1])
            if len(tensors[name].dims) == 2:
                found.append(Product(name, None, None, 0 if given[1] in origin else 1))
    return found


def _faults(proto: ModelProto, folder: Path, layers: int) -> Iterator[tuple[str, Fault]]:
    tensors = {t.name: t for t in proto.graph.initializer}

    def values(name: str) -> Array:
        return np.array(external_array(tensors[name], folder))

    each = products(proto)
    count = len(each) // layers
    middle = each[count * (layers // 2) :][:count]
    for at in sorted({0, max(count - 4, 0), count - 1}):  # the second is a llama's attention output
        product = middle[at]
        name, axis = (product.scales, 0) if product.scales else (product.weights, product.axis)
        # Every second output: the norms behind it in Gemma undo a factor of all or of a head.
        array = np.moveaxis(values(name).copy(), axis, 0)
        array[::2] *= 2
        yield f"half of product {at} doubled", {name: np.moveaxis(array, 0, axis)}
    narrow = middle[-1]
    order = np.roll(np.arange(tensors[narrow.weights].dims[narrow.axis]), 1)
    yield (
        "outputs in another order",
        {narrow.weights: values(narrow.weights).take(order, narrow.axis)},
    )
    if narrow.scales:
        codes = values(middle[0].weights)
        if codes.dtype == np.uint8 and middle[0].zeros is None:
            yield "signed codes read as unsigned", {middle[0].weights: codes ^ 0x80}
        if codes.dtype == np.int8:
            shifted = np.clip(codes.astype(np.int16) + 16, -128, 127).astype(np.int8)
            yield "zero point of weights off by 16", {middle[0].weights: shifted}
    for product in middle:
        if product.zeros:
            yield "zero points in another order", {product.zeros: values(product.zeros)[::-1]}
            break
    yield from _activations(proto, values, len(each) // 2)
    if rope := _rope(tensors, values):
        yield "theta of the rope four times as large", rope
    yield from _vectors(proto, tensors, values)
    yield from _positions(proto, tensors, values)


def _activations(proto: ModelProto, values: Any, at: int) -> Iterator[tuple[str, Fault]]:
    """Zero point and scale of one activation with a range of its own, of another activation."""
    nodes = [n for n in proto.graph.node if n.op_type == "QuantizeLinear" and "static" in n.name]
    if len(nodes) > 2:
        node = nodes[len(nodes) // 2]
        zero = values(node.input[2])
        swapped = max((values(n.input[2]) for n in nodes), key=lambda z: abs(int(z) - int(zero)))
        yield "zero point of another activation", {node.input[2]: swapped}
        yield "scale of an activation halved", {node.input[1]: values(node.input[1]) / 2}


def _rope(tensors: Mapping[str, TensorProto], values: Any) -> dict[str, Array]:
    """Rotary tables, or the frequencies that they are made of, of a theta four times as large."""
    changed: dict[str, Array] = {}
    for name, tensor in tensors.items():
        if name.endswith("cos_cache"):
            cos, sin = values(name), values(other := name.replace("cos", "sin"))
            own = np.arctan2(sin[1], cos[1]).astype(np.float64)
            angles = np.arange(len(cos))[:, None] * _slower(own)
            changed |= {
                name: np.cos(angles).astype(cos.dtype),
                other: np.sin(angles).astype(sin.dtype),
            }
        elif tensor.data_type == TensorProto.FLOAT and 4 <= np.prod(tensor.dims) <= 512:
            flat = values(name).ravel()
            if flat[0] == 1 and (np.diff(flat) < 0).all() and flat[-1] > 0:
                changed[name] = _slower(flat).astype(np.float32).reshape(tuple(tensor.dims))
    return changed


def _slower(frequencies: Array) -> Array:
    return np.asarray(frequencies * 4.0 ** -(np.arange(len(frequencies)) / len(frequencies)))


def _vectors(
    proto: ModelProto, tensors: Mapping[str, TensorProto], values: Any
) -> Iterator[tuple[str, Fault]]:
    """A bias left out, and a norm whose weights are all their mean, in the middle of the model."""
    biases, norms = list[str](), list[str]()
    scales = {p.scales for p in products(proto)}
    for node in proto.graph.node:
        names = [n for n in node.input if n in tensors and n not in scales]
        names = [n for n in names if len(tensors[n].dims) == 1 and tensors[n].dims[0] >= 16]
        names = [n for n in names if tensors[n].data_type == TensorProto.FLOAT]
        if not names:
            continue
        if node.op_type == "Add" and len(names) < len(node.input):
            biases += names
        elif "Norm" in node.op_type or node.op_type in ("Mul", "Add"):
            norms += names[:1]
    if biases and values(name := biases[len(biases) // 2]).any():
        yield "a bias left out", {name: np.zeros_like(values(name))}
    if norms:
        weights = values(name := norms[len(norms) // 2])
        yield "a norm without its weights", {name: np.full_like(weights, weights.mean())}


def _positions(
    proto: ModelProto, tensors: Mapping[str, TensorProto], values: Any
) -> Iterator[tuple[str, Fault]]:
    """A table of positions that begins one too late."""
    for node in proto.graph.node:
        if "Gather" in node.op_type and "position" in node.input[0] and node.input[0] in tensors:
            parts = [n for n in _parts(node) if n in tensors and len(tensors[n].dims) > 1]
            yield "positions one too late", {n: np.roll(values(n), -1, axis=0) for n in parts}
            return


def _parts(node: NodeProto) -> list[str]:
    return [node.input[0], *(node.input[2:] if node.op_type == "GatherBlockQuantized" else ())]
