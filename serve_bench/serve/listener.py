"""The listening socket and uvicorn: connections are bounded in number and in time, and drained.

Knows sockets and uvicorn; knows nothing of the endpoints.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from limbeck.contract.errors import EnvironmentalError
from limbeck.contract.limits import Limits
from limbeck.contract.progress import say
from serve_bench.serve.engine import Engine

# Seconds. Longer than clients keep an idle connection: else they may use one that just closed.
_KEEP_ALIVE = 30
_LAST_WORDS = 5  # seconds that finished answers may take to reach their clients at the end
_RESERVE = 16  # descriptors for files and threads of the libraries
_LOG_EVERY = 1.0  # seconds between two lines about refused connections
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: 0\r\n\r\n"
)


class Door(socket.socket):
    """A listening socket that answers 503 itself when it has as many connections as it may.

    asyncio would otherwise accept until no descriptor is left, and then log an error for every
    attempt without end. A spare descriptor lets the door answer even then.
    """

    most = 1000
    open = 0
    _spare: int | None = None
    _logged = 0.0
    _refused = 0

    def bound(self, most: int) -> None:
        """Allow ``most`` connections, or fewer where the descriptors do not suffice."""
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
        room = most if soft == resource.RLIM_INFINITY else soft - used - _RESERVE
        self.most = max(1, min(most, room))

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection that there is room for. Raises `BlockingIOError` for none."""
        while True:
            try:
                connection, address = super().accept()
            except BlockingIOError:
                raise
            except OSError:  # no descriptor is left
                if self._spare is None:
                    raise BlockingIOError from None
                os.close(self._spare)
                try:
                    connection, address = super().accept()
                    self._refuse(connection)
                finally:
                    self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
                continue
            if self.open < self.most:
                self.open += 1
                return connection, address
            self._refuse(connection)

    def close(self) -> None:
        """Close the socket and the spare descriptor."""
        super().close()
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    def _refuse(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.setblocking(False)
                connection.send(_FULL)
            except OSError:
                pass  # the client has left already
        self._refused += 1
        if time.monotonic() - self._logged >= _LOG_EVERY:
            say(f"{self._refused} connections refused: all {self.most} are in use")
            self._logged, self._refused = time.monotonic(), 0


class Connection(H11Protocol):
    """uvicorn's protocol, with time limits for the headers of a request, for silence, and for a
    client that does not read its answer."""

    door: Door
    header_timeout: float
    unread_timeout = 60.0  # seconds in which a client must read something of what is ready
    _waiting: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected, and must now send a request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # `pause_writing` comes for every unsent byte
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        """Read on; the time that a request's headers may take does not begin anew."""
        before = self.cycle
        if self._waiting is None and (before is None or before.response_complete):
            self._expect_headers()
        super().data_received(data)
        if self.cycle is not before:
            self._headers_came()

    def connection_lost(self, exc: Exception | None) -> None:
        """Make room for another one."""
        self._headers_came()
        self._all_was_sent()
        self.door.open -= 1
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client reads more slowly than answers come."""
        super().pause_writing()
        self._expect_reading(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """The client has caught up."""
        self._all_was_sent()
        super().resume_writing()

    def _expect_reading(self, unsent: int) -> None:
        def look() -> None:
            now = self.transport.get_write_buffer_size()
            if now < unsent:
                self._expect_reading(now)
            else:
                self.transport.abort()

        self._unread = self.loop.call_later(self.unread_timeout, look)

    def _all_was_sent(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _expect_headers(self) -> None:
        self._waiting = self.loop.call_later(self.header_timeout, self.transport.abort)

    def _headers_came(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


class Listener(uvicorn.Server):
    """uvicorn that drains: once stopped it answers 503 to new requests until the engine is done."""

    def __init__(
        self, app: Any, engine: Engine, *, door: Door, title: str, grace: float, limits: Limits
    ) -> None:
        door.bound(limits.max_connections)
        timeout = min(limits.header_timeout, limits.request_timeout)
        protocol = type("Bounded", (Connection,), {"door": door, "header_timeout": timeout})
        config = uvicorn.Config(
            app,
            http=protocol,
            loop="asyncio",  # uvloop would not ask the door
            log_level="error",  # hostile bytes are no event of ours
            access_log=False,
            ws="none",
            lifespan="off",
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=_LAST_WORDS,
        )
        super().__init__(config)
        self.engine, self.title = engine, title
        host, port = door.getsockname()[:2]
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._door, self._grace = door, grace
        self._stopped = False

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until `stop` or a signal, drain, and return.

        Raises the error that ended the engine, if it was a defect.
        """
        try:
            super().run(sockets or [self._door])
        finally:
            self._door.close()
            self.engine.close()
        if self.engine.failure:
            raise self.engine.failure

    def stop(self) -> None:
        """Drain; called again, end the requests that still run. Any thread may call it."""
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
                left = self.engine.running + self.engine.waiting
                say(f"shutting down; {left} requests have {self._grace:g} s left")
            self.engine.close(self._grace, wait=False)
        return await super().on_tick(counter) or self.engine.ended


def open_door(host: str, port: int) -> Door:
    """Take the address. Raises `EnvironmentalError` when it cannot be had."""
    door = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        door = Door(family, kind, protocol)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(address)
        door.listen()  # clients that connect while the model loads are answered afterwards
    except (OSError, UnicodeError, OverflowError) as error:
        if door:
            door.close()
        why = getattr(error, "strerror", None) or error
        raise EnvironmentalError(
            f"cannot listen on {host}, port {port}: {why}; give another one with --host or --port."
        ) from None
    return door
