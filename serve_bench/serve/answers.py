"""The bodies of OpenAI's answers: choices, events of a stream, token counts, log-probabilities.

Knows the wire format alone: no HTTP, no engine.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from limbeck.runtime.sampling import TokenLogprobs
from limbeck.runtime.text import well_formed
from serve_bench.serve.text.tools import CallPart

TokenText = Callable[[int], str]


@dataclass(frozen=True)
class Usage:
    """Token counts of one answer. A stop token is not counted, because it is not sent."""

    prompt: int
    completion: int
    reused: int  # prompt tokens that were not read again

    def body(self) -> dict[str, Any]:
        """As the wire has it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.reused},
        }


@dataclass
class Choice:
    """One answer to a prompt, complete or so far."""

    index: int = 0
    text: str = ""
    finish: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    calls: list[CallPart] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # None: the first token


def first_of(token: int) -> TokenLogprobs:
    """The first token of an echoed prompt, which has no probability."""
    return TokenLogprobs(token, 0.0, 0, ())


class Shape(Protocol):
    """How one endpoint writes its answers."""

    def chunk(self, piece: Choice, *, first: bool = False, end: bool = False) -> dict[str, Any]:
        """One event of a stream: a token's text, or the end."""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The whole answer."""

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The event of a stream with the token counts."""


class _Answer:
    """What every body of one answer repeats."""

    def __init__(
        self, kind: str, model: str, fingerprint: str, token_text: TokenText, wanted: bool
    ) -> None:
        self._head = {
            "id": f"{kind}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._tail = {"system_fingerprint": fingerprint}
        self._token_text, self._wanted = token_text, wanted

    def _body(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices, **self._tail, **more}

    def _prompt(self, choice: Choice) -> dict[str, Any]:
        """vLLM's `prompt_logprobs`: for each token but the first, log-probabilities by id."""
        if choice.prompt_logprobs is None:
            return {}
        return {"prompt_logprobs": [self._by_id(one) for one in choice.prompt_logprobs]}

    def _by_id(self, found: TokenLogprobs | None) -> dict[str, Any] | None:
        if found is None:
            return None
        ranked = {token: (value, rank) for rank, (token, value) in enumerate(found.top, 1)}
        ranked[found.token] = found.logprob, found.rank
        return {
            str(token): {"logprob": value, "rank": rank, "decoded_token": self._token_text(token)}
            for token, (value, rank) in ranked.items()
        }


class Completion(_Answer):
    """Answers of `/v1/completions`."""

    def __init__(
        self, model: str, fingerprint: str, token_text: TokenText, wanted: bool = False
    ) -> None:
        super().__init__("cmpl", model, fingerprint, token_text, wanted)
        self._offsets: dict[int, int] = {}

    def chunk(self, piece: Choice, *, first: bool = False, end: bool = False) -> dict[str, Any]:
        return self._body("text_completion", [self._choice(piece)])

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        bodies = [self._choice(choice) for choice in choices]
        return self._body("text_completion", bodies, usage=usage.body())

    def usage(self, usage: Usage) -> dict[str, Any]:
        return self._body("text_completion", [], usage=usage.body())

    def _choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": self._logprobs(choice) if self._wanted and choice.logprobs else None,
            "finish_reason": choice.finish,
            **self._prompt(choice),
        }

    def _logprobs(self, choice: Choice) -> dict[str, Any]:
        body: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        offset = self._offsets.get(choice.index, 0)
        for one in choice.logprobs:
            text, known = self._token_text(one.token), one != first_of(one.token)
            top = {self._token_text(token): value for token, value in one.top}
            body["tokens"].append(text)
            body["token_logprobs"].append(one.logprob if known else None)
            body["top_logprobs"].append({**top, text: one.logprob} if known else None)
            body["text_offset"].append(offset)
            offset += len(text)
        self._offsets[choice.index] = offset
        return body


class ChatCompletion(_Answer):
    """Answers of `/v1/chat/completions`."""

    def __init__(
        self, model: str, fingerprint: str, token_text: TokenText, wanted: bool = False
    ) -> None:
        super().__init__("chatcmpl", model, fingerprint, token_text, wanted)

    def chunk(self, piece: Choice, *, first: bool = False, end: bool = False) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if piece.calls:
            delta["tool_calls"] = [_call_part(part) for part in piece.calls]
        if piece.text or not (end or piece.calls):
            delta["content"] = piece.text
        choice = {
            "index": piece.index,
            "delta": delta,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish,
        }
        return self._body("chat.completion.chunk", [choice])

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        bodies = [
            {
                "index": choice.index,
                "message": self._message(choice),
                "logprobs": self._logprobs(choice),
                "finish_reason": choice.finish,
            }
            for choice in choices
        ]
        prompt = self._prompt(choices[0])
        return self._body("chat.completion", bodies, usage=usage.body(), **prompt)

    def usage(self, usage: Usage) -> dict[str, Any]:
        return self._body("chat.completion.chunk", [], usage=usage.body())

    @staticmethod
    def _message(choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls:
            message["content"] = choice.text or None
            message["tool_calls"] = _whole_calls(choice.calls)
        return message

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        if not self._wanted or not choice.logprobs:
            return None
        content = [
            {
                **self._one(one.token, one.logprob),
                "top_logprobs": [self._one(token, value) for token, value in one.top],
            }
            for one in choice.logprobs
        ]
        return {"content": content, "refusal": None}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _call_part(part: CallPart) -> dict[str, Any]:
    """A part of a streamed call: its name first, then pieces of its arguments."""
    if part.id is None:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    function = {"name": part.name, "arguments": part.arguments}
    return {"index": part.index, "id": part.id, "type": "function", "function": function}


def _whole_calls(parts: Iterable[CallPart]) -> list[dict[str, Any]]:
    """Calls as whole answers have them."""
    calls: list[dict[str, Any]] = []
    for part in parts:
        if part.id is not None:
            calls.append(_call_part(part))
            del calls[-1]["index"]
        else:
            calls[part.index]["function"]["arguments"] += part.arguments
    return calls


def error_body(
    message: str, *, kind: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI writes it."""
    param = param and well_formed(param)
    return {"error": {"message": well_formed(message), "type": kind, "param": param, "code": code}}
