"""The bodies of the OpenAI endpoints: what a request may hold and what an answer looks like.

Knows the wire format alone: no HTTP, no engine. A field that would change the answer in a way that is not supported is refused by name;
the same field at a value that changes nothing is taken, because many clients always send it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

STOPS = 16  # stop strings of one request
_STOP_LENGTH = 256  # characters


def _only(*values: Any) -> Any:
    """A field that may be absent, null, or one of ``values``, none of which changes the answer."""
    return Field(default=None, json_schema_extra={"enum": [None, *values]})


StopString = Annotated[str, Field(min_length=1, max_length=_STOP_LENGTH)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @field_validator("*")
    @classmethod
    def _supported(cls, found: Any, info: ValidationInfo) -> Any:
        extra = cls.model_fields[str(info.field_name)].json_schema_extra
        if not isinstance(extra, dict):
            return found
        values: list[Any] = extra["enum"]  # type: ignore[assignment]  # as `_only` writes it
        if any(type(found) is type(value) and found == value for value in values):
            return None
        instead = " or give " + " or ".join(map(repr, values[1:])) if values[1:] else ""
        raise ValueError(f"this server does not support it; leave it out{instead}")


class StreamOptions(_Body):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    include_obfuscation: Any = _only(False)


class Common(_Body):
    """What both endpoints take."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(
        default=None, description="Go on past the model's own end; as vLLM has it."
    )
    user: str | None = Field(default=None, description="Taken and not used.")
    n: Any = _only(1)
    frequency_penalty: Any = _only(0, 0.0)
    presence_penalty: Any = _only(0, 0.0)
    logit_bias: Any = _only({})

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionBody(Common):
    """`POST /v1/completions`."""

    prompt: (
        str
        | list[int]
        | Annotated[list[str], Field(max_length=1)]
        | Annotated[list[list[int]], Field(max_length=1)]
    )
    best_of: Any = _only(1)
    echo: Any = _only(False)
    logprobs: Any = _only(False)
    suffix: Any = _only("")

    @property
    def one_prompt(self) -> str | list[int]:
        """The prompt as text or tokens."""
        if isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int):
            return self.prompt[0]
        return self.prompt  # type: ignore[return-value]  # the list of one is unpacked above


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    refusal: Any = _only()
    annotations: Any = _only([])
    audio: Any = _only()
    function_call: Any = _only()
    tool_calls: Any = _only([])

    def plain(self) -> dict[str, str]:
        """As chat templates take it: `developer` is the newer name of `system`."""
        text = (
            self.content
            if isinstance(self.content, str)
            else "".join(part.text for part in self.content)
        )
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(Common):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Any = _only(False)
    top_logprobs: Any = _only(0)
    response_format: Any = _only({"type": "text"})
    tools: Any = _only([])
    tool_choice: Any = _only("none", "auto")
    functions: Any = _only([])
    function_call: Any = _only("none", "auto")
    parallel_tool_calls: Any = _only(True, False)
    modalities: Any = _only(["text"])
    store: Any = _only(False)
    metadata: dict[str, str] | None = Field(default=None, description="Taken and not used.")


@dataclass(frozen=True)
class Usage:
    """Token counts of one answer; a stop token is not counted, because none is sent."""

    prompt: int
    completion: int

    def body(self) -> dict[str, int]:
        """As the wire has it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


class Shape(Protocol):
    """How one endpoint writes its answers."""

    def chunk(
        self, text: str | None, finish: str | None = None, *, first: bool = False
    ) -> dict[str, Any]:
        """One event of a stream: a token's text, or the end."""

    def whole(self, text: str, finish: str, usage: Usage) -> dict[str, Any]:
        """The answer at once."""

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The event of a stream that tells the counts."""


class _Answer:
    """What every body of one answer repeats."""

    def __init__(self, kind: str, model: str, fingerprint: str) -> None:
        self._head = {
            "id": f"{kind}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._tail = {"system_fingerprint": fingerprint}

    def _body(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices, **self._tail, **more}


class Completion(_Answer):
    """Answers of `/v1/completions`."""

    def __init__(self, model: str, fingerprint: str) -> None:
        super().__init__("cmpl", model, fingerprint)

    def chunk(
        self, text: str | None, finish: str | None = None, *, first: bool = False
    ) -> dict[str, Any]:
        return self._body("text_completion", [self._choice(text or "", finish)])

    def whole(self, text: str, finish: str, usage: Usage) -> dict[str, Any]:
        return self._body("text_completion", [self._choice(text, finish)], usage=usage.body())

    def usage(self, usage: Usage) -> dict[str, Any]:
        return self._body("text_completion", [], usage=usage.body())

    @staticmethod
    def _choice(text: str, finish: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}


class ChatCompletion(_Answer):
    """Answers of `/v1/chat/completions`."""

    def __init__(self, model: str, fingerprint: str) -> None:
        super().__init__("chatcmpl", model, fingerprint)

    def chunk(
        self, text: str | None, finish: str | None = None, *, first: bool = False
    ) -> dict[str, Any]:
        delta = ({"role": "assistant"} if first else {}) | (
            {} if text is None else {"content": text}
        )
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._body("chat.completion.chunk", [choice])

    def whole(self, text: str, finish: str, usage: Usage) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return self._body("chat.completion", [choice], usage=usage.body())

    def usage(self, usage: Usage) -> dict[str, Any]:
        return self._body("chat.completion.chunk", [], usage=usage.body())


def error_body(
    message: str, *, kind: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI writes it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def first_mistake(errors: Sequence[Any]) -> tuple[str, str | None]:
    """Message and field of the first of pydantic's ``errors`` on a body."""
    error = errors[0]
    if error["type"] == "json_invalid":
        return (
            f"the body is not JSON: {error['ctx']['error']} at character {error['loc'][-1]}.",
            None,
        )
    place = [str(part) for part in error["loc"] if part != "body"]
    if not place:
        return (
            "found no JSON object in the body; send one with Content-Type: application/json.",
            None,
        )
    field = place[0]
    if error["type"] == "extra_forbidden":
        return f"{'.'.join(place)}: this server does not know this field; leave it out.", field
    if error["type"] == "missing":
        return f"{'.'.join(place)}: this field is required.", field
    found = repr(error.get("input"))
    found = found if len(found) <= 80 else f"{found[:77]}..."
    same = [
        other for other in errors if other["loc"][:2] == error["loc"][:2]
    ]  # the branches of a union
    expected = " or ".join(
        dict.fromkeys(str(other["msg"]).removeprefix("Value error, ") for other in same)
    )
    return f"{place[0] if len(same) > 1 else '.'.join(place)}: found {found}; {expected}.", field
