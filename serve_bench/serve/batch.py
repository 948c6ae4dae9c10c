"""The key-value caches of several streams in one decoder graph; rows join and leave between steps.

Knows numpy, onnxruntime and the graphs that `limbeck.runtime.decoder` opens; knows nothing of
requests, sampling or text. Every row is decoded from its own tokens alone.
Shape letters: N rows, S new tokens, L the longest row, V vocabulary, H heads, D width of a head.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from limbeck.contract.data.arrays import Floats, Ids
from limbeck.contract.errors import ArtifactError
from limbeck.runtime.decoder import GraphDecoder


class Batch(Protocol):
    """What the two kinds of cache have in common.

    One new row is filled at a time, apart from the running rows.
    """

    rows: int
    longest: int  # tokens that one row may grow to

    @property
    def held(self) -> int:
        """Tokens that the caches hold now, padding included."""

    def fits(self, needs: Sequence[int]) -> bool:
        """Whether rows that may grow to ``needs`` tokens each can be held at once."""

    def fill(self, ids: Sequence[int], *, is_long: bool = False) -> Floats:
        """Append ``ids`` to the new row; returns the logits ``[V]`` after its last token.

        ``is_long`` is whether its whole prompt is: see `GraphDecoder.is_long`.
        """

    def join(self) -> None:
        """Make the new row the last of the running rows."""

    def drop(self) -> None:
        """Forget the new row."""

    def step(self, ids: Ids) -> Floats:
        """Append one token to every row, ``ids[N]``; returns the logits ``[N, V]`` after it.

        They are valid until the next call.
        """

    def leave(self, row: int) -> None:
        """Free a row. The last one takes its number."""

    def length(self, row: int | None) -> int:
        """Tokens in a row's cache; None is the new row."""

    def view(self, row: int | None, length: int) -> list[Floats]:
        """The first ``length`` tokens of a row's caches, ``[H, length, D]`` for each graph input.

        Copy them to keep them: they change with the next call.
        """

    def take(self, arrays: Sequence[Floats]) -> None:
        """Begin the new row with caches that `view` gave of another one."""


def open_batch(decoder: GraphDecoder, *, rows: int, tokens: int) -> Batch:
    """Caches in the graph of ``decoder``, for ``rows`` rows and ``tokens`` tokens of all together.

    Raises `ArtifactError` for a graph of fixed shape, whose rows cannot come and go.
    """
    if decoder.fixed:
        raise ArtifactError(
            "this graph is of fixed shape (export.shapes: static), so its rows cannot come and go; "
            "serve one that was exported with export.shapes: dynamic."
        )
    return GrowingBatch(decoder, tokens) if decoder.grows else InPlaceBatch(decoder, rows, tokens)


def bytes_per_token(decoder: GraphDecoder) -> int:
    """Bytes that the cache takes for one token of one row."""
    return (
        sum(heads * size for heads, size in decoder.past.values())
        * np.dtype(decoder.cache_type).itemsize
    )


class InPlaceBatch:
    """Rows of a fused graph, which reads and writes one buffer a layer.

    Each buffer has address space for every row at full length, and for one more that is being
    filled behind the running ones: when none has left meanwhile, it joins without a copy. The
    system gives it memory page by page where tokens are written, and takes it back when
    a row leaves: memory follows the tokens held, without a table of blocks that the graph would
    have to know. The fused kernel takes a row's length from the sum of its mask, so rows of any
    lengths can be stepped together.
    """

    def __init__(self, decoder: GraphDecoder, rows: int, tokens: int) -> None:
        self.rows = 0
        self._decoder, self._tokens, self._most = decoder, tokens, rows
        self.longest = min(tokens, decoder.context or tokens)
        unit = mmap.PAGESIZE  # then every row begins on a page, however small its heads
        capacity = -(-self.longest // unit) * unit
        self._buffers = {
            name: Pages((rows + 1, heads, capacity, size), decoder.cache_type)
            for name, (heads, size) in decoder.past.items()
        }
        self._lengths = np.zeros(rows + 1, np.int64)
        self._logits = np.empty((rows, 1, decoder.vocabulary), np.float32)
        self._running: Any = None
        self._new: int | None = None  # the row that is being filled, and its bindings
        self._filling: dict[bool, Any] = {}

    @property
    def held(self) -> int:
        return int(self._lengths.sum())

    def fits(self, needs: Sequence[int]) -> bool:
        return len(needs) <= self._most and sum(needs) <= self._tokens

    def fill(self, ids: Sequence[int], *, is_long: bool = False) -> Floats:
        new = self._begin()
        tokens = np.array([ids], np.int64)
        self._lengths[new] += len(ids)
        mask = np.ones((1, self._lengths[new]), np.int64)
        logits = np.empty((1, 1, self._decoder.vocabulary), np.float32)
        if is_long not in self._filling:
            self._filling[is_long] = self._bind(new, new + 1, is_long)
        run(self._decoder, self._filling[is_long], tokens, mask, logits, is_long)
        last: Floats = logits[0, 0]
        return last

    def join(self) -> None:
        new = self._begin()
        if new != self.rows:  # a row has left meanwhile
            self._move(new, self.rows)
        self._new, self._filling = None, {}
        self._resize(self.rows + 1)

    def drop(self) -> None:
        self._clear(self._begin())
        self._new, self._filling = None, {}

    def step(self, ids: Ids) -> Floats:
        lengths = self._lengths[: self.rows]
        lengths += 1
        width = lengths.max()
        mask = (np.arange(width) >= width - lengths[:, None]).astype(np.int64)
        logits = self._logits[: self.rows]
        run(self._decoder, self._running, np.ascontiguousarray(ids[:, None]), mask, logits)
        return logits[:, 0]

    def leave(self, row: int) -> None:
        last = self.rows - 1
        self._clear(row)
        if row != last:
            self._move(last, row)
        self._resize(last)

    def length(self, row: int | None) -> int:
        return int(self._lengths[self._begin() if row is None else row])

    def view(self, row: int | None, length: int) -> list[Floats]:
        index = self._begin() if row is None else row
        return [pages.array[index, :, :length] for pages in self._buffers.values()]

    def take(self, arrays: Sequence[Floats]) -> None:
        new = self._begin()
        self._lengths[new] = length = arrays[0].shape[1]
        for pages, array in zip(self._buffers.values(), arrays, strict=True):
            pages.array[new, :, :length] = array

    def _begin(self) -> int:
        """The row that is being filled."""
        if self._new is None:
            self._new = self.rows
        return self._new

    def _move(self, source: int, target: int) -> None:
        length = self._lengths[source]
        for pages in self._buffers.values():
            pages.array[target, :, :length] = pages.array[source, :, :length]
        self._clear(source)
        self._lengths[target] = length

    def _clear(self, row: int) -> None:
        for pages in self._buffers.values():
            pages.give_back(row)
        self._lengths[row] = 0

    def _resize(self, rows: int) -> None:
        self.rows = rows
        self._running = self._bind(0, rows) if rows else None

    def _bind(self, first: int, last: int, is_long: bool = False) -> Any:
        binding = self._decoder.new_binding(is_long=is_long)
        for name, pages in self._buffers.items():
            cache = self._decoder.share(pages.array[first:last])
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), cache)
        return binding


class Pages:
    """An array in memory that the system provides at the first write and that rows give back."""

    def __init__(self, shape: tuple[int, ...], kind: type[np.floating[Any]]) -> None:
        self._row = int(np.prod(shape[1:])) * np.dtype(kind).itemsize  # bytes
        self._memory = mmap.mmap(
            -1, shape[0] * self._row, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a huge page has room for thousands of tokens
            self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.array = np.frombuffer(self._memory, kind).reshape(shape)

    def give_back(self, row: int) -> None:
        """Let the system have the memory of ``row``; reads as zero afterwards."""
        self._memory.madvise(mmap.MADV_DONTNEED, row * self._row, self._row)


class GrowingBatch:
    """Rows of a graph that returns a longer cache at every step (see `export.build.dynamo`).

    They are padded on the left to one length.
    """

    def __init__(self, decoder: GraphDecoder, tokens: int) -> None:
        self.rows = 0
        self._decoder = decoder
        self._tokens = tokens // 2  # a step holds the old cache and the new one
        self.longest = min(self._tokens, decoder.context or self._tokens)
        self._bindings: dict[bool, Any] = {}
        self._cache: list[Any] = []
        self._mask: Ids = np.zeros((0, 0), np.int64)
        self._new: list[Any] = []  # the cache of the row that is being filled
        self._filled = 0

    @property
    def held(self) -> int:
        return self._mask.size + self._filled

    def fits(self, needs: Sequence[int]) -> bool:
        # Every row is as long as the longest.
        return len(needs) * max(needs, default=0) <= self._tokens

    def fill(self, ids: Sequence[int], *, is_long: bool = False) -> Floats:
        self._filled += len(ids)
        kind = self._decoder.cache_type
        past = self._new or [
            self._share(np.zeros((1, h, 0, d), kind)) for h, d in self._decoder.past.values()
        ]
        logits, self._new = self._run(
            np.array([ids], np.int64), np.ones((1, self._filled), np.int64), past, is_long
        )
        last: Floats = logits[0]
        return last

    def join(self) -> None:
        length = max(self._filled, self._mask.shape[1])
        mine, theirs = self._arrays(self._new), self._arrays(self._cache)
        joined = [self._padded(new, length) for new in mine]
        if self.rows:
            joined = [
                np.concatenate([self._padded(old, length), new])
                for old, new in zip(theirs, joined, strict=True)
            ]
        mask = np.zeros((self.rows + 1, length), np.int64)
        mask[: self.rows, length - self._mask.shape[1] :] = self._mask
        mask[self.rows, length - self._filled :] = 1
        self._keep(joined, mask)
        self.drop()

    def drop(self) -> None:
        self._new, self._filled = [], 0

    def step(self, ids: Ids) -> Floats:
        self._mask = np.concatenate([self._mask, np.ones((self.rows, 1), np.int64)], axis=1)
        logits, self._cache = self._run(np.ascontiguousarray(ids[:, None]), self._mask, self._cache)
        return logits

    def leave(self, row: int) -> None:
        order = [*range(self.rows - 1)]
        if row < self.rows - 1:
            order[row] = self.rows - 1
        mask = self._mask[order]
        # Columns before this one are padding in every row that stays.
        first = int(mask.any(axis=0).argmax()) if order else 0
        self._keep(
            [cache[order, :, first:] for cache in self._arrays(self._cache)], mask[:, first:]
        )

    def length(self, row: int | None) -> int:
        return self._filled if row is None else int(self._mask[row].sum())

    def view(self, row: int | None, length: int) -> list[Floats]:
        if row is None:
            return [array[0, :, :length] for array in self._arrays(self._new)]
        first = self._mask.shape[1] - self.length(row)  # padding is on the left
        return [array[row, :, first : first + length] for array in self._arrays(self._cache)]

    def take(self, arrays: Sequence[Floats]) -> None:
        self._new = [self._share(np.ascontiguousarray(array[None])) for array in arrays]
        self._filled = arrays[0].shape[1]

    def _keep(self, arrays: Iterable[Floats], mask: Ids) -> None:
        self.rows, self._mask = len(mask), mask
        self._cache = (
            [self._share(np.ascontiguousarray(array)) for array in arrays] if self.rows else []
        )

    def _run(
        self, tokens: Ids, mask: Ids, past: list[Any], is_long: bool = False
    ) -> tuple[Floats, list[Any]]:
        logits = np.empty((len(tokens), 1, self._decoder.vocabulary), np.float32)
        if is_long not in self._bindings:
            self._bindings[is_long] = self._decoder.new_binding(is_long=is_long)
        binding = self._bindings[is_long]
        for name, cache in zip(self._decoder.past, past, strict=True):
            binding.bind_ortvalue_input(name, cache)
            binding.bind_output(name.replace("past_key_values.", "present."), "cpu")
        run(self._decoder, binding, tokens, np.ascontiguousarray(mask), logits, is_long)
        return logits[:, 0], binding.get_outputs()[: len(past)]  # bound before the logits

    def _share(self, array: Floats) -> Any:
        return self._decoder.share(array)

    @staticmethod
    def _arrays(values: list[Any]) -> list[Floats]:
        return [value.numpy() for value in values]

    @staticmethod
    def _padded(array: Floats, length: int) -> Floats:
        return np.pad(array, ((0, 0), (0, 0), (length - array.shape[2], 0), (0, 0)))


def run(
    decoder: GraphDecoder,
    binding: Any,
    tokens: Ids,
    mask: Ids,
    logits: Floats,
    is_long: bool = False,
) -> None:
    """Run a graph on ``tokens[N, S]`` and ``mask[N, L]`` into ``logits``; caches are bound."""
    binding.bind_ortvalue_input("input_ids", decoder.share(tokens))
    binding.bind_ortvalue_input("attention_mask", decoder.share(mask))
    binding.bind_ortvalue_output("logits", decoder.share(logits))
    (decoder.prompt_session if is_long else decoder.session).run_with_iobinding(binding)
