"""The teachers of a recipe, wherever they are: in memory, in the cache, behind a server.

Teachers behind a server have no head and no hidden states. They are left out of feature alignment.

Shapes: K teachers, R rows, L positions, P layers, d_k width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from compress.data.training_text import Row
from compress.head import Head
from compress.states import AnyStates
from compress.teachers.cache import CachedTeachers
from compress.teachers.live import TeacherFolder, Teachers
from compress.teachers.pairs import Pairs
from compress.teachers.served import ServedTeacher, ServedTeachers
from limbeck.contract.recipe import NoCache, TeacherCache

T = TypeVar("T")
Found = tuple[list[AnyStates], list[list[Tensor]]]


def open_teachers(
    found: Sequence[TeacherFolder | ServedTeacher],
    *,
    cache: TeacherCache,
    device: torch.device,
    compute_dtype: torch.dtype,
    pairs: Pairs | None = None,
) -> Teachers | CachedTeachers | MixedTeachers:
    """Load the local teachers, or open the cache; open the cache of the served ones.

    ``pairs`` has one entry a teacher; None: all have the student's tokenizer.
    """
    folders = [f for f in found if isinstance(f, TeacherFolder)]
    pairs = pairs or Pairs((None,) * len(found), ((),) * len(found))
    here = pairs.only([k for k, f in enumerate(found) if isinstance(f, TeacherFolder)])
    local = (
        Teachers(folders, device=device, compute_dtype=compute_dtype, pairs=here.pairs)
        if isinstance(cache, NoCache)
        else CachedTeachers(
            folders, cache=cache, device=device, compute_dtype=compute_dtype, pairs=here
        )
    )
    if len(folders) == len(found):
        return local
    return MixedTeachers(found, local, device=device, pairs=pairs)


class MixedTeachers:
    """`Teachers` or `CachedTeachers`, and teachers behind servers, in the recipe's order."""

    def __init__(
        self,
        found: Sequence[TeacherFolder | ServedTeacher],
        local: Teachers | CachedTeachers,
        *,
        device: torch.device,
        pairs: Pairs,
    ) -> None:
        self.names = [f.name for f in found]
        self.temperatures = [1.0] * len(found)
        self.local = local
        is_local = [isinstance(f, TeacherFolder) for f in found]
        self.served = ServedTeachers(
            [f for f in found if isinstance(f, ServedTeacher)],
            device=device,
            pairs=[pair for pair, mine in zip(pairs.pairs, is_local, strict=True) if not mine],
        )
        # Each teacher's place among the local ones, or among the served ones.
        self._places = [(mine, is_local[:k].count(mine)) for k, mine in enumerate(is_local)]
        self.heads: list[Head | None] = []
        self.widths, self.depths = list[int](), list[int]()  # 0 of a served teacher
        for mine, place in self._places:
            self.heads.append(local.heads[place] if mine else None)
            self.widths.append(local.widths[place] if mine else 0)
            self.depths.append(local.depths[place] if mine else 0)

    @property
    def served_vocabularies(self) -> list[int]:
        return self.served.vocabularies

    def __len__(self) -> int:
        return len(self.names)

    def prepare(self, rows: Sequence[Row], layers: Sequence[Sequence[int]] | None) -> None:
        """Ask every server, and fill the cache of the local teachers where there is one."""
        self.served.prepare(rows)
        if isinstance(self.local, CachedTeachers):
            self.local.prepare(rows, self.of_local(layers) if layers else None)

    def states(
        self,
        input_ids_RL: Tensor,
        layers: Sequence[Sequence[int]] | None = None,
        *,
        only: int | None = None,
        labels_RL: Tensor | None = None,
    ) -> Found:
        """As `Teachers.states`."""
        self.local.temperatures[:] = self.of_local(self.temperatures)
        inner_layers = self.of_local(layers) if layers else None
        if only is not None:
            mine, place = self._places[only]
            if not mine:
                return [self.served.states(place, input_ids_RL, labels_RL)], [[]]
            last, inner = self.local.states(
                input_ids_RL, inner_layers, only=place, labels_RL=labels_RL
            )
            return list(last), inner
        found, states = self.local.states(input_ids_RL, inner_layers, labels_RL=labels_RL)
        return (
            [
                found[place] if mine else self.served.states(place, input_ids_RL, labels_RL)
                for mine, place in self._places
            ],
            [states[place] if mine else [] for mine, place in self._places],
        )

    def of_local(self, values: Sequence[T]) -> list[T]:
        """The local teachers' values, taken from all teachers'."""
        return [v for v, (mine, _) in zip(values, self._places, strict=True) if mine]
