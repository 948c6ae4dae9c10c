"""The server's doors: connections, Host, keys and long prompts, tried with real sockets."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from limbeck.app.cli import app
from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import EnvironmentalError
from limbeck.contract.limits import Limits
from limbeck.runtime.grammar import Grammar, Grammars
from limbeck.runtime.text import Text
from serve_bench.serve.gate import is_allowed
from serve_bench.serve.listener import Connection, Listener
from serve_bench.serve.page import docs_page
from tests.pico import CHAT
from tests.serve_bench.serve.asking import bare, serving, until


def address(server: Listener) -> tuple[str, int]:
    host, port = server.address.removeprefix("http://").split(":")
    return host, int(port)


def ended(connection: socket.socket) -> bool:
    """Whether the other side has closed within the connection's time limit."""
    try:
        return connection.recv(1000) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize(
    ("name", "first", "drip"),
    [
        ("silent", b"", b""),
        ("half a line", b"GET /hea", b""),
        ("headers a byte at a time", b"GET /health HTTP/1.1\r\nX: ", b"y"),
        (
            "headers a byte at a time, second request",
            b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HTTP/1.1\r\nX: ",
            b"y",
        ),
    ],
)
def test_who_sends_no_whole_request_is_let_go(
    served: Artifact, name: str, first: bytes, drip: bytes
) -> None:
    with serving(served.path, limits=Limits(header_timeout=0.3)) as server:
        with socket.create_connection(address(server), timeout=5) as connection:
            connection.sendall(first)
            if first.count(b"HTTP/1.1") == 2:
                assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            start = time.monotonic()
            connection.settimeout(0.05)
            while time.monotonic() - start < 4:
                try:
                    if connection.recv(1000) == b"":
                        break
                except TimeoutError:
                    pass
                except ConnectionResetError:
                    break
                if drip:
                    try:
                        connection.sendall(drip)
                    except OSError:
                        break
            assert 0.1 < time.monotonic() - start < 3
        assert bare(server, "GET", "/health")[0] == 200


def test_a_slow_answer_outlives_the_time_for_headers(
    served: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(served.path, limits=Limits(header_timeout=0.2)) as server:
        step = server.engine._batch.step
        monkeypatch.setattr(
            server.engine._batch, "step", lambda ids: (time.sleep(0.05), step(ids))[1]
        )
        body = {"model": "pico", "prompt": "a", "max_tokens": 12, "ignore_eos": True}
        assert bare(server, "POST", "/v1/completions", body)[0] == 200


DOCS = b"GET /docs HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_a_client_that_does_not_read_is_let_go_and_a_slow_one_is_not(
    served: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Connection, "unread_timeout", 0.5)
    with serving(served.path) as server:
        length = len(docs_page(server.config.app.openapi(), "pico").encode())  # type: ignore[union-attr]
        with socket.socket() as silent, socket.socket() as slow:
            for client in (silent, slow):
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.settimeout(10)
                client.connect(address(server))
                client.sendall(DOCS * 200)
            got, ends = 0, time.monotonic() + 20
            while got < 200 * length:
                assert time.monotonic() < ends
                got += len(slow.recv(1 << 18))
                time.sleep(0.001)
            until(lambda: server._door.open == 1)


def test_connections_are_capped(served: Artifact) -> None:
    with serving(served.path, limits=Limits(max_connections=3)) as server:
        held = [socket.create_connection(address(server), timeout=5) for _ in range(3)]
        with socket.create_connection(address(server), timeout=5) as refused:
            assert refused.recv(1000).startswith(b"HTTP/1.1 503 ")
            assert ended(refused)
        held.pop().close()
        deadline = time.monotonic() + 5
        while bare_status(server) != 200:
            assert time.monotonic() < deadline
        for connection in held:
            connection.close()


def bare_status(server: Listener) -> int:
    try:
        return bare(server, "GET", "/health")[0]
    except OSError:
        return 0


def test_few_descriptors_and_many_idle_connections(served: Artifact) -> None:
    """`ulimit -n 128` and 200 idle clients: the log stays short, and the server answers again."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))

    process = subprocess.Popen(
        [sys.executable, "-m", "limbeck", "serve", str(served.path), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )
    lines: list[str] = []
    try:
        assert process.stderr
        found = re.search(r"http://127.0.0.1:(\d+)", process.stderr.readline())
        assert found
        reader = threading.Thread(target=lambda: lines.extend(process.stderr))  # type: ignore[arg-type]
        reader.start()
        place = ("127.0.0.1", int(found[1]))
        idle = [socket.create_connection(place, timeout=10) for _ in range(200)]
        time.sleep(1.5)
        assert len(os.listdir(f"/proc/{process.pid}/fd")) <= 128
        for connection in idle:
            connection.close()
        deadline = time.monotonic() + 10
        answer = b""
        while not answer.startswith(b"HTTP/1.1 200"):
            assert time.monotonic() < deadline
            with socket.create_connection(place, timeout=10) as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answer = connection.recv(1000)
    finally:
        process.terminate()
        process.wait(timeout=30)
    reader.join(timeout=10)
    process.stderr.close()
    assert len(lines) < 10, lines[:20]
    assert any("connections refused: all" in line for line in lines)


def test_a_signal_ends_the_server_while_a_hostile_schema_is_compiled(served: Artifact) -> None:
    patterns = [f"(a|b)*a(a|b){{{count}}}" for count in range(60)]
    schema = {"allOf": [{"type": "string", "pattern": one} for one in patterns]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    body = json.dumps({"model": "pico", "prompt": "a", "response_format": form}).encode()
    command = [sys.executable, "-m", "limbeck", "serve", str(served.path), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        found = re.search(r"http://127.0.0.1:(\d+)", process.stderr.readline())
        assert found
        with socket.create_connection(("127.0.0.1", int(found[1])), timeout=10) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            until(lambda: children(process.pid) > 0)
            process.terminate()
            assert process.wait(timeout=25) == 0
    finally:
        process.kill()
        process.communicate()


def children(pid: int) -> int:
    return sum(len(one.read_text().split()) for one in Path(f"/proc/{pid}/task").glob("*/children"))


# Who may ask --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "names", "allowed"),
    [
        ("localhost:8000", (), True),
        ("LOCALHOST.", (), True),
        ("127.0.0.1:8000", (), True),
        ("[::1]:8000", (), True),
        ("::1", (), True),
        ("", (), True),
        ("evil.example:8000", (), False),
        ("localhost.evil.example", (), False),
        ("127.0.0.1.evil.example", (), False),
        ("api.example:80", ("API.example",), True),
        ("evil.example", ("*",), True),
    ],
)
def test_names_of_this_server(host: str, names: tuple[str, ...], allowed: bool) -> None:
    assert is_allowed(host, names) == allowed


def test_a_request_of_two_lengths_hides_no_second_one(server: Listener) -> None:
    with socket.create_connection(address(server), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
            b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        answer = b"".join(iter(lambda: connection.recv(10_000), b""))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"found both Content-Length and Transfer-Encoding" in answer
    assert answer.count(b"HTTP/1.1") == 1


def test_a_rebound_name_is_refused(served: Artifact) -> None:
    with serving(served.path) as server:
        for path in ("/v1/models", "/metrics", "/health"):
            status, _, body = bare(server, "GET", path, Host="evil.example:80")
            assert (status, body["error"]["code"]) == (400, "invalid_host")
    with serving(served.path, limits=Limits(allowed_hosts=("api.example",))) as server:
        assert bare(server, "GET", "/v1/models", Host="api.example")[0] == 200


EMPTY, ODD = "found an empty API key", "found an API key with blanks, control characters or"


@pytest.mark.parametrize(
    ("key", "message"),
    [("", EMPTY), ("  ", EMPTY), ("k\udcffy", ODD), ("kéy", ODD), ("key\n", ODD), ("a b", ODD)],
)
def test_a_key_that_nobody_can_send_is_refused_at_the_start(
    served: Artifact, monkeypatch: pytest.MonkeyPatch, key: str, message: str
) -> None:
    with pytest.raises(EnvironmentalError, match=message):
        Limits(api_key=key)
    for arguments, variable in (((), key), (("--api-key", key), None)):
        if variable is not None:
            monkeypatch.setenv("LIMBECK_API_KEY", variable)
        else:
            monkeypatch.delenv("LIMBECK_API_KEY")
        result = CliRunner().invoke(app, ["serve", str(served.path), "--port", "0", *arguments])
        assert (result.exit_code, message in result.stderr) == (2, True)


# Long prompts -------------------------------------------------------------------------------------


def test_what_cannot_fit_is_refused_before_it_is_read(
    served: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*_: Any) -> Any:
        raise AssertionError

    with serving(served.path) as server:
        with monkeypatch.context() as patch:
            patch.setattr(Text, "_encoded", unread)
            calls = "{% for m in messages %}{{ (m.tool_calls or []) | tojson }}{% endfor %}"
            text = replace(server.engine.text, template=CHAT + calls)
            patch.setattr(server.engine, "text", text)
            long = "x" * 500_000
            user: dict[str, Any] = {"role": "user", "content": ""}
            function = {"name": "f", "arguments": json.dumps({"x": long})}
            call = {"role": "assistant", "tool_calls": [{"function": function}]}
            for path, body in (
                ("completions", {"prompt": long}),
                ("chat/completions", {"messages": [{"role": "user", "content": long}]}),
                ("chat/completions", {"messages": [user] * 20_000}),
                ("chat/completions", {"messages": [user, call]}),
            ):
                status, _, answer = bare(server, "POST", f"/v1/{path}", {"model": "pico"} | body)
                assert (status, answer["error"]["code"]) == (400, "context_length_exceeded"), answer
                found = re.search(r"found a prompt of (\d+) bytes", answer["error"]["message"])
                assert found
                assert int(found[1]) >= 20_000
        longest = "x" * 511  # the bound refuses nothing that fits: a byte a token here
        body = {"model": "pico", "prompt": longest, "max_tokens": 1, "ignore_eos": True}
        assert bare(server, "POST", "/v1/completions", body)[0] == 200


def test_the_loop_goes_on_while_a_long_prompt_is_read(
    served: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, go, encode = threading.Event(), threading.Event(), Text.encode

    def held(text: Text, given: str) -> list[int]:
        reading.set()
        assert go.wait(20)
        return encode(text, given)

    monkeypatch.setattr(Text, "encode", held)
    with serving(served.path) as server:
        body = {"model": "pico", "prompt": "abc", "max_tokens": 1}
        asking = threading.Thread(target=bare, args=(server, "POST", "/v1/completions", body))
        asking.start()
        assert reading.wait(20)
        assert bare(server, "GET", "/health")[0] == 200
        go.set()
        asking.join(20)


def test_who_has_left_waits_for_nothing(
    server: Listener, limited: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schemas that took 5 s each held prompts of others for an hour, whoever still waited."""
    compiled, go, compile_ = list[str](), threading.Event(), Grammars.compile

    def held(grammars: Grammars, lark: str) -> Grammar:
        compiled.append(lark)
        assert go.wait(20)
        return compile_(grammars, lark)

    monkeypatch.setattr(Grammars, "compile", held)
    body = {"model": "pico", "prompt": "abc", "max_tokens": 1}
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": 1}}}
    asked = json.dumps(body | {"response_format": schema}).encode()
    head = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(asked)
    request = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" + head + asked
    place = server.engine.max_queue + server.engine.max_batch + 1
    clients = []
    for _ in range(place):
        clients.append(socket.create_connection(address(server)))
        clients[-1].sendall(request)
    until(lambda: len(compiled) == 1 and bare(server, "POST", "/v1/completions", asked)[0] == 429)
    assert bare(server, "POST", "/v1/completions", body)[0] == 200  # without a schema
    for client in clients:
        client.close()
    until(lambda: not server.server_state.connections)  # it has seen them go
    assert bare(server, "GET", "/health")[0] == 200
    go.set()
    until(lambda: bare(server, "POST", "/v1/completions", asked)[0] == 200)
    assert len(compiled) < 9

    go.clear()
    status, _, answer = bare(limited, "POST", "/v1/completions", asked)
    go.set()
    assert (status, answer["error"]["code"]) == (504, "timeout")


def test_long_and_short_texts_are_read_alike(served: Artifact, tmp_path: Path) -> None:
    from limbeck.runtime import text as module
    from limbeck.runtime.text import load_text

    text = load_text(served.path)
    long = "Grüße 世界 <|endoftext|> " * 2000
    assert len(long) > module._LONG
    assert text.encode(long) == text.tokenizer.encode(long).ids


# The access log and /docs -------------------------------------------------------------------------


def test_the_access_log_has_a_line_for_each_request_and_no_text(
    served: Artifact, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = {"model": "pico", "prompt": "secret words", "max_tokens": 5, "ignore_eos": True}
    for log in (True, False):
        with serving(served.path, access_log=log) as server:
            for stream in (False, True):
                bare(server, "POST", "/v1/completions?key=hidden", asked | {"stream": stream})
            bare(server, "GET", "/v1/nothing%0A%1B[31m")
            bare(server, "GET", "/health")
            bare(server, "GET", "/metrics", Host="evil.example")
        lines = [line for line in capfd.readouterr().err.splitlines() if " ms" in line]
        stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d"
        expected = [
            *[r"POST /v1/completions 200 \d+\.\d ms, 12 tokens in, 5 out"] * 2,
            r"GET /v1/nothing\\n\\u001b\[31m 404 \d+\.\d ms",
            r"GET /health 200 \d+\.\d ms",
            r"GET /metrics 400 \d+\.\d ms",
        ]
        if not log:
            assert not lines
            continue
        assert len(lines) == len(expected), lines
        for line, form in zip(lines, expected, strict=True):
            assert re.fullmatch(f"{stamp} {form}", line), line


class Page(HTMLParser):
    """Names of fields, and addresses that a browser would load or go to."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: set[str] = set()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]
        self.ids |= {value or "" for name, value in attrs if name == "id"}

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def test_the_docs_need_the_key_and_nothing_from_elsewhere(served: Artifact) -> None:
    with serving(served.path, limits=Limits(api_key="secret")) as server:
        for path in ("/docs", "/openapi.json", "/docs/", "/redoc"):
            assert bare(server, "GET", path)[0] == 401
        key = {"Authorization": "Bearer secret"}
        status, headers, html = bare(server, "GET", "/docs", **key)
        described = bare(server, "GET", "/openapi.json", **key)[2]
    assert (status, headers.get_content_type()) == (200, "text/html")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    page = Page()
    page.feed(html)
    assert not page.tags & {"script", "link", "img", "iframe"}
    inside = [address[1:] for address in page.addresses if address.startswith("#")]
    assert set(inside) <= page.ids
    assert [a for a in page.addresses if not a.startswith("#")] == ["openapi.json"]
    for name in described["components"]["schemas"]["ChatBody"]["properties"]:
        assert f"\n{name}\n" in page.text
