"""Between Ray's HTTP proxy and a replica: ask again if it dies, end what was cut with an error.

Knows ASGI and the shape of an error; knows neither replicas nor the engine. Ray's proxy itself
ends without an answer when a replica dies, and writes its own errors as plain text.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_bench.serve.answers import error_body

_TRIES = 3  # replicas that one request may be given to; a request that kills them kills no more
_CARRIED = "limbeck.first"  # of a scope: the first part of the body
_CARRY_SECONDS = 0.01
_LOST = "the process that wrote this answer has died; ask again."


def middlewares() -> list[Middleware]:
    """What Ray Serve puts around its proxy: it reads the name of this function in a variable."""
    return [Middleware(Steady)]


class Steady:
    """ASGI middleware around the proxy of Ray Serve."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # Ray's own paths
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(receive, send)
        carried = {_CARRIED: await exchange.first()}
        for _ in range(_TRIES):
            # The proxy changes the scope, so that each try gets one of its own.
            own = {**scope, **carried, "headers": list(scope["headers"])}
            await self._app(own, *exchange.again())
            if exchange.begun or exchange.left:
                break
        await exchange.end()


class Carried:
    """ASGI middleware around the application of a replica: the body begins in the scope.

    Replicas ask the proxy for a body, which takes as long as the way of the request to them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kept = iter([first] if (first := scope.get(_CARRIED)) else [])

        async def begin() -> Message:
            return next(kept, None) or await receive()

        await self.app(scope, begin, send)


class _Exchange:
    """One request and its answer; an answer begins for the client with its first bytes."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._received: list[Message] = []
        self._start: Message | None = None
        self._first: Message | None = None
        self.begun = self.left = self._complete = self._events = False

    async def first(self) -> Message | None:
        """The first part of the body, or None if the client has not sent it with its headers."""
        with contextlib.suppress(TimeoutError):
            self._first = await asyncio.wait_for(self._receive(), _CARRY_SECONDS)
        return self._first

    def again(self) -> tuple[Receive, Send]:
        """`receive` and `send` for the next try, which reads the same rest of the body."""
        self._start = None
        kept = iter(list(self._received))

        async def receive() -> Message:
            if (message := next(kept, None)) is not None:
                return message
            message = await self._receive()
            self.left = message["type"] == "http.disconnect"
            if not self.begun and not self.left:
                self._received.append(message)
            return message

        return receive, self._pass_on

    async def _pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        if self._start is not None:
            start, self._start = self._start, None
            headers = {k.lower(): bytes(v) for k, v in reversed(start["headers"])}
            kind = headers.get(b"content-type", b"")
            if start["status"] >= 400 and kind.startswith(b"text/plain"):
                await self._refuse(start["status"], message.get("body", b"").decode())
                return
            self._events = kind.startswith(b"text/event-stream")
            self.begun = True
            self._received.clear()
            await self._send(start)
        if self._complete:
            return
        self._complete = not message.get("more_body", False)
        await self._send(message)

    async def end(self) -> None:
        """Say what is wrong with an answer that never came, or that was cut."""
        if self._complete or self.left:
            return
        if not self.begun:
            await self._refuse(503, "no process could answer; ask again later.")
        elif self._events:
            lost = error_body(_LOST, kind="server_error", code="replica_lost")
            event = f"data: {json.dumps(lost)}\n\n".encode()
            await self._send({"type": "http.response.body", "body": event})

    async def _refuse(self, status: int, message: str) -> None:
        """An error of Ray's own, in OpenAI's shape. 404: no student is deployed."""
        if status == 404:
            status, message = 503, "no student is served here now."
        kind = "server_error" if status >= 500 else "invalid_request_error"
        body = json.dumps(error_body(message, kind=kind, code="unavailable")).encode()
        headers: list[Any] = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
        headers.append((b"content-length", str(len(body)).encode()))
        self.begun = self._complete = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})
