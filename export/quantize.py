"""8-bit weights from the fp32 graph: MatMulNBits for every large MatMul, one 8-bit copy for a tied head and embedding.

Knows block quantisation and the weights file, which it streams from one file to the other a tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.graph import Graphs, stamp
from limbeck.progress import task

BLOCKS = (128, 64, 32, 16)
_ALIGN = 64  # bytes; a processor's cache line
_ROWS = 4096  # rows of a matrix quantised at a time, which bounds the memory


def block_size_for(width: int) -> int:
    """The largest of 128, 64, 32 and 16 that divides ``width``, else 16; a block that divides it wastes no bytes."""
    return next((block for block in BLOCKS if width % block == 0), 16)


def quantize_blocks(
    weights_NK: npt.NDArray[np.float32], block: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Round ``weights[N, K]`` to 8 bits in blocks along K, symmetric around 128.

    Returns codes ``[N, ceil(K / block), block]`` and scales ``[N, ceil(K / block)]``: weight = (code - 128) * scale.
    """
    rows, width = weights_NK.shape
    blocks = math.ceil(width / block)
    padded = np.zeros((rows, blocks * block), np.float32)
    padded[:, :width] = weights_NK
    grouped = padded.reshape(rows, blocks, block)
    scales = np.abs(grouped).max(axis=2) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scales > 0, 1 / scales, 0).astype(np.float32)
    codes = np.rint(grouped * inverse[:, :, None]) + 128
    return codes.astype(np.uint8), scales.astype(np.float32)


def quantize_weights(source: Graphs, target: Graphs, *, block: int, metadata: Mapping[str, str]) -> None:
    """Write the ``int8-weight`` form of ``source`` to ``target``; ``block`` weights share a scale.

    Every MatMul with a constant matrix becomes a MatMulNBits of accuracy level 4 (activations in 8 bits as well, the
    fast kernel); every embedding becomes a GatherBlockQuantized, on the head's own codes where the two are tied.
    """
    first = onnx.load(source.last, load_external_data=False)
    tensors = {t.name: t for t in first.graph.initializer}
    matrices = _matrices(first.graph, tensors)
    written: dict[str, TensorProto] = {}
    with target.data.open("wb") as out, task("quantise weights", len(tensors)) as progress:
        for tensor in first.graph.initializer:
            if not tensor.external_data:
                written[tensor.name] = tensor
            elif tensor.name in matrices:
                values = external_array(tensor, source.data.parent)
                rows_first = values if matrices[tensor.name] == "rows" else values.T
                codes, scales = _quantize_in_pieces(rows_first, block)
                written[f"{tensor.name}_q8"] = _append(out, f"{tensor.name}_q8", codes, target.data.name)
                scale = written[f"{tensor.name}_scales"] = _append(
                    out, f"{tensor.name}_scales", scales, target.data.name
                )
                # The same bytes once more with the rank that GatherBlockQuantized wants.
                column = written[f"{tensor.name}_scales_3d"] = TensorProto()
                column.CopyFrom(scale)
                column.name = f"{tensor.name}_scales_3d"
                column.dims.append(1)
            else:
                written[tensor.name] = _append(
                    out, tensor.name, external_array(tensor, source.data.parent), target.data.name
                )
            progress.advance()
    for old, new in ((source.last, target.last), (source.all, target.all)):
        proto = onnx.load(old, load_external_data=False)
        _replace_nodes(proto, tensors, matrices, block)
        own = {t.name: t for t in proto.graph.initializer if not t.external_data}
        used = {name for node in proto.graph.node for name in node.input}
        kept = [own.get(name, written.get(name)) for name in sorted(used)]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(tensor for tensor in kept if tensor is not None)
        stamp(proto, metadata)
        onnx.save(proto, new)


def external_array(tensor: TensorProto, folder: Path) -> npt.NDArray[Any]:
    """An initialiser's values, mapped from its external file in ``folder``."""
    if not tensor.external_data:
        return np.asarray(numpy_helper.to_array(tensor))
    entry = {e.key: e.value for e in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(folder / entry["location"], dtype, "r", int(entry.get("offset", 0)), tuple(tensor.dims))


def _matrices(graph: GraphProto, tensors: Mapping[str, TensorProto]) -> dict[str, str]:
    """Name → layout of every constant matrix to quantise: `columns` ([K, N], of a MatMul) or `rows` ([N, K], embeddings)."""
    found: dict[str, str] = {}
    for node in graph.node:
        name = node.input[1] if node.op_type == "MatMul" else node.input[0] if node.op_type == "Gather" else ""
        tensor = tensors.get(name)
        if (
            tensor is not None
            and tensor.data_type == TensorProto.FLOAT
            and len(tensor.dims) == 2
            and tensor.external_data
        ):
            found[name] = "columns" if node.op_type == "MatMul" else "rows"
    return found


def _quantize_in_pieces(
    weights_NK: npt.NDArray[np.float32], block: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    pieces = [
        quantize_blocks(np.asarray(weights_NK[at : at + _ROWS]), block) for at in range(0, len(weights_NK), _ROWS)
    ]
    return np.concatenate([codes for codes, _ in pieces]), np.concatenate([scales for _, scales in pieces])


def _append(out: Any, name: str, values: npt.NDArray[Any], location: str) -> TensorProto:
    """Append ``values`` to the weights file ``out`` and return the initialiser that refers to them."""
    out.write(b"\0" * (-out.tell() % _ALIGN))
    tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(values.dtype), dims=values.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", out.tell()), ("length", values.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    out.write(np.ascontiguousarray(values).data)
    return tensor


def _replace_nodes(
    proto: ModelProto, tensors: Mapping[str, TensorProto], matrices: Mapping[str, str], block: int
) -> None:
    """Put quantised operators in the place of the MatMuls and Gathers on ``matrices``, in place."""
    graph = proto.graph
    transposed = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Transpose" and n.input[0] in matrices}
    nodes: list[NodeProto] = []
    for node in graph.node:
        matrix = transposed.get(node.input[0], node.input[0]) if node.op_type == "Gather" else ""
        if node.op_type == "MatMul" and node.input[1] in matrices:
            nodes.append(_matmul(node, tensors[node.input[1]], block))
        elif node.op_type == "Gather" and matrix in matrices:
            dims = tensors[matrix].dims
            nodes.extend(_embedding(node, matrix, int(dims[1] if matrices[matrix] == "rows" else dims[0]), block))
        elif not (node.op_type == "Transpose" and node.output[0] in transposed):
            nodes.append(node)
    for name, dims in (("keep_rank", [0, 0, -1]), ("embedding_start", [0]), ("embedding_axis", [-1])):
        graph.initializer.append(numpy_helper.from_array(np.asarray(dims, np.int64), f"limbeck/const/{name}"))
    for matrix in set(transposed.values()) | {m for m, layout in matrices.items() if layout == "rows"}:
        width = int(tensors[matrix].dims[1] if matrices[matrix] == "rows" else tensors[matrix].dims[0])
        graph.initializer.append(
            numpy_helper.from_array(np.asarray([width], np.int64), f"limbeck/const/width/{matrix}")
        )
    del graph.node[:]
    graph.node.extend(nodes)
    if "com.microsoft" not in {opset.domain for opset in proto.opset_import}:
        proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _matmul(node: NodeProto, tensor: TensorProto, block: int) -> NodeProto:
    name = tensor.name
    return helper.make_node(
        "MatMulNBits",
        [node.input[0], f"{name}_q8", f"{name}_scales"],
        list(node.output),
        name=node.name,
        domain="com.microsoft",
        K=int(tensor.dims[0]),
        N=int(tensor.dims[1]),
        bits=8,
        block_size=block,
        accuracy_level=4,
    )


def _embedding(node: NodeProto, matrix: str, width: int, block: int) -> list[NodeProto]:
    padded = math.ceil(width / block) * block
    stem = f"limbeck/embedding/{node.output[0]}"
    nodes = [
        helper.make_node(
            "GatherBlockQuantized",
            [f"{matrix}_q8", node.input[1], f"{matrix}_scales_3d"],
            [f"{stem}/blocks"],
            name=f"{stem}/GatherBlockQuantized",
            domain="com.microsoft",
            bits=8,
            block_size=block,
            gather_axis=0,
            quantize_axis=2,
        ),
        helper.make_node(
            "Reshape",
            [f"{stem}/blocks", "limbeck/const/keep_rank"],
            [f"{stem}/whole" if padded > width else node.output[0]],
            name=f"{stem}/Reshape",
        ),
    ]
    if padded > width:
        ends = ["limbeck/const/embedding_start", f"limbeck/const/width/{matrix}", "limbeck/const/embedding_axis"]
        nodes.append(helper.make_node("Slice", [f"{stem}/whole", *ends], list(node.output), name=f"{stem}/Slice"))
    return nodes
