"""Rows of conversations with tool calls, in templates that write them in different ways."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from compress.data.blocks import conversations
from limbeck.contract.recipe import ChatRows
from limbeck.runtime.text import load_text
from serve_bench.serve.wire import ChatBody
from tests.pico import make_tokenizer
from tests.wild.cases.row import Row, said

_TURN = "{{ '<|end|>' }}"
_PROMPT = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
_NULL_ALONE = (  # shows calls only where content is null; arguments must be text, as DeepSeek's
    "{% for m in messages %}{{ m['role'] + ': ' }}"
    "{% if m['role'] == 'assistant' and m['content'] is none %}"
    "{% for c in m['tool_calls'] %}"
    "{{ '<call>' + c['function']['name'] + ' ' + c['function']['arguments'] + '</call>' }}"
    "{% endfor %}{% else %}{{ m['content'] }}{% endif %}" + _TURN + "{% endfor %}" + _PROMPT
)
_CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ' ' }}"
    "{{ c.function.arguments | tojson }}</call>{% endfor %}"
)
_TEMPLATES = {
    "shows calls where content is null": _NULL_ALONE,
    "shows them there, arguments as objects": _NULL_ALONE.replace(
        "c['function']['arguments'] +", "(c['function']['arguments'] | tojson) +"
    ),
    "tests whether content is text": (
        "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}"
        "{% endif %}" + _CALLS + _TURN + "{% endfor %}" + _PROMPT
    ),
    "adds content to other text": (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}" + _CALLS + _TURN + "{% endfor %}"
    )
    + _PROMPT,
    "writes content": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}" + _CALLS + _TURN + "{% endfor %}"
    )
    + _PROMPT,
    "writes arguments, which are text": (
        "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}"
        + _CALLS.replace(" | tojson", "")
        + _TURN
        + "{% endfor %}"
        + _PROMPT
    ),
}
_LOOP = "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}"
_PARTS = {  # templates of models for pictures, and the roles that they read in parts
    "each part": (_LOOP, {"system", "user", "assistant"}),
    "parts of all but answers": (
        "{% if m.role == 'assistant' %}{{ m.content }}{% else %}" + _LOOP + "{% endif %}",
        {"system", "user"},
    ),
    "the first part": ("{{ m.content[0]['text'] }}", {"system", "user", "assistant"}),
    "parts between marks": (
        "{% if m.role == 'assistant' %}{% generation %}" + _LOOP + "{% endgeneration %}{% else %}"
        + _LOOP + "{% endif %}",
        {"system", "user", "assistant"},
    ),
    "parts alone, and says so": (
        "{{ raise_exception('parts') if m.content is string }}" + _LOOP,
        {"system", "user", "assistant"},
    ),
    "text or parts": ("{{ m.content if m.content is string else 'parts' }}", set()),
}  # fmt: skip
_TEXT_ARGUMENTS = {"shows calls where content is null", "writes arguments, which are text"}
_FAILS_OR_SAYS_NONE = {"adds content to other text", "writes content"}


def chats(root: Path) -> Iterator[Row]:
    """All of them, made below ``root``."""
    root = root / "chats"
    root.mkdir()
    for name, template in _TEMPLATES.items():
        yield from _calls(root / name, name, template)
    for name, (content, roles) in _PARTS.items():
        yield from _parts(root / name, name, content, roles)
    yield _reasoning(root / "reasoning")
    yield from _variables(root / "variables")


def _calls(folder: Path, name: str, template: str) -> Iterator[Row]:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    arguments = json.dumps({"x": 1})
    for content in (None, "", "look"):
        called = {"name": "f", "arguments": arguments}
        call = {"id": "c1", "type": "function", "function": called}
        asked = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": content, "tool_calls": [call]},
            {"role": "tool", "content": "r", "tool_call_id": "c1"},
        ]
        answered = [*asked, {"role": "assistant", "content": "a"}]
        (folder / "rows.jsonl").write_text(json.dumps({"messages": answered}))
        right = "" if content is None and name in _FAILS_OR_SAYS_NONE else content
        given = arguments if name in _TEXT_ARGUMENTS else json.loads(arguments)
        plain = [dict(m) for m in answered]
        plain[1] |= {
            "content": right,
            "tool_calls": [call | {"function": called | {"arguments": given}}],
        }
        what = f"template that {name}, content {json.dumps(content)}"
        theirs = _rendered(tokenizer, plain)

        def trained() -> str:
            (piece,) = conversations(folder / "rows.jsonl", ChatRows(kind="chat"), tokenizer)
            return piece.text

        yield Row(f"chat: {what}", said(trained), theirs)
        body = ChatBody.model_validate({"model": "m", "messages": asked})
        theirs = _rendered(tokenizer, plain[:3], prompt=True)
        sent = [message.plain() for message in body.messages]
        called_with = body.model_dump(exclude_none=True)
        for m in called_with["messages"]:  # as clients of other interfaces send arguments
            for c in m.get("tool_calls", ()):
                c["function"]["arguments"] = json.loads(arguments)
                c["extra_content"] = {"google": {}}
        again = ChatBody.model_validate(called_with)
        assert [message.plain() for message in again.messages] == sent
        ours = said(lambda sent=sent: load_text(folder).rendered(sent))  # type: ignore[misc]
        yield Row(f"serve: {what}", ours, theirs)


def _parts(folder: Path, name: str, content: str, roles: set[str]) -> Iterator[Row]:
    """Text and parts are read alike, by a template that leaves out what has another form."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: " + content + _TURN + "{% endfor %}" + _PROMPT
    )
    tokenizer.save_pretrained(folder)

    def talk(roles: set[str]) -> list[dict[str, Any]]:
        return [
            {"role": role, "content": [{"type": "text", "text": text}] if role in roles else text}
            for role, text in (("system", "s"), ("user", "q"), ("assistant", " a "))
        ]

    for given in (set(), {"system", "user", "assistant"}):
        (folder / "rows.jsonl").write_text(json.dumps({"messages": talk(given)}))
        what = f"a template that reads {name}, given {'parts' if given else 'text'}"

        def trained() -> str:
            (piece,) = conversations(folder / "rows.jsonl", ChatRows(kind="chat"), tokenizer)
            learned = [piece.text[slice(*span)] for span in piece.answers or ()]
            return f"{piece.text} learned: {[answer.strip() for answer in learned]}"

        end = "" if "generation" in content else "<|end|>"
        wanted = f"{_rendered(tokenizer, talk(roles))} learned: {[f' a {end}'.strip()]}"
        yield Row(f"chat: {what}", said(trained), wanted)
        body = ChatBody.model_validate({"model": "m", "messages": talk(given)[:2]})
        sent = [message.plain() for message in body.messages]
        ours = said(lambda sent=sent: load_text(folder).rendered(sent))  # type: ignore[misc]
        yield Row(f"serve: {what}", ours, _rendered(tokenizer, talk(roles)[:2], prompt=True))


def _rendered(
    tokenizer: Any, messages: list[dict[str, Any]], *, prompt: bool = False, **variables: Any
) -> str:
    """By transformers, which is given null where a template tests for it."""
    texts, _ = render_jinja_template(
        [messages], chat_template=tokenizer.chat_template, add_generation_prompt=prompt, **variables
    )
    return str(texts[0])


def _variables(folder: Path) -> Iterator[Row]:
    """Templates that read variables of their own, documents and the date."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if enable_thinking is defined and not enable_thinking %}<off>{% endif %}"
        "{{ reasoning_effort | default('medium') }}{% for d in documents or [] %}{{ d.text }}"
        "{% endfor %}{% if date_string is not defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}" + _TURN + "{% endfor %}"
    ) + _PROMPT
    tokenizer.save_pretrained(folder)
    talk = [{"role": "user", "content": "q"}]
    for fields, variables in (
        ({}, {}),
        ({"chat_template_kwargs": {"enable_thinking": False, "date_string": "26 Jul 2024"}},
         {"enable_thinking": False, "date_string": "26 Jul 2024"}),
        ({"reasoning_effort": "high"}, {"reasoning_effort": "high"}),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "none"}},
         {"reasoning_effort": "none"}),
        ({"documents": [{"text": "d"}]}, {"documents": [{"text": "d"}]}),
    ):  # fmt: skip
        body = ChatBody.model_validate({"model": "m", "messages": talk, **fields})
        yield Row(
            f"serve: a template with the date, and {json.dumps(fields)}",
            load_text(folder).rendered(talk, variables=body.variables),
            _rendered(tokenizer, talk, prompt=True, **variables),
        )
        row = {"messages": [*talk, {"role": "assistant", "content": "a"}]}
        (folder / "rows.jsonl").write_text(json.dumps(row | {"chat_template_kwargs": variables}))
        (piece,) = conversations(folder / "rows.jsonl", ChatRows(kind="chat"), tokenizer)
        theirs = _rendered(tokenizer, row["messages"], **variables)
        yield Row(f"chat: a template with the date, and {json.dumps(fields)}", piece.text, theirs)


def _reasoning(folder: Path) -> Row:
    """An agent's client sends back the thought of the turn that is not finished, as Qwen3 needs."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {% if m.reasoning_content is string %}"
        "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
        + _TURN
        + "{% endfor %}"
    ) + _PROMPT
    tokenizer.save_pretrained(folder)
    talk: list[dict[str, Any]] = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "reasoning_content": "hm"},
        {"role": "tool", "content": "r", "tool_call_id": "c1"},
    ]
    body = ChatBody.model_validate({"model": "m", "messages": talk})
    sent = [message.plain() for message in body.messages]
    return Row(
        "serve: reasoning_content of an earlier answer",
        load_text(folder).rendered(sent),
        _rendered(tokenizer, talk, prompt=True),
    )
