"""What a training reads and when: batches of a step, held-out batches, and all rows of both.

A function of the recipe and the text alone, so a teacher cache can be filled before any student
is built.

Shapes: R rows (blocks), L positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compress.data.blocks import DomainBlocks, labels_of, training_order
from limbeck.contract.data.heldout import Blocks
from limbeck.contract.recipe import MergeStudent, Recipe

Row = tuple[Tensor, Tensor]  # token ids [L] and labels [L]


class TrainingText:
    """The blocks of a recipe in the order in which its training reads them."""

    def __init__(self, recipe: Recipe, blocks: Sequence[DomainBlocks]) -> None:
        self.blocks = blocks
        self._recipe, self._order = recipe, np.zeros((0, 2), np.int64)

    @property
    def steps(self) -> int | None:
        """Steps of a budget in tokens, 0 for a merge; None where the budget is in minutes."""
        config = self._recipe.training
        if isinstance(self._recipe.student, MergeStudent):
            return 0
        return config.tokens // config.batch_tokens if config.tokens is not None else None

    def batch(self, step: int) -> tuple[npt.NDArray[np.int64], Tensor, Tensor]:
        """Return domains ``[R]``, token ids and labels ``[R, L]`` of the global batch of a step.

        A function of the seed and the step alone.
        """
        rows = self._recipe.training.batch_tokens // self._recipe.data.block
        last = step * rows + rows
        if len(self._order) < last:
            # A longer order begins with the shorter one, so growing it changes nothing.
            self._order = self._first(1 << last.bit_length())
        return self._rows(self._order[step * rows : last])

    def first_rows(self, count: int) -> tuple[Tensor, Tensor]:
        """Token ids and labels ``[R, L]`` of the first ``count`` training blocks."""
        return self._rows(self._first(count))[1:]

    def first_texts(self, count: int) -> list[npt.NDArray[np.int32]]:
        """Token ids of the first ``count`` training blocks, without their padding."""
        blocks = self.blocks
        return [
            np.array(blocks[d].train_ids[r, : blocks[d].train_lengths[r]])
            for d, r in self._first(count)
        ]

    def rows(self) -> list[Row]:
        """Every row that training and measuring will need, of a budget in tokens."""
        found = [
            row
            for b in self.blocks
            for batch in heldout_batches(b.heldout)
            for row in zip(*batch, strict=True)
        ]
        for step in range(self.steps or 0):
            found += zip(*self.batch(step)[1:], strict=True)
        return found

    def _first(self, count: int) -> npt.NDArray[np.int64]:
        """Domain and row of the first ``count`` blocks in the recipe's mixture."""
        return training_order(self.blocks, count=count, seed=self._recipe.seed)

    def _rows(self, picked: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], Tensor, Tensor]:
        ids = np.stack([self.blocks[d].train_ids[r] for d, r in picked])
        scored = np.stack([self.blocks[d].train_scored[r] for d, r in picked])
        return picked[:, 0], torch.from_numpy(ids).long(), torch.from_numpy(labels_of(ids, scored))


def heldout_batches(heldout: Blocks, rows: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Return token ids and labels ``[rows, L]`` of held-out blocks."""
    ids, labels = heldout.input_ids, labels_of(heldout.input_ids, heldout.scored)
    return [
        (torch.from_numpy(ids[i : i + rows]).long(), torch.from_numpy(labels[i : i + rows]))
        for i in range(0, len(ids), rows)
    ]
