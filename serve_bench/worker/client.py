"""The client of an OpenAI-compatible completions endpoint that streams: one event's meaning, one
request, one closed-loop runtime.

Prompts are token ids, so that their length is exact. Tokens are counted by the server's own usage
where it gives one, and timed by the events that carry one, as vLLM's `bench serve` does. Knows
HTTP; knows nothing of arrivals (see `serve_bench.measure.scenarios.load`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import httpx2
import numpy as np

from limbeck.contract.data.arrays import Ids, Logits
from limbeck.contract.errors import DataError, EnvironmentalError
from limbeck.contract.files import parse_json
from limbeck.runtime.endpoint import CONNECT, Endpoint, find_endpoint

_LONGEST_EVENT = 1 << 20  # bytes of a line of a stream
_REFUSAL = 1 << 16  # bytes that are read of an answer that is an error


@dataclass
class Stream:
    """One streamed answer so far; ``at`` holds the time of every event that carries a token."""

    at: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    counted: int | None = None  # generated tokens, by the server
    finished: bool = False

    @property
    def output_tokens(self) -> int:
        """Generated tokens: the server's count, else one an event."""
        return len(self.at) if self.counted is None else self.counted

    def read(self, line: str, now: float) -> bool:
        """Take one line of the event stream; whether it carried a token. Raises `ValueError` for an
        error in the stream, and for what is no event of a completion.

        A token's text may be empty: a special token, or a part of a character that waits for the
        rest. The end may bring the last token along or stand alone, so an event with
        `finish_reason` carries a token only where it has text.
        """
        if not line.startswith("data:"):
            return False
        data = line[5:].strip()
        if data == "[DONE]":
            self.finished = True
            return False
        event = parse_json(data)
        try:
            if "error" in event:
                raise ValueError(f"the server said: {event['error']}")
            if usage := event.get("usage"):
                self.prompt_tokens = _count(usage["prompt_tokens"])
                self.counted = _count(usage["completion_tokens"])
            carried = any(
                choice.get("text") or not choice.get("finish_reason")
                for choice in event.get("choices") or ()
            )
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"the stream holds what is no event of a completion: {data}") from None
        if carried:
            self.at.append(now)
        return carried


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"the server's usage is no number of tokens: {value!r}")
    return value


def streamed(endpoint: Endpoint, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
    """A greedy request for exactly ``new_tokens`` tokens, if the server honours ``ignore_eos``."""
    return endpoint.body(list(prompt), new_tokens) | {
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def open_session() -> aiohttp.ClientSession:
    """HTTP client for `request`: any number of open connections, no time limit of its own.

    Needs a running event loop.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(),
        read_bufsize=_LONGEST_EVENT,
    )


async def request(session: aiohttp.ClientSession, endpoint: Endpoint, body: bytes) -> Stream:
    """One streamed request, its ``body`` written out before, to its end.

    Raises `ValueError` with the reason when it fails.
    """
    stream, clock = Stream(), time.perf_counter
    url = f"{endpoint.url}/completions"
    headers = {**endpoint.headers, "Content-Type": "application/json"}
    try:
        async with session.post(url, data=body, headers=headers, allow_redirects=False) as response:
            if response.status != 200:
                beginning = await response.content.read(_REFUSAL)
                raise ValueError(endpoint.refusal(response.status, beginning))
            async for line in response.content:
                stream.read(line.decode(), clock())
    except aiohttp.ClientError as error:
        shown = f"{type(error).__name__}: {error}".rstrip(": ")
        raise ValueError(endpoint.told(shown)) from None
    except ValueError as error:  # reports keep it
        raise ValueError(endpoint.told(error)) from None
    if not stream.finished:
        raise ValueError("the stream ended without [DONE]")
    if not stream.at:
        raise ValueError("the answer holds no token")
    return stream


class OpenAi:
    """A model behind a URL as a `Runtime`: one request at a time, each token taken from the stream.

    The server chooses and appends tokens itself. So `step` takes none, and their ids are unknown
    here: -1.
    """

    def __init__(
        self, *, url: str, model: str | None = None, key_variable: str = "OPENAI_API_KEY"
    ) -> None:
        self._endpoint = find_endpoint(url, model, key_variable)
        self._client = httpx2.Client(timeout=httpx2.Timeout(None, connect=CONNECT))
        self._stream = Stream()
        self._tokens: Iterator[None] = iter(())
        self.facts: dict[str, Any] = {
            "vocabulary": None,
            "context": None,
            "threads": None,
            "kv_cache": None,
            "library": self._endpoint.url,
            "model": self._endpoint.model,
        }

    def begin(self, prompts: Ids, room: int) -> Ids:
        """See `Runtime.begin`.

        Raises `DataError` for several rows, `EnvironmentalError` when the server refuses.
        """
        if len(prompts) != 1:
            raise DataError(
                "a server takes one prompt a request; measure it in the `server` scenario."
            )
        for _ in self._tokens:
            pass  # the last answer's end, so that its connection can be used again
        self._tokens = self._answer([int(token) for token in prompts[0]], room)
        return self.step(prompts[:, -1])

    def step(self, tokens: Ids) -> Ids:
        try:
            next(self._tokens)
        except StopIteration:
            raise DataError(
                f"{self._endpoint.url}: the answer ended after {len(self._stream.at)} tokens, "
                "before all that were asked; let "
                "the server honour ignore_eos and send every token by itself."
            ) from None
        return np.array([-1])

    def close(self) -> None:
        """Give its connection back."""
        self._client.close()

    def score(self, ids: Ids) -> Logits:
        """Not offered by the protocol."""
        raise DataError(f"{self._endpoint.url}: a server tells no logits, so it cannot be scored.")

    def device_seconds(self) -> list[float] | None:
        return None

    def prompt_tokens(self) -> int:
        """See `Runtime.prompt_tokens`; reads the answer to its end, because usage comes last."""
        for _ in self._tokens:
            pass
        if self._stream.prompt_tokens is None:
            raise DataError(
                f"{self._endpoint.url}: the server gives no usage, so what it read cannot be "
                "checked."
            )
        return self._stream.prompt_tokens

    def _answer(self, prompt: list[int], new_tokens: int) -> Iterator[None]:
        self._stream = stream = Stream()
        url = f"{self._endpoint.url}/completions"
        body = streamed(self._endpoint, prompt, new_tokens)
        try:
            with self._client.stream(
                "POST", url, json=body, headers=self._endpoint.headers
            ) as response:
                if response.status_code != 200:
                    beginning = next(response.iter_bytes(_REFUSAL), b"")
                    raise ValueError(self._endpoint.refusal(response.status_code, beginning))
                for line in response.iter_lines():
                    if stream.read(line, time.perf_counter()):
                        yield None
        except (httpx2.HTTPError, ValueError) as error:
            raise EnvironmentalError(f"{url}: {self._endpoint.told(error)}") from None
