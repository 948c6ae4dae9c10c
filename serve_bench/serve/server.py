"""An OpenAI-compatible server in front of the engine: FastAPI, uvicorn, Prometheus.

Knows HTTP and the wire format; what generates, and when, is `serve_bench.serve.engine`'s. Needs the extra ``limbeck[serve]``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from limbeck.contract.artifact import open_artifact
from limbeck.contract.errors import (
    ClosedError,
    ContextError,
    DataError,
    EnvironmentalError,
    QueueFullError,
)
from limbeck.contract.limits import Limits
from limbeck.contract.progress import say
from limbeck.runtime.sampling import Sampling
from serve_bench.serve.engine import Engine, Finish, Piece, Request, Stream
from serve_bench.serve.wire import (
    ChatBody,
    ChatCompletion,
    Common,
    Completion,
    CompletionBody,
    Shape,
    Usage,
    error_body,
    first_mistake,
)

_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens in /v1/completions
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)
_KEEP_ALIVE = 30  # seconds; longer than clients keep an idle connection, or they would now and then use one being closed
_READERS = 2  # threads that turn text into tokens: tokenizers keeps up to 10,000 words for each thread that asks it
_LAST_WORDS = 5  # seconds that answers already made may take to reach their clients at the end


class ApiError(HTTPException):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = error_body(message, kind=kind, code=code, param=param)


class Metrics:
    """What `/metrics` tells, in a registry of its own."""

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.requests = Counter(
            "limbeck_requests", "Answers by status.", ["endpoint", "status"], registry=registry
        )
        self.errors = Counter(
            "limbeck_errors", "Errors told to clients, by code.", ["code"], registry=registry
        )
        self.finished = Counter(
            "limbeck_finished", "Ends of generations, by reason.", ["reason"], registry=registry
        )
        self.prompt = Counter(
            "limbeck_prompt_tokens", "Prompt tokens of accepted requests.", registry=registry
        )
        self.generated = Counter("limbeck_generated_tokens", "Tokens sent.", registry=registry)
        self.ttft = Histogram(
            "limbeck_time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.itl = Histogram(
            "limbeck_inter_token_latency_seconds",
            "From one token of a request to the next.",
            buckets=_SECONDS,
            registry=registry,
        )
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "limbeck_queue_length": ("Requests that wait for a slot.", lambda: engine.waiting),
            "limbeck_running": ("Requests that hold a slot.", lambda: engine.running),
            "limbeck_cache_bytes": (
                "Memory of the tokens that the caches hold.",
                lambda: engine.cache_bytes,
            ),
            "limbeck_slots": ("Requests that may run at once.", lambda: engine.max_batch),
        }
        for name, (text, read) in gauges.items():
            Gauge(name, text, registry=registry).set_function(read)


class Post:
    """Carries pieces from the engine's thread to the event loop, and wakes the loop once for all that lie ready."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ready: deque[tuple[asyncio.Queue[Piece], Piece]] = deque()
        self._called = False

    def box(self) -> tuple[asyncio.Queue[Piece], Callable[[Piece], None]]:
        """A queue for the loop, and what the engine calls to put into it."""
        box: asyncio.Queue[Piece] = asyncio.Queue()

        def put(piece: Piece) -> None:
            self._ready.append((box, piece))
            if not self._called:
                self._called = True
                if not self._loop.is_closed():
                    self._loop.call_soon_threadsafe(self._deliver)

        return box, put

    def _deliver(self) -> None:
        self._called = False  # before the queue is emptied: what comes from here on calls again
        while self._ready:
            box, piece = self._ready.popleft()
            box.put_nowait(piece)


class Answer:
    """One request from its acceptance by the engine to its last piece."""

    def __init__(self, service: Service, request: Request, arrived: float) -> None:
        self._service, self._request, self._last = service, request, arrived
        self._box, put = service.post().box()
        self._stream = service.submit(request, put)
        self._ended = False
        self.made = 0

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(len(self._request.ids), self.made)

    async def next(self) -> Piece:
        """The next piece. Raises `ApiError` when the end is not one the client asked for."""
        piece = await self._box.get()
        metrics = self._service.metrics
        if piece.finish:
            self._ended = True
            metrics.finished.labels(piece.finish).inc()
            self._service.require(piece.finish)
        else:
            (metrics.itl if self.made else metrics.ttft).observe(piece.at - self._last)
            metrics.generated.inc()
            self._last = piece.at
            self.made += 1
        return piece

    @property
    def more(self) -> bool:
        """Whether another piece lies ready."""
        return not self._box.empty()

    async def rest(self, first: Piece) -> AsyncIterator[Piece]:
        """``first`` and what comes after it."""
        yield (piece := first)
        while not piece.finish:
            yield (piece := await self.next())

    def leave(self) -> None:
        """Give the slot back, whether or not the end has come."""
        if not self._ended:
            self._ended = True
            self._stream.cancel()
            self._service.metrics.finished.labels("cancelled").inc()


class EventStream(StreamingResponse):
    """Server-sent events of an answer; gives the engine's slot back whatever ends them."""

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


Given = TypeVar("Given")


class Service:
    """The endpoints' work: from a body to an answer."""

    def __init__(self, engine: Engine, *, model: str, fingerprint: str, limits: Limits) -> None:
        self.engine, self.model, self.fingerprint, self.limits = engine, model, fingerprint, limits
        self.created = int(time.time())
        self.metrics = Metrics(engine)
        self._post: Post | None = None
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="limbeck-text")

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
            raise ApiError(
                429, str(error), code="queue_full", headers={"Retry-After": "1"}
            ) from None
        except ClosedError as error:
            raise ApiError(
                503, str(error), code="shutting_down", headers={"Retry-After": "5"}
            ) from None
        self.metrics.prompt.inc(len(request.ids))
        return stream

    def require(self, finish: Finish) -> None:
        """Raise `ApiError` for an end that is none of the client's."""
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

    async def _read(self, turn: Callable[[Given], list[int]], given: Given) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._readers, turn, given)

    async def complete(self, http: HttpRequest, body: CompletionBody) -> Response:
        """`/v1/completions`."""
        prompt = body.one_prompt
        ids = (
            await self._read(self.engine.text.encode, prompt) if isinstance(prompt, str) else prompt
        )
        most = body.max_tokens or self._room(ids, _COMPLETION_TOKENS)
        return await self._answer(http, body, ids, most, Completion(self.model, self.fingerprint))

    async def chat(self, http: HttpRequest, body: ChatBody) -> Response:
        """`/v1/chat/completions`."""
        if self.engine.text.template is None:
            raise ApiError(
                400, "this model has no chat template; use /v1/completions.", param="messages"
            )
        try:
            ids = await self._read(
                self.engine.text.chat, [message.plain() for message in body.messages]
            )
        except DataError as error:
            raise ApiError(400, str(error), param="messages") from None
        most = (
            body.max_completion_tokens or body.max_tokens or self._room(ids, self.limits.max_tokens)
        )
        return await self._answer(
            http, body, ids, most, ChatCompletion(self.model, self.fingerprint)
        )

    def _room(self, ids: list[int], most: int) -> int:
        """Tokens to generate where the request does not say: ``most``, or what the limit and the context leave."""
        room = min(most, self.limits.max_tokens, self.engine.longest - len(ids))
        return max(room, 1)  # the engine says what is too long

    async def _answer(
        self, http: HttpRequest, body: Common, ids: list[int], most: int, shape: Shape
    ) -> Response:
        arrived: float = http.scope["limbeck.arrived"]
        if body.model != self.model:
            raise ApiError(
                404,
                f"found model {body.model!r}; this server has {self.model!r}.",
                code="model_not_found",
                param="model",
            )
        if body.stream_options and not body.stream:
            raise ApiError(
                400,
                "stream_options: only a stream has any; set stream to true.",
                param="stream_options",
            )
        if most > self.limits.max_tokens:
            raise ApiError(
                400,
                f"max_tokens: found {most}; at most {self.limits.max_tokens} are allowed here.",
                param="max_tokens",
            )
        request = Request(
            ids=tuple(ids),
            max_new_tokens=most,
            sampling=Sampling(
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
            ),
            seed=None if body.seed is None else body.seed % 2**64,
            stop_ids=frozenset() if body.ignore_eos else self.engine.text.stop_ids,
            stop=body.stops,
            timeout=max(self.limits.request_timeout - (time.monotonic() - arrived), 1e-3),
        )
        answer = Answer(self, request, arrived)
        try:
            if body.stream:
                first = await unless_gone(
                    http, answer.next()
                )  # an error until then still has a status of its own
                return EventStream(self._events(answer, first, shape, body.wants_usage), answer)
            return await unless_gone(http, self._whole(answer, shape))
        except BaseException:
            answer.leave()
            raise

    async def _whole(self, answer: Answer, shape: Shape) -> Response:
        text, finish = "", None
        async for piece in answer.rest(await answer.next()):
            text, finish = text + piece.text, piece.finish
        return JSONResponse(shape.whole(text, str(finish), answer.usage))

    async def _events(
        self, answer: Answer, first: Piece, shape: Shape, wants_usage: bool
    ) -> AsyncIterator[str]:
        """One event a token, so that a client that times events times tokens; then the end, and the counts if wanted."""
        extra = {"usage": None} if wants_usage else {}
        events = []
        try:
            async for piece in answer.rest(first):
                text = piece.text or None if piece.finish else piece.text
                events.append(_event(shape.chunk(text, piece.finish, first=piece is first) | extra))
                if not answer.more:  # what lies ready goes out in one write
                    yield "".join(events)
                    events.clear()
            if wants_usage:
                events.append(_event(shape.usage(answer.usage)))
            events.append("data: [DONE]\n\n")
        except ApiError as error:
            self.metrics.errors.labels(str(error.body["error"]["code"])).inc()
            events.append(_event(error.body))
        yield "".join(events)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


T = TypeVar("T")


class ClientGone(Exception):
    """The client has left; nobody reads an answer any more."""


async def unless_gone(http: HttpRequest, work: Awaitable[T]) -> T:
    """What ``work`` returns. Raises `ClientGone` when the client leaves first."""

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


class Gate:
    """Stands before the endpoints: counts answers, asks for the key, and limits the body's size and time."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service, limits, path = self._service, self._service.limits, str(scope["path"])
        scope["limbeck.arrived"] = arrived = time.monotonic()
        size, complete = 0, False

        async def limited() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            left = limits.request_timeout - (time.monotonic() - arrived)
            try:
                message = await asyncio.wait_for(receive(), max(left, 0))
            except TimeoutError:
                raise ApiError(
                    408, f"the body did not arrive within {limits.request_timeout:g} s."
                ) from None
            size += len(message.get("body", b""))
            if size > limits.max_body_bytes:
                raise _too_large(limits)
            complete = not message.get("more_body", False)
            return message

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                endpoint = path if path in _ENDPOINTS else "other"
                service.metrics.requests.labels(endpoint, str(message["status"])).inc()
            await send(message)

        try:
            if path.startswith("/v1"):
                self._admit(Headers(scope=scope))
        except ApiError as error:
            await _refusal(service, error)(scope, receive, counted)
            return
        with contextlib.suppress(ClientGone):
            await self._app(scope, limited, counted)

    def _admit(self, headers: Headers) -> None:
        limits = self._service.limits
        key = headers.get("authorization", "").removeprefix("Bearer ")
        if limits.api_key and not hmac.compare_digest(key.encode(), limits.api_key.encode()):
            raise ApiError(
                401,
                "found no valid API key; send it as Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self._service.engine.closing:
            raise ApiError(
                503,
                "the server is shutting down.",
                code="shutting_down",
                headers={"Retry-After": "5"},
            )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limits.max_body_bytes:
            raise _too_large(limits)


def _too_large(limits: Limits) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {limits.max_body_bytes} bytes, the limit here.",
        code="body_too_large",
    )


def _refusal(service: Service, error: ApiError) -> JSONResponse:
    service.metrics.errors.labels(str(error.body["error"]["code"] or error.status_code)).inc()
    return JSONResponse(error.body, error.status_code, error.headers)


_ENDPOINTS = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/metrics")


def make_app(engine: Engine, *, model: str, fingerprint: str, limits: Limits) -> FastAPI:
    """The ASGI application over a running engine, for any server that takes one."""
    service = Service(engine, model=model, fingerprint=fingerprint, limits=limits)
    app = FastAPI(title="Limbeck", docs_url=None, redoc_url=None)
    app.add_middleware(Gate, service=service)
    card = {
        "id": model,
        "object": "model",
        "created": service.created,
        "owned_by": "limbeck",
        "max_model_len": engine.longest,
    }

    @app.exception_handler(ApiError)
    async def refused(_: HttpRequest, error: ApiError) -> Response:
        return _refusal(service, error)

    @app.exception_handler(HTTPException)
    async def not_served(_: HttpRequest, error: HTTPException) -> Response:
        served = ", ".join(_ENDPOINTS)
        return _refusal(
            service, ApiError(error.status_code, f"{error.detail}; this server has {served}.")
        )

    @app.exception_handler(RequestValidationError)
    async def malformed(_: HttpRequest, error: RequestValidationError) -> Response:
        message, field = first_mistake(error.errors())
        return _refusal(service, ApiError(400, message, param=field))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != model:
            raise ApiError(
                404, f"found model {name!r}; this server has {model!r}.", code="model_not_found"
            )
        return card

    @app.post("/v1/completions")
    async def completions(http: HttpRequest, body: CompletionBody) -> Response:
        return await service.complete(http, body)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: HttpRequest, body: ChatBody) -> Response:
        return await service.chat(http, body)

    @app.get("/health")
    async def health() -> Response:
        status = "failed" if engine.failure else "shutting down" if engine.closing else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


class Listener(uvicorn.Server):
    """uvicorn that drains: once stopped it still answers, with 503 for what is new, until the engine has finished."""

    def __init__(
        self,
        config: uvicorn.Config,
        engine: Engine,
        *,
        bound: socket.socket,
        title: str,
        grace: float,
    ) -> None:
        super().__init__(config)
        self.engine, self.title = engine, title
        host, port = bound.getsockname()[:2]
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._socket, self._grace = bound, grace
        self._stopped = False

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until `stop` or a signal, drain, and return. Raises what ended the engine, if that was a defect."""
        try:
            super().run(sockets or [self._socket])
        finally:
            self._socket.close()
            self.engine.close()
        if self.engine.failure:
            raise self.engine.failure

    def stop(self) -> None:
        """Drain; called again, end what still runs. Any thread may call it."""
        if self._stopped:
            self._grace = 0.0
        self._stopped = True

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM or Ctrl-C."""
        self.stop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        say(f"serving {self.title} at {self.address}/v1")

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is time to go."""
        if self._stopped:
            if not self.engine.closing:
                say(
                    f"shutting down; {self.engine.running + self.engine.waiting} requests have {self._grace:g} s left"
                )
            self.engine.close(self._grace, wait=False)
        return await super().on_tick(counter) or self.engine.ended


def open_server(
    folder: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    form: str | None = None,
    threads: int | None = None,
    max_batch: int = 64,
    max_queue: int = 256,
    cache_bytes: int = 1_000_000_000,
    limits: Limits | None = None,
    grace: float = 30.0,
) -> Listener:
    """A server over the ``onnx`` artifact at ``folder``, its address taken and its model loaded; `Listener.run` serves.

    Raises `EnvironmentalError` when ``host`` and ``port`` cannot be had, otherwise as `Engine` does.
    """
    bound = _bind(host, port)
    try:
        engine = Engine(
            folder,
            form=form,
            threads=threads,
            max_batch=max_batch,
            max_queue=max_queue,
            cache_bytes=cache_bytes,
        )
        artifact = open_artifact(folder, kind="onnx", verify=False)
        recipe = artifact.manifest["recipe"]
        model = str(recipe["resolved"]["name"]) if recipe else folder.resolve().name
        fingerprint = f"limbeck-{artifact.digest[:12]}-{engine.form}"
        config = uvicorn.Config(
            make_app(engine, model=model, fingerprint=fingerprint, limits=limits or Limits()),
            log_level="warning",
            access_log=False,
            ws="none",
            lifespan="off",
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=_LAST_WORDS,
        )
        title = (
            f"{model} ({engine.form}, context {engine.longest} tokens, {engine.threads} threads)"
        )
        return Listener(config, engine, bound=bound, title=title, grace=grace)
    except BaseException:
        bound.close()
        raise


def _bind(host: str, port: int) -> socket.socket:
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()  # who connects while the model loads is answered when it is loaded
    except OSError as error:
        if bound:
            bound.close()
        raise EnvironmentalError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; give another one with --host or --port."
        ) from None
    return bound
