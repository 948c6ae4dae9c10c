"""Names for the arrays that the packages pass to each other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]  # token ids, choices, positions
Logits = npt.NDArray[np.float32]  # also log-probabilities and vectors
