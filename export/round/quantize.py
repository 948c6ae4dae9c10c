"""Write rounded weights from the fp32 graph, streamed one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from export.graphs import Graphs, stamp
from export.round.blocks import Blockwise, inverse, pack_nibbles
from export.round.calibrate import Calibration
from export.round.floats import multiply_in_floats
from export.round.gptq import round_blocks, shares
from export.round.matrices import Matrix, find_matrices
from export.round.operators import replace_nodes
from export.round.scheme import Scheme, Static, is_calibrated
from export.weights import WeightsFile, external_array
from limbeck.contract.data.arrays import Floats
from limbeck.contract.progress import task

_ROWS = 4096  # rows of a matrix rounded at a time, which bounds the memory


def quantize_weights(
    source: Graphs,
    target: Graphs,
    *,
    scheme: Scheme,
    metadata: dict[str, str],
    calibration: Calibration | None = None,
) -> None:
    """Write ``source`` rounded by ``scheme`` to ``target``.

    A static scheme needs ``calibration``. Matrices with moments in it are rounded by GPTQ
    (`export.round.gptq`). Each MatMul with a constant matrix becomes a MatMulNBits of accuracy
    level 4 (the fast kernel, activations in 8 bits too) or a MatMulIntegerToFloat. Each embedding
    becomes a GatherBlockQuantized, on the head's own codes if the two are tied. The graph for long
    prompts, where ``target`` has one, multiplies in fp32 instead.
    """
    first = onnx.load(source.last, load_external_data=False)
    tensors = {t.name: t for t in first.graph.initializer}
    matrices = find_matrices(first, tensors, scheme)
    calibration = calibration or Calibration()
    written = _write_tensors(source, target, tensors, matrices, calibration)
    graphs = [(source.last, target.last), (source.all, target.all)]
    if target.prompt:
        graphs.append((source.last, target.prompt))
    for old, new in graphs:
        proto = onnx.load(old, load_external_data=False)
        replace_nodes(proto, matrices, calibration.ranges)
        if new == target.prompt:
            multiply_in_floats(proto.graph, written)
        own = {
            t.name: t
            for t in proto.graph.initializer
            if not t.external_data and t.name not in calibration.factors
        }
        used = {name for node in proto.graph.node for name in node.input}
        kept = [own.get(name, written.get(name)) for name in sorted(used)]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(tensor for tensor in kept if tensor is not None)
        stamp(proto, metadata | _integer_bits(matrices))
        onnx.save(proto, new)


def _write_tensors(
    source: Graphs,
    target: Graphs,
    tensors: Mapping[str, TensorProto],
    matrices: Mapping[str, Matrix],
    calibration: Calibration,
) -> dict[str, TensorProto]:
    """Write the file of weights; returns the tensors that point into it, and the small ones."""
    factors, written = calibration.factors, dict[str, TensorProto]()
    with target.data.open("wb") as out, task("quantise weights", len(tensors)) as progress:
        file = WeightsFile(out, target.data.name, written)
        for tensor in tensors.values():
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
                    few = is_calibrated(matrix.how)
                    _write_matrix(
                        file, matrix, values, calibration.moments.get(matrix.name) if few else None
                    )
                else:
                    file.append(tensor.name, values)
            progress.advance()
    return written


def quantize_columns(weights_NK: Floats, most: int = 127) -> tuple[npt.NDArray[np.int8], Floats]:
    """Round ``weights[N, K]`` to signed codes up to ``most``: codes ``[N, K]``, scales ``[N]``."""
    scales = np.abs(weights_NK).max(axis=1) / np.float32(most)
    return np.rint(weights_NK * inverse(scales)[:, None]).astype(np.int8), scales.astype(np.float32)


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
    found = None if moments_KK is None else shares(moments_KK)
    blocks = [round_blocks(piece, matrix.how, found) for piece in pieces]
    pack = pack_nibbles if matrix.how.bits == 4 else np.asarray
    file.append(codes, np.concatenate([pack(c) for c, _, _ in blocks]))
    scale = file.append(scales, np.concatenate([s for _, s, _ in blocks]))
    file.rename(scale, column, [*scale.dims, 1])  # the rank that GatherBlockQuantized wants
    if matrix.how.zero_points:
        file.append(zeros, np.concatenate([pack(z) for _, _, z in blocks]))


def _integer_bits(matrices: Mapping[str, Matrix]) -> dict[str, str]:
    """Metadata for clients: whether integer products have weights of 7 or 8 bits.

    8-bit sums of unsigned activations overflow on some processors.
    """
    most = {
        m.how.most
        for m in matrices.values()
        if not isinstance(m.how, Blockwise) and not (isinstance(m.how, Static) and m.how.symmetric)
    }
    return {"limbeck.integer_weights": "8 bits" if 127 in most else "7 bits"} if most else {}
