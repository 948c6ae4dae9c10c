"""Continuous batching: requests in, pieces of text out, and one thread that owns the model.

Knows requests, sampling, stop strings, limits and time. Knows nothing of HTTP, so any server can
use it. The key-value caches and the graph belong to `serve_bench.serve.batch`.

Between two steps of the running rows, requests that ended leave and waiting ones join. A prompt is
read in chunks, one chunk a step, so that a long one delays the others little. A request
joins when there is room for all it may ask for, first come first served: nothing that runs is ever
pushed out again. The beginning that a prompt shares with a running or finished sequence is copied
instead of read.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from limbeck.contract.data.arrays import Floats
from limbeck.contract.errors import (
    ArtifactError,
    ClosedError,
    ContextError,
    DataError,
    EnvironmentalError,
    QueueFullError,
)
from limbeck.contract.progress import say
from limbeck.runtime.decoder import FEWEST_READ, Decoder, common_prefix
from limbeck.runtime.grammar import Grammar, GrammarError, Grammars
from limbeck.runtime.sampling import GREEDY, Sampler, Sampling, TokenLogprobs, logprobs
from limbeck.runtime.text import Decoding, load_text
from serve_bench.serve.batch import bytes_per_token, open_batch
from serve_bench.serve.prefix import PrefixCache
from serve_bench.serve.scoring import Scorer
from serve_bench.serve.text.stops import StopStrings

Finish = Literal["stop", "length", "cancelled", "timeout", "closed", "failed", "grammar"]

PREFIX_BYTES = 256_000_000  # default memory of finished sequences
# Prompt tokens between two steps of the running rows: as many as take this long, within bounds. In
# shorter runs each costs so much more that prompts wait and rows stay empty.
_PAUSE = 0.05  # seconds
_SHORTEST, _CHUNK = 64, 128
_ALONE = 512  # where no row waits; only giving up and other prompts do


@dataclass(frozen=True)
class Request:
    """One prompt and how to go on from it. Without a ``seed`` every draw is another one."""

    ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    timeout: float | None = None  # seconds from submission to the last token
    logprobs: int | None = None  # how many of the likeliest tokens to report beside each token
    owner: str = ""  # prefixes are shared between requests of one owner only
    grammar: Grammar | None = None  # what the answer must follow, from `Engine.grammars`


@dataclass(frozen=True, slots=True)
class Piece:
    """One token and the text it made certain, or, with ``finish``, the end and the last text.

    The text may be empty: half a character, or what might become a stop string, waits for the
    tokens after it.
    """

    text: str
    at: float  # time.monotonic() when it was made
    token: int | None = None
    finish: Finish | None = None
    logprobs: TokenLogprobs | None = None


class Stream:
    """A request in the engine. Its pieces go to ``put``, in the engine's thread.

    The last piece has ``finish``.
    """

    def __init__(self, request: Request, put: Callable[[Piece], None], decoding: Decoding) -> None:
        self.request = request
        self.put = put
        self.decoding = decoding
        self.stops = StopStrings(request.stop)
        self.sampler = Sampler(
            request.sampling,
            prompt=request.ids,
            stop_ids=request.stop_ids,
            seed=request.seed,
            constraint=request.grammar.begin() if request.grammar else None,
        )
        self.deadline = time.monotonic() + request.timeout if request.timeout else None
        self.need = len(request.ids) + request.max_new_tokens
        self.read = 0  # tokens of the prompt in the cache
        self.reused = 0  # of these, tokens that were copied instead of read
        self.answer: list[int] = []
        self.cancelled = False

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and answer so far."""
        return (*self.request.ids, *self.answer)

    def cancel(self) -> None:
        """Give it up; its place is free before the next step. Any thread may call it.

        Does nothing once the request has ended.
        """
        self.cancelled = True


class Engine:
    """An exported student that answers many requests at once."""

    def __init__(
        self,
        folder: Path,
        *,
        form: str | None = None,
        threads: int | None = None,
        max_batch: int = 64,
        max_queue: int = 256,
        cache_bytes: int = 1_000_000_000,
        prefix_bytes: int = PREFIX_BYTES,
        verify: bool = True,
    ) -> None:
        """Open a form of the ``onnx`` artifact at ``folder`` and start the thread.

        By default the shipped form. Up to ``max_batch`` requests run at once and ``max_queue`` more
        wait; their caches take ``cache_bytes`` at most. Finished sequences keep their caches under
        ``prefix_bytes``; 0 keeps none.
        Raises as `Decoder` does, `ArtifactError` for a form made for a card, and
        `EnvironmentalError` when the caches cannot hold one token of each request.
        """
        decoder = Decoder(folder, form=form, threads=threads, provider="cpu", verify=verify)
        if decoder.made_for != "cpu":
            raise ArtifactError(
                f"{folder}: its {decoder.form} is made for {decoder.made_for} and this serves on "
                "the CPU, which would cast what it has no kernel for; "
                "export the student with export.provider: cpu, or serve the form fp32."
            )
        self._token_bytes = bytes_per_token(decoder)
        tokens = cache_bytes // self._token_bytes
        if tokens < 2 * max_batch:
            raise EnvironmentalError(
                f"found {cache_bytes} bytes for the caches, expected at least "
                f"{2 * max_batch * self._token_bytes} for {max_batch} rows of this model; "
                "allow more (--cache-mb) or fewer rows (--max-batch)."
            )
        self.form, self.threads, self.vocabulary = decoder.form, decoder.threads, decoder.vocabulary
        self.max_batch, self.max_queue = max_batch, max_queue
        self.text = load_text(folder)
        self.grammars = Grammars(
            self.text.tokenizer, vocabulary=self.vocabulary, stop_ids=self.text.stop_ids
        )
        self.scorer = Scorer(folder, form=self.form, threads=self.threads)
        self.failure: BaseException | None = None  # what ended the thread, when that was a defect
        self._decoder = decoder
        if decoder.prompts is not None:
            _ = decoder.prompt_session  # now, so that no request waits for it or fails with it
        self._batch = open_batch(decoder, rows=max_batch, tokens=tokens)
        self._prefixes = PrefixCache(prefix_bytes)
        self._change = threading.Condition()
        self._waiting: deque[Stream] = deque()
        self._new: Stream | None = None  # its prompt is being read
        self._running: list[Stream] = []  # by row of the batch
        self._closing: float | None = None  # when what still runs is ended
        self._pace = _PAUSE / _CHUNK  # seconds that a prompt token took in the last chunks
        self._thread = threading.Thread(target=self._work, name="limbeck-engine", daemon=True)
        self._thread.start()

    @property
    def longest(self) -> int:
        """Most tokens of prompt and answer together: the context, or what the caches hold."""
        return self._batch.longest

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that hold a row."""
        return len(self._running) + (self._new is not None)

    @property
    def cache_bytes(self) -> int:
        """Memory that the tokens held by the caches take."""
        return self._batch.held * self._token_bytes

    @property
    def prefix_bytes(self) -> int:
        """Memory that finished sequences take."""
        return self._prefixes.bytes

    @property
    def closing(self) -> bool:
        """Whether new requests are refused."""
        return self._closing is not None or self.failure is not None

    @property
    def ended(self) -> bool:
        """Whether the thread has ended: nothing runs and nothing ever will."""
        return not self._thread.is_alive()

    def check(self, request: Request) -> None:
        """Raise `DataError` for a request that can never be answered."""
        count = len(request.ids)
        if not count:
            raise DataError("found an empty prompt, expected at least one token.")
        if foreign := next(
            (token for token in request.ids if not 0 <= token < self.vocabulary), None
        ):
            raise DataError(
                f"found token {foreign} in the prompt, expected 0 to {self.vocabulary - 1}."
            )
        if request.max_new_tokens < 1:
            raise DataError(
                f"found {request.max_new_tokens} tokens to generate, expected at least 1."
            )
        if count + request.max_new_tokens > self.longest:
            raise ContextError(
                f"found a prompt of {count} tokens and {request.max_new_tokens} to generate, "
                f"{count + request.max_new_tokens} together; the context here is {self.longest} "
                "tokens. Shorten the prompt or ask for fewer tokens."
            )

    def submit(self, request: Request, put: Callable[[Piece], None]) -> Stream:
        """Queue a request. ``put`` gets its pieces in the engine's thread and must return at once.

        Raises `DataError` as `check` does, `QueueFullError` when too many wait already,
        `ClosedError` once `close` was called.
        """
        self.check(request)
        stream = Stream(request, put, Decoding(self.text.tokenizer))
        with self._change:
            if self.failure is not None:
                raise ClosedError(
                    f"the engine has failed ({self.failure!r}) and takes no more requests."
                )
            if self._closing is not None:
                raise ClosedError("the engine is shutting down and takes no more requests.")
            held_up = self._held_up([*self._waiting, stream])
            if held_up > self.max_queue:
                raise QueueFullError(
                    f"found {held_up - 1} requests waiting, at most {self.max_queue} may; "
                    "try again later."
                )
            self._waiting.append(stream)
            self._change.notify()
        return stream

    def _held_up(self, streams: Sequence[Stream]) -> int:
        """How many of ``streams``, in this order, have no row or no room in the caches now."""
        needs = [stream.need for stream in (*self._running, *([self._new] if self._new else []))]
        for place, stream in enumerate(streams):
            needs.append(stream.need)
            if len(needs) > self.max_batch or not self._batch.fits(needs):
                return len(streams) - place
        return 0

    def generate(self, request: Request) -> Iterator[Piece]:
        """The pieces of one request, as they come. Leaving the loop early cancels it.

        Raises as `submit` does.
        """
        pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        stream = self.submit(request, pieces.put)
        try:
            while True:
                piece = pieces.get()
                yield piece
                if piece.finish:
                    return
        finally:
            stream.cancel()

    def close(self, grace: float = 0.0, *, wait: bool = True) -> None:
        """Take no more requests; those here may go on for ``grace`` seconds, then end.

        With ``wait`` it returns when the thread has ended. May be called again with less grace.
        """
        with self._change:
            end = time.monotonic() + grace
            self._closing = end if self._closing is None else min(self._closing, end)
            self._change.notify()
        if wait:
            self._thread.join()

    # The thread ------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._wait():
                self._sweep()
                self._read_prompts()
                self._step()
        except BaseException as error:
            with self._change:
                self.failure = error
            for stream in self._all():
                self._end(stream, "failed")

    def _wait(self) -> bool:
        """Until there is something to do; false when there never will be again."""
        with self._change:
            self._change.wait_for(lambda: self._all() or self._closing is not None)
            return bool(self._all())

    def _all(self) -> list[Stream]:
        return [*self._running, *([self._new] if self._new else []), *self._waiting]

    def _sweep(self) -> None:
        """Let go of requests that were given up or whose time is over."""
        now = time.monotonic()

        def over(stream: Stream) -> Finish | None:
            if stream.cancelled:
                return "cancelled"
            if self._closing is not None and now >= self._closing:
                return "closed"
            return "timeout" if stream.deadline is not None and now >= stream.deadline else None

        with self._change:
            ended = [(stream, finish) for stream in self._waiting if (finish := over(stream))]
            for stream, _ in ended:
                self._waiting.remove(stream)
        for stream, finish in ended:
            self._end(stream, finish)
        if self._new and (finish := over(self._new)):
            self._batch.drop()
            self._end(self._new, finish)
            self._new = None
        self._leave(
            {row: finish for row, stream in enumerate(self._running) if (finish := over(stream))}
        )

    def _read_prompts(self) -> None:
        """Read a chunk of prompts, of several where they are short.

        Those that are read to their end get their first token and join.
        """
        left = self._chunk()
        while left >= FEWEST_READ and (new := self._new or self._next()):
            end = new.read + left
            if len(new.request.ids) - end < FEWEST_READ:
                end += FEWEST_READ
            chunk = new.request.ids[new.read : end]
            began = time.perf_counter()
            logits = self._batch.fill(chunk, is_long=self._decoder.is_long(len(new.request.ids)))
            took = time.perf_counter() - began
            if len(chunk) >= _SHORTEST:  # shorter ones are dominated by what a run costs
                self._pace += (took / len(chunk) - self._pace) / 4
            new.read += len(chunk)
            left -= len(chunk)
            if new.read < len(new.request.ids):
                return
            if finish := self._advance(new, logits):
                self._keep(new, None)
                self._batch.drop()
                self._new = None
                self._end(new, finish)
            else:
                self._batch.join()
                with self._change:  # `submit` counts each request once
                    self._new = None
                    self._running.append(new)
                left = min(left, self._chunk())

    def _chunk(self) -> int:
        """Prompt tokens to read before the next step of the running rows."""
        if not self._running:
            return _ALONE
        return int(min(max(_PAUSE / self._pace, _SHORTEST), _CHUNK))

    def _next(self) -> Stream | None:
        """The request that waits longest, when there is room for all it may grow to."""
        with self._change:
            if not self._waiting or len(self._running) == self.max_batch:
                return None
            if not self._batch.fits([stream.need for stream in (*self._running, self._waiting[0])]):
                return None
            self._new = new = self._waiting.popleft()
        self._reuse(new)
        return new

    def _reuse(self, new: Stream) -> None:
        """Copy the longest beginning of the prompt that a running or a finished sequence holds."""
        ids, pool = new.request.ids[:-FEWEST_READ], self._pool(new)
        length, arrays = self._prefixes.find(ids, pool)
        for row, stream in enumerate(self._running if self._prefixes.budget else ()):
            if self._pool(stream) == pool:
                held = self._shared(stream, self._batch.length(row))
                shared = min(common_prefix(stream.ids, ids), held)
                if shared > length:
                    length, arrays = shared, tuple(self._batch.view(row, shared))
        if length:
            self._batch.take(arrays)
            new.read = new.reused = length

    def _pool(self, stream: Stream) -> tuple[str, bool]:
        """Requests that may take over each other's caches: of one owner, read by one graph."""
        return stream.request.owner, self._decoder.is_long(len(stream.request.ids))

    def _shared(self, stream: Stream, length: int) -> int:
        """How many of the first ``length`` tokens of ``stream`` another prompt may take over.

        Not the answer to a long prompt: as a part of its own prompt, a cold run would read it with
        the other graph.
        """
        count = len(stream.request.ids)
        return min(length, count) if self._decoder.is_long(count) else length

    def _keep(self, stream: Stream, row: int | None) -> None:
        """Keep the caches of a sequence that ends, for prompts that begin like it."""
        length = self._shared(stream, self._batch.length(row))
        self._prefixes.put(
            stream.ids[:length],
            self._pool(stream),
            self._token_bytes,
            lambda: [array.copy() for array in self._batch.view(row, length)],
        )

    def _step(self) -> None:
        if not self._running:
            return
        logits = self._batch.step(
            np.array([stream.answer[-1] for stream in self._running], np.int64)
        )
        found = (
            (row, self._advance(stream, logits[row])) for row, stream in enumerate(self._running)
        )
        self._leave({row: finish for row, finish in found if finish})

    def _advance(self, stream: Stream, logits: Floats) -> Finish | None:
        """Choose the token after ``logits[V]`` and send it; returns why the stream ends, if so."""
        try:
            return self._chosen(stream, logits)
        except GrammarError:
            return "grammar"
        except Exception as error:  # the other requests go on
            say(f"a request failed: {type(error).__name__}: {error}")
            return "failed"

    @staticmethod
    def _chosen(stream: Stream, logits: Floats) -> Finish | None:
        request = stream.request
        token = stream.sampler.next(logits)
        if token in request.stop_ids or stream.sampler.ended:
            return "stop"
        stream.answer.append(token)
        text = stream.stops.add(stream.decoding.add(token))
        beside = None if request.logprobs is None else logprobs(logits, token, request.logprobs)
        stream.put(Piece(text, time.monotonic(), token, logprobs=beside))
        if stream.stops.met:
            return "stop"
        return "length" if len(stream.answer) == request.max_new_tokens else None

    def _leave(self, ended: dict[int, Finish]) -> None:
        for row in sorted(ended, reverse=True):  # the last row takes the number of one that leaves
            self._keep(self._running[row], row)
            self._batch.leave(row)
            with self._change:
                stream, self._running[row] = self._running[row], self._running[-1]
                self._running.pop()
            self._end(stream, ended[row])

    def _end(self, stream: Stream, finish: Finish) -> None:
        rest = ""
        if finish != "failed":  # else the failure may be that of the text
            rest = stream.stops.add(stream.decoding.rest()) + stream.stops.rest()
        stream.put(Piece(rest, time.monotonic(), finish=finish))
