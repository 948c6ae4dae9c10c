"""Products with 8-bit matrices in fp32: the graph that reads long prompts.

MatMulNBits rounds activations to 8 bits and multiplies integers. That is fast for a few rows. For
many rows an x86 without VNNI multiplies floats faster, even when each matrix is first turned back
into fp32: docs/experiments/decoder.md.

Shape letters: K inputs of a product, N outputs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from export.weights import same_bytes

_MIDDLE = 128  # the code of 0


def multiply_in_floats(graph: GraphProto, written: dict[str, TensorProto]) -> None:
    """Replace each MatMulNBits of ``graph`` but the last by DequantizeLinear and FusedMatMul.

    ``written`` are the initialisers in the weights file; the new ones, with the same bytes in
    another shape, are added. The last product is the head, which runs at one position. Products
    whose rows do not end with a block stay as they are.
    """
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "MatMulNBits" and node is not products[-1]:
            nodes += _in_floats(graph, node, written)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _in_floats(
    graph: GraphProto, node: NodeProto, written: dict[str, TensorProto]
) -> list[NodeProto]:
    """x [.., K] times the transpose of the matrix [N, K], which is made of its blocks.

    DequantizeLinear gets a row for each block: with one scale a row it is several times as fast as
    with blocks within a row (measured with onnxruntime 1.32).
    """
    about = {attribute.name: attribute.i for attribute in node.attribute}
    width, channels, block = (about[name] for name in ("K", "N", "block_size"))
    if width % block or about["bits"] != 8:
        return [node]
    x, codes, scales = node.input  # symmetric: without zero points
    rows = channels * width // block
    by_block, by_row = f"{codes}/rows", f"{scales}/rows"
    written[by_block] = same_bytes(written[codes], by_block, [rows, block])
    written[by_row] = same_bytes(written[scales], by_row, [rows])
    middles = _constant(graph, f"middles/{rows}", np.full(rows, _MIDDLE, np.uint8))
    shape = _constant(graph, f"{channels}x{width}", np.array([channels, width], np.int64))
    stem = f"limbeck/floats/{node.output[0]}"
    return [
        helper.make_node(
            "DequantizeLinear",
            [by_block, by_row, middles],
            [f"{stem}/rows"],
            name=f"{stem}/Dequantize",
            axis=0,
        ),
        helper.make_node(
            "Reshape", [f"{stem}/rows", shape], [f"{stem}/weights"], name=f"{stem}/Reshape"
        ),
        helper.make_node(
            "FusedMatMul",
            [x, f"{stem}/weights"],
            list(node.output),
            name=node.name,
            domain="com.microsoft",
            transB=1,
        ),
    ]


def _constant(graph: GraphProto, name: str, values: npt.NDArray[np.generic]) -> str:
    """The name of a constant that several products share."""
    name = f"limbeck/const/floats/{name}"
    if name not in {tensor.name for tensor in graph.initializer}:
        graph.initializer.append(numpy_helper.from_array(values, name))
    return name
