"""`response_format` and `tools`, asked by the official client."""

from __future__ import annotations

import json
from dataclasses import replace
from enum import Enum
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.contract.artifact import Artifact
from limbeck.runtime.decoder import Decoder
from limbeck.runtime.grammar import Constraint, GrammarError, json_rule
from limbeck.runtime.text import load_text
from serve_bench.serve.listener import Listener
from serve_bench.serve.text.tools import (
    HERMES,
    LLAMA,
    CallFormat,
    CallReader,
    Tool,
    call_format,
    call_grammar,
)
from tests.pico import make_tokenizer
from tests.serve_bench.serve.asking import CHAT, bare

# As Qwen2.5's and Llama 3.2's templates have it, without their system texts.
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\nFor each function call, return a json object within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- for tool_call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n{"name": "' + tool_call.function.name + '", "arguments": ' }}
        {{- tool_call.function.arguments | tojson }}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""  # noqa: E501
LLAMA3 = """{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if tools is not none %}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.\\n' }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {{- message.role + ': ' + message.content + '\\n' }}
{%- endfor %}
"""  # noqa: E501
XML = QWEN.replace("<args-json-object>", "<function=example><parameter=a>")
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"enum": ["Bern", "Zürich"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["place", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
SCHEMA = WEATHER["function"]["parameters"]


def strict(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": tool["function"] | {"strict": True}}


def template(server: Listener, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Give the model a chat template; it shows names only, since a byte is a token here."""
    text = text.replace("tool | tojson", "tool.function.name")
    text = text.replace("t | tojson(indent=4)", "t.function.name")
    text = text.replace("For each function call, return a json object within", "")
    monkeypatch.setattr(server.engine, "text", replace(server.engine.text, template=text))


def says(server: Listener, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Make the model answer ``text``, whatever it is asked."""
    compiled = server.engine.grammars.compile(f"start: {json.dumps(text)}")
    monkeypatch.setattr(server.engine.grammars, "compile", lambda _: compiled)
    monkeypatch.setattr(
        "serve_bench.serve.delivery.call_grammar", lambda *_, **__: "start: /anything/"
    )


# response_format ----------------------------------------------------------------------------------


class Colour(Enum):
    red = "red"
    green = "green"


class Answer(pydantic.BaseModel):
    colour: Colour
    size: Literal[1, 2, 3]
    known: bool | None


def test_the_clients_own_models_are_parsed(client: openai.OpenAI) -> None:
    for seed in range(4):
        asked: dict[str, Any] = {"model": "pico", "messages": CHAT, "seed": seed}
        parsed = client.chat.completions.parse(**asked, response_format=Answer)
        assert parsed.choices[0].finish_reason == "stop"
        assert isinstance(parsed.choices[0].message.parsed, Answer)
        with client.chat.completions.stream(**asked, response_format=Answer) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.content == parsed.choices[0].message.content


def test_json_of_both_endpoints_is_the_decoders(
    served: Artifact, server: Listener, client: openai.OpenAI
) -> None:
    text, decoder = load_text(served.path), Decoder(served.path, form="fp32", threads=1)
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True},
    }

    def alone(ids: list[int]) -> str:
        constraint = server.engine.grammars.compile(f"start: {json_rule(SCHEMA)}").begin()
        tokens = decoder.generate(ids, 200, stop_ids=text.stop_ids, constraint=constraint)
        return "".join(text.stream(tokens))

    options: dict[str, Any] = {"model": "pico", "max_tokens": 200, "temperature": 0}
    chat = client.chat.completions.create(**options, messages=CHAT, response_format=form)
    plain = client.completions.create(
        **options, prompt="weather", extra_body={"response_format": form, "ignore_eos": True}
    )
    found = chat.choices[0].message.content, plain.choices[0].text
    assert found == (alone(text.chat(CHAT)), alone(text.encode("weather")))
    for content in found:
        jsonschema.validate(json.loads(content or ""), SCHEMA)
    assert chat.choices[0].finish_reason == plain.choices[0].finish_reason == "stop"


def test_any_object_is_json_unless_it_is_cut(client: openai.OpenAI) -> None:
    ends = set()
    for seed in range(12):
        answer = client.chat.completions.create(
            model="pico", messages=CHAT, seed=seed, temperature=1, max_tokens=60,  # type: ignore[arg-type]
            response_format={"type": "json_object"}, n=2,
        )  # fmt: skip
        for choice in answer.choices:
            ends.add(choice.finish_reason)
            assert (choice.message.content or "")[0] == "{"
            if choice.finish_reason == "stop":
                assert isinstance(json.loads(choice.message.content or ""), dict)
    assert "length" in ends
    assert ends <= {"stop", "length"}


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "with type json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format",
            "schema: this field is required",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"uniqueItems": True}},
                }
            },
            "response_format",
            'cannot follow it: Unimplemented keys: ["uniqueItems"]',
        ),
        ({"tools": [WEATHER]}, "tools", "writes no tool calls that this server can read"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "two of them have the same name"),
        ({"tools": [{"type": "function"}]}, "tools", "function: this field is required"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools",
            "should match pattern",
        ),
        ({"tool_choice": "required"}, "tool_choice", "found 'required' without tools"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}, "tools": [CLOCK]},
            "tool_choice",
            "found 'f', which is not in tools",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    server: Listener, change: dict[str, Any], field: str, message: str
) -> None:
    body = {"model": "pico", "messages": CHAT} | change
    status, _, answer = bare(server, "POST", "/v1/chat/completions", body)
    assert (status, answer["error"]["param"]) == (400, field)
    assert message in answer["error"]["message"]


def test_a_schema_too_complex_within_an_answer_ends_that_answer_alone(
    server: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, allowed = iter(range(10**6)), Constraint.allowed

    def limited(constraint: Constraint) -> Any:
        if next(calls) == 1:  # any JSON object has two tokens
            raise GrammarError("too many states")
        return allowed(constraint)

    body = {"model": "pico", "messages": CHAT, "response_format": {"type": "json_object"}}
    with monkeypatch.context() as patch:
        patch.setattr(Constraint, "allowed", limited)
        status, _, answer = bare(server, "POST", "/v1/chat/completions", body)
        assert (status, answer["error"]["code"]) == (400, "schema_too_complex")
    assert bare(server, "POST", "/v1/chat/completions", body | {"max_tokens": 4})[0] == 200


# tools: templates ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [(QWEN, HERMES), (LLAMA3, LLAMA), (XML, None), ("{{ messages }}", None), ("{% if %}", None)],
    ids=["qwen", "llama", "xml", "no tools", "broken"],
)
def test_templates_are_recognised(text: str, expected: CallFormat | None) -> None:
    assert call_format(text) == expected


@pytest.mark.parametrize("text", [QWEN, LLAMA3], ids=["qwen", "llama"])
def test_tools_are_rendered_as_transformers_does(served: Artifact, text: str) -> None:
    call = {"type": "function", "function": {"name": "clock", "arguments": {"a": "é"}}}
    messages = [*CHAT, {"role": "assistant", "content": "", "tool_calls": [call]}]
    expected = make_tokenizer().apply_chat_template(
        messages,
        tools=[WEATHER, CLOCK],
        chat_template=text,
        add_generation_prompt=True,
        return_dict=False,
    )
    found = replace(load_text(served.path), template=text)
    assert found.chat(messages, [WEATHER, CLOCK]) == expected


# tools: calls in text -----------------------------------------------------------------------------


def read(form: CallFormat, text: str, cuts: list[int], *, several: bool = True) -> Any:
    """Text and calls that are read from pieces, joined as clients join them."""
    reader = CallReader(form, ["weather", "clock"], several=several)
    found = [reader.add(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found.append(reader.rest())
    calls: list[list[str]] = []
    for part in (part for one in found for part in one.calls):
        if part.id:
            calls.append([part.name or "", ""])
        calls[part.index][1] += part.arguments
    return "".join(one.text for one in found), [(name, given) for name, given in calls]


TEXTS: list[tuple[CallFormat, str, str, list[tuple[str, str]]]] = [
    (HERMES, "Hello <tool> you.\n", "Hello <tool> you.\n", []),
    (
        HERMES,
        'Sure.\n<tool_call>\n{"name": "weather", "arguments": {"place": "}\\"{</tool_call>"}}\n'
        '</tool_call>\n<tool_call>{"arguments": {}, "name": "clock"}</tool_call>\n',
        "Sure.",
        [("weather", '{"place": "}\\"{</tool_call>"}'), ("clock", "{}")],
    ),
    (
        HERMES,
        'a\n<tool_call>\n{"name": "other", "arguments": {}}</tool_call> b',
        'a\n<tool_call>\n{"name": "other", "arguments": {}}</tool_call> b',
        [],
    ),
    (HERMES, "<tool_call>x</tool_call>", "<tool_call>x</tool_call>", []),
    (HERMES, '<tool_call>{"name": "clo', '<tool_call>{"name": "clo', []),
    (HERMES, '<tool_call>{"name": "clock", "arguments": {"a', "", [("clock", '{"a')]),
    (HERMES, "<tool_call>" + "y" * 300, "<tool_call>" + "y" * 300, []),
    (
        LLAMA,
        ' {"name": "weather", "parameters": {"a": [{}]}}; {"name": "clock", "parameters": {}}',
        "",
        [("weather", '{"a": [{}]}'), ("clock", "{}")],
    ),
    (LLAMA, 'I say {"name": "clock", "parameters": {}}', "", []),
    (LLAMA, '{"colour": "red"} ', '{"colour": "red"} ', []),
    (LLAMA, '{"parameters": {"a": 1}, "name": "clock"}', "", [("clock", '{"a": 1}')]),
]


@settings(deadline=None)
@given(case=st.sampled_from(TEXTS), data=st.data())
def test_calls_are_found_wherever_the_text_is_cut(case: Any, data: st.DataObject) -> None:
    form, text, rest, calls = case
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    assert read(form, text, cuts) == (rest or ("" if calls else text), calls)
    assert read(form, text, cuts, several=False)[1] == calls[:1]


@settings(deadline=None)
@given(arguments=st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
))  # fmt: skip
def test_arguments_end_where_json_does(arguments: Any) -> None:
    given_ = json.dumps({"a": arguments}, ensure_ascii=False)
    text = f'<tool_call>\n{{"name": "clock", "arguments": {given_}}}\n</tool_call>'
    assert read(HERMES, text, []) == ("", [("clock", given_)])


# tools: the server --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [QWEN, LLAMA3], ids=["qwen", "llama"])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_call_that_is_asked_for_is_made(
    server: Listener, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, text: str, choice: Any
) -> None:
    template(server, monkeypatch, text)
    asked: dict[str, Any] = {
        "model": "pico", "messages": CHAT, "tools": [WEATHER, CLOCK], "max_tokens": 190,
        "tool_choice": choice, "parallel_tool_calls": False, "temperature": 0, "n": 2,
    }  # fmt: skip
    answer = client.chat.completions.create(**asked)
    for found in answer.choices:
        assert (found.finish_reason, found.message.content) == ("tool_calls", None)
        (call,) = found.message.tool_calls or []
        assert (call.type, call.id[:5]) == ("function", "call_")
        if choice != "required" or call.function.name == "weather":  # type: ignore[union-attr]
            jsonschema.validate(json.loads(call.function.arguments), SCHEMA)  # type: ignore[union-attr]

    joined = ["", ""]
    for event in client.chat.completions.create(**asked, stream=True):
        (part,) = event.choices
        assert not part.delta.content
        for piece in part.delta.tool_calls or []:
            assert (piece.index, piece.id is None) == (0, piece.function.name is None)  # type: ignore[union-attr]
            joined[part.index] += piece.function.arguments or ""  # type: ignore[union-attr]
    expected = [one.message.tool_calls[0].function.arguments for one in answer.choices]  # type: ignore[index,union-attr]
    assert joined == expected


def test_a_call_by_the_models_choice_is_found(
    server: Listener, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    template(server, monkeypatch, QWEN)
    says(
        server,
        monkeypatch,
        'One moment.\n<tool_call>\n{"name": "weather", "arguments": {"place": "Bern"}}\n'
        '</tool_call>\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
    )
    asked: dict[str, Any] = {"model": "pico", "messages": CHAT, "tools": [WEATHER, CLOCK]}
    (choice,) = client.chat.completions.create(**asked).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "One moment.")
    calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or []]  # type: ignore[union-attr]
    assert calls == [("weather", '{"place": "Bern"}'), ("clock", "{}")]
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0]
    assert (final.finish_reason, final.message.content) == ("tool_calls", "One moment.")
    calls = [(c.function.name, c.function.arguments) for c in final.message.tool_calls or []]
    assert calls == [("weather", '{"place": "Bern"}'), ("clock", "{}")]
    # The next turn: the calls and what they gave go back to the template.
    follow = [CHAT[1], choice.message.model_dump(exclude_none=True)]
    made = final.message.tool_calls or []
    follow += [{"role": "tool", "tool_call_id": call.id, "content": "9"} for call in made]
    client.chat.completions.create(**asked | {"messages": follow})
    (cut,) = client.chat.completions.create(**asked, max_tokens=60).choices
    assert (cut.finish_reason, len(cut.message.tool_calls or [])) == ("length", 1)


def test_tools_that_may_not_be_called_are_not_shown(
    server: Listener, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    template(server, monkeypatch, QWEN)
    asked: dict[str, Any] = {"model": "pico", "messages": CHAT, "max_tokens": 1}
    without = client.chat.completions.create(**asked).usage
    none = client.chat.completions.create(**asked, tools=[WEATHER], tool_choice="none").usage
    with_tools = client.chat.completions.create(**asked, tools=[WEATHER]).usage
    assert without.prompt_tokens == none.prompt_tokens < with_tools.prompt_tokens  # type: ignore[union-attr]


def accepts(server: Listener, lark: str | None, text: str) -> tuple[bool, bool]:
    """Whether a grammar takes ``text``, and whether it may end there."""
    assert lark is not None
    constraint = server.engine.grammars.compile(lark).begin()
    for token in server.engine.text.tokenizer.encode(text).ids:
        if not constraint.allowed()[token]:
            return False, False
        constraint.accept(token)
    return True, bool(constraint.allowed()[256])


GOOD = '{"place": "Bern", "days": 3}'


def test_what_the_grammars_of_calls_take(server: Listener) -> None:
    tools = [Tool("weather", SCHEMA, strict=True), Tool("clock")]
    hermes = f'<tool_call>\n{{"name": "weather", "arguments": {GOOD}}}\n</tool_call>'
    clock = '<tool_call>\n{"name": "clock", "arguments": {"free": [1]}}\n</tool_call>'
    llama = f'{{"name": "weather", "parameters": {GOOD}}}'
    bad = hermes.replace("3", "0"), llama.replace("Bern", "Rome")

    free = call_grammar(HERMES, tools, forced=False, several=True)
    for text in ("", "Hello.", hermes, f"a {hermes}\n{hermes} b", clock, "<tool"):
        assert accepts(server, free, text) == (True, True), text
    assert accepts(server, free, bad[0]) == (False, False)
    assert accepts(server, free, hermes[:-3]) == (True, False)
    forced = call_grammar(HERMES, tools, forced=True, several=True)
    assert accepts(server, forced, f"{hermes}\n{hermes}") == (True, True)
    assert accepts(server, forced, "") == (True, False)
    assert accepts(server, forced, "Hello") == accepts(server, forced, clock) == (False, False)
    one = call_grammar(HERMES, tools, forced=True, several=False)
    assert accepts(server, one, hermes) == (True, True)
    assert accepts(server, one, f"{hermes}\n") == (False, False)

    free = call_grammar(LLAMA, tools, forced=False, several=True)
    for text in ("", "Hello {}", llama):
        assert accepts(server, free, text) == (True, True), text
    assert accepts(server, free, bad[1]) == (False, False)
    either = call_grammar(LLAMA, tools, forced=False, several=True, answer={"enum": ["x", 5]})
    for text in ('"x"', "5", llama):
        assert accepts(server, either, text) == (True, True), text
    assert accepts(server, either, "Hello") == (False, False)
    assert call_grammar(HERMES, [Tool("clock")], forced=False, several=True) is None
