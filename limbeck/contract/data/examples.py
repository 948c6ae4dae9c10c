"""Held-out examples of an encoder, which the stages share, and the figures of its quality.

Shape letters: N examples, L tokens, C classes, d width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from limbeck.contract.data.arrays import Floats, Ids
from limbeck.contract.data.tensors import damaged, load_tensors, require_rows, take

EXAMPLES = "examples.safetensors"


@dataclass(frozen=True)
class Examples:
    """Token rows, each with its class or its domain."""

    input_ids: npt.NDArray[np.int32]  # [N, L], right-padded
    lengths: npt.NDArray[np.int32]  # [N]
    groups: npt.NDArray[np.int32]  # [N]

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, rows: Ids) -> Examples:
        """The examples of ``rows``, in that order."""
        return Examples(self.input_ids[rows], self.lengths[rows], self.groups[rows])

    def batch(self, rows: Ids | slice) -> tuple[Ids, Ids]:
        """Token ids and mask ``[rows, L]``; L is the longest of these rows."""
        lengths = self.lengths[rows]
        width = int(lengths.max())
        mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
        return self.input_ids[rows, :width].astype(np.int64), mask

    def batches(self, size: int) -> Iterator[tuple[Ids, Ids]]:
        """All examples in order, ``size`` at a time."""
        return (self.batch(slice(at, at + size)) for at in range(0, len(self), size))


def save_examples(path: Path, examples: Examples) -> None:
    """Write examples to ``path``."""
    save_file(
        {name: np.ascontiguousarray(getattr(examples, name)) for name in Examples.__annotations__},
        path,
    )


def load_examples(path: Path) -> Examples:
    """Read what `save_examples` wrote.

    Raises `ArtifactError` naming file and tensor for anything else.
    """
    tensors = load_tensors(path)
    examples = Examples(
        input_ids=take(path, tensors, "input_ids", np.int32, 2),
        lengths=take(path, tensors, "lengths", np.int32, 1),
        groups=take(path, tensors, "groups", np.int32, 1),
    )
    require_rows(path, examples.input_ids, examples.lengths, {"groups": examples.groups})
    if examples.groups.min() < 0:
        raise damaged(path, f"groups: found the negative number {examples.groups.min()}")
    return examples


def accuracy(predicted_N: Ids, labels_N: Ids) -> float:
    """Share of examples whose class is right."""
    return float((predicted_N == labels_N).mean())


def macro_f1(predicted_N: Ids, labels_N: Ids, classes: int) -> float:
    """Mean over the classes of F1 = 2 TP / (2 TP + FP + FN).

    A class with no label and no prediction counts 1.
    """
    scores = []
    for c in range(classes):
        predicted, true = predicted_N == c, labels_N == c
        both, either = int((predicted & true).sum()), int(predicted.sum() + true.sum())
        scores.append(2 * both / either if either else 1.0)
    return float(np.mean(scores))


def similarities(vectors_Nd: Floats) -> npt.NDArray[np.float64]:
    """Cosine similarities of all pairs, ``[N, N]``."""
    unit = np.asarray(vectors_Nd, np.float64)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True).clip(min=1e-12)
    found: npt.NDArray[np.float64] = unit @ unit.T
    return found
