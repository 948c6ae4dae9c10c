"""Rounded weights from the fp32 graph: MatMulNBits or MatMulIntegerToFloat for every large MatMul, 8-bit head and embedding.

Knows rounding and the weights file, which it streams from one file to the other a tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.build.surgery import Graphs, head_of, stamp
from export.round.blocks import Blockwise, Floats, block_size_for, inverse, pack_nibbles
from export.round.calibrate import Calibration
from export.round.gptq import round_blocks, shares
from export.round.weights import WeightsFile, external_array
from limbeck.contract.machine import sums_overflow
from limbeck.contract.progress import task
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

How: TypeAlias = "Blockwise | PerChannel | Static"
_ROWS = 4096  # rows of a matrix rounded at a time, which bounds the memory


@dataclass(frozen=True)
class PerChannel:
    """MatMulIntegerToFloat: signed 8-bit weights of at most ``most``, a scale a column; activations in 8 bits, a scale a token, on
    the fly."""

    most: int = 127


@dataclass(frozen=True)
class Static:
    """A MatMul between quantise and dequantise operators: signed 8-bit weights, a scale a column; activations in 8 bits
    with one scale, known beforehand."""

    most: int = 127  # of the weights' codes
    symmetric: bool = (
        False  # signed activations, which TensorRT asks for; else unsigned ones with a zero point
    )
    activations: bool = True  # else weights alone


@dataclass(frozen=True)
class Scheme:
    """How a form rounds.

    ``narrow`` is for products with more inputs than outputs, which is where an FFN returns to the model's width and inputs
    have outliers of a hundred times the rest; ``attention`` for those that make queries, keys and values. ``head`` is for
    the head and every embedding: one copy of the codes where they are tied. ``exceptions`` are matrices of the fp32 graph, by
    name, that are rounded otherwise.
    """

    body: How
    attention: How
    narrow: How
    head: How
    exceptions: Mapping[str, Blockwise] = field(default_factory=dict)


def scheme_for(form: Form, width: int) -> Scheme | None:
    """What ``form`` of a model of hidden size ``width`` rounds, and how; none for fp32 and fp16."""
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


def most_of(form: Int8DynamicForm | Int8StaticForm) -> int:
    """The largest code of a weight: one of 7 bits where pairs of products would overflow 16 bits, `reduce_range`."""
    return 63 if (sums_overflow() if form.reduce_range is None else form.reduce_range) else 127


def quantize_columns(weights_NK: Floats, most: int = 127) -> tuple[npt.NDArray[np.int8], Floats]:
    """Round ``weights[N, K]`` to signed codes of at most ``most``, a scale an output channel: codes ``[N, K]``, scales ``[N]``."""
    scales = np.abs(weights_NK).max(axis=1) / np.float32(most)
    return np.rint(weights_NK * inverse(scales)[:, None]).astype(np.int8), scales.astype(np.float32)


def stored_bytes(channels: int, width: int, how: How, number: int = 4) -> int:
    """Bytes in the weights file of a matrix of ``channels`` outputs and ``width`` inputs: codes, zero points, and scales of
    ``number`` bytes each."""
    if not isinstance(how, Blockwise):
        return channels * width + number * channels
    row = math.ceil(width / how.block)
    zeros = (
        channels * math.ceil(row * how.bits / 8) if how.zero_points else 0
    )  # a row ends on a whole byte
    return channels * row * (how.block * how.bits // 8 + number) + zeros


def calibrated_reads(source: Graphs, scheme: Scheme) -> dict[str, str]:
    """By matrix, the activation that ``scheme`` may want to know beforehand: its range where it is rounded with a scale of its own, its
    second moments where weights get few bits. In the order of the graph.
    """
    proto = onnx.load(source.last, load_external_data=False)
    tensors = {t.name: t for t in proto.graph.initializer}
    matrices, turned = _matrices(proto, tensors, scheme), _turned(proto.graph, tensors)
    read = [
        (n.input[0], turned.get(n.input[1], n.input[1]))
        for n in proto.graph.node
        if n.op_type == "MatMul"
    ]
    return {name: x for x, name in read if name in matrices and _is_calibrated(matrices[name].how)}


def _is_calibrated(how: How) -> bool:
    return (
        how.bits < 8 if isinstance(how, Blockwise) else isinstance(how, Static) and how.activations
    )


def quantize_weights(
    source: Graphs,
    target: Graphs,
    *,
    scheme: Scheme,
    metadata: dict[str, str],
    calibration: Calibration | None = None,
) -> None:
    """Write the form of ``source`` that ``scheme`` describes to ``target``, after ``calibration``, which a static one needs;
    matrices whose moments it holds are rounded by `export.round.gptq`.

    Every MatMul with a constant matrix becomes a MatMulNBits of accuracy level 4 (activations in 8 bits as well, the
    fast kernel) or a MatMulIntegerToFloat; every embedding becomes a GatherBlockQuantized, on the head's own codes where the
    two are tied.
    """
    first = onnx.load(source.last, load_external_data=False)
    tensors = {t.name: t for t in first.graph.initializer}
    matrices = _matrices(first, tensors, scheme)
    calibration = calibration or Calibration()
    ranges, factors = calibration.ranges, calibration.factors
    written: dict[str, TensorProto] = {}
    with target.data.open("wb") as out, task("quantise weights", len(tensors)) as progress:
        file = WeightsFile(out, target.data.name, written)
        for tensor in first.graph.initializer:
            if not tensor.external_data:
                written[tensor.name] = tensor
                if tensor.name in factors:
                    values = factors.apply(tensor.name, numpy_helper.to_array(tensor), rows=False)
                    written[tensor.name] = numpy_helper.from_array(values, tensor.name)
            else:
                values = external_array(tensor, source.data.parent)
                matrix = matrices.get(tensor.name)
                values = factors.apply(tensor.name, values, rows=matrix is not None and matrix.rows)
                if matrix:
                    few = _is_calibrated(matrix.how)
                    _write_matrix(
                        file, matrix, values, calibration.moments.get(matrix.name) if few else None
                    )
                else:
                    file.append(tensor.name, values)
            progress.advance()
    for old, new in ((source.last, target.last), (source.all, target.all)):
        proto = onnx.load(old, load_external_data=False)
        _replace_nodes(proto, matrices, ranges)
        own = {
            t.name: t
            for t in proto.graph.initializer
            if not t.external_data and t.name not in factors
        }
        used = {name for node in proto.graph.node for name in node.input}
        kept = [own.get(name, written.get(name)) for name in sorted(used)]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(tensor for tensor in kept if tensor is not None)
        stamp(proto, metadata | _integer_bits(matrices))
        onnx.save(proto, new)


@dataclass(frozen=True)
class Matrix:
    """A constant matrix to round: [K, N] as a MatMul reads it, or [N, K] (``rows``) as embeddings are stored."""

    name: str
    width: int  # K
    channels: int  # N
    rows: bool
    how: How
    gathered: bool = False  # an embedding, or a head tied to one

    @property
    def by_rows(self) -> bool:
        """Whether the codes of a scale a channel are stored [N, K]: for embeddings, which read rows; products read [K, N]."""
        return self.gathered and isinstance(self.how, Static)

    def names(self, *kinds: str) -> list[str]:
        return [f"{self.name}_{kind}" for kind in kinds]


def matrices_of(source: Graphs, scheme: Scheme) -> dict[str, Matrix]:
    """Every matrix of the fp32 ``source`` that ``scheme`` rounds, by its name there."""
    proto = onnx.load(source.last, load_external_data=False)
    return _matrices(proto, {t.name: t for t in proto.graph.initializer}, scheme)


def _matrices(
    proto: ModelProto, tensors: Mapping[str, TensorProto], scheme: Scheme
) -> dict[str, Matrix]:
    """Every matrix to round by name, with its layout and how it is rounded."""
    graph = proto.graph
    origin = _turned(graph, tensors)
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


def _integer_bits(matrices: Mapping[str, Matrix]) -> dict[str, str]:
    """For clients on processors whose sums overflow: whether integer products have weights of 8 bits."""
    most = {
        m.how.most
        for m in matrices.values()
        if not isinstance(m.how, Blockwise) and _unsigned(m.how)
    }
    return {"limbeck.integer_weights": "8 bits" if 127 in most else "7 bits"} if most else {}


def _unsigned(how: How) -> bool:
    """Whether activations are unsigned, which is what overflows."""
    return not isinstance(how, Static) or not how.symmetric


def _turned(graph: GraphProto, constants: Container[str]) -> dict[str, str]:
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


def _write_matrix(
    file: WeightsFile, matrix: Matrix, values: npt.NDArray[Any], moments_KK: npt.NDArray[Any] | None
) -> None:
    weights_NK = values if matrix.rows else values.T
    pieces = [np.asarray(weights_NK[at : at + _ROWS]) for at in range(0, matrix.channels, _ROWS)]
    codes, scales, zeros, column = matrix.names("codes", "scales", "zeros", "scales_3d")
    if not isinstance(matrix.how, Blockwise):
        columns = [quantize_columns(piece, matrix.how.most) for piece in pieces]
        whole = np.concatenate([c for c, _ in columns])
        file.append(codes, whole if matrix.by_rows else whole.T)
        file.append(scales, np.concatenate([s for _, s in columns]))
        return
    shares_KK = None if moments_KK is None else shares(moments_KK)
    blocks = [round_blocks(piece, matrix.how, shares_KK) for piece in pieces]
    pack = pack_nibbles if matrix.how.bits == 4 else np.asarray
    file.append(codes, np.concatenate([pack(c) for c, _, _ in blocks]))
    scale = file.append(scales, np.concatenate([s for _, s, _ in blocks]))
    file.rename(scale, column, [*scale.dims, 1])  # the rank that GatherBlockQuantized wants
    if matrix.how.zero_points:
        file.append(zeros, np.concatenate([pack(z) for _, _, z in blocks]))


def _replace_nodes(
    proto: ModelProto, matrices: Mapping[str, Matrix], ranges: Mapping[str, tuple[float, float]]
) -> None:
    """Put quantised operators in the place of the MatMuls and Gathers on ``matrices``, in place."""
    graph = proto.graph
    origin = _turned(graph, matrices)
    nodes: list[NodeProto] = []
    rounded: set[str] = (
        set()
    )  # activations that are quantised already: several MatMuls may read one
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
    """An integer product between operators that round each token's activations around 128 with a scale of its own.

    onnxruntime's MatMulIntegerToFloat scales the columns where it sums; it takes one scale for the activations, so a token's
    own divides before and multiplies after.
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
    """MatMul of two dequantised values; a provider with a kernel for 8-bit products runs the three as one."""
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
    """Scale and zero point of 8-bit codes for values between ``span``, 0 among them."""
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
            [f"{stem}/blocks", constant("keep_rank", [0, 0, -1])],
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
