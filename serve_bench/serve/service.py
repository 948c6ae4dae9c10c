"""From a request's body to an answer: tokens in, the engine asked, events or one body out."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from limbeck.contract.errors import ClosedError, ContextError, DataError, QueueFullError
from limbeck.contract.limits import Limits
from limbeck.runtime.sampling import TokenLogprobs
from serve_bench.serve.answers import (
    ChatCompletion,
    Choice,
    Completion,
    Shape,
    TokenText,
    Usage,
    first_of,
)
from serve_bench.serve.engine import Engine, Finish, Piece, Request, Stream
from serve_bench.serve.gate import ApiError, ClientGone, bearer
from serve_bench.serve.metrics import Metrics
from serve_bench.serve.wire import ChatBody, Common, CompletionBody

_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens in /v1/completions
# Threads that turn text into tokens. Each one costs memory: tokenizers caches 10,000 words for it.
_READERS = 2
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

    def __init__(self, service: Service, requests: Sequence[Request], arrived: float) -> None:
        self._service, self._prompt = service, len(requests[0].ids)
        self._last = dict.fromkeys(range(len(requests)), arrived)
        self._made = [0] * len(requests)
        self._box, put = service.post().box()
        self._open: dict[int, Stream] = {}
        try:
            for index, request in enumerate(requests):
                self._open[index] = service.submit(request, partial(put, index))
        except BaseException:
            self.leave()
            raise
        self._first = self._open[0]

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(self._prompt, sum(self._made), self._first.reused)

    @property
    def ended(self) -> bool:
        """Whether every choice has its end."""
        return not self._open

    @property
    def more(self) -> bool:
        """Whether another piece lies ready."""
        return not self._box.empty()

    async def next(self) -> Numbered:
        """The next piece and its choice. Raises `ApiError` as `Service.require` does."""
        index, piece = await self._box.get()
        metrics = self._service.metrics
        if piece.finish:
            self._open.pop(index, None)
            metrics.finished.labels(piece.finish).inc()
            self._service.require(piece.finish)
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
            self._service.metrics.finished.labels("cancelled").inc()
        self._open.clear()


class EventStream(StreamingResponse):
    """Server-sent events of an answer; gives the engine's slots back whatever ends them."""

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


class Service:
    """The work of the endpoints."""

    def __init__(
        self, engine: Engine, metrics: Metrics, *, model: str, fingerprint: str, limits: Limits
    ) -> None:
        self.engine, self.metrics, self.limits = engine, metrics, limits
        self.model, self.fingerprint = model, fingerprint
        self._post: Post | None = None
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="limbeck-text")
        self._scorers = ThreadPoolExecutor(1, thread_name_prefix="limbeck-score")
        self._busy = 0  # prompts that wait for a reader or a scorer

    def post(self) -> Post:
        """The way from the engine to the loop that serves."""
        if self._post is None:
            self._post = Post(asyncio.get_running_loop())
        return self._post

    def submit(self, request: Request, put: Callable[[Piece], None]) -> Stream:
        """Hand a request to the engine; its refusals become answers."""
        try:
            stream = self.engine.submit(request, put)
        except ContextError as error:
            raise ApiError(400, str(error), code="context_length_exceeded") from None
        except DataError as error:
            raise ApiError(400, str(error)) from None
        except QueueFullError as error:
            raise _busy(str(error)) from None
        except ClosedError as error:
            raise ApiError(
                503, str(error), code="shutting_down", headers={"Retry-After": "5"}
            ) from None
        self.metrics.prompt.inc(len(request.ids))
        return stream

    def require(self, finish: Finish) -> None:
        """Raise `ApiError` for an end that the client did not ask for."""
        match finish:
            case "timeout":
                limit = f"{self.limits.request_timeout:g} s"
                raise ApiError(
                    504, f"the request took longer than {limit}, the limit here.", code="timeout"
                )
            case "closed":
                raise ApiError(503, "the server is shutting down.", code="shutting_down")
            case "failed":
                raise ApiError(
                    500, "the engine has failed; the server's log says why.", code="failed"
                )

    # Prompts --------------------------------------------------------------------------------------

    async def complete(self, http: HttpRequest, body: CompletionBody) -> Response:
        """`/v1/completions`."""
        self._check(body)
        prompt = body.one_prompt
        if isinstance(prompt, str):
            self._fits(prompt)
            ids = await self._work(self._readers, self.engine.text.encode, prompt)
        else:
            ids = prompt
        most = body.max_tokens
        if most is None:
            most = self._room(ids, _COMPLETION_TOKENS)
        elif most == 0 and not body.echo and body.prompt_logprobs is None:
            raise ApiError(
                400,
                "max_tokens: found 0; Input should be greater than or equal to 1, "
                "unless echo or prompt_logprobs is asked for.",
                param="max_tokens",
            )
        wanted = body.logprobs is not None
        shape = Completion(self.model, self.fingerprint, self._token_text(body), wanted)
        return await self._answer(http, body, ids, most, shape)

    async def chat(self, http: HttpRequest, body: ChatBody) -> Response:
        """`/v1/chat/completions`."""
        self._check(body)
        template = self.engine.text.template
        if template is None:
            raise ApiError(
                400, "this model has no chat template; use /v1/completions.", param="messages"
            )
        for index, message in enumerate(body.messages):
            if message.tool_calls and "tool_calls" not in template:
                raise _no_place(f"messages.{index}.tool_calls", "tool calls")
            if message.role == "tool" and "tool" not in template:
                raise _no_place(f"messages.{index}.role", "messages of role 'tool'")
        messages = [message.plain() for message in body.messages]
        self._fits("".join(message["content"] for message in messages))
        try:
            ids = await self._work(self._readers, self.engine.text.chat, messages)
        except DataError as error:
            raise ApiError(400, str(error), param="messages") from None
        most = body.max_completion_tokens or body.max_tokens
        most = most or self._room(ids, self.limits.max_tokens)
        wanted = bool(body.logprobs)
        shape = ChatCompletion(self.model, self.fingerprint, self._token_text(body), wanted)
        return await self._answer(http, body, ids, most, shape)

    def _check(self, body: Common) -> None:
        """Raise `ApiError` for fields that do not go together or exceed a limit."""
        limits = self.limits
        if body.model != self.model:
            raise ApiError(
                404,
                f"found model {body.model!r}; this server has {self.model!r}.",
                code="model_not_found",
                param="model",
            )
        if body.stream_options and not body.stream:
            raise _wrong("stream_options", "only a stream has any; set stream to true")
        for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
            count = getattr(body, name, None)
            if count is not None and count > limits.max_logprobs:
                most = f"at most {limits.max_logprobs} are allowed here"
                raise _wrong(name, f"found {count}; {most}")
        if isinstance(body, ChatBody) and body.top_logprobs and not body.logprobs:
            raise _wrong("top_logprobs", "only with logprobs; set logprobs to true")
        for name in ("prompt_logprobs", "echo"):
            if body.stream and getattr(body, name, None) not in (None, False):
                raise _wrong(name, "a stream has no prompt; leave it out, or leave out stream")

    def _fits(self, text: str) -> None:
        """Refuse by its bytes a text that cannot fit the context, before it is tokenised."""
        tokenizer, longest = self.engine.text.tokenizer, self.engine.text.longest_token
        most = self.engine.longest * longest * (1 if tokenizer.normalizer is None else 4)
        if len(text) > most or len(text.encode()) > most:
            raise ApiError(
                400,
                f"found a prompt of {len(text.encode())} bytes; the context here is "
                f"{self.engine.longest} tokens, {most} bytes at most. Shorten the prompt.",
                code="context_length_exceeded",
            )

    async def _work(self, pool: ThreadPoolExecutor, task: Callable[..., T], *given: Any) -> T:
        """Run ``task`` in a thread of ``pool``, so that the loop goes on. Raises `ApiError`."""
        if self._busy > self.engine.max_queue + self.engine.max_batch:
            raise _busy("too many prompts wait to be read; try again later.")
        self._busy += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, task, *given)
        finally:
            self._busy -= 1

    def _token_text(self, body: Common) -> TokenText:
        if body.return_tokens_as_token_ids:
            return lambda token: f"token_id:{token}"
        decode = self.engine.text.tokenizer.decode
        return lambda token: str(decode([token], skip_special_tokens=False))

    def _room(self, ids: list[int], most: int) -> int:
        """Tokens to generate by default: ``most``, or what there is room for."""
        room = min(most, self.limits.max_tokens, self.engine.longest - len(ids))
        return max(room, 1)  # the engine refuses a prompt that is too long

    # Answers --------------------------------------------------------------------------------------

    async def _answer(
        self, http: HttpRequest, body: Common, ids: list[int], most: int, shape: Shape
    ) -> Response:
        arrived: float = http.scope["limbeck.arrived"]
        limits, text = self.limits, self.engine.text
        if most > limits.max_tokens:
            raise _wrong(
                "max_tokens", f"found {most}; at most {limits.max_tokens} are allowed here"
            )
        if body.min_tokens and body.min_tokens > most:
            raise _wrong("min_tokens", f"found {body.min_tokens}; at most max_tokens, {most}")
        timeout = max(limits.request_timeout - (time.monotonic() - arrived), 1e-3)
        stop_ids = frozenset() if body.ignore_eos else text.stop_ids
        request = Request(
            ids=tuple(ids),
            max_new_tokens=max(most, 1),
            sampling=body.sampling,
            stop_ids=stop_ids | frozenset(body.stop_token_ids or ()),
            stop=body.stops,
            timeout=timeout,
            logprobs=body.wanted_logprobs,
            owner=json.dumps([bearer(http.headers), body.cache_salt]),
        )
        echoed = await self._echo(request, body, most)
        if most == 0:
            for choice in echoed:
                choice.finish = "length"
            return JSONResponse(shape.whole(echoed, Usage(len(ids), 0, 0)))
        answer = Answer(self, self._numbered(request, body), arrived)
        try:
            if body.stream:  # an error until the first piece still has a status of its own
                first = await unless_gone(http, answer.next())
                return EventStream(self._events(answer, first, shape, body), answer)
            return await unless_gone(http, self._whole(answer, shape, echoed))
        except BaseException:
            answer.leave()
            raise

    @staticmethod
    def _numbered(request: Request, body: Common) -> list[Request]:
        """One request a choice; each has a seed of its own, the first one the body's."""
        first, count = body.seed, body.choices
        seeds = [None if first is None else (first + at) % 2**64 for at in range(count)]
        return [replace(request, seed=seed) for seed in seeds]

    async def _echo(self, request: Request, body: Common, most: int) -> list[Choice]:
        """Choices that begin with the prompt and its log-probabilities, where wanted."""
        choices = [Choice(index) for index in range(body.choices)]
        echo = isinstance(body, CompletionBody) and bool(body.echo)
        if not echo and body.prompt_logprobs is None:
            return choices
        try:
            self.engine.check(request)
        except ContextError as error:
            if most:  # without an answer the prompt may fill the context
                raise ApiError(400, str(error), code="context_length_exceeded") from None
        except DataError as error:
            raise ApiError(400, str(error)) from None
        found: list[TokenLogprobs] = []
        if body.prompt_logprobs is not None or request.logprobs is not None:
            count = max(body.prompt_logprobs or 0, request.logprobs or 0)
            deadline = time.monotonic() + (request.timeout or 0)
            score = partial(self.engine.scorer.score, request.ids, count, deadline=deadline)
            try:
                found = await self._work(self._scorers, score)
            except TimeoutError:
                self.require("timeout")
            except DataError as error:
                raise ApiError(400, str(error), code="context_length_exceeded") from None
        for choice in choices:
            if body.prompt_logprobs is not None:
                choice.prompt_logprobs = [None, *found]
            if echo:
                choice.text = self.engine.text.tokenizer.decode(list(request.ids))
                if request.logprobs is not None:
                    choice.logprobs = [first_of(request.ids[0]), *found]
        return choices

    async def _whole(self, answer: Answer, shape: Shape, choices: list[Choice]) -> Response:
        while not answer.ended:
            index, piece = await answer.next()
            choice = choices[index]
            choice.text += piece.text
            choice.finish = piece.finish
            if piece.logprobs:
                choice.logprobs.append(piece.logprobs)
        return JSONResponse(shape.whole(choices, answer.usage))

    async def _events(
        self, answer: Answer, first: Numbered, shape: Shape, body: Common
    ) -> AsyncIterator[str]:
        """One event a token, so that clients can time tokens; then the end and the counts."""
        options = body.stream_options
        wants_usage = bool(options and options.include_usage)
        continuous = wants_usage and bool(options and options.continuous_usage_stats)
        begun: set[int] = set()
        events, numbered = list[str](), first
        try:
            while True:
                index, piece = numbered
                beside = [piece.logprobs] if piece.logprobs else []
                part = Choice(index, piece.text, piece.finish, beside)
                chunk = shape.chunk(part, first=index not in begun, end=bool(piece.finish))
                begun.add(index)
                if wants_usage:
                    chunk["usage"] = answer.usage.body() if continuous else None
                events.append(_event(chunk))
                if answer.ended:
                    break
                if not answer.more:  # events that lie ready go out in one write
                    yield "".join(events)
                    events.clear()
                numbered = await answer.next()
            if wants_usage:
                events.append(_event(shape.usage(answer.usage)))
            events.append("data: [DONE]\n\n")
        except ApiError as error:
            self.metrics.errors.labels(str(error.body["error"]["code"])).inc()
            events.append(_event(error.body))
        yield "".join(events)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _wrong(field: str, message: str) -> ApiError:
    return ApiError(400, f"{field}: {message}.", param=field)


def _no_place(field: str, what: str) -> ApiError:
    return ApiError(
        400, f"{field}: this model's chat template has no place for {what}.", param="messages"
    )


def _busy(message: str) -> ApiError:
    return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})


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
