"""From the engine's thread to the client: pieces carried over, counted, and made parts of choices.

Knows the engine, the metrics and tool calls; knows nothing of endpoints and limits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from limbeck.contract.errors import DataError
from limbeck.contract.limits import Limits
from limbeck.runtime.grammar import json_rule
from limbeck.runtime.text import Text
from serve_bench.serve.answers import Choice, Usage
from serve_bench.serve.engine import Finish, Piece, Request, Stream
from serve_bench.serve.gate import ApiError, ClientGone, wrong
from serve_bench.serve.metrics import Metrics
from serve_bench.serve.text.tools import (
    CallFormat,
    CallReader,
    Found,
    Tool,
    call_format,
    call_grammar,
)
from serve_bench.serve.wire import ChatBody

Numbered = tuple[int, Piece]  # the index of a choice, and a piece of it
T = TypeVar("T")


class Post:
    """Carries pieces from the engine's thread to the event loop, all that lie ready at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ready: deque[tuple[asyncio.Queue[Numbered], Numbered]] = deque()
        self._called = False

    def box(self) -> tuple[asyncio.Queue[Numbered], Callable[[int, Piece], None]]:
        """A queue for the loop, and the function with which the engine puts into it."""
        box: asyncio.Queue[Numbered] = asyncio.Queue()

        def put(index: int, piece: Piece) -> None:
            self._ready.append((box, (index, piece)))
            if not self._called:
                self._called = True
                if not self._loop.is_closed():
                    self._loop.call_soon_threadsafe(self._deliver)

        return box, put

    def _deliver(self) -> None:
        self._called = False  # before the queue is emptied: pieces from here on call again
        while self._ready:
            box, piece = self._ready.popleft()
            box.put_nowait(piece)


class Answer:
    """The choices of one request, from their acceptance by the engine to their last pieces."""

    def __init__(
        self,
        submit: Callable[[Request, Callable[[Piece], None]], Stream],
        requests: Sequence[Request],
        arrived: float,
        post: Post,
        metrics: Metrics,
        limits: Limits,
        *,
        each: int = 1,
    ) -> None:
        """Submit ``requests``, of which ``each`` in turn have one prompt. Raises as ``submit``."""
        self._metrics, self._limits = metrics, limits
        self._prompt = sum(len(request.ids) for request in requests[::each])
        self._last = dict.fromkeys(range(len(requests)), arrived)
        self._made = [0] * len(requests)
        self._box, put = post.box()
        self._open: dict[int, Stream] = {}
        try:
            for index, request in enumerate(requests):
                self._open[index] = submit(request, partial(put, index))
        except BaseException:
            self.leave()
            raise
        self._firsts = [self._open[index] for index in range(0, len(requests), each)]

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(self._prompt, sum(self._made), sum(first.reused for first in self._firsts))

    @property
    def ended(self) -> bool:
        """Whether every choice has its end."""
        return not self._open

    @property
    def more(self) -> bool:
        """Whether another piece lies ready."""
        return not self._box.empty()

    async def next(self) -> Numbered:
        """The next piece and its choice. Raises `ApiError` as `require` does."""
        index, piece = await self._box.get()
        metrics = self._metrics
        if piece.finish:
            self._open.pop(index, None)
            metrics.finished.labels(piece.finish).inc()
            require(piece.finish, self._limits)
            return index, piece
        if self._made[index]:
            metrics.itl.observe(piece.at - self._last[index])
        else:
            metrics.ttft.observe(piece.at - self._last[index])
            metrics.reused.inc(self._open[index].reused)
        metrics.generated.inc()
        self._last[index] = piece.at
        self._made[index] += 1
        return index, piece

    def leave(self) -> None:
        """Give the slots back, whether or not the end has come."""
        for stream in self._open.values():
            stream.cancel()
            self._metrics.finished.labels("cancelled").inc()
        self._open.clear()


class Parts:
    """Turns the pieces of an answer into parts of its choices; takes tool calls out of the text."""

    def __init__(self, offer: Offer | None) -> None:
        self._offer = offer
        self._readers: dict[int, CallReader] = {}

    def of(self, index: int, piece: Piece) -> Choice:
        """The part of choice ``index`` that ``piece`` makes certain."""
        beside = [piece.logprobs] if piece.logprobs else []
        if self._offer is None or self._offer.form is None:
            return Choice(index, piece.text, piece.finish, beside)
        if (reader := self._readers.get(index)) is None:
            reader = self._readers[index] = self._offer.reader()
        found, finish = reader.add(piece.text), str(piece.finish) if piece.finish else None
        if finish:
            rest = reader.rest()
            found = Found(found.text + rest.text, found.calls + rest.calls)
            finish = "tool_calls" if finish == "stop" and reader.count else finish
        return Choice(index, found.text, finish, beside, found.calls)


@dataclass(frozen=True)
class Offer:
    """The tools of a chat, and how this model writes calls of them."""

    form: CallFormat | None  # None where no tools are offered
    tools: tuple[Tool, ...] = ()
    forced: bool = False
    several: bool = True

    @staticmethod
    def of(body: ChatBody, text: Text) -> Offer:
        """Raises `ApiError` for a template that takes no tools, or writes calls in another way."""
        if not body.offered:
            return Offer(None)
        try:
            form = call_format(text.template_for(body.offered) or "")
        except DataError as error:
            raise wrong("tools", str(error).rstrip(".")) from None
        if form is not None and form.opening in text.unseen:
            form = None
        if form is None:
            raise wrong(
                "tools",
                "this model's chat template writes no tool calls that this server can read "
                "(<tool_call> of Hermes and Qwen, or the JSON of Llama 3); leave them out",
            )
        tools = (tool.function for tool in body.callable)
        return Offer(
            form,
            tuple(Tool(one.name, one.parameters, bool(one.strict)) for one in tools),
            forced=body.tool_choice not in (None, "auto"),
            several=body.parallel_tool_calls is not False,
        )

    def grammar(self, body: ChatBody) -> str | None:
        """The Lark grammar that holds the answer, or None if nothing does."""
        answer = body.schema_of_answer
        if self.form is None:
            return None if answer is None else f"start: {json_rule(answer)}"
        return call_grammar(
            self.form, self.tools, forced=self.forced, several=self.several, answer=answer
        )

    def reader(self) -> CallReader:
        """A reader for one answer."""
        assert self.form is not None
        names = [tool.name for tool in self.tools]
        return CallReader(self.form, names, several=self.several)


def require(finish: Finish, limits: Limits) -> None:
    """Raise `ApiError` for an end that the client did not ask for."""
    match finish:
        case "timeout":
            raise late(limits)
        case "closed":
            raise ApiError(503, "the server is shutting down.", code="shutting_down")
        case "grammar":
            raise ApiError(
                400,
                "the schema became too complex for the answer to follow; simplify it.",
                code="schema_too_complex",
            )
        case "failed":
            raise ApiError(500, "the request has failed; the server's log says why.", code="failed")


def late(limits: Limits) -> ApiError:
    """The answer to a request whose time is over."""
    limit = f"{limits.request_timeout:g} s"
    return ApiError(504, f"the request took longer than {limit}, the limit here.", code="timeout")


class EventStream(StreamingResponse):
    """Server-sent events of an answer; always gives the engine's slots back."""

    def __init__(self, events: AsyncIterator[str], answer: Answer) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.leave()


async def unless_gone(http: HttpRequest, work: Awaitable[T]) -> T:
    """The result of ``work``. Raises `ClientGone` when the client leaves first."""

    async def leaving() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(leaving())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        working.cancel()
        watching.cancel()
