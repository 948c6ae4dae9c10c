"""Keys and values of finished sequences, so that a prompt that begins alike is not read again.

Knows tokens and arrays; knows nothing of graphs or requests. Used by the engine's thread alone.
Shape letters: H heads, L tokens, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from limbeck.runtime.decoder import common_prefix

_MOST = 512  # sequences: every prompt is compared with all of them
Cache = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Entry:
    """One sequence: its tokens, and an array ``[H, L, D]`` for each key and value input."""

    owner: Hashable
    ids: npt.NDArray[np.int64]
    arrays: tuple[Cache, ...]

    @property
    def bytes(self) -> int:
        """Memory that the entry takes."""
        return self.ids.nbytes + sum(array.nbytes for array in self.arrays)


class PrefixCache:
    """At most 512 sequences under a byte budget; the least recently used one goes first.

    A sequence is found only by its owner, so that the time to the first token tells nobody what
    others have asked.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes = 0
        self._entries: list[Entry] = []  # least recently used first

    def find(self, ids: Sequence[int], owner: Hashable) -> tuple[int, tuple[Cache, ...]]:
        """The longest beginning of ``ids`` that is held: its length, and arrays cut to it."""
        wanted = np.array(ids, np.int64)
        best, length = None, 0
        for entry in self._entries:
            if entry.owner == owner and (shared := common_prefix(entry.ids, wanted)) > length:
                best, length = entry, shared
        if best is None:
            return 0, ()
        self._touch(best)
        return length, tuple(array[:, :length] for array in best.arrays)

    def put(
        self, ids: Sequence[int], owner: Hashable, token_bytes: int, read: Callable[[], list[Cache]]
    ) -> None:
        """Keep a sequence. ``read`` is called for copies of its arrays when it is worth keeping.

        A sequence that another one begins with is dropped: the longer one serves for both.
        """
        tokens = np.array(ids, np.int64)
        if not len(tokens) or len(tokens) * token_bytes + tokens.nbytes > self.budget:
            return
        for entry in [one for one in self._entries if one.owner == owner]:
            shared = common_prefix(entry.ids, tokens)
            if shared == len(tokens):
                self._touch(entry)
                return
            if shared == len(entry.ids):
                self._remove(entry)
        new = Entry(owner, tokens, tuple(read()))
        while self._entries and (
            self.bytes + new.bytes > self.budget or len(self._entries) >= _MOST
        ):
            self._remove(self._entries[0])
        self._entries.append(new)
        self.bytes += new.bytes

    def _touch(self, entry: Entry) -> None:
        self._entries.remove(entry)
        self._entries.append(entry)

    def _remove(self, entry: Entry) -> None:
        self._entries.remove(entry)
        self.bytes -= entry.bytes
