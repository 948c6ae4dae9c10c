"""Safetensors files of an artifact, read and checked: names, number types, shapes and ranges."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from limbeck.contract.errors import ArtifactError
from limbeck.contract.files import open_regular

Array = npt.NDArray[Any]


def load_tensors(path: Path) -> dict[str, Array]:
    """All tensors of a file by name.

    Raises `FileNotFoundError`, and `ArtifactError` for another or a damaged file.
    """
    with open_regular(path):
        pass  # it can be read, and is neither a pipe nor a folder
    try:
        return dict(load_file(path))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, f"not a safetensors file ({error})") from None


def damaged(path: Path, finding: str) -> ArtifactError:
    """The error for a file of an artifact that is not what its stage wrote."""
    return ArtifactError(
        f"{path}: {finding}; delete the folder of this file and run its stage again."
    )


def take(
    path: Path, tensors: Mapping[str, Array], name: str, dtype: npt.DTypeLike, axes: int
) -> Array:
    """The tensor ``name`` of ``path``, of this number type and number of axes.

    Raises `ArtifactError`.
    """
    found = tensors.get(name)
    if found is None:
        raise damaged(path, f"no tensor {name!r} (found: {', '.join(sorted(tensors))})")
    if found.dtype != np.dtype(dtype) or found.ndim != axes:
        wanted = f"{np.dtype(dtype)} with {axes} axes"
        raise damaged(
            path, f"{name}: found {found.dtype} of shape {list(found.shape)}, expected {wanted}"
        )
    return found


def require_rows(
    path: Path, input_ids_NL: Array, lengths_N: Array, more: Mapping[str, Array]
) -> None:
    """Raise `ArtifactError` unless these are padded token rows, with ``more`` for each row.

    That is N of each, lengths of 1 to L, and no negative id.
    """
    rows, width = input_ids_NL.shape
    for name, values in {"lengths": lengths_N, **more}.items():
        if len(values) != rows:
            raise damaged(path, f"{name}: found {len(values)} rows, expected {rows}")
    if rows == 0:
        raise damaged(path, "found no rows")
    if lengths_N.min() < 1 or lengths_N.max() > width:
        found = f"{lengths_N.min()} to {lengths_N.max()}"
        raise damaged(path, f"lengths: found {found}, expected 1 to {width}")
    if input_ids_NL.min() < 0:
        raise damaged(path, f"input_ids: found the negative id {input_ids_NL.min()}")
