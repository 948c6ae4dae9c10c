"""What the OpenAI-compatible server refuses, by name."""

from __future__ import annotations

import gzip
import http.client
import json
import re
import socket
from dataclasses import replace
from typing import Any

import openai
import pytest

from limbeck.contract.artifact import Artifact
from limbeck.contract.limits import Limits
from serve_bench.serve.server import Listener
from tests.serve_bench.serve.asking import CALLS, CHAT, bare, connect, serving


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
        ({"repetition_penalty": 1e-50}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"min_p": 1.5}, "min_p", "less than or equal to 1"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "found 9; at most max_tokens, 8"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "found '1'; Input should be a valid number"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "found 0; Input should be greater than or equal to 1"),
        ({"max_tokens": 401}, "max_tokens", "found 401; at most 400 are allowed here"),
        ({"stop": ""}, "stop", "^stop: found ''; String should have at least 1 character"),
        ({"stop": ["a"] * 17}, "stop", "at most 16 items"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "greater than or equal to 0"),
        ({"stop_token_ids": [2**31]}, "stop_token_ids", "less than 2147483648"),
        ({"stop_token_ids": [5] * 1025}, "stop_token_ids", "at most 1024 items"),
        ({"misspelt": 1}, "misspelt", "this server does not know this field"),
        (
            {"prompt": 3},
            "prompt",
            "found 3; Input should be a valid string or Input should be a valid list",
        ),
        ({"prompt": ["a"] * 65}, "prompt", "at most 64 items"),
        ({"prompt": ["a", "b"], "n": 33}, "prompt", "2 prompts with 33 answers each, 66 in all"),
        ({"prompt": ["a", ""]}, None, "empty prompt"),
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
            r"messages\.0\.content: .* part 0 is of type image_url; this server takes 'text' alone",
        ),
        (
            {"tools": [{"type": "custom", "custom": {"name": "f"}}]},
            "tools",
            r"^tools\.0\.type: found 'custom'; Input should be 'function'",
        ),
        ({"top_logprobs": 2}, "top_logprobs", "only with logprobs; set logprobs to true"),
        ({"logprobs": True, "top_logprobs": 65}, "top_logprobs", "found 65; at most 64"),
        ({"web_search_options": {}}, "web_search_options", "does not support it"),
        ({"chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs", "tools is no variable"),
        ({"maxTokens": 4}, "maxTokens", "^maxTokens: this server does not know this field"),
        (
            {"speculative.n_max": 4},
            "speculative.n_max",
            r"^speculative\.n_max: this server does not",
        ),
        ({"body": 4}, "body", "^body: this server does not know this field"),
        ({"do_sample": False}, "do_sample", "found False; .* leave it out or give True"),
        ({"dry_multiplier": 0.8}, "dry_multiplier", "found 0.8; .* leave it out or give 0"),
        (
            {"response_format": {"type": "text", "schema": {}}},
            "response_format",
            "schema is given with type json_object",
        ),
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
# Those of openai-agents, cline and Open WebUI are written from their documented fields.
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
        "detokenize": True,
    },
}  # fmt: skip


CHATS: dict[str, dict[str, Any]] = {
    "OpenAI's whole interface": {
        "messages": [{"role": "user", "content": "abc"}], "max_completion_tokens": 4,
        "store": True, "metadata": {"a": "b"}, "user": "me", "service_tier": "flex",
        "parallel_tool_calls": True, "reasoning_effort": "minimal", "verbosity": "medium",
        "modalities": ["text"], "prompt_cache_key": "k", "safety_identifier": "s",
    },
    "text-generation-webui, SillyTavern": {
        "messages": [{"role": "user", "content": "abc"}], "max_tokens": 4, "typical_p": 1,
        "top_a": 0, "tfs": 1, "epsilon_cutoff": 0, "eta_cutoff": 0, "mirostat_mode": 0,
        "mirostat_tau": 5, "mirostat_eta": 0.1, "dry_multiplier": 0, "dry_base": 1.75,
        "xtc_probability": 0, "xtc_threshold": 0.1, "no_repeat_ngram_size": 0, "do_sample": True,
        "guidance_scale": 1, "negative_prompt": "", "grammar": "", "add_bos_token": True,
        "ban_eos_token": False, "custom_token_bans": "", "seed": -1, "skip_special_tokens": True,
    },
    "PHP, in which an empty object is an empty list": {
        "messages": [{"role": "user", "content": "abc"}], "max_tokens": 4, "metadata": [],
        "logit_bias": [], "stream_options": [], "response_format": [], "tools": [], "functions": [],
        "chat_template_kwargs": [], "modalities": [], "options": [], "documents": [],
    },
    "llama.cpp's page, text-generation-webui's settings": {
        "messages": [{"role": "user", "content": "abc"}], "max_tokens": -1.0, "repeat_last_n": 64,
        "min_keep": 0, "n_indent": 0, "t_max_predict_ms": 0, "backend_sampling": False,
        "dynamic_temperature": False, "auto_max_new_tokens": False, "max_tokens_second": 0,
        "prompt_lookup_num_tokens": 0, "watermark": False, "return_logprob": False,
        "logprob_start_len": -1, "top_logprobs_num": 0, "deferred": False,
    },
    "a router": {
        "messages": [{"role": "user", "content": "abc"}], "max_tokens": 4, "plugins": [],
        "models": [], "chat_id": "1", "session_id": "2", "litellm_call_id": "3", "tags": ["a"],
        "extra_body": {}, "chat_template_kwargs": {"enable_thinking": False},
    },
    "llama.cpp, LM Studio, n8n": {
        "messages": [{"role": "user", "content": "abc", "id": "1"}], "max_tokens": -1,
        "max_completion_tokens": 4.0, "top_k": 40.0, "typical_p": 1.0, "mirostat": 0,
        "repeat_penalty": 1.0, "cache_prompt": True, "logit_bias": {"5": 0}, "best_of": 1,
    },
    "parts of the Responses interface": {
        "messages": [{"role": "user", "content": ["a", {"type": "input_text", "text": "b"},
                                                  {"text": "c"}]}],
        "max_completion_tokens": 4,
    },
    "openai-agents": {
        "messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": "abc"},
                     {"role": "assistant", "content": "d", "refusal": None, "annotations": [],
                      "audio": None, "function_call": None, "tool_calls": None},
                     {"role": "user", "content": "abc"}],
        "store": False, "metadata": {"trace": "1"}, "prompt_cache_retention": None,
        "top_logprobs": None, "parallel_tool_calls": None, "max_tokens": 4,
    },
    "cline": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "s",
                                            "cache_control": {"type": "ephemeral"}}]},
            {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]},
        ],
        "temperature": 0, "max_tokens": 4, "stream": True,
        "stream_options": {"include_usage": True},
    },
    "open-webui": {
        "messages": [{"role": "user", "content": "abc"}], "stream": False,
        "max_completion_tokens": 4, "metadata": None, "seed": -1, "stop": [],
    },
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
            {
                "role": "assistant", "content": "def", "images": [], "reasoning": "hm",
                "provider_specific_fields": {"refusal": None},
            },
            {"role": "user", "content": "abc", "cache_control": {"type": "ephemeral"}},
        ],
        "include_reasoning": True,
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
    models = [bare(server, "GET", path) for path in ("/v1/models", "/v1/models/")]
    assert models[0][2] == models[1][2]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"model": "p\xffco"}', "it is not UTF-8: byte 0xff at position 12"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "Exceeds the limit .4300 digits."),
        (b'{"model": "a\nb"}', "the body is not JSON: Invalid control character at character 12"),
        (b'{"model": "pico", "prompt": "a", "\\ud800": 1}', r"^'\\ud800': no character has this"),
        (b'{"model": "pico", "messages": [{"\\ud800": 1}]}', r"^messages\.0\.'\\ud800': no char"),
    ],
)
def test_a_body_that_cannot_be_read_is_told_why(server: Listener, body: bytes, says: str) -> None:
    path = "chat/completions" if b"messages" in body else "completions"
    status, _, answer = bare(server, "POST", f"/v1/{path}", body)
    assert status == 400
    assert re.search(says, answer["error"]["message"]), answer


@pytest.mark.parametrize("coding", ["gzip", "br", " Deflate", "gzip, identity"])
def test_a_body_that_is_compressed_is_refused_by_name(server: Listener, coding: str) -> None:
    status, headers, answer = bare(
        server, "POST", "/v1/completions", gzip.compress(b"{}"), **{"Content-Encoding": coding}
    )
    assert (status, headers["Accept-Encoding"]) == (415, "identity")  # RFC 9110, 15.5.16
    assert f"Content-Encoding {coding.strip().lower()!r}" in answer["error"]["message"]


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/models/pico", "/docs"])
def test_head_is_get_without_its_body(server: Listener, path: str) -> None:
    """RFC 9110, 9.3.2; programs that watch a server ask so."""
    status, headers, body = bare(server, "HEAD", path)
    assert (status, body) == (200, "")
    assert headers["Content-Type"] == bare(server, "GET", path)[1]["Content-Type"]
    assert bare(server, "HEAD", "/v1/completions")[0] == 405


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
