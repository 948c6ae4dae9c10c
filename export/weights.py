"""The external weights file of a graph: read an initialiser's values, write a new file in parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper

ALIGN = 64  # bytes; a processor's cache line


def external_array(tensor: TensorProto, folder: Path) -> npt.NDArray[Any]:
    """An initialiser's values, mapped from its external file in ``folder``."""
    if not tensor.external_data:
        return np.asarray(numpy_helper.to_array(tensor))
    entry = {e.key: e.value for e in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(
        folder / entry["location"], dtype, "r", int(entry.get("offset", 0)), tuple(tensor.dims)
    )


class WeightsFile:
    """The external file being written, and the initialisers that refer to it."""

    def __init__(self, out: BinaryIO, location: str, written: dict[str, TensorProto]) -> None:
        self._out, self._location, self._written = out, location, written

    def append(self, name: str, values: npt.NDArray[Any]) -> TensorProto:
        """Write ``values`` and the initialiser ``name`` of their shape."""
        out = self._out
        out.write(b"\0" * (-out.tell() % ALIGN))
        tensor = TensorProto(
            name=name, data_type=helper.np_dtype_to_tensor_dtype(values.dtype), dims=values.shape
        )
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (
            ("location", self._location),
            ("offset", out.tell()),
            ("length", values.nbytes),
        ):
            tensor.external_data.add(key=key, value=str(value))
        out.write(np.ascontiguousarray(values).data)
        self._written[name] = tensor
        return tensor

    def rename(self, tensor: TensorProto, name: str, dims: list[int]) -> None:
        """The same bytes under another name and shape."""
        self._written[name] = same_bytes(tensor, name, dims)


def same_bytes(tensor: TensorProto, name: str, dims: Sequence[int]) -> TensorProto:
    """An initialiser of the bytes of ``tensor``, with another name and shape."""
    other = TensorProto()
    other.CopyFrom(tensor)
    other.name = name
    del other.dims[:]
    other.dims.extend(dims)
    return other
