"""Are the weights of a rounded graph those of the fp32 graph, within rounding errors?

Reads the files that ship. The error of an output of a matrix does not depend on the model's depth
or on text. A fault in one matrix is plain here; in the logits dozens of sound matrices hide it.

Shape letters: K inputs of a product, N outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from export.graphs import Graphs
from export.round.blocks import Blockwise, dequantize_blocks, unpack_nibbles
from export.round.calibrate import Calibration
from export.round.matrices import Matrix, find_matrices
from export.round.scheme import Scheme
from export.weights import external_array
from limbeck.contract.data.arrays import Floats
from limbeck.contract.errors import ParityError

# The largest error of each kind; docs/experiments/forms.md has the measured values. For weights it
# is |w' - w| / |w| of one output. In 8 bits it is at most sqrt(K) / 440 where one outlier sets the
# step of K weights (7 bits: sqrt(K) / 218), so that the limit grows with K. What is
# not rounded may be cast to 16 bits, which keep 11 bits of a number. For an activation it is how
# far the outermost codes are from its measured range, over the width of that range: up to half a
# step of 255, because a zero point is a whole number.
_LIMITS = {"8 bits": 0.5, "4 bits": 0.5, "not rounded": 1e-3, "activation": 0.01}
_ROWS = 4096  # outputs compared at a time, which bounds the memory


@dataclass(frozen=True)
class WeightError:
    """The largest relative error in one initialiser, or in the codes of one activation."""

    name: str
    kind: str  # a key of `_LIMITS`
    error: float
    sharing: int = 10_000  # weights of one step

    @property
    def limit(self) -> float:
        """What rounding may cost at most."""
        most = _LIMITS[self.kind]
        return min(most, max(0.1, self.sharing**0.5 / 150)) if self.kind == "8 bits" else most


def weight_errors(
    source: Graphs, graph: Path, scheme: Scheme, calibration: Calibration
) -> Iterator[WeightError]:
    """The error of every initialiser of the rounded ``graph`` that comes from the fp32 ``source``.

    ``calibration`` holds the factors that the fp32 weights were multiplied by, and the ranges of
    activations.
    """
    fp32 = onnx.load(source.last, load_external_data=False)
    before = {t.name: t for t in fp32.graph.initializer}
    made = onnx.load(graph, load_external_data=False)
    after = {t.name: t for t in made.graph.initializer}
    matrices = find_matrices(fp32, before, scheme)
    for name, tensor in before.items():
        matrix = matrices.get(name)
        if tensor.data_type != TensorProto.FLOAT or (matrix is None and name not in after):
            continue
        values = external_array(tensor, source.data.parent)
        rows = matrix is not None and matrix.rows
        values = calibration.factors.apply(name, values, rows=rows)
        if matrix is None:
            found = external_array(after[name], graph.parent)
            yield WeightError(name, "not rounded", unlike(values, found))
            continue
        weights_NK = values if rows else values.T
        parts = [
            unlike_rows(weights_NK[at : at + _ROWS], _read(matrix, after, graph.parent, at))
            for at in range(0, matrix.channels, _ROWS)
        ]
        how = matrix.how
        bits, sharing = (how.bits, how.block) if isinstance(how, Blockwise) else (8, matrix.width)
        yield WeightError(name, f"{bits} bits", max(parts), sharing)
    for name, span in calibration.ranges.items():
        scale, middle = (after.get(f"limbeck/static/{name}/{part}") for part in ("scale", "middle"))
        if scale is not None and middle is not None:
            yield WeightError(name, "activation", _range_error(span, scale, middle))


def require_weights(
    form: str, source: Graphs, made: Graphs, scheme: Scheme, calibration: Calibration
) -> None:
    """Raise `ParityError` naming initialisers of ``made`` that differ from ``source``."""
    require_limits(form, weight_errors(source, made.last, scheme, calibration))


def require_limits(form: str, errors: Iterable[WeightError]) -> None:
    """Raise `ParityError` naming the first of ``errors`` that are past their limits."""
    wrong = [e for e in errors if not e.error <= e.limit]  # NaN is past every limit
    if wrong:
        listed = "".join(
            f"\n  {e.name}: {e.error:.3g} of its size, limit {e.limit:.3g}" for e in wrong[:5]
        )
        raise ParityError(
            f"the {form} file does not hold the student's weights; {len(wrong)} differ by more "
            f"than rounding does:{listed}\n"
            "Choose another form or a smaller block_size in the recipe, or report the model."
        )


def _read(matrix: Matrix, tensors: dict[str, TensorProto], folder: Path, at: int) -> Floats:
    """Weights ``[n, K]`` of up to `_ROWS` outputs from ``at`` on, from codes and scales."""
    codes, scales, zeros = (
        external_array(tensors[name], folder) if name in tensors else None
        for name in matrix.names("codes", "scales", "zeros")
    )
    part = slice(at, at + _ROWS)
    if scales is None:  # of an embedding that is not tied to a head
        scales = external_array(tensors[matrix.names("scales_3d")[0]], folder)[..., 0]
    assert codes is not None
    steps = scales[part].astype(np.float32)
    if not isinstance(matrix.how, Blockwise):
        columns = codes[part] if matrix.by_rows else codes[:, part].T
        return np.asarray(columns * steps[:, None], np.float32)
    blocks = codes[part] if matrix.how.bits == 8 else unpack_nibbles(codes[part])
    if zeros is None:
        middles = np.full(steps.shape, 2 ** (matrix.how.bits - 1), np.uint8)
    else:
        middles = zeros[part] if matrix.how.bits == 8 else unpack_nibbles(zeros[part])
    read = dequantize_blocks(blocks, steps, middles[:, : steps.shape[1]])
    return read[:, : matrix.width]


def unlike(values: npt.NDArray[np.float32], found: npt.NDArray[Any]) -> float:
    """The largest difference over the largest value; masks hold numbers whose squares overflow."""
    if np.array_equal(values, found):
        return 0.0
    before, after = values.astype(np.float64), found.astype(np.float64)
    if found.dtype == np.float16:
        most = float(np.finfo(np.float16).max)  # a mask's number is cast to the largest there is
        before = np.clip(before, -most, most)
    return float(np.abs(after - before).max() / max(np.abs(before).max(), 1e-30))


def _range_error(span: tuple[float, float], scale: TensorProto, middle: TensorProto) -> float:
    """How far the first and the last code of an activation are from its range ``span``."""
    step, zero = (numpy_helper.to_array(tensor) for tensor in (scale, middle))
    low, high = min(span[0], 0.0), max(span[1], 0.0)
    first, last = (0, 255) if zero.dtype == np.uint8 else (-127, 127)
    if zero.dtype != np.uint8:
        low, high = min(low, -high), max(high, -low)
    ends = (first - int(zero)) * float(step), (last - int(zero)) * float(step)
    return max(abs(ends[0] - low), abs(ends[1] - high)) / max(high - low, 1e-9)


def unlike_rows(values_NK: Floats, found_NK: Floats) -> float:
    """The largest |found - value| / |value| of a row; 0 where both are 0."""
    size = np.linalg.norm(values_NK, axis=-1)
    off = np.linalg.norm(found_NK.astype(np.float32) - values_NK, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(off == 0, 0, off / size)
    return float(ratio.max(initial=0))
