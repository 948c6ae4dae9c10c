"""The OpenAI-compatible server under load, out of time, and at its end."""

from __future__ import annotations

import inspect
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import openai
import pytest
from typer.testing import CliRunner

from limbeck.app.cli import app
from limbeck.app.cli.use import serve
from limbeck.contract.artifact import Artifact
from limbeck.contract.limits import Limits
from limbeck.runtime.text import Text
from serve_bench.serve.engine import PREFIX_BYTES
from serve_bench.serve.server import Listener, open_server
from tests.serve_bench.serve.asking import bare, connect, metric, serving, slow, until

# Load and time ------------------------------------------------------------------------------------


def test_a_client_that_leaves_frees_its_slot(
    served: Artifact, server: Listener, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(server, monkeypatch)
    asked: dict[str, Any] = {
        "model": "pico",
        "prompt": "a",
        "max_tokens": 400,
        "extra_body": {"ignore_eos": True},
    }
    gone = metric(server, "limbeck_finished_total", reason="cancelled")
    with client.completions.create(**asked, stream=True) as stream:
        next(iter(stream))
        assert metric(server, "limbeck_running") == 1
    until(lambda: server.engine.running == 0)
    with pytest.raises(
        openai.APITimeoutError
    ):  # not a stream: the connection is closed while it waits
        client.with_options(timeout=0.2).completions.create(**asked)
    until(lambda: server.engine.running == server.engine.waiting == 0)
    assert metric(server, "limbeck_finished_total", reason="cancelled") == gone + 2
    after = client.completions.create(**asked | {"max_tokens": 3})
    assert after.usage.completion_tokens == 3


def test_a_full_queue_says_so(served: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"model": "pico", "prompt": "a", "max_tokens": 5, "ignore_eos": True}
    with serving(served.path, max_batch=1, max_queue=1) as server, ThreadPoolExecutor(2) as pool:
        go, step = threading.Event(), server.engine._batch.step
        monkeypatch.setattr(server.engine._batch, "step", lambda ids: (go.wait(30), step(ids))[1])
        first = pool.submit(bare, server, "POST", "/v1/completions", body)
        until(lambda: server.engine.running == 1)
        second = pool.submit(bare, server, "POST", "/v1/completions", body)
        until(lambda: server.engine.waiting == 1)
        assert metric(server, "limbeck_queue_length") == 1
        assert metric(server, "limbeck_cache_bytes") > 0
        status, headers, answer = bare(server, "POST", "/v1/completions", body)
        assert (status, headers["Retry-After"], answer["error"]["code"]) == (429, "1", "queue_full")
        with connect(server) as client, pytest.raises(openai.RateLimitError):
            client.completions.create(model="pico", prompt="a")
        go.set()
        assert first.result()[0] == second.result()[0] == 200


def test_time_runs_out(limited: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(limited, monkeypatch)
    body = {"model": "pico", "prompt": "a", "max_tokens": 300, "ignore_eos": True}
    with ThreadPoolExecutor(2) as pool:  # one that runs and one that waits
        for status, _, answer in pool.map(
            lambda _: bare(limited, "POST", "/v1/completions", body), range(2)
        ):
            assert (status, answer["error"]["code"]) == (504, "timeout")
            assert answer["error"]["message"] == "the request took longer than 1 s, the limit here."
    until(lambda: limited.engine.running == limited.engine.waiting == 0)


def test_time_runs_out_within_a_stream(limited: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(limited, monkeypatch)
    with connect(limited) as client:
        events = client.completions.create(
            model="pico", prompt="a", max_tokens=300, stream=True, extra_body={"ignore_eos": True}
        )
        assert next(iter(events)).choices[0].finish_reason is None
        with pytest.raises(openai.APIError, match="took longer than 1 s"):
            list(events)
    assert metric(limited, "limbeck_errors_total", code="timeout") >= 1


def test_text_is_read_by_two_threads_however_many_ask(
    server: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, threads, several = Text.encode, list[str](), threading.Barrier(2)

    def watched(text: Text, given: str) -> list[int]:
        threads.append(threading.current_thread().name)
        several.wait(30)  # so that both are at work at once
        return encode(text, given)

    monkeypatch.setattr(Text, "encode", watched)
    body = {"model": "pico", "prompt": "abc", "max_tokens": 1, "ignore_eos": True}
    with ThreadPoolExecutor(12) as pool:
        answers = list(
            pool.map(lambda _: bare(server, "POST", "/v1/completions", body)[0], range(12))
        )
    assert answers == [200] * 12
    assert set(threads) == {"limbeck-text_0", "limbeck-text_1"}


def test_metrics_count(server: Listener, client: openai.OpenAI) -> None:
    names = {
        "limbeck_requests_total": {"endpoint": "/v1/completions", "status": "200"},
        "limbeck_prompt_tokens_total": {},
        "limbeck_generated_tokens_total": {},
        "limbeck_time_to_first_token_seconds_count": {},
        "limbeck_inter_token_latency_seconds_count": {},
        "limbeck_finished_total": {"reason": "length"},
        "limbeck_errors_total": {"code": "model_not_found"},
    }
    before = {name: metric(server, name, **labels) for name, labels in names.items()}
    client.completions.create(
        model="pico", prompt="abc", max_tokens=8, extra_body={"ignore_eos": True}
    )
    bare(server, "POST", "/v1/completions", {"model": "none", "prompt": "a"})
    after = {name: metric(server, name, **labels) - before[name] for name, labels in names.items()}
    assert list(after.values()) == [1, 3, 8, 1, 7, 1, 1]
    assert metric(server, "limbeck_slots") == 64
    until(lambda: metric(server, "limbeck_cache_bytes") == 0)


# The end ------------------------------------------------------------------------------------------


def test_stopping_lets_streams_finish_and_takes_no_more(
    served: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = open_server(served.path, port=0, form="fp32", threads=1, grace=20.0)
    slow(server, monkeypatch)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    with connect(server) as client:
        options: dict[str, Any] = {"max_tokens": 100, "extra_body": {"ignore_eos": True}}
        events = iter(client.completions.create(model="pico", prompt="a", stream=True, **options))
        next(events)
        server.stop()
        until(lambda: server.engine.closing)
        status, headers, body = bare(
            server, "POST", "/v1/completions", {"model": "pico", "prompt": "a"}
        )
        assert (status, headers["Retry-After"], body["error"]["code"]) == (
            503,
            "5",
            "shutting_down",
        )
        assert bare(server, "GET", "/health")[::2] == (503, {"status": "shutting down"})
        assert [e.choices[0].finish_reason for e in events] == [None] * 99 + ["length"]
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_a_stream_that_outlives_the_grace_is_reported(
    served: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(served.path, grace=0.05) as server, connect(server) as client:
        slow(server, monkeypatch)
        options: dict[str, Any] = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}
        events = iter(client.completions.create(model="pico", prompt="a", stream=True, **options))
        next(events)
        server.stop()
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(events)


def test_a_defect_of_the_engine_is_an_error_and_the_end(
    served: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = open_server(served.path, port=0, form="fp32", threads=1)

    def broken(ids: Any) -> Any:
        raise ZeroDivisionError("broken")

    monkeypatch.setattr(server.engine._batch, "step", broken)
    raised: list[BaseException] = []

    def run() -> None:
        try:
            server.run()
        except ZeroDivisionError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: server.started)
    assert bare(server, "POST", "/v1/completions", {"model": "pico", "prompt": "a"})[0] == 500
    thread.join(timeout=30)
    assert [str(error) for error in raised] == ["broken"]


def test_the_command(served: Artifact) -> None:
    """A process of its own, from the start to SIGTERM while a client reads."""
    command = ["serve", str(served.path), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from limbeck.app.cli import main; main()", *command],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"LIMBECK_API_KEY": "secret"},
    )
    try:
        assert process.stderr
        line = process.stderr.readline()
        found = re.fullmatch(
            r"serving pico \(int8-weight, context 512 tokens, 1 threads\) at (http://127.0.0.1:\d+/v1)\n",
            line,
        )
        assert found, line
        with openai.OpenAI(base_url=found[1], api_key="secret", max_retries=0) as client:
            options: dict[str, Any] = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}
            events = client.completions.create(model="pico", prompt="a", stream=True, **options)
            iterator = iter(events)
            next(iterator)
            process.send_signal(signal.SIGTERM)
            assert len(list(iterator)) == 400
        assert process.wait(timeout=30) == 0
        assert re.fullmatch(r"shutting down; [01] requests have 30 s left\n", process.stderr.read())
    finally:
        process.kill()
        process.wait()
        process.stderr.close()  # type: ignore[union-attr]


def test_the_command_has_the_limits_of_the_server() -> None:
    of_command = inspect.signature(serve).parameters
    names = {field.name for field in fields(Limits)} & set(of_command)
    assert names >= {"max_tokens", "max_body_bytes", "request_timeout", "api_key"}
    assert Limits(**{name: of_command[name].default for name in names}) == Limits()
    assert of_command["prefix_cache_mb"].default * 1_000_000 == PREFIX_BYTES


def test_a_port_in_use_and_a_host_that_is_none(served: Artifact) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["serve", str(served.path), "--port", str(port)])
    assert result.exit_code == 2
    assert (
        f"cannot listen on 127.0.0.1, port {port}: Address already in use; "
        "give another one with --host" in result.stderr
    )
    result = CliRunner().invoke(app, ["serve", str(served.path), "--host", "no.such.host.invalid"])
    assert result.exit_code == 2
    assert "cannot listen on no.such.host.invalid" in result.stderr


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["serve", str(tmp_path), "--port", "0"])
    assert result.exit_code == 2
    assert "no complete artifact" in result.stderr


def test_without_the_extra_the_command_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "serve_bench.serve.server", raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    result = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert result.exit_code == 2
    assert (
        result.stderr == "limbeck: fastapi is not installed; run: pip install 'limbeck[serve]'.\n"
    )
