"""The OpenAI-compatible server, asked by the official client and by bare HTTP."""

from __future__ import annotations

import http.client
import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from limbeck.app.cli import app
from limbeck.app.cli.use import serve
from limbeck.contract.artifact import Artifact
from limbeck.contract.limits import Limits
from limbeck.runtime.decoder import Decoder
from limbeck.runtime.sampling import Sampling
from limbeck.runtime.text import Text, load_text
from serve_bench.serve.engine import PREFIX_BYTES
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


@pytest.fixture(scope="module")
def server(served: Artifact) -> Iterator[Listener]:
    with serving(served.path) as listener:
        yield listener


@pytest.fixture
def client(server: Listener) -> Iterator[openai.OpenAI]:
    with connect(server) as connected:
        yield connected


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
    return response.status, response.headers, json.loads(text) if is_json else text


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


# Answers ------------------------------------------------------------------------------------------


def test_models(server: Listener, client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("pico", "model", "limbeck")
    assert client.models.retrieve("pico") == model
    with pytest.raises(openai.NotFoundError, match="found model 'other'; this server has 'pico'"):
        client.models.retrieve("other")
    assert bare(server, "GET", "/health")[::2] == (200, {"status": "ok"})


def test_a_completion_is_the_decoders(served: Artifact, client: openai.OpenAI) -> None:
    ids = load_text(served.path).encode(PROMPTS[1])
    for prompt in (PROMPTS[1], ids, [PROMPTS[1]], [ids]):
        answer = client.completions.create(
            model="pico", prompt=prompt, max_tokens=24, temperature=0
        )
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason, choice.index) == (
            greedy(served.path, ids, 24),
            "length",
            0,
        )
        assert answer.usage is not None
        assert (
            answer.usage.prompt_tokens,
            answer.usage.completion_tokens,
            answer.usage.total_tokens,
        ) == (20, 24, 44)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.system_fingerprint == f"limbeck-{served.digest[:12]}-fp32"
    unasked = client.completions.create(
        model="pico", prompt="a", extra_body={"ignore_eos": True}
    )  # drawn, as OpenAI's
    assert unasked.usage.completion_tokens == 16  # type: ignore[union-attr]


def test_what_is_not_asked_for_fits_the_limits(served: Artifact) -> None:
    with serving(served.path, limits=Limits(max_tokens=8)) as server:
        for prompt, made in (("a", 8), ("x" * 507, 5)):  # of a context of 512
            body = {"model": "pico", "prompt": prompt, "ignore_eos": True}
            status, _, answer = bare(server, "POST", "/v1/completions", body)
            assert (status, answer["usage"]["completion_tokens"]) == (200, made)


def test_a_chat_is_the_decoders(served: Artifact, client: openai.OpenAI) -> None:
    ids = load_text(served.path).chat(CHAT)
    expected = greedy(served.path, ids, 24)
    answer = client.chat.completions.create(
        model="pico", messages=CHAT, max_completion_tokens=24, temperature=0
    )  # type: ignore[call-overload]
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        expected,
        "length",
    )
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 24)
    assert (answer.object, answer.model) == ("chat.completion", "pico")
    parts = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}],
        },
        CHAT[1],
    ]
    again = client.chat.completions.create(
        model="pico", messages=parts, max_tokens=24, temperature=0
    )  # type: ignore[call-overload]
    assert again.choices[0].message.content == expected
    follow = [*CHAT, again.choices[0].message.model_dump(), CHAT[1]]  # what clients send back
    assert client.chat.completions.create(
        model="pico", messages=follow, temperature=0
    ).usage.prompt_tokens > len(ids)  # type: ignore[call-overload]


def test_streams_tell_a_token_an_event(served: Artifact, client: openai.OpenAI) -> None:
    ids = load_text(served.path).encode("stream")
    expected = greedy(served.path, ids, 24)
    options: dict[str, Any] = {"include_usage": True}
    events = list(
        client.completions.create(
            model="pico",
            prompt="stream",
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options=options,
        )
    )
    assert "".join(e.choices[0].text for e in events[:-1]) == expected
    assert [e.choices[0].finish_reason for e in events[:-1]] == [None] * 24 + ["length"]
    assert events[-1].choices == []
    assert (events[-1].usage.prompt_tokens, events[-1].usage.completion_tokens) == (6, 24)  # type: ignore[union-attr]
    assert {e.usage for e in events[:-1]} == {None}
    assert len({e.id for e in events}) == 1

    expected = greedy(served.path, load_text(served.path).chat(CHAT), 24)
    chunks = list(
        client.chat.completions.create(
            model="pico", messages=CHAT, max_tokens=24, temperature=0, stream=True
        )  # type: ignore[call-overload]
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected
    assert [c.choices[0].delta.role for c in chunks] == ["assistant"] + [None] * 24
    assert [c.choices[0].finish_reason for c in chunks] == [None] * 24 + ["length"]
    assert {c.object for c in chunks} == {"chat.completion.chunk"}


def test_the_stream_on_the_wire(server: Listener) -> None:
    body = {"model": "pico", "prompt": "é", "max_tokens": 2, "temperature": 0, "stream": True}
    status, headers, text = bare(server, "POST", "/v1/completions", body)
    assert (status, headers.get_content_type()) == (200, "text/event-stream")
    assert re.fullmatch(r"(data: \{[^\n]*\}\n\n){3}data: \[DONE\]\n\n", text)


def test_ragged_prompts_at_once_get_what_each_gets_alone(
    served: Artifact, server: Listener
) -> None:
    text = load_text(served.path)
    prompts = [prompt * times for times in (1, 2) for prompt in PROMPTS]
    expected = [greedy(served.path, text.encode(prompt), 40) for prompt in prompts]

    def ask(prompt: str) -> str:
        with connect(server) as client:
            answer = client.completions.create(
                model="pico", prompt=prompt, max_tokens=40, temperature=0
            )
            return answer.choices[0].text

    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(ask, prompts)) == expected


def test_stop_strings_across_tokens(served: Artifact, client: openai.OpenAI) -> None:
    whole = greedy(served.path, load_text(served.path).encode("stop"), 40)
    stop = whole[10:13]  # one byte a token: never within one
    expected = whole[: whole.index(stop)]
    asked: dict[str, Any] = {"model": "pico", "prompt": "stop", "max_tokens": 40, "temperature": 0}
    for given in (stop, ["not there", stop]):
        (choice,) = client.completions.create(**asked, stop=given).choices
        assert (choice.text, choice.finish_reason) == (expected, "stop")
    events = list(client.completions.create(**asked, stop=stop, stream=True))
    assert "".join(e.choices[0].text for e in events) == expected
    assert events[-1].choices[0].finish_reason == "stop"


def test_a_seed_repeats(served: Artifact, client: openai.OpenAI) -> None:
    def draw(**options: Any) -> str:
        return (
            client.completions.create(model="pico", prompt="seed", max_tokens=24, **options)
            .choices[0]
            .text
        )

    assert draw(seed=7) == draw(seed=7, temperature=1.0, top_p=1.0)
    assert len({draw(seed=7), draw(seed=8), draw(seed=7, temperature=2), draw(), draw()}) == 5
    text = load_text(served.path)
    drawn = alone(served.path).generate(
        text.encode("seed"),
        24,
        stop_ids=text.stop_ids,
        sampling=Sampling(temperature=1.5, top_p=0.5),
        seed=7,
    )
    assert draw(seed=7, temperature=1.5, top_p=0.5) == "".join(text.stream(drawn))


def test_the_models_own_end(served: Artifact, server: Listener, client: openai.OpenAI) -> None:
    decoder, text = alone(served.path), load_text(served.path)
    for prompt in np.random.default_rng(0).integers(0, 256, (200, 3)).tolist():
        tokens = list(decoder.generate(prompt, 20))
        if (end := tokens.index(256) if 256 in tokens else 0) > 0:
            break
    asked: dict[str, Any] = {"model": "pico", "prompt": prompt, "max_tokens": 20, "temperature": 0}
    answer = client.completions.create(**asked)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", end)  # type: ignore[union-attr]
    assert answer.choices[0].text == "".join(text.stream(tokens[:end]))
    answer = client.completions.create(**asked, extra_body={"ignore_eos": True})
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 20)  # type: ignore[union-attr]


@cache
def torchs(folder: Path) -> Any:
    """Log-probabilities ``[L, V]`` of torch after each token of a row."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder.parent / "student/model")

    def score(ids: list[int]) -> Any:
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    return score


def test_logprobs_are_torchs(served: Artifact, client: openai.OpenAI) -> None:
    text = load_text(served.path)
    ids = text.encode("logprobs")
    made = list(alone(served.path).generate(ids, 6))
    expected = torchs(served.path)([*ids, *made])[len(ids) - 1 : -1]
    labels = [float(row[token]) for row, token in zip(expected, made, strict=True)]
    options: dict[str, Any] = {"model": "pico", "max_tokens": 6, "temperature": 0}

    def shown(token: int) -> str:
        return str(text.tokenizer.decode([token], skip_special_tokens=False))

    asked = options | {"prompt": "logprobs", "logprobs": 3, "extra_body": {"ignore_eos": True}}
    found = client.completions.create(**asked).choices[0].logprobs
    assert found is not None
    assert found.tokens == [shown(token) for token in made]
    assert found.token_logprobs == pytest.approx(labels, abs=1e-4)
    events = [e for e in client.completions.create(**asked, stream=True) if e.choices[0].logprobs]
    assert [t for e in events for t in e.choices[0].logprobs.tokens or []] == found.tokens  # type: ignore[union-attr]
    offsets = [o for e in events for o in e.choices[0].logprobs.text_offset or []]  # type: ignore[union-attr]
    assert offsets == found.text_offset
    by_id = asked["extra_body"] | {"return_tokens_as_token_ids": True}
    found = client.completions.create(**asked | {"extra_body": by_id}).choices[0].logprobs
    assert found.tokens == [f"token_id:{token}" for token in made]  # type: ignore[union-attr]
    # Bytes that are no text look alike, so the likeliest are compared by their ids.
    for row, top in zip(expected, found.top_logprobs or [], strict=True):  # type: ignore[union-attr]
        values, tokens = row.topk(3)
        for value, token in zip(values, tokens, strict=True):
            assert top[f"token_id:{token}"] == pytest.approx(float(value), abs=1e-4)

    ids = text.chat(CHAT)
    made = list(alone(served.path).generate(ids, 6))
    expected = torchs(served.path)([*ids, *made])[len(ids) - 1 : -1]
    asked = options | {"messages": CHAT, "extra_body": {"ignore_eos": True}}
    logged = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    content = logged.choices[0].logprobs.content
    for row, token, one in zip(expected, made, content, strict=True):
        assert one.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert bytes(one.bytes or []).decode() == one.token == shown(token)
        tops = [top.logprob for top in one.top_logprobs]
        assert tops == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
    assert client.chat.completions.create(**asked).choices[0].logprobs is None


def test_logprobs_of_the_prompt_are_torchs(served: Artifact, server: Listener) -> None:
    ids = np.random.default_rng(2).integers(0, 256, 300).tolist()  # three chunks of the scorer
    expected = torchs(served.path)(ids)
    body = {"model": "pico", "prompt": ids, "max_tokens": 1, "temperature": 0}
    status, _, answer = bare(server, "POST", "/v1/completions", body | {"prompt_logprobs": 3})
    assert status == 200, answer
    first, *found = answer["choices"][0]["prompt_logprobs"]
    assert first is None
    assert len(found) == len(ids) - 1
    for row, label, one in zip(expected, ids[1:], found, strict=False):
        assert one[str(label)]["logprob"] == pytest.approx(float(row[label]), abs=1e-4)
        best = {str(int(token)): float(value) for value, token in zip(*row.topk(3), strict=True)}
        assert one.keys() == best.keys() | {str(label)}
        assert {t: one[t]["logprob"] for t in best} == pytest.approx(best, abs=1e-4)
        assert [one[t]["rank"] for t in best] == [1, 2, 3]
        assert one[str(label)]["rank"] == int((row > row[label]).sum()) + 1

    echo = {"echo": True, "logprobs": 1, "max_tokens": 0}  # as lm-eval asks
    answer = bare(server, "POST", "/v1/completions", body | echo)[2]
    (choice,), usage = answer["choices"], answer["usage"]
    labels = [float(row[label]) for row, label in zip(expected, ids[1:], strict=False)]
    assert choice["text"] == load_text(served.path).tokenizer.decode(ids)
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(labels, abs=1e-4)
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (300, 0)
    full = [*ids, *ids][:512]
    status, _, answer = bare(server, "POST", "/v1/completions", body | echo | {"prompt": full})
    assert status == 200, answer  # without an answer the prompt may fill the context


def test_several_choices_are_several_requests(served: Artifact, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "pico", "prompt": "choices", "max_tokens": 12}
    asked["extra_body"] = {"ignore_eos": True}
    alone = [client.completions.create(**asked, seed=7 + at).choices[0].text for at in range(3)]
    answer = client.completions.create(**asked, seed=7, n=3)
    assert [choice.text for choice in answer.choices] == alone
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 36)  # type: ignore[union-attr]
    texts = {0: "", 1: "", 2: ""}
    ends = []
    for event in client.completions.create(**asked, seed=7, n=3, stream=True):
        (choice,) = event.choices
        texts[choice.index] += choice.text
        ends += [choice.index] if choice.finish_reason else []
    assert (list(texts.values()), sorted(ends)) == (alone, [0, 1, 2])


def test_penalties_and_filters_are_the_decoders(served: Artifact, client: openai.OpenAI) -> None:
    text = load_text(served.path)
    given = {"top_k": 9, "min_p": 0.02, "repetition_penalty": 1.4, "min_tokens": 9}
    more = {"frequency_penalty": 0.6, "presence_penalty": 0.3, "temperature": 1.2, "top_p": 0.9}
    sampling = Sampling(**given, **more)  # type: ignore[arg-type]
    drawn = alone(served.path).generate(
        text.encode("penalties"), 20, stop_ids=text.stop_ids, sampling=sampling, seed=5
    )
    answer = client.completions.create(
        model="pico", prompt="penalties", max_tokens=20, seed=5, **more, extra_body=given
    )  # type: ignore[call-overload]
    assert answer.choices[0].text == "".join(text.stream(drawn))


def test_reused_prompt_tokens_are_counted(server: Listener) -> None:
    body = {"model": "pico", "prompt": "a prompt that comes again", "max_tokens": 3}

    def cached(**headers: str) -> int:
        answer = bare(server, "POST", "/v1/completions", body, **headers)[2]
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    before = metric(server, "limbeck_reused_prompt_tokens_total")
    one, other = {"Authorization": "Bearer one"}, {"Authorization": "Bearer other"}
    count = len(str(body["prompt"]))
    assert [cached(**one), cached(**one), cached(**other)] == [0, count - 2, 0]
    body["cache_salt"] = "mine"
    assert cached(**one) == 0
    assert metric(server, "limbeck_reused_prompt_tokens_total") == before + count - 2
    assert metric(server, "limbeck_prefix_cache_bytes") > 0


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"n": 65}, "n", "found 65; Input should be less than or equal to 64"),
        (
            {"best_of": 2},
            "best_of",
            "found 2; this server does not support it; leave it out or give 1",
        ),
        ({"logprobs": 65}, "logprobs", "found 65; at most 64 are allowed here"),
        ({"prompt_logprobs": 65}, "prompt_logprobs", "found 65; at most 64 are allowed here"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "a stream has no prompt"),
        ({"echo": True, "stream": True}, "echo", "a stream has no prompt"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "does not support it; leave it out or give {}"),
        ({"length_penalty": 0.9}, "length_penalty", "does not support it; leave it out or give 1"),
        ({"use_beam_search": True}, "use_beam_search", "does not support it"),
        ({"suffix": "x"}, "suffix", "does not support it"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "less than or equal to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"min_p": 1.5}, "min_p", "less than or equal to 1"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "found 9; at most max_tokens, 8"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "found '1'; Input should be a valid number"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "found 0; Input should be greater than or equal to 1"),
        ({"max_tokens": 401}, "max_tokens", "found 401; at most 400 are allowed here"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": ["a"] * 17}, "stop", "at most 16 items"),
        ({"misspelt": 1}, "misspelt", "this server does not know this field"),
        (
            {"prompt": 3},
            "prompt",
            "found 3; Input should be a valid string or Input should be a valid list",
        ),
        ({"prompt": ["a", "b"]}, "prompt", "at most 1 item"),
        ({"prompt": None}, "prompt", "found None"),
        ({"prompt": ""}, None, "empty prompt"),
        ({"prompt": [1, 999]}, None, "found token 999 in the prompt, expected 0 to 257"),
        (
            {"prompt": "x" * 500, "max_tokens": 13},
            None,
            "a prompt of 500 tokens and 13 to generate, 513 together; .* 512",
        ),
        ({"stream_options": {"include_usage": True}}, "stream_options", "set stream to true"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    limited: Listener, change: dict[str, Any], field: str | None, message: str
) -> None:
    status, _, body = bare(
        limited, "POST", "/v1/completions", {"model": "pico", "prompt": "a"} | change
    )
    assert status == 400
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert (body["error"]["type"], body["error"]["param"]) == ("invalid_request_error", field)
    assert re.search(message, body["error"]["message"])


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        (
            {"messages": [{"role": "robot", "content": "a"}]},
            "messages",
            "'system', 'developer', 'user', 'assistant' or 'tool'",
        ),
        (
            {"messages": [{"role": "tool", "content": "a", "tool_call_id": "1"}]},
            "messages",
            r"messages\.0\.role: .* has no place for messages of role 'tool'",
        ),
        (
            {"messages": [*CHAT, {"role": "assistant", "content": None, "tool_calls": CALLS}]},
            "messages",
            r"messages\.2\.tool_calls: .* has no place for tool calls",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            "messages",
            "a message of role user needs content",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages",
            "'text'",
        ),
        ({"top_logprobs": 2}, "top_logprobs", "only with logprobs; set logprobs to true"),
        ({"logprobs": True, "top_logprobs": 65}, "top_logprobs", "found 65; at most 64"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "does not support it"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs", "does not support it"),
        (
            {"messages": [{"role": "user", "content": "x" * 600}]},
            None,
            r"prompt of \d+ tokens and 1 to generate",
        ),
    ],
)
def test_so_it_is_in_chat(
    limited: Listener, change: dict[str, Any], field: str | None, message: str
) -> None:
    status, _, body = bare(
        limited, "POST", "/v1/chat/completions", {"model": "pico", "messages": CHAT} | change
    )
    assert (status, body["error"]["type"], body["error"]["param"]) == (
        400,
        "invalid_request_error",
        field,
    )
    assert re.search(message, body["error"]["message"])


def test_values_that_change_nothing_are_taken(client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model="pico", messages=CHAT, max_tokens=1, n=1,  # type: ignore[arg-type]
        frequency_penalty=0, presence_penalty=0.0, logit_bias={}, logprobs=False,
        response_format={"type": "text"}, tools=[], tool_choice="auto", user="me", seed=None,
        stop=None,
    )  # fmt: skip
    client.completions.create(
        model="pico", prompt="a", max_tokens=1, best_of=1, echo=False, logprobs=None, suffix=""
    )


# What clients send by default, read from their sources: `vllm bench serve`, guidellm 0.8.1, aiperf
# 0.13, langchain-openai 1.7; what litellm 1.110 may send; neutral values of more of vLLM's fields.
COMPLETIONS: dict[str, dict[str, Any]] = {
    "vllm": {
        "repetition_penalty": 1.0, "logprobs": None, "stream": True,
        "stream_options": {"include_usage": True}, "ignore_eos": True,
        "top_k": -1, "top_p": 1.0, "min_p": 0.0, "temperature": 0.0,
    },
    "guidellm": {
        "stream": True, "stop": None, "ignore_eos": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    },
    "aiperf": {
        "prompt": ["abc"], "stream": True, "min_tokens": 4, "ignore_eos": True,
        "stream_options": {"include_usage": True},
    },
    "neutral": {
        "min_p": 0, "top_k": 0, "use_beam_search": False, "length_penalty": 1.0, "best_of": None,
        "skip_special_tokens": True, "spaces_between_special_tokens": True, "priority": 0,
        "include_stop_str_in_output": False, "add_special_tokens": True, "bad_words": [],
        "guided_json": None, "truncate_prompt_tokens": None, "allowed_token_ids": None,
        "cache_salt": "a", "request_id": "1", "service_tier": "auto", "stop_token_ids": [],
    },
}  # fmt: skip
CHATS: dict[str, dict[str, Any]] = {
    "vllm": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "abc"}]}],
        "max_completion_tokens": 4, "stream": True, "stream_options": {"include_usage": True},
    },
    "aiperf": {
        "messages": [{"role": "user", "name": "", "content": "abc"}], "stream": True,
        "max_completion_tokens": 4, "stream_options": {"include_usage": True},
    },
    "langchain": {
        "messages": [
            {"content": "Be brief.", "role": "system"},
            {"content": "abc", "role": "user", "name": "me"},
            {"content": "def", "role": "assistant"},
            {"content": None, "role": "assistant", "tool_calls": []},
        ],
        "stream": False, "n": 1, "temperature": 0.7, "max_completion_tokens": 4,
        "reasoning_effort": None, "verbosity": None, "truncation": None, "reasoning": None,
        "parallel_tool_calls": False, "service_tier": None, "presence_penalty": 0,
    },
    "litellm": {
        "messages": [
            {"role": "user", "content": "abc"},
            {"role": "assistant", "content": None, "tool_calls": None, "function_call": None},
        ],
        "user": "", "metadata": None, "max_tokens": 4, "modalities": None, "audio": None,
        "prediction": None, "web_search_options": None, "safety_identifier": None,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body"),
    [("completions", {"prompt": "abc", "max_tokens": 4} | body) for body in COMPLETIONS.values()]
    + [("chat/completions", body) for body in CHATS.values()],
    ids=[*COMPLETIONS, *(f"chat-{name}" for name in CHATS)],
)
def test_bodies_of_clients_are_taken(server: Listener, path: str, body: dict[str, Any]) -> None:
    status, _, answer = bare(server, "POST", f"/v1/{path}", {"model": "pico"} | body)
    assert status == 200, answer
    if body.get("stream"):
        events = [
            json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")
        ]
        assert events[-1]["usage"]["completion_tokens"] <= 4
        if body["stream_options"].get("continuous_usage_stats"):
            counts = [event["usage"]["completion_tokens"] for event in events]
            assert counts == [1, 2, 3, 4, 4, 4]


def test_tools_are_rendered_by_a_template_that_has_a_place_for_them(
    server: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %};{% endfor %}"
    )
    text = replace(server.engine.text, template=template)
    monkeypatch.setattr(server.engine, "text", text)
    call = {"name": "f", "arguments": '{"x": 1}'}
    messages = [
        CHAT[1],
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": call}],
        },
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    body = {"model": "pico", "messages": messages, "max_tokens": 1}
    status, _, answer = bare(server, "POST", "/v1/chat/completions", body)
    rendered = 'user:Who are you?;assistant:f({"x": 1});tool:42;'
    assert (status, answer["usage"]["prompt_tokens"]) == (200, len(rendered)), answer


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "pico", "prompt": "a\\ud800b", "max_tokens": 1}',
        b'{"model": "pico", "prompt": "a", "stop": "\\udfff", "max_tokens": 1}',
        b'{"model": "\\ud800", "prompt": "a"}',
        b'{"model": "pico", "prompt": "a", "\\ud800": 1}',
        b'{"model": "pico", "prompt": "a", "suffix": "\\ud800"}',
        b'{"model": "pico", "prompt": "\xff"}',
        b'{"model": "pico", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "pico", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "pico", "prompt": [' + b"9" * 400 + b"]}",
        b'{"model": "pico", "prompt": "a", "temperature": NaN}',
        b'{"model": "pico", "prompt": "a", "metadata": {"\\ud800": "\\ud801"}, "max_tokens": 1}',
    ],
)
def test_hostile_text_is_no_defect_of_the_server(server: Listener, body: bytes) -> None:
    status, _, answer = bare(server, "POST", "/v1/completions", body)
    assert status in (200, 400, 404), answer
    if status != 200:
        assert answer["error"]["message"]


def test_a_lone_surrogate_is_read_as_a_replacement_character(server: Listener) -> None:
    def made(prompt: bytes) -> str:
        body = b'{"model": "pico", "prompt": "%s", "max_tokens": 8, "temperature": 0}' % prompt
        return str(bare(server, "POST", "/v1/completions", body)[2]["choices"][0]["text"])

    assert made(b"a\\ud800b") == made("a\ufffdb".encode())


@pytest.fixture(scope="module")
def limited(served: Artifact) -> Iterator[Listener]:
    limits = Limits(max_tokens=400, max_body_bytes=4000, request_timeout=1.0)
    with serving(served.path, max_batch=1, max_queue=1, limits=limits) as listener:
        yield listener


def test_a_large_body_is_refused(limited: Listener) -> None:
    body = {"model": "pico", "prompt": "x" * 5000}
    chunked = iter([json.dumps(body).encode()])
    for sent in (json.dumps(body).encode(), chunked):
        host, port = limited.address.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        connection.request("POST", "/v1/completions", sent, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 413
        assert (
            json.loads(response.read())["error"]["message"]
            == "the body is larger than 4000 bytes, the limit here."
        )
        connection.close()


def test_a_body_that_never_comes_is_not_waited_for(limited: Listener) -> None:
    host, port = limited.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_what_is_no_json_or_no_endpoint(server: Listener) -> None:
    status, _, body = bare(server, "POST", "/v1/completions", b"{no")
    assert (status, body["error"]["message"][:25]) == (400, "the body is not JSON: Exp")
    status, _, body = bare(
        server, "POST", "/v1/completions", b"{}", **{"Content-Type": "text/plain"}
    )
    assert (status, "send one with Content-Type: application/json" in body["error"]["message"]) == (
        400,
        True,
    )
    status, _, body = bare(server, "GET", "/v1/embeddings")
    assert (status, "this server has /v1/models" in body["error"]["message"]) == (404, True)
    assert bare(server, "GET", "/v1/completions")[0] == 405


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(
        openai.NotFoundError, match="found model 'gpt'; this server has 'pico'"
    ) as refused:
        client.completions.create(model="gpt", prompt="a")
    assert refused.value.code == "model_not_found"


def test_the_key(served: Artifact) -> None:
    with serving(served.path, limits=Limits(api_key="secret")) as server:
        for key in ("wrong", "secret2", "sécret"):
            assert bare(server, "GET", "/v1/models", Authorization=f"Bearer {key}")[0] == 401
        status, headers, body = bare(server, "POST", "/v1/completions", b"x" * 5)
        assert (status, headers["WWW-Authenticate"], body["error"]["code"]) == (
            401,
            "Bearer",
            "invalid_api_key",
        )
        with connect(server, "wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with connect(server, "secret") as client:
            assert client.models.list().data[0].id == "pico"
        assert bare(server, "GET", "/health")[0] == 200
        for path in ("/metrics", "/openapi.json", "/nothing"):
            assert bare(server, "GET", path)[0] == 401
            sent = {"Authorization": "bearer secret"}  # the scheme's case does not matter
            assert bare(server, "GET", path, **sent)[0] == (404 if path == "/nothing" else 200)


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


def test_a_stream_that_outlives_the_grace_is_told(
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
