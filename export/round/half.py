"""The fp16 twin of a graph: fp16 weights, and fp16 arithmetic if the kernels sum in fp32.

Knows ONNX protobufs and the weights file, which is streamed one tensor at a time, and not the
graph's origin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from export.graphs import ROPE, Graphs, stamp
from export.weights import WeightsFile, external_array
from limbeck.contract.errors import QualityError
from limbeck.contract.progress import task

_LARGEST = 65504.0  # the largest number of fp16
_HALF, _FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
# Operators that read a large constant, with the input that decides the number type: the matrix or
# its scales.
_PRODUCTS = {"MatMul": 1, "Gather": 0, "MatMulNBits": 2, "GatherBlockQuantized": 2}


def cast_to_half(source: Graphs, target: Graphs, *, metadata: Mapping[str, str]) -> None:
    """Write ``source``, in fp32 or with quantised weights, to ``target`` in fp16; logits stay fp32.

    A graph with fused attention becomes fp16 as a whole, cache included, because its kernels sum in
    fp32. In other graphs only embeddings and products with constant matrices become fp16, between
    casts: norms and masks made of small operators would overflow. Raises `QualityError` for a
    weight beyond fp16.
    """
    first = onnx.load(source.last, load_external_data=False)
    whole = any(node.op_type == "GroupQueryAttention" for node in first.graph.node)
    constants = {c.name for c in first.graph.initializer if c.data_type == _FLOAT}
    halved = constants if whole else _matrices(first.graph)
    written: dict[str, TensorProto] = {}
    names: dict[
        str, str
    ] = {}  # offset in the source's file -> the name its bytes have in the target's
    with (
        target.data.open("wb") as out,
        task("cast weights to fp16", len(first.graph.initializer)) as progress,
    ):
        file = WeightsFile(out, target.data.name, written)
        for tensor in first.graph.initializer:
            offset = next(
                (entry.value for entry in tensor.external_data if entry.key == "offset"), None
            )
            if tensor.external_data and offset in names:
                file.rename(written[names[offset]], tensor.name, list(tensor.dims))
            elif tensor.external_data:
                values = external_array(tensor, source.data.parent)
                file.append(
                    tensor.name, half(tensor.name, values) if tensor.name in halved else values
                )
                names[str(offset)] = tensor.name
            progress.advance()
    for old, new in ((source.last, target.last), (source.all, target.all)):
        proto = onnx.load(old, load_external_data=False)
        small = [t for t in proto.graph.initializer if not t.external_data]
        large = [written[t.name] for t in proto.graph.initializer if t.external_data]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend([*(_half_tensor(t) if whole else t for t in small), *large])
        if whole:
            _cast_all(proto.graph)
        else:
            _cast_products(proto.graph, halved)
        stamp(proto, metadata)
        onnx.save(proto, new)


def half(name: str, values: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    """``values`` rounded to fp16. Raises `QualityError` if one is too large."""
    most = float(np.abs(values).max(initial=0))
    if not most < _LARGEST:
        raise QualityError(
            f"{name}: its largest weight is {most:.3g}, fp16 ends at {_LARGEST:.0f}; take fp16 out "
            "of export.forms."
        )
    return values.astype(np.float16)


def _half_tensor(tensor: TensorProto) -> TensorProto:
    if tensor.data_type != _FLOAT or tensor.name.startswith(ROPE):
        return tensor
    return numpy_helper.from_array(half(tensor.name, numpy_helper.to_array(tensor)), tensor.name)


def _matrices(graph: GraphProto) -> set[str]:
    """Float constants in the weights file that only products and embeddings read.

    These include the scales of rounded matrices.
    """
    turned = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Transpose"}
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input if node.op_type != "Transpose" else ():
            readers.setdefault(turned.get(name, name), set()).add(node.op_type)
    large = {
        t.name
        for t in graph.initializer
        if t.external_data and t.data_type == _FLOAT and len(t.dims) > 1
    }
    return {name for name in large if readers.get(name, {""}) <= set(_PRODUCTS)}


def _cast_all(graph: GraphProto) -> None:
    """Make every number of the graph fp16 except its logits, in place."""
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == _FLOAT and value.name != "logits":
            value.type.tensor_type.elem_type = _HALF
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == _FLOAT:
                attribute.i = _HALF
            elif node.op_type == "Constant" and attribute.name == "value":
                attribute.t.CopyFrom(_half_tensor(attribute.t))
        for index, name in enumerate(node.output):
            if name == "logits":
                node.output[index] = "limbeck/half/logits"
    graph.node.append(
        helper.make_node(
            "Cast", ["limbeck/half/logits"], ["logits"], name="limbeck/half/Cast", to=_FLOAT
        )
    )
    del graph.value_info[:]


def _cast_products(graph: GraphProto, halved: set[str]) -> None:
    """Put casts around products and embeddings on ``halved`` matrices, in place; one per input."""
    turned = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Transpose"}
    nodes: list[NodeProto] = []
    cast: set[str] = set()
    for node in graph.node:
        matrix = _PRODUCTS.get(node.op_type)
        nodes.append(node)
        if matrix is None or turned.get(node.input[matrix], node.input[matrix]) not in halved:
            continue
        if node.op_type.startswith("MatMul"):
            x = node.input[0]
            if x not in cast:
                cast.add(x)
                nodes.insert(
                    -1,
                    helper.make_node("Cast", [x], [f"{x}/half"], name=f"{x}/half/Cast", to=_HALF),
                )
            node.input[0] = f"{x}/half"
        out = node.output[0]
        node.output[0] = f"{out}/half_product"
        nodes.append(
            helper.make_node(
                "Cast", [node.output[0]], [out], name=f"{out}/half_product/Cast", to=_FLOAT
            )
        )
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
