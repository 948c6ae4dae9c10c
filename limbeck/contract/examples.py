"""Held-out examples of an encoder as the stages share them, and the figures that its quality is told in.

Shape letters: N examples, L tokens, C classes, d width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

EXAMPLES = "examples.safetensors"

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """Token rows and the class, or the domain, of each."""

    input_ids: npt.NDArray[np.int32]  # [N, L], right-padded
    lengths: npt.NDArray[np.int32]  # [N]
    groups: npt.NDArray[np.int32]  # [N]

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, rows: Ints) -> Examples:
        """Some of them, in the order of ``rows``."""
        return Examples(self.input_ids[rows], self.lengths[rows], self.groups[rows])

    def batch(self, rows: Ints | slice) -> tuple[Ints, Ints]:
        """Ids and mask ``[rows, L]``, as long as the longest of them."""
        lengths = self.lengths[rows]
        width = int(lengths.max())
        mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
        return self.input_ids[rows, :width].astype(np.int64), mask

    def batches(self, size: int) -> Iterator[tuple[Ints, Ints]]:
        """All of them in order, ``size`` at a time."""
        return (self.batch(slice(at, at + size)) for at in range(0, len(self), size))


def save_examples(path: Path, examples: Examples) -> None:
    """Write examples to ``path``."""
    save_file(
        {name: np.ascontiguousarray(getattr(examples, name)) for name in Examples.__annotations__},
        path,
    )


def load_examples(path: Path) -> Examples:
    """Read what `save_examples` wrote."""
    return Examples(**load_file(path))


def accuracy(predicted_N: Ints, labels_N: Ints) -> float:
    """Share of examples whose class is right."""
    return float((predicted_N == labels_N).mean())


def macro_f1(predicted_N: Ints, labels_N: Ints, classes: int) -> float:
    """Mean over the classes of F1 = 2 TP / (2 TP + FP + FN); a class that is neither there nor said counts 1."""
    scores = []
    for c in range(classes):
        said, there = predicted_N == c, labels_N == c
        both, either = int((said & there).sum()), int(said.sum() + there.sum())
        scores.append(2 * both / either if either else 1.0)
    return float(np.mean(scores))


def similarities(vectors_Nd: Floats) -> npt.NDArray[np.float64]:
    """Cosine similarities of all pairs, ``[N, N]``."""
    unit = np.asarray(vectors_Nd, np.float64)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True).clip(min=1e-12)
    found: npt.NDArray[np.float64] = unit @ unit.T
    return found
