"""A tiny OpenAI-compatible completions server in a thread: fixed pace, stalls on request."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from typing import Any


class FakeServer:
    """Answers every request with ``max_tokens`` tokens, ``pace`` seconds apart.

    All requests run at once; the first token takes ``first`` seconds. ``stall`` = (after, seconds)
    stops everything once, ``after`` seconds after the first completion came in. ``status`` refuses;
    ``cut`` ends streams early, ``done=False`` without their mark; ``usage=False`` leaves the counts
    out; ``extra`` prompt tokens are added to the count; ``text`` is the text of each token
    (default: its number).
    """

    def __init__(
        self,
        *,
        pace: float = 0.0,
        first: float | None = None,
        stall: tuple[float, float] | None = None,
        status: int = 200,
        cut: int | None = None,
        usage: bool = True,
        done: bool = True,
        extra: int = 0,
        text: str | None = None,
    ) -> None:
        self._pace, self._stall, self._status, self._cut = pace, stall, status, cut
        self._first = pace if first is None else first
        self._usage, self._done, self._extra, self._text = usage, done, extra, text
        self.bodies: list[dict[str, Any]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024), self._loop
        )
        self._server = starting.result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                found = re.search(rb"(?i)\r\ncontent-length:\s*(\d+)", head)
                length = int(found[1]) if found else 0
                body = await reader.readexactly(length)
                await self._answer(head.split(b" ")[1], body, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        if path == b"/v1/models":
            return self._whole(writer, 200, {"data": [{"id": "fake"}]})
        asked = json.loads(body)
        self.bodies.append(asked)
        if self._status != 200:
            return self._whole(writer, self._status, {"error": {"message": "no room"}})
        if self._stall and len(self.bodies) == 1:
            self._loop.call_later(self._stall[0], time.sleep, self._stall[1])
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        wanted = asked["max_tokens"]
        for index in range(min(wanted, self._cut or wanted)):
            if wait := self._pace if index else self._first:
                await asyncio.sleep(wait)
            text = f" {index}" if self._text is None else self._text
            self._event(writer, {"choices": [{"index": 0, "text": text, "finish_reason": None}]})
            await writer.drain()
        if self._usage:
            counts = {
                "prompt_tokens": len(asked["prompt"]) + self._extra,
                "completion_tokens": self._cut or wanted,
            }
            self._event(writer, {"choices": [], "usage": counts})
        if self._done:
            self._chunk(writer, b"data: [DONE]\n\n")
        self._chunk(writer, b"")
        await writer.drain()
        return None

    def _event(self, writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        self._chunk(
            writer, f"data: {json.dumps({'object': 'text_completion', **event})}\n\n".encode()
        )

    @staticmethod
    def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    @staticmethod
    def _whole(writer: asyncio.StreamWriter, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        writer.write(
            f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n"
            f"content-length: {len(data)}\r\n\r\n".encode()
            + data
        )
