"""Answers of the OpenAI-compatible server: those of decoder and torch."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from limbeck.contract.artifact import Artifact
from limbeck.contract.limits import Limits
from limbeck.runtime.sampling import Sampling
from limbeck.runtime.text import load_text
from serve_bench.serve.server import Listener
from tests.serve_bench.serve.asking import (
    CHAT,
    PROMPTS,
    alone,
    bare,
    connect,
    greedy,
    metric,
    serving,
)


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


def test_several_prompts_are_several_requests(
    served: Artifact, server: Listener, client: openai.OpenAI
) -> None:
    asked: dict[str, Any] = {"model": "pico", "max_tokens": 8, "seed": 7, "n": 2}
    asked["extra_body"] = {"ignore_eos": True}
    prompts = ["several", "prompts at once", "é"]
    alone = [
        choice.text
        for prompt in prompts
        for choice in client.completions.create(**asked, prompt=prompt).choices
    ]
    ids = [load_text(served.path).encode(prompt) for prompt in prompts]
    for given in (prompts, ids):
        answer = client.completions.create(**asked, prompt=given)
        assert [choice.text for choice in answer.choices] == alone
        assert [choice.index for choice in answer.choices] == list(range(6))
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        assert answer.usage.completion_tokens == 6 * 8
    texts = dict.fromkeys(range(6), "")
    for event in client.completions.create(**asked, prompt=prompts, stream=True):
        texts[event.choices[0].index] += event.choices[0].text
    assert list(texts.values()) == alone

    scored = {"model": "pico", "max_tokens": 0, "echo": True, "logprobs": 0}
    found = bare(server, "POST", "/v1/completions", scored | {"prompt": prompts})[2]["choices"]
    for choice, prompt in zip(found, prompts, strict=True):
        one = bare(server, "POST", "/v1/completions", scored | {"prompt": prompt})[2]
        assert choice["text"] == prompt
        assert choice["logprobs"] == one["choices"][0]["logprobs"]


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
