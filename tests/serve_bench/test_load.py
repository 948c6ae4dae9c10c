"""The server scenario against a fake server: latency from the scheduled arrival, nothing left out,
the rate found.
"""

from __future__ import annotations

import io
import json
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from limbeck.contract.errors import DataError, EnvironmentalError
from limbeck.contract.recipe import Bench, ServerScenario, Slo
from limbeck.runtime.endpoint import find_endpoint
from serve_bench.judge import scenarios
from serve_bench.measure.scenarios import load
from serve_bench.measure.scenarios.load import Loop, Sizes, measure_server, search
from serve_bench.worker import client
from serve_bench.worker.client import OpenAi, Stream
from tests.servers.fake_server import FakeServer


def prompts(block: int, tokens: int) -> list[int]:
    return [block % 200] * tokens


def scenario(url: str, **over: Any) -> ServerScenario:
    return ServerScenario.model_validate(
        {"kind": "server", "target": {"kind": "url", "url": url}} | over
    )


def run_loop(
    server: FakeServer, *, rate: float, new_tokens: int = 2, **over: Any
) -> list[dict[str, Any]]:
    loop = Loop(
        find_endpoint(server.url), prompts, Sizes(4, new_tokens), scenario(server.url, **over)
    )
    return [row | {"phase": "double"} for row in loop.at(rate)]


def row(
    *at: float, error: str | None = None, scheduled: float = 0.0, output: int | None = None
) -> dict[str, Any]:
    written = len(at) if output is None else output
    whole = {
        "event": "request",
        "rate": 2.0,
        "phase": "double",
        "scheduled": scheduled,
        "sent": scheduled,
    }
    return whole | {"at": list(at), "prompt_tokens": 3, "output_tokens": written, "error": error}


# Figures ------------------------------------------------------------------------------------------


def test_figures_of_a_rate_by_hand() -> None:
    rows = [row(0.1, 0.2, 0.3), row(0.5, 0.6, 0.7, scheduled=1.0), row(error="gone", scheduled=2.0)]
    found = scenarios.rate_figures(2.0, rows, Slo(ttft_ms=200, tpot_ms=150, share=0.3))
    assert (found["requests"], found["completed"], found["failed"]) == (3, 2, 1)
    assert found["duration_s"] == pytest.approx(1.7)
    assert found["share"] == pytest.approx(1 / 3)  # the second is late, the third failed
    assert found["goodput"] == pytest.approx(1 / 1.7)
    assert found["requests_s"] == pytest.approx(2 / 1.7)
    assert found["output_tokens_s"] == pytest.approx(6 / 1.7)
    assert found["prompt_tokens_s"] == pytest.approx(6 / 1.7)
    assert found["ttft_ms"]["mean"] == pytest.approx(300)
    assert found["tpot_ms"]["mean"] == pytest.approx(100)
    assert found["itl_ms"]["n"] == 4
    assert found["ttft_ms"]["p90"] is None  # too few
    assert found["meets"]
    assert not scenarios.meets(rows, Slo(ttft_ms=200, tpot_ms=150, share=0.5))


def test_tokens_are_the_servers_count_where_one_event_carries_several() -> None:
    assert scenarios.tpot(row(0.1, 0.4, output=4)) == pytest.approx(0.1)
    assert scenarios.tpot(row(0.1)) is None


def test_a_stream_counts_tokens_with_and_without_text_and_takes_the_servers_usage() -> None:
    stream = Stream()
    assert not stream.read(": comment", 0.5)
    assert stream.read('data: {"choices": [{"text": "a"}]}', 1.0)
    assert stream.read(
        'data: {"choices": [{"text": "", "finish_reason": null}]}', 2.0
    )  # half a character
    assert (stream.at, stream.output_tokens) == ([1.0, 2.0], 2)
    stream.read('data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}', 3.0)
    stream.read("data: [DONE]", 3.0)
    assert (stream.prompt_tokens, stream.output_tokens, stream.finished) == (7, 2, True)
    with pytest.raises(ValueError, match="overloaded"):
        stream.read('data: {"error": {"message": "overloaded"}}', 4.0)


# Finding the rate ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "tried"),
    [(5.0, [1, 2, 4, 8, 6, 5]), (0.3, [1, 0.5, 0.25, 0.375, 0.3125]), (1.0, [1, 2, 1.5, 1.25])],
)
def test_the_rate_is_doubled_or_halved_and_bisected(limit: float, tried: list[float]) -> None:
    rates: list[float] = []

    def try_rate(rate: float, phase: str) -> bool:
        rates.append(rate)
        assert phase == ("double" if len(rates) <= len(tried) - 2 else "bisect")
        return rate <= limit

    search(try_rate, 1.0, bisections=2, until=time.monotonic() + 100)
    assert rates == tried


def test_the_search_ends_when_its_time_is_spent_or_nothing_fails() -> None:
    rates: list[float] = []

    def holds(rate: float, phase: str) -> bool:
        rates.append(rate)
        return True

    search(holds, 1.0, bisections=2, until=time.monotonic() - 1)
    assert rates == [1.0]
    rates.clear()
    search(holds, 1.0, bisections=2, until=time.monotonic() + 100)
    assert rates == [2.0**k for k in range(12)]


# Against a server ---------------------------------------------------------------------------------


def test_a_stall_is_seen_in_full_by_every_request_that_was_due_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        load, "_PATIENCE", 600.0
    )  # however slow the machine that tests, no request is given up
    with FakeServer(stall=(0.3, 0.5)) as server:
        rows = run_loop(server, rate=250, requests=500, new_tokens=1)
    figures = scenarios.rate_figures(250, rows, Slo())
    assert figures["failed"] == 0
    assert figures["ttft_ms"]["n"] == 500
    # Requests due in the stall's first 10 ms waited at least 490 of its 500 ms: more than 1 in 100
    # of all.
    assert figures["ttft_ms"]["p99"] >= 450
    due = np.array([row["scheduled"] for row in rows])
    waited = np.array([row["at"][0] for row in rows])
    stalled = (waited > 0.1).sum()
    assert (
        stalled >= 0.5 * ((due > 0.3) & (due < 0.7)).sum()
    )  # not one request, all that were due meanwhile


def test_a_late_client_is_no_excuse(monkeypatch: pytest.MonkeyPatch) -> None:
    original, told = client.request, []

    async def blocking(*arguments: Any) -> Stream:
        if not told:
            told.append(time.sleep(0.3))  # our own loop does nothing for 300 ms
        return await original(*arguments)

    monkeypatch.setattr(load, "request", blocking)
    with FakeServer() as server:
        rows = run_loop(server, rate=100, requests=20)
    late = [row for row in rows if row["sent"] - row["scheduled"] > 0.1]
    assert len(late) >= 5
    assert all(row["at"][0] > row["sent"] - row["scheduled"] for row in late)


def test_arrivals_are_poisson_and_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(*arguments: Any) -> Stream:
        return Stream(at=[time.perf_counter()], finished=True)

    monkeypatch.setattr(load, "request", nothing)
    with FakeServer() as server:
        first, second = (run_loop(server, rate=2000, requests=400) for _ in range(2))
    due = [row["scheduled"] for row in first]
    assert due == [row["scheduled"] for row in second]
    gaps = np.diff(due)
    assert gaps.mean() == pytest.approx(1 / 2000, rel=0.2)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.25)  # as of exponential gaps


def test_refusals_and_cut_streams_fail_and_say_why() -> None:
    with FakeServer(status=503) as server:
        rows = run_loop(server, rate=200, requests=3)
        assert [row["error"] for row in rows] == ["status 503: no room"] * 3
        with pytest.raises(EnvironmentalError, match=r"cannot be measured \(status 503: no room\)"):
            Loop(find_endpoint(server.url), prompts, Sizes(4, 2), scenario(server.url)).alone()
    assert scenarios.rate_figures(200, rows, Slo())["goodput"] == 0


def test_the_whole_scenario_on_a_url(tmp_path: Path) -> None:
    raw = io.StringIO()
    with FakeServer(pace=0.001) as server:
        slo = {"ttft_ms": 6e5, "tpot_ms": 6e5}  # held on the slowest machine
        asked = scenario(
            server.url, requests=6, first_rate=50, bisections=0, minutes=0.001, slo=slo
        )
        target = measure_server(
            asked, tmp_path, prompts, Sizes(5, 3), raw, threads=1, folder=tmp_path
        )
        assert {tuple(body["prompt"]) for body in server.bodies} >= {(0,) * 5, (5,) * 5}
        assert all(body["ignore_eos"] and body["max_tokens"] == 3 for body in server.bodies)
    assert target == {"label": server.url, "kind": "url", "model": "fake"}
    rows = [json.loads(line) for line in raw.getvalue().splitlines()]
    assert len(rows) == 6
    assert {row["output_tokens"] for row in rows} == {3}
    assert {row["prompt_tokens"] for row in rows} == {5}

    result = scenarios.server(rows, asked, target, Bench())
    assert result["rates"][0]["completed"] == 6
    assert result["highest_rate"] == {"value": 50, "fails_at": None}


def test_where_nothing_answers_is_named() -> None:
    with pytest.raises(
        EnvironmentalError,
        match=r"127.0.0.1:9/v1/models: no OpenAI-compatible server answers there",
    ):
        find_endpoint("http://127.0.0.1:9/v1/")
    with (
        FakeServer() as server,
        pytest.raises(EnvironmentalError, match="no model 'other'; it has fake"),
    ):
        find_endpoint(server.url, "other")


def test_what_cannot_be_served_is_said_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = ServerScenario(kind="server")
    with pytest.raises(EnvironmentalError, match="a model in torch is not served"):
        load.require_server(ours, None)
    load.require_server(ours, Path("somewhere"))  # all that it needs is installed here
    for missing in (["prometheus_client"], ["fastapi", "uvicorn", "prometheus_client"]):
        monkeypatch.setattr(
            load.importlib.util,
            "find_spec",
            lambda name, gone=missing: None if name in gone else name,
        )
        with pytest.raises(
            EnvironmentalError,
            match=rf"needs {', '.join(missing)}, which `limbeck serve` runs on"
            r"(?s:.*)limbeck\[serve\]",
        ):
            load.require_server(ours, Path("somewhere"))
    with pytest.raises(EnvironmentalError, match="no OpenAI-compatible server answers there"):
        load.require_server(scenario("http://127.0.0.1:9"), None)


def test_a_served_artifact_that_does_not_start_shows_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(
        EnvironmentalError, match=r"limbeck serve ended with status \d+. Its last words:(?s:.*)\S"
    ):
        with load.serve(tmp_path / "nothing", threads=1, log=tmp_path / "log"):
            raise AssertionError("unreachable")


@pytest.mark.parametrize("status", [200, 503])
def test_a_served_artifact_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    (tmp_path / "log").write_text("loading")
    asked, answers = list[str](), [load.httpx2.ConnectError("refused"), 503, status]

    def health(url: str, **_: Any) -> SimpleNamespace:
        asked.append(url)
        answer = answers.pop(0) if answers else status
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(status_code=answer)

    monkeypatch.setattr(load.httpx2, "get", health)
    monkeypatch.setattr(load, "_READY", 0.5)
    running: Any = SimpleNamespace(poll=lambda: None)
    if status == 200:
        load._wait_until_ready("http://x", running, tmp_path / "log")
        assert asked == ["http://x/health"] * 3
    else:
        with pytest.raises(EnvironmentalError, match=r"not ready .*; its log ends:\nloading"):
            load._wait_until_ready("http://x", running, tmp_path / "log")


def test_a_request_alone_takes_its_first_token_and_all_others() -> None:
    with FakeServer(first=0.05, pace=0.02) as server:
        loop = Loop(find_endpoint(server.url), prompts, Sizes(4, 4), scenario(server.url))
        assert 0.05 + 3 * 0.02 <= loop.alone() < 1


# As a runtime -------------------------------------------------------------------------------------


def test_the_runtime_behind_a_url_times_every_token() -> None:
    from serve_bench.worker.language import generate

    with FakeServer(pace=0.001) as server:
        with closing(OpenAi(url=server.url)) as runtime:
            answers = [generate(runtime, [[1, 2, 3]], 4) for _ in range(2)]
    for answer in answers:
        assert len(answer["at"]) == 4
        assert answer["prompt_tokens"] == 3
        assert all(b > a for a, b in zip(answer["at"], answer["at"][1:], strict=False))
        assert answer["tokens"] == [[-1] * 4]


def test_the_end_of_a_stream_is_a_token_only_where_it_brings_text() -> None:
    alone, with_text = Stream(), Stream()
    for stream, text in ((alone, ""), (with_text, "b")):
        stream.read('data: {"choices": [{"text": "a", "finish_reason": null}]}', 1.0)
        carried = stream.read(
            f'data: {{"choices": [{{"text": "{text}", "finish_reason": "length"}}]}}', 2.0
        )
        assert carried == bool(text)
    assert (alone.at, with_text.at) == (
        [1.0],
        [1.0, 2.0],
    )  # limbeck serve ends as the first does, vLLM as the second


def test_tokens_without_text_are_timed_by_both_clients() -> None:
    from serve_bench.worker.language import generate

    with FakeServer(text="") as server:
        (answer,) = run_loop(server, rate=100, requests=1, new_tokens=4)
        with closing(OpenAi(url=server.url)) as runtime:
            timed = generate(runtime, [[1, 2, 3]], 4)["at"]
    assert (len(answer["at"]), answer["output_tokens"], answer["error"]) == (4, 4, None)
    assert len(timed) == 4


def test_the_runtime_behind_a_url_refuses_other_work() -> None:
    from serve_bench.worker.language import generate

    def refused(kind: type[Exception], match: str, **how: Any) -> None:
        with FakeServer(**how) as server, closing(OpenAi(url=server.url)) as runtime:
            with pytest.raises(kind, match=match):
                generate(runtime, [[1, 2, 3]], 4)

    refused(DataError, "ended after 2 tokens", cut=2)
    refused(DataError, "gives no usage", usage=False)
    refused(EnvironmentalError, "status 429: no room", status=429)


def test_answers_without_an_end_or_a_token_are_failed_requests() -> None:
    for how, new_tokens, error in (
        ({"done": False}, 2, "the stream ended without [DONE]"),
        ({}, 0, "the answer holds no token"),
    ):
        with FakeServer(**how) as server:
            (answer,) = run_loop(server, rate=100, requests=1, new_tokens=new_tokens)
        assert answer["error"] == error


def test_a_connection_is_used_again_though_an_answer_was_not_read_to_its_end() -> None:
    with FakeServer() as server, closing(OpenAi(url=server.url)) as runtime:
        runtime.begin(np.array([[1, 2, 3]]), 4)
        runtime.begin(np.array([[1, 2, 3, 4, 5]]), 4)
        assert runtime.prompt_tokens() == 5  # usage comes behind the tokens that nobody read
        assert [body["prompt"] for body in server.bodies] == [[1, 2, 3], [1, 2, 3, 4, 5]]
        with pytest.raises(DataError, match="takes one prompt a request; measure it in the `serv"):
            runtime.begin(np.zeros((2, 3), np.int64), 4)
