"""The gate before the endpoints: Host, API key, size and time of the body; counts every answer.

Knows HTTP alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from limbeck.contract.limits import Limits
from limbeck.contract.progress import say
from serve_bench.serve.answers import Usage, error_body
from serve_bench.serve.engine import Engine
from serve_bench.serve.metrics import Metrics

ENDPOINTS = (
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/health",
    "/metrics",
    "/docs",
)
_OPEN = ("/health",)  # without a key: what starts and restarts the server has none
_PATH = 200  # characters of a path in the access log
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    429: "rate_limit_error",
    504: "timeout_error",
}


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


def wrong(field: str, message: str) -> ApiError:
    """The error for a field of a body."""
    return ApiError(400, f"{field}: {message}.", param=field)


class ClientGone(Exception):
    """The client has left; nobody reads an answer any more."""


def refusal(metrics: Metrics, error: ApiError) -> JSONResponse:
    """The answer for ``error``, counted."""
    metrics.errors.labels(str(error.body["error"]["code"] or error.status_code)).inc()
    return JSONResponse(error.body, error.status_code, error.headers)


def why_no_json(error: BaseException | None) -> str:
    """What json says of a body that is no text, or is no value that Python can hold."""
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"it is not UTF-8: byte 0x{byte:02x} at position {error.start}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return f"{error}".partition(";")[0]


def bearer(headers: Headers) -> str:
    """The key that a client sent, or an empty text. The scheme may be in any case."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def is_allowed(host: str, names: Collection[str]) -> bool:
    """Whether a Host header names this server.

    A page whose name was made to point at this machine (DNS rebinding) sends its own name; an
    address or localhost cannot be such a name.
    """
    name = host.rpartition(":")[0] if host.count(":") == 1 or "]:" in host else host
    name = name.strip("[]").rstrip(".").lower()
    if not name or name == "localhost" or name.endswith(".localhost") or "*" in names:
        return True
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return name in {allowed.lower() for allowed in names}


@dataclass
class Visit:
    """One request, for the endpoints (``scope["limbeck.visit"]``) and the access log."""

    arrived: float  # time.monotonic()
    status: int = 499  # until an answer begins; as nginx writes for a client that has left
    usage: Callable[[], Usage] | None = None  # tokens so far, of an endpoint that makes some


class Gate:
    """ASGI middleware: admits, counts and logs requests."""

    def __init__(
        self,
        app: ASGIApp,
        engine: Engine,
        metrics: Metrics,
        limits: Limits,
        access_log: bool = False,
    ) -> None:
        self._app, self._engine, self._metrics, self._limits = app, engine, metrics, limits
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = scope["limbeck.visit"] = Visit(time.monotonic())
        path = str(scope["path"])

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                endpoint = path if path in ENDPOINTS else "other"
                self._metrics.requests.labels(endpoint, str(visit.status)).inc()
            await send(message)

        asked = scope
        if scope["method"] == "HEAD":  # GET, of which the socket's side sends no body
            asked = {**scope, "method": "GET"}
        try:
            self._admit(path, Headers(scope=scope))
        except ApiError as error:
            await refusal(self._metrics, error)(scope, receive, counted)
        else:
            with contextlib.suppress(ClientGone):
                await self._app(asked, Bounded(receive, self._limits), counted)
        finally:
            if self._access_log:
                say(_line(str(scope["method"]), path, visit))

    def _admit(self, path: str, headers: Headers) -> None:
        limits = self._limits
        if "transfer-encoding" in headers and "content-length" in headers:
            # A proxy that goes by the length takes the rest for a request of somebody else, unless
            # the connection ends here (RFC 9112, 6.1).
            raise ApiError(
                400,
                "found both Content-Length and Transfer-Encoding; send one of them.",
                headers={"Connection": "close"},
            )
        if not is_allowed(host := headers.get("host", ""), limits.allowed_hosts):
            raise ApiError(
                400,
                f"found Host {host!r}, which is not a name of this server; "
                "allow it with --allow-host, or use the address.",
                code="invalid_host",
            )
        key = None if path in _OPEN else limits.api_key
        if key is not None and not hmac.compare_digest(bearer(headers).encode(), key.encode()):
            raise ApiError(
                401,
                "found no valid API key; send it as Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if not path.startswith("/v1"):
            return
        if self._engine.closing:
            raise ApiError(
                503,
                "the server is shutting down.",
                code="shutting_down",
                headers={"Retry-After": "5"},
            )
        coding = headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            raise ApiError(
                415,
                f"found a body with Content-Encoding {coding!r}; send it as it is, without one.",
                headers={"Accept-Encoding": "identity"},
            )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limits.max_body_bytes:
            raise _too_large(limits)


class Bounded:
    """A request's `receive` that raises `ApiError` for a body that is too large or too slow."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._end = time.monotonic() + limits.request_timeout
        self._size, self._complete = 0, False

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            left = max(self._end - time.monotonic(), 0)
            message = await asyncio.wait_for(self._receive(), left)
        except TimeoutError:
            limit = f"{self._limits.request_timeout:g} s"
            raise ApiError(408, f"the body did not arrive within {limit}.") from None
        self._size += len(message.get("body", b""))
        if self._size > self._limits.max_body_bytes:
            raise _too_large(self._limits)
        self._complete = not message.get("more_body", False)
        return message


def _line(method: str, path: str, visit: Visit) -> str:
    """A line of the access log. It holds no query, since some clients put keys there."""
    now = datetime.now().astimezone().isoformat(timespec="milliseconds")
    milliseconds = 1000 * (time.monotonic() - visit.arrived)
    path = json.dumps(path[:_PATH])[1:-1]  # one line, even if a client sends several
    line = f"{now} {method} {path} {visit.status} {milliseconds:.1f} ms"
    if visit.usage is None:
        return line
    usage = visit.usage()
    return f"{line}, {usage.prompt} tokens in, {usage.completion} out"


def _too_large(limits: Limits) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {limits.max_body_bytes} bytes, the limit here.",
        code="body_too_large",
    )
