"""Products with rounded matrices: MatMulNBits, MatMulIntegerToFloat, MatMul between QDQ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from export.round.blocks import Blockwise
from export.round.matrices import Matrix, turned
from export.round.scheme import PerChannel, Static


def replace_nodes(
    proto: ModelProto, matrices: Mapping[str, Matrix], ranges: Mapping[str, tuple[float, float]]
) -> None:
    """Replace the MatMuls and Gathers on ``matrices`` by quantised operators, in place."""
    graph = proto.graph
    origin = turned(graph, matrices)
    nodes: list[NodeProto] = []
    # activations that are quantised already: several MatMuls may read one
    rounded: set[str] = set()
    for node in graph.node:
        read = {"MatMul": 1, "Gather": 0}.get(node.op_type)
        matrix = (
            None if read is None else matrices.get(origin.get(node.input[read], node.input[read]))
        )
        if matrix is None:
            if not (node.op_type == "Transpose" and node.output[0] in origin):
                nodes.append(node)
        elif isinstance(matrix.how, PerChannel):
            nodes.extend(_integer_matmul(graph, node, matrix, rounded))
        elif isinstance(matrix.how, Static) and node.op_type == "Gather":
            nodes.extend(_static_embedding(node, matrix))
        elif isinstance(matrix.how, Static):
            nodes.extend(_static_matmul(graph, node, matrix, matrix.how, ranges, rounded))
        elif node.op_type == "MatMul":
            nodes.append(_blockwise_matmul(node, matrix, matrix.how))
        else:
            nodes.extend(_embedding(graph, node, matrix, matrix.how))
    del graph.node[:]
    graph.node.extend(nodes)
    if "com.microsoft" not in {opset.domain for opset in proto.opset_import}:
        proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _blockwise_matmul(node: NodeProto, matrix: Matrix, how: Blockwise) -> NodeProto:
    kinds = ("codes", "scales", "zeros") if how.zero_points else ("codes", "scales")
    return helper.make_node(
        "MatMulNBits",
        [node.input[0], *matrix.names(*kinds)],
        list(node.output),
        name=node.name,
        domain="com.microsoft",
        K=matrix.width,
        N=matrix.channels,
        bits=how.bits,
        block_size=how.block,
        accuracy_level=4,
    )


def _integer_matmul(
    graph: GraphProto, node: NodeProto, matrix: Matrix, rounded: set[str]
) -> list[NodeProto]:
    """An integer product, with a scale of its own for each token's activations, centred at 128.

    onnxruntime's MatMulIntegerToFloat takes one scale for all activations. So a token's own scale
    divides before the product and multiplies after it.
    """
    codes, scales = matrix.names("codes", "scales")
    x, out = node.input[0], node.output[0]
    stem, own = f"limbeck/dynamic/{x}", f"limbeck/dynamic/{out}"
    shared = {
        "one": np.float32(1),
        "steps": np.float32(127),
        "least": np.float32(1e-9),
        "middle": np.uint8(128),
    }
    one, steps, least, middle = (f"limbeck/const/dynamic/{name}" for name in shared)
    axis = "limbeck/const/dynamic/axis"
    nodes = []
    if not rounded:
        graph.initializer.extend(
            numpy_helper.from_array(np.asarray(value), name)
            for name, value in zip((one, steps, least, middle), shared.values(), strict=True)
        )
        graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), axis))
    if x not in rounded:
        rounded.add(x)
        nodes += [
            helper.make_node("Abs", [x], [f"{stem}/abs"], name=f"{stem}/Abs"),
            helper.make_node(
                "ReduceMax",
                [f"{stem}/abs", axis],
                [f"{stem}/most"],
                name=f"{stem}/ReduceMax",
                keepdims=1,
            ),
            helper.make_node("Max", [f"{stem}/most", least], [f"{stem}/range"], name=f"{stem}/Max"),
            helper.make_node(
                "Div", [f"{stem}/range", steps], [f"{stem}/scale"], name=f"{stem}/Scale"
            ),
            helper.make_node("Div", [x, f"{stem}/scale"], [f"{stem}/steps"], name=f"{stem}/Div"),
            helper.make_node(
                "QuantizeLinear",
                [f"{stem}/steps", one, middle],
                [f"{stem}/codes"],
                name=f"{stem}/Quantize",
            ),
        ]
    nodes += [
        helper.make_node(
            "MatMulIntegerToFloat",
            [f"{stem}/codes", codes, one, scales, middle],
            [f"{own}/steps"],
            name=node.name,
            domain="com.microsoft",
        ),
        helper.make_node("Mul", [f"{own}/steps", f"{stem}/scale"], [out], name=f"{own}/Rows"),
    ]
    return nodes


def _static_matmul(
    graph: GraphProto,
    node: NodeProto,
    matrix: Matrix,
    how: Static,
    ranges: Mapping[str, tuple[float, float]],
    rounded: set[str],
) -> list[NodeProto]:
    """MatMul of two dequantised values; a provider with an 8-bit kernel fuses the three nodes."""
    codes, scales = matrix.names("codes", "scales")
    x, out = node.input[0], node.output[0]
    stem, own = f"limbeck/static/{x}", f"limbeck/static/{out}"
    scale, middle = f"{stem}/scale", f"{stem}/middle"
    nodes = []
    if how.activations and x not in rounded:
        rounded.add(x)
        step, zero = activation_scale(ranges[x], symmetric=how.symmetric)
        graph.initializer.append(numpy_helper.from_array(np.asarray(step, np.float32), scale))
        graph.initializer.append(numpy_helper.from_array(zero, middle))
        nodes += [
            helper.make_node(
                "QuantizeLinear", [x, scale, middle], [f"{stem}/codes"], name=f"{stem}/Quantize"
            ),
            helper.make_node(
                "DequantizeLinear",
                [f"{stem}/codes", scale, middle],
                [f"{stem}/rounded"],
                name=f"{stem}/Dequantize",
            ),
        ]
    axis, weights = (0, f"{own}/rows") if matrix.by_rows else (1, f"{own}/weights")
    nodes.append(
        helper.make_node(
            "DequantizeLinear", [codes, scales], [weights], name=f"{own}/Dequantize", axis=axis
        )
    )
    if matrix.by_rows:
        nodes.append(
            helper.make_node(
                "Transpose", [weights], [f"{own}/weights"], name=f"{own}/Transpose", perm=[1, 0]
            )
        )
    given = f"{stem}/rounded" if how.activations else x
    return [*nodes, helper.make_node("MatMul", [given, f"{own}/weights"], [out], name=node.name)]


def _static_embedding(node: NodeProto, matrix: Matrix) -> list[NodeProto]:
    codes, scales = matrix.names("codes", "scales")
    rows = f"limbeck/static/{node.output[0]}/rows"
    return [
        helper.make_node(
            "DequantizeLinear", [codes, scales], [rows], name=f"{rows}/Dequantize", axis=0
        ),
        helper.make_node("Gather", [rows, node.input[1]], list(node.output), name=node.name),
    ]


def activation_scale(
    span: tuple[float, float], *, symmetric: bool
) -> tuple[float, npt.NDArray[Any]]:
    """Scale and zero point of 8-bit codes for the range ``span``, which includes 0."""
    low, high = min(span[0], 0.0), max(span[1], 0.0)
    if symmetric:
        return max(-low, high, 1e-9) / 127, np.asarray(0, np.int8)
    step = max(high - low, 1e-9) / 255
    return step, np.asarray(np.clip(np.rint(-low / step), 0, 255), np.uint8)


def _embedding(
    graph: GraphProto, node: NodeProto, matrix: Matrix, how: Blockwise
) -> list[NodeProto]:
    codes, scales = matrix.names("codes", "scales_3d")
    padded = math.ceil(matrix.width / how.block) * how.block
    stem = f"limbeck/embedding/{node.output[0]}"
    read = (v for v in graph.value_info if v.name == node.output[0])
    # Token ids have rows and columns; positions that every row shares may be one row.
    ids = next((len(v.type.tensor_type.shape.dim) - 1 for v in read), 2)

    def constant(name: str, values: list[int]) -> str:
        tensor = numpy_helper.from_array(np.asarray(values, np.int64), f"{stem}/{name}")
        graph.initializer.append(tensor)
        return str(tensor.name)

    nodes = [
        helper.make_node(
            "GatherBlockQuantized",
            [codes, node.input[1], scales],
            [f"{stem}/blocks"],
            name=f"{stem}/GatherBlockQuantized",
            domain="com.microsoft",
            bits=8,
            block_size=how.block,
            gather_axis=0,
            quantize_axis=2,
        ),
        helper.make_node(
            "Reshape",
            [f"{stem}/blocks", constant("keep_rank", [0] * ids + [-1])],
            [f"{stem}/whole" if padded > matrix.width else node.output[0]],
            name=f"{stem}/Reshape",
        ),
    ]
    if padded > matrix.width:
        ends = [constant("start", [0]), constant("width", [matrix.width]), constant("axis", [-1])]
        nodes.append(
            helper.make_node(
                "Slice", [f"{stem}/whole", *ends], list(node.output), name=f"{stem}/Slice"
            )
        )
    return nodes
