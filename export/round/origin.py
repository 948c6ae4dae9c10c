"""Find the student's parameters in each matrix of the graph by their values.

Graph builders rename, transpose and join matrices but keep the numbers. So nothing here depends on
a builder's names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from safetensors import safe_open

from export.graphs import Graphs
from export.round.blocks import Blockwise
from export.round.matrices import Matrix
from export.weights import external_array
from limbeck.contract.errors import ModelError


@dataclass(frozen=True)
class Part:
    """Rows of a matrix [N, K] that one parameter fills."""

    parameter: str  # its name in the student's weights file
    turned: bool  # stored [K, N] there
    start: int  # first row of the matrix
    rows: int


def matrix_values(matrix: Matrix, graphs: Graphs) -> npt.NDArray[np.float32]:
    """The fp32 values ``[N, K]`` of a matrix of the fp32 ``graphs``."""
    tensors = {
        t.name: t for t in onnx.load(graphs.last, load_external_data=False).graph.initializer
    }
    values = external_array(tensors[matrix.name], graphs.data.parent)
    return np.asarray(values if matrix.rows else values.T)


def origins(matrices: Mapping[str, Matrix], graphs: Graphs, model: Path) -> dict[str, list[Part]]:
    """Parts of every matrix of the fp32 ``graphs`` by name, from the transformers folder ``model``.

    Raises `ModelError` if a matrix is not parameters joined by rows, for example if it was scaled.
    """
    tensors = {
        t.name: t for t in onnx.load(graphs.last, load_external_data=False).graph.initializer
    }
    parameters = _parameters(model)
    found = {}
    for name, matrix in matrices.items():
        values = external_array(tensors[name], graphs.data.parent)
        weights_NK, parts, start = values if matrix.rows else values.T, list[Part](), 0
        while start < matrix.channels:
            part = _part_at(weights_NK, start, parameters)
            if part is None:
                raise ModelError(
                    f"{model}: row {start} of the graph's matrix {name} is in no weight of the "
                    "model, expected the builder to keep "
                    "values; set export.mixed: rule and leave export.recover out."
                )
            parts.append(part)
            start += part.rows
        found[name] = parts
    return found


def rounding_of(
    matrices: Mapping[str, Matrix], parts: Mapping[str, Sequence[Part]]
) -> dict[str, dict[str, Any]]:
    """Rounding of each parameter, as data: ``bits``, ``block`` and ``zero_points``.

    With one scale per channel it is ``most``, the largest code; ``turned`` means stored as [K, N].
    """
    return {
        part.parameter: {"turned": part.turned}
        | (asdict(matrix.how) if isinstance(matrix.how, Blockwise) else {"most": matrix.how.most})
        for name, matrix in matrices.items()
        for part in parts[name]
    }


def _part_at(
    weights_NK: Any, start: int, parameters: Mapping[bytes, list[tuple[str, bool, Any]]]
) -> Part | None:
    for name, turned, values in parameters.get(
        np.ascontiguousarray(weights_NK[start]).tobytes(), ()
    ):
        rows = len(values)
        if np.array_equal(weights_NK[start : start + rows], values):
            return Part(name, turned, start, rows)
    return None


def _parameters(model: Path) -> dict[bytes, list[tuple[str, bool, Any]]]:
    """Name, layout and values [N, K] of every matrix, keyed by the bytes of its first row."""
    found: dict[bytes, list[tuple[str, bool, Any]]] = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                values = weights.get_tensor(name)
                if values.ndim == 2:
                    for turned, matrix in ((False, values), (True, values.T)):
                        found.setdefault(np.ascontiguousarray(matrix[0]).tobytes(), []).append(
                            (name, turned, matrix)
                        )
    return found
