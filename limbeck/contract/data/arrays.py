"""Arrays that the packages pass to each other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from limbeck.contract.errors import DataError

Ids = npt.NDArray[np.int64]  # token ids, choices, positions
Floats = npt.NDArray[np.float32]
Logits = Floats  # also log-probabilities and vectors


def token_rows(ids: npt.ArrayLike) -> Ids:
    """``ids`` as an array ``[rows, tokens]``. Raises `DataError` unless it is one with tokens."""
    tokens = np.ascontiguousarray(ids, np.int64)
    if tokens.ndim != 2 or not tokens.size:
        raise DataError(
            f"found ids of shape {tokens.shape}; expected [rows, tokens] with at least one token."
        )
    return tokens
