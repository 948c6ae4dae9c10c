"""The bodies of OpenAI's requests: which fields a request may hold, and what they mean.

Knows the wire format alone: no HTTP, no engine. A field that would change the answer in a way that
is not supported is refused by name. The same field at a value that changes nothing is taken,
because many clients always send it; so is null, whatever the field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from limbeck.runtime.chat import OURS
from limbeck.runtime.sampling import Sampling
from limbeck.runtime.text import well_formed
from serve_bench.serve.text.neutral import OFF, is_nothing, text_part, without_empty

STOPS = 16  # stop strings of one request
_STOP_LENGTH = 256  # characters
_STOP_IDS = 1024  # of one request; each one costs time at every token
CHOICES = 64  # of one request
_TOOLS = 128  # of one request
_UNSUPPORTED = "this server does not support it; leave it out"


def _only(*values: Any) -> Any:
    """A field that may be absent, null, or one of ``values``, none of which changes the answer."""
    return Field(default=None, json_schema_extra={"enum": [None, *values]})


def _unused(description: str = "Taken and not used.") -> Any:
    return Field(default=None, description=description)


def _mend(value: Any) -> Any:
    return well_formed(value) if isinstance(value, str) else value


# Text in which U+FFFD stands for lone surrogates, which JSON can write and UTF-8 cannot.
Str = Annotated[str, BeforeValidator(_mend)]
StopString = Annotated[str, Field(min_length=1, max_length=_STOP_LENGTH), BeforeValidator(_mend)]


def _whole(value: Any) -> Any:
    """Some clients write every number with a point, as in 40.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_whole)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_absent(cls, given: Any) -> Any:
        """Unknown fields that are null or empty, or samplers that are off, change nothing."""
        if not isinstance(given, dict):
            return given
        known = cls.model_fields.keys() | {field.alias for field in cls.model_fields.values()}
        return {k: v for k, v in given.items() if k in known or not is_nothing(k, v)}

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
        raise ValueError(f"{_UNSUPPORTED}{instead}")


class StreamOptions(_Body):
    """What a stream sends beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Any = _only(False)


class JsonSchema(_Body):
    """A JSON schema that the answer must follow, whether or not it is called strict."""

    name: Annotated[Str, Field(min_length=1, max_length=64)]
    description: Str | None = None
    rules: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    rules: dict[str, Any] | None = Field(
        default=None, alias="schema", description="llama.cpp's, of json_object."
    )

    @model_validator(mode="after")
    def _goes_together(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is given with type json_schema, and only then")
        if self.rules is not None and self.type != "json_object":
            raise ValueError("schema is given with type json_object, and only then")
        return self

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema of the answer, or None for text."""
        if self.json_schema is not None:
            return self.json_schema.rules
        return (self.rules or {"type": "object"}) if self.type == "json_object" else None


class Common(_Body):
    """Fields of both endpoints. Those that OpenAI does not have are vLLM's."""

    model: Str
    max_tokens: Annotated[Int, Field(ge=1)] | None = None
    n: Annotated[Int, Field(ge=1, le=CHOICES)] | None = None
    seed: Int | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=_STOP_IDS)] | None = None
    ignore_eos: bool | None = Field(default=None, description="Go on past the model's own end.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Int, Field(ge=-1)] | None = Field(default=None, description="0 and -1: all.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_tokens: Annotated[Int, Field(ge=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    # Logits are divided by it: a tiny one would take them past what float32 holds.
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None

    response_format: ResponseFormat | None = None
    prompt_logprobs: Annotated[int, Field(ge=0)] | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: Str | None = Field(default=None, description="Only equal salts share prefixes.")

    user: Str | None = _unused()
    request_id: Str | None = _unused()
    safety_identifier: Str | None = _unused()
    prompt_cache_key: Str | None = _unused()
    metadata: dict[Str, Any] | None = _unused()
    store: bool | None = _unused()
    priority: Int | None = _unused("One queue serves all requests.")
    service_tier: Literal["auto", "default", "flex", "priority", "scale"] | None = _unused()
    logit_bias: Any = _only({})

    @model_validator(mode="before")
    @classmethod
    def _empty_is_absent(cls, given: Any) -> Any:
        return without_empty(given, {n for n, f in cls.model_fields.items() if f.is_required()})

    @field_validator("max_tokens", "max_completion_tokens", mode="before", check_fields=False)
    @classmethod
    def _no_limit(cls, given: Any) -> Any:
        """-1 is llama.cpp's and LM Studio's word for no limit."""
        return None if type(given) in (int, float) and given == -1 else given

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _zeros_change_nothing(cls, given: Any) -> Any:
        return {} if isinstance(given, dict) and not any(given.values()) else given

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        """Answers that are wanted."""
        return self.n or 1

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen; OpenAI's temperature is 1 unless the request says otherwise."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            min_tokens=self.min_tokens or 0,
        )

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must follow, or None for text."""
        return self.response_format.schema_of_answer if self.response_format else None

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens to report at each place; None reports nothing."""
        raise NotImplementedError


class CompletionBody(Common):
    """`POST /v1/completions`."""

    prompt: (
        Str
        | list[int]
        | Annotated[list[Str], Field(max_length=CHOICES)]
        | Annotated[list[list[int]], Field(max_length=CHOICES)]
    )
    max_tokens: Annotated[Int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    suffix: Any = _only("")
    add_special_tokens: Any = _only(True)

    @field_validator("logprobs", mode="before")
    @classmethod
    def _false_is_absent(cls, given: Any) -> Any:
        return None if given is False else given

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as text or tokens; several are answered as if each had come alone."""
        if isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int):
            return list(self.prompt)
        return [self.prompt]  # type: ignore[list-item]

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: Str
    cache_control: dict[str, Any] | None = _unused()


class CalledFunction(_Body):
    """The function of a tool call, its arguments as JSON text."""

    name: Str
    arguments: Str

    @field_validator("arguments", mode="before")
    @classmethod
    def _as_text(cls, given: Any) -> Any:
        """Clients of other interfaces send the object itself."""
        return json.dumps(given, ensure_ascii=False) if isinstance(given, dict) else given


class ToolCall(_Body):
    """A call that the assistant has made in an earlier turn."""

    id: Str | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    function: CalledFunction
    extra_content: Any = _unused("Google's.")
    provider_specific_fields: Any = _unused("LiteLLM's form of it.")

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: the arguments as an object, where they are one."""
        unused = {"extra_content", "provider_specific_fields"}
        call = self.model_dump(exclude_none=True, exclude=unused)
        try:
            arguments = json.loads(self.function.arguments)
        except (ValueError, RecursionError):
            return call
        if isinstance(arguments, dict):
            call["function"]["arguments"] = arguments
        return call


class Message(_Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Str | list[TextPart] | None = None
    name: Str | None = Field(default=None, description="Given to the chat template.")
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Str | None = None
    reasoning_content: Str | None = Field(
        default=None, description="Of an earlier answer. Given to the chat template."
    )
    reasoning: Str | None = Field(default=None, description="vLLM's newer name of it.")
    reasoning_details: Any = _unused("OpenRouter's form of it.")
    thinking_blocks: Any = _unused("LiteLLM's form of it.")
    provider_specific_fields: dict[str, Any] | None = _unused()
    refusal: Any = _only("")
    annotations: Any = _only([])
    images: Any = _only([])
    audio: Any = _only()
    function_call: Any = _only()
    cache_control: dict[str, Any] | None = _unused()
    id: Str | None = _unused()

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, given: Any) -> Any:
        """Parts in OpenAI's form, of those of the Responses interface and of bare texts."""
        return [text_part(p, n) for n, p in enumerate(given)] if type(given) is list else given

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role} needs content")
        return self

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: `developer` is the newer name of `system`."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        if isinstance(self.content, list):
            message["content"] = "".join(part.text for part in self.content)
        elif self.content is not None:
            message["content"] = self.content
        if self.name is not None:
            message["name"] = self.name
        thoughts = {"reasoning_content": self.reasoning_content, "reasoning": self.reasoning}
        given = {name: text for name, text in thoughts.items() if text is not None}
        if given:  # under all names of templates, as transformers gives it
            thought = next(iter(given.values()))
            message |= given | {"reasoning_content": thought, "thinking": thought}
        if self.tool_calls:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class Function(_Body):
    """A function that the model may call."""

    name: Annotated[Str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="A JSON schema.")
    strict: bool | None = None


class ToolBody(_Body):
    """An entry of `tools`."""

    type: Literal["function"]
    function: Function
    cache_control: dict[str, Any] | None = _unused()

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        return self.model_dump(exclude_none=True, exclude={"cache_control"})


class NamedFunction(_Body):
    """The name of a function."""

    name: Str


class NamedTool(_Body):
    """A `tool_choice` that names the function to call."""

    type: Literal["function"]
    function: NamedFunction


class ChatBody(Common):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[Int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: Annotated[list[ToolBody], Field(max_length=_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(default=None, description="False: one call at most.")
    functions: Any = _only([])
    function_call: Any = _only("none", "auto")
    modalities: Any = _only(["text"])
    prediction: Any = _unused("A guess of the answer, which makes some servers quicker.")
    web_search_options: Any = _only()
    reasoning_effort: Str | None = Field(default=None, description="Given to the chat template.")
    include_reasoning: Any = _only(True)
    verbosity: Any = _only("medium")
    documents: list[dict[str, Any]] | None = Field(
        default=None, description="Given to the chat template."
    )
    chat_template_kwargs: dict[Str, Any] | None = Field(
        default=None, description="Variables of the chat template, such as enable_thinking."
    )
    add_generation_prompt: Any = _only(True)
    continue_final_message: Any = _only(False)
    add_special_tokens: Any = _only(False)

    @field_validator("chat_template_kwargs")
    @classmethod
    def _are_its_own(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        if given and (clash := OURS & given.keys()):
            raise ValueError(f"{min(clash)} is no variable of the template's own")
        return given

    @property
    def variables(self) -> dict[str, Any]:
        """Variables of the chat template."""
        named = {"reasoning_effort": self.reasoning_effort, "documents": self.documents}
        return {n: v for n, v in named.items() if v is not None} | (self.chat_template_kwargs or {})

    @model_validator(mode="after")
    def _names_a_tool(self) -> ChatBody:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools: two of them have the same name")
        choice = self.tool_choice
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise ValueError(f"tool_choice: found {choice.function.name!r}, which is not in tools")
        if choice == "required" and not names:
            raise ValueError("tool_choice: found 'required' without tools")
        return self

    @property
    def offered(self) -> list[ToolBody]:
        """Tools that the model may call: none with `tool_choice: none`."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    @property
    def callable(self) -> list[ToolBody]:
        """Of the tools that the model sees, those that it may call."""
        choice = self.tool_choice
        if isinstance(choice, NamedTool):
            return [tool for tool in self.offered if tool.function.name == choice.function.name]
        return self.offered

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def first_mistake(errors: Sequence[Any]) -> tuple[str, str | None]:
    """Message and field of the first of pydantic's ``errors`` on a body."""
    error = errors[0]
    if error["type"] == "json_invalid":
        why, at = error["ctx"]["error"].removesuffix(" at"), error["loc"][-1]
        return f"the body is not JSON: {why} at character {at}.", None
    place = _place(error)
    if not place and error["type"] == "value_error":  # of fields that do not go together
        message = str(error["ctx"]["error"])
        return f"{message}.", message.partition(":")[0]
    if error["type"] == "string_unicode":  # of a name; texts are mended
        return f"{'.'.join([*place, repr(error['input'])])}: no character has this escape.", None
    if not place:
        return (
            "found no JSON object in the body; send one with Content-Type: application/json.",
            None,
        )
    field = place[0]
    if error["type"] == "extra_forbidden":
        problem = "this server does not know this field; leave it out"
        if (name := place[-1]) in OFF:
            given = error["input"]
            problem = f"found {given!r}; {_UNSUPPORTED} or give {OFF[name]!r}"
        return f"{'.'.join(place)}: {problem}.", field
    if error["type"] == "missing":
        return f"{'.'.join(place)}: this field is required.", field
    found = repr(error.get("input"))
    found = found if len(found) <= 80 else f"{found[:77]}..."
    # The branches of a union fail at the same place.
    same = [other for other in errors if _place(other) == place]
    expected = " or ".join(
        dict.fromkeys(str(other["msg"]).removeprefix("Value error, ") for other in same)
    )
    return f"{'.'.join(place)}: found {found}; {expected}.", field


def _place(error: Any) -> list[str]:
    """Fields and numbers that lead to an error, without the names of our types between them."""
    parts = [str(part) for part in error["loc"]]
    own = parts[-1:] if error["type"] == "extra_forbidden" else []  # a name of the client's
    ours = parts[: len(parts) - len(own)]
    named = [part for part in ours if part not in ("body", "str", "int")]
    return [part for part in named if re.fullmatch("[a-z_]+|[0-9]+", part)] + own
