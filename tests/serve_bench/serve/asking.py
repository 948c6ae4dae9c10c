"""A server in this process, and the ways in which tests ask it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from limbeck.runtime.decoder import Decoder
from limbeck.runtime.text import load_text
from serve_bench.serve.server import Listener, open_server

PROMPTS = [
    "a",
    "My fellow Americans,",
    "x" * 140,
    "Grüße",
    "one two three four five",
    "{}",
    "And it came to pass " * 5,
]


CALLS = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]


@contextmanager
def serving(folder: Path, **options: Any) -> Iterator[Listener]:
    server = open_server(
        folder, **{"port": 0, "form": "fp32", "threads": 1, "grace": 10.0, **options}
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    try:
        yield server
    finally:
        server.stop()
        server.stop()
        thread.join(timeout=30)
        assert not thread.is_alive()


def connect(server: Listener, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key=key, max_retries=0, timeout=30)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def slow(server: Listener, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.01) -> None:
    """Make every step of the engine take this long."""
    step = server.engine._batch.step

    def slowed(ids: Any) -> Any:
        time.sleep(seconds)
        return step(ids)

    monkeypatch.setattr(server.engine._batch, "step", slowed)


def bare(
    server: Listener, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, Any, Any]:
    """Status, headers and body of one request."""
    host, port = server.address.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    payload = body if body is None or isinstance(body, bytes) else json.dumps(body)
    connection.request(method, path, payload, {"Content-Type": "application/json"} | headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    is_json = response.headers.get_content_type() == "application/json"
    return response.status, response.headers, json.loads(text) if is_json and text else text


def metric(server: Listener, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(bare(server, "GET", "/metrics")[2])
    found = [
        s.value
        for f in families
        for s in f.samples
        if s.name == name and labels.items() <= s.labels.items()
    ]
    return sum(found)


@cache
def alone(folder: Path) -> Decoder:
    return Decoder(folder, form="fp32", threads=1)


def greedy(folder: Path, ids: list[int], count: int) -> str:
    text = load_text(folder)
    return "".join(text.stream(alone(folder).generate(ids, count, stop_ids=text.stop_ids)))
