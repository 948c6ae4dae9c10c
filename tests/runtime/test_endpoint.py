"""Servers that are hostile or wrong: a message each, in bounded time and memory."""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import queue
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from limbeck.app.cli import app
from limbeck.contract.errors import EnvironmentalError, RecipeError
from limbeck.contract.recipe import parse_recipe
from limbeck.runtime import endpoint
from limbeck.runtime.endpoint import Endpoint, find_endpoint
from serve_bench.worker.client import OpenAi, Stream, open_session, request
from tests.pico import pico_recipe

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
WHOLE = HEAD + b"Content-Length: 1000000\r\n\r\n"


@contextmanager
def answering(
    first: bytes, then: bytes = b"", every: float = 0.0, *, tls: ssl.SSLContext | None = None
) -> Iterator[str]:
    """A server that answers ``first``, then ``then`` again and again until the client leaves."""
    door, closing = socket.create_server(("127.0.0.1", 0)), threading.Event()
    if tls:
        door = tls.wrap_socket(door, server_side=True)

    def serve() -> None:
        try:
            connection, _ = door.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(first)
                while then and not closing.wait(every):
                    connection.sendall(then)
        except OSError:
            pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http{'s' * bool(tls)}://127.0.0.1:{door.getsockname()[1]}"
    finally:
        closing.set()
        door.close()
        thread.join(10)


def self_signed(file: Path) -> None:
    """Write a key and its certificate for 127.0.0.1."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "own")])
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    parts = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    file.write_bytes(key.private_bytes(*parts, plain) + made.public_bytes(parts[0]))


def sized(body: bytes, kind: bytes = b"") -> bytes:
    return HEAD + kind + b"Content-Length: %d\r\n\r\n" % len(body) + body


BOMB = gzip.compress(bytes(64 << 20))


@pytest.mark.parametrize(
    ("first", "then", "every", "message"),
    [
        (sized(b"[" * 100_000), b"", 0, "nested too deeply"),
        (sized(b'{"data":' + b"1" * 5000 + b"}"), b"", 0, "integer string"),
        (sized(BOMB, b"Content-Encoding: gzip\r\n"), b"", 0, "larger than 16777216 bytes"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b" " * 65536 + b"\r\n", 0,
         "larger than 16777216 bytes"),
        (WHOLE, b" ", 0.05, r"took longer than 0\.5 s"),
        (HEAD, b"a", 0.05, r"took longer than 0\.5 s"),
    ],
    ids=["deep", "digits", "gzip", "endless", "slow body", "slow headers"],
)  # fmt: skip
def test_a_hostile_list_of_models_is_refused(
    monkeypatch: pytest.MonkeyPatch, first: bytes, then: bytes, every: float, message: str
) -> None:
    if "longer" in message:
        monkeypatch.setattr(endpoint, "_LISTING", 0.5)
    began = time.monotonic()
    with answering(first, then, every) as url:
        with pytest.raises(EnvironmentalError, match=f"no OpenAI-compatible server.*{message}"):
            find_endpoint(url)
        assert time.monotonic() - began < 5


def test_a_refusal_that_is_nested_too_deeply_is_shown_as_text() -> None:
    found = Endpoint("http://host/v1", "big").refusal(400, b"[" * 100_000)
    assert found == "status 400: " + "[" * 300


ODD = ["http://[::1", "http://[x]", "http://a:b", "http://a:99999999", "http://a\x01b",
       "http://a b", "http://:80", "http://a\u2028"]  # fmt: skip


@pytest.mark.parametrize("url", ODD)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(EnvironmentalError, match="it is no address"):
        find_endpoint(url)
    tokenizer = {"kind": "local", "path": "x"}
    server = {"kind": "server", "url": url, "model": "m", "tokenizer": tokenizer}
    target = {"scenarios": [{"kind": "server", "target": {"kind": "url", "url": url}}]}
    runtime = {"runtimes": [{"kind": "openai", "url": url}]}
    for change, place in (
        ({"teachers": [{"name": "a", "model": server}]}, "teachers"),
        ({"bench": target}, "bench.scenarios"),
        ({"bench": runtime}, "bench.runtimes"),
    ):
        with pytest.raises(RecipeError, match=rf"(?s){place}.*(it is no address|pattern)"):
            parse_recipe(pico_recipe().resolved() | change)


SECRET = ["http://me:s3cr3t@host", "https://s3cr3t@host/v1", "http://me:s3cr3t/x@host",
          "http://me:x#s3cr3t@host", "http://host?key=s3cr3t", "http://host#s3cr3t"]  # fmt: skip


@pytest.mark.parametrize("url", SECRET)
def test_an_address_that_would_show_a_secret_is_refused(url: str) -> None:
    result = CliRunner().invoke(app, ["bench", url])
    assert result.exit_code == 2, result.exception
    for change in (
        {"scenarios": [{"kind": "server", "target": {"kind": "url", "url": url}}]},
        {"runtimes": [{"kind": "openai", "url": url}]},
    ):
        with pytest.raises(RecipeError, match=r"name or pass|query|no address") as e:
            parse_recipe(pico_recipe().resolved() | {"bench": change})
        assert "s3cr3t" not in str(e.value) + result.output


def test_an_at_sign_in_a_path_is_no_password() -> None:
    runtime = {"kind": "openai", "url": "http://host/@team/v1"}
    parse_recipe(pico_recipe().resolved() | {"bench": {"runtimes": [runtime]}})


def test_the_password_of_a_store_is_not_shown() -> None:
    kept = ["cache", "pico", "--set", "training.teacher_cache=hidden"]
    result = CliRunner().invoke(app, [*kept, "--to", "ssh://me:s3cr3t@host/folder"])
    assert (result.exit_code, "s3cr3t" in result.output) == (2, False), result.output
    assert "teacher_cache.store" in result.output


@pytest.mark.parametrize("url", ODD[:4])
def test_the_bench_refuses_them_without_a_traceback(url: str) -> None:
    result = CliRunner().invoke(app, ["bench", url])
    assert (result.exit_code, "it is no address" in result.stderr) == (2, True), result.exception


@pytest.mark.parametrize("url", ["http://a", "https://a:1/v1", "http://[::1]:80/v1", "http://ä.de"])
def test_addresses_are_taken(url: str) -> None:
    runtime = {"kind": "openai", "url": url}
    assert parse_recipe(pico_recipe().resolved() | {"bench": {"runtimes": [runtime]}})
    httpx2.URL(url)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (b"404 Not Found\r\n", "answered 404; is the path before /v1 right?"),
        (b"307 Moved\r\nLocation: https://b/v1/models\r\n",
         "answered 307 and sends on to https://b/v1/models; give that address, up to /v1."),
    ],
)  # fmt: skip
def test_an_address_that_answers_otherwise_says_what_may_be_wrong(
    status: bytes, message: str
) -> None:
    with answering(b"HTTP/1.1 " + status + b"Content-Length: 0\r\n\r\n") as url:
        with pytest.raises(EnvironmentalError) as found:
            find_endpoint(url)
        assert str(found.value) == f"{url}/v1/models: {message}"


def test_a_certificate_of_an_unknown_authority_is_taken_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, context = tmp_path / "own.pem", ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    self_signed(file)
    context.load_cert_chain(file)
    listed = sized(b'{"data": [{"id": "big"}]}')
    with answering(listed, tls=context) as url:
        with pytest.raises(EnvironmentalError, match=r"if you trust it, .* in \$SSL_CERT_FILE"):
            find_endpoint(url)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    with answering(listed, tls=context) as url:
        assert find_endpoint(url).model == "big"
    with answering(listed) as url:
        with pytest.raises(EnvironmentalError, match=r"does it speak http, without s\?"):
            find_endpoint(url.replace("http:", "https:"))


@pytest.mark.parametrize("key", ["s3cret\nX: y", "s3cret\r", "é", "a b", "\x1b[31m"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(
        EnvironmentalError, match=r"\$OPENAI_API_KEY: found a key with blanks"
    ) as at:
        find_endpoint("http://127.0.0.1:1")
    assert "s3cret" not in str(at.value)


def test_a_key_that_a_server_repeats_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's own server repeats a part of a wrong key, a proxy all of it."""
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    named = sized(b'{"data": [{"id": "for s3cret"}]}')
    with answering(named, b"", 0) as url:
        with pytest.raises(EnvironmentalError, match=r"no model 'big'; it has for \[key\]"):
            find_endpoint(url, "big")
    with answering(named, b"", 0) as url:
        found = find_endpoint(url)
    said = b'{"error": {"message": "no such key: Bearer s3cret"}}'
    assert found.refusal(401, said) == "status 401: no such key: Bearer [key]"
    long = b"x" * 298 + b"s3cret"
    assert "s3" not in found.refusal(500, long)


QUOTES = {
    "header": b"HTTP/1.1 200 OK\r\nAuth orization: Bearer s3cret/key\r\n\r\n",
    "status": b"HTTQ/1.1 200 Bearer s3cret/key\r\n\r\n",
    "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\ns3cret/key\r\n",
    "address": b"HTTP/1.1 302 F\r\nLocation: http://x/?k=s3cret%2Fkey\r\nContent-Length: 0\r\n\r\n",
    "json": b'HTTP/1.1 401 N\r\nContent-Length: 19\r\n\r\n{"a":"s3cret\\/key"}',
    "json with more": b"HTTP/1.1 401 N\r\nContent-Length: 0\r\n\r\ns3cret\\/key",
    "event": sized(b'data: {"error": "Bearer s3cret/key"}\n\n'),
    "usage": sized(b'data: {"usage": {"prompt_tokens": "s3cret/key", "completion_tokens": 1}}\n\n'),
}


@pytest.mark.parametrize("name", QUOTES)
def test_a_key_that_broken_answers_quote_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Libraries put the broken part into their errors, and reports keep those of the bench."""
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret/key")
    found = Endpoint("", "big", {"Authorization": "Bearer s3cret/key"})

    async def measured() -> None:
        async with open_session() as session:
            await request(session, found, b"{}")

    shown = []
    with answering(QUOTES[name]) as url, pytest.raises(EnvironmentalError) as listed:
        find_endpoint(url)
    shown.append(str(listed.value))
    with answering(QUOTES[name]) as url:
        found = replace(found, url=f"{url}/v1")
        with pytest.raises(ValueError, match=r"\S") as row:
            asyncio.run(measured())
    shown.append(str(row.value))
    with answering(QUOTES[name]) as url:
        found = replace(found, url=f"{url}/v1")
        monkeypatch.setattr("serve_bench.worker.client.find_endpoint", lambda *_: found)
        alone = OpenAi(url=url)
        with pytest.raises(EnvironmentalError) as one:
            alone.begin(np.zeros((1, 1), np.int64), 1)
        alone.close()
    shown.append(str(one.value))
    assert not [text for text in shown if "s3cret" in text]
    assert any("[key]" in text for text in shown)


def test_what_a_server_says_is_cut_in_messages() -> None:
    models = b",".join(b'{"id": "%d"}' % i for i in range(5000))
    for answer in (
        sized(b'{"data": [' + models + b"]}"),
        b"HTTP/1.1 302 F\r\nContent-Length: 0\r\nLocation: http://x/" + b"a" * 5000 + b"\r\n\r\n",
    ):
        with answering(answer) as url, pytest.raises(EnvironmentalError) as found:
            find_endpoint(url, "big")
        assert len(str(found.value)) < 450


@pytest.mark.parametrize("length", [b"-5", b"true", b"0", b"1e999", b'"9"'])
def test_a_context_that_is_no_number_of_tokens_is_none(length: bytes) -> None:
    listed = sized(b'{"data": [{"id": "big", "max_model_len": ' + length + b"}]}")
    with answering(listed) as url:
        assert find_endpoint(url).context is None


@pytest.mark.parametrize(
    "event",
    [
        "5", "[]", "null", '"error"', '{"usage": 5}', '{"choices": [5]}',
        '{"choices": 5}', '{"usage": {"prompt_tokens": -1, "completion_tokens": 1}}',
        '{"usage": {"prompt_tokens": 1, "completion_tokens": 1e999}}',
        '{"usage": {"prompt_tokens": 1, "completion_tokens": true}}',
    ],
)  # fmt: skip
def test_an_event_that_is_none_of_a_completion_fails_its_request(event: str) -> None:
    with pytest.raises(ValueError, match=r"no event of a completion|no number of tokens"):
        Stream().read(f"data: {event}", 0.0)


def test_a_part_of_an_answer_that_comes_late_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the thread that reads is faster than the one that waits."""

    class Patient(queue.SimpleQueue[object]):
        def get(self, block: bool = True, timeout: float | None = None) -> object:
            return super().get(block, 10)

    monkeypatch.setattr(queue, "SimpleQueue", Patient)
    monkeypatch.setattr(endpoint, "_LISTING", 0.2)
    with (
        answering(WHOLE, b" ", 0.05) as url,
        pytest.raises(EnvironmentalError, match=r"took longer than 0\.2 s"),
    ):
        find_endpoint(url)
