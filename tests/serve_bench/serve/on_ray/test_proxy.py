"""What is put around Ray's proxy: tries again, ends cut streams, and writes errors as OpenAI does.

The application inside does what Ray's proxy does when a replica dies: it returns.
"""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from serve_bench.serve.on_ray.proxy import Carried, Steady

Try = Callable[[Receive, Send], Awaitable[None]]
STREAM = [(b"content-type", b"text/event-stream")]
BODY = [
    {"type": "http.request", "body": b"a", "more_body": True},
    {"type": "http.request", "body": b"b", "more_body": False},
]


def start(status: int, headers: list[Any]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(text: bytes, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": text, "more_body": more}


def asked(
    *tries: Try, path: str = "/v1/completions", left: bool = False, late: float = 0.0
) -> tuple[int, Any]:
    """How often the proxy was asked, and what the client got."""
    left_over, sent = list(tries), list[Message]()
    given = [*BODY, *([{"type": "http.disconnect"}] if left else [])]

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        scope["headers"].append((b"x-request-id", b"1"))  # as Ray's own middleware does
        assert len(scope["headers"]) == 1
        scope = pickle.loads(pickle.dumps(scope))  # it goes to another process
        tried = left_over.pop(0)
        await Carried(lambda _, receive, send: tried(receive, send))(scope, receive, send)

    async def receive() -> Message:
        await asyncio.sleep(late)
        return given.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": []}
    asyncio.run(Steady(proxy)(scope, receive, send))
    return len(tries) - len(left_over), sent


async def dies(receive: Receive, send: Send) -> None:
    assert (await receive())["body"] == b"a"


async def dies_after_its_headers(receive: Receive, send: Send) -> None:
    assert [(await receive())["body"] for _ in range(2)] == [b"a", b"b"]
    await send(start(200, STREAM))


async def answers(receive: Receive, send: Send) -> None:
    assert [(await receive())["body"] for _ in range(2)] == [b"a", b"b"]
    await send(start(200, []))
    await send(body(b"done"))


async def streams(receive: Receive, send: Send) -> None:
    await answers_begin(receive, send)
    await send(body(b"data: 2\n\n"))


async def answers_begin(receive: Receive, send: Send) -> None:
    await send(start(200, STREAM))
    await send(body(b"data: 1\n\n", more=True))


async def sees_it_leave(receive: Receive, send: Send) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def has_no_route(receive: Receive, send: Send) -> None:
    await send(start(404, [(b"content-type", b"text/plain; charset=utf-8")]))
    await send(body(b"Path '/v1' not found."))


async def is_refused_by_us(receive: Receive, send: Send) -> None:
    await send(start(429, [(b"content-type", b"application/json")]))
    await send(body(b'{"error": {}}'))


@pytest.mark.parametrize("late", [0.0, 0.05])  # seconds between the headers and the body
@pytest.mark.parametrize("first", [(dies,), (dies_after_its_headers,), (dies, dies)])
def test_a_request_whose_answer_has_not_begun_is_given_to_another(
    first: tuple[Try, ...], late: float
) -> None:
    count, sent = asked(*first, answers, late=late)
    assert count == len(first) + 1
    assert sent == [start(200, []), body(b"done")]


def test_after_three_deaths_the_client_gets_an_error() -> None:
    count, (head, rest) = asked(dies, dies, dies, answers)
    assert (count, head["status"]) == (3, 503)
    assert (b"retry-after", b"1") in head["headers"]
    error = json.loads(rest["body"])["error"]
    assert error["type"] == "server_error"
    assert set(error) == {"message", "type", "param", "code"}


def test_a_cut_stream_ends_with_an_error() -> None:
    count, sent = asked(answers_begin, answers)
    assert count == 1
    *begun, last = sent
    assert begun == [start(200, STREAM), body(b"data: 1\n\n", more=True)]
    assert not last.get("more_body", False)
    event = last["body"].decode()
    assert event.startswith("data: ")
    assert event.endswith("\n\n")
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == "replica_lost"


def test_a_whole_stream_is_passed_on_as_it_is() -> None:
    count, sent = asked(streams)
    assert (count, len(sent)) == (1, 3)
    assert sent[-1] == body(b"data: 2\n\n")


def test_nobody_is_asked_again_for_a_client_that_has_left() -> None:
    assert asked(sees_it_leave, answers, left=True) == (1, [])


def test_errors_of_ray_are_written_as_openai_does_and_ours_stay() -> None:
    _, (head, rest) = asked(has_no_route)
    assert head["status"] == 503
    assert "no student is served" in json.loads(rest["body"])["error"]["message"]
    _, (head, rest) = asked(is_refused_by_us)
    assert (head["status"], rest["body"]) == (429, b'{"error": {}}')


def test_paths_of_ray_are_left_alone() -> None:
    _, (head, _) = asked(has_no_route, path="/-/nothing")
    assert head["status"] == 404
