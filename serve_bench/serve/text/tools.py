"""Tool calls: how a chat template writes them, the grammar of a call, and calls found in text.

Knows two ways of writing: ``<tool_call>`` with a JSON object (Hermes, Qwen), and a bare JSON object
(Llama 3). Knows no HTTP and no engine.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from limbeck.runtime.chat import variables
from limbeck.runtime.grammar import json_rule
from serve_bench.serve.text.stops import overlap

_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_BLANKS = " \n\t;"  # before a call; Llama 3 writes a semicolon between two
_LONGEST_HEAD = 256  # characters; a name has 64
# A name, and an object of arguments that begins.
_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*"(?P<name>[^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


@dataclass(frozen=True)
class CallFormat:
    """How a model writes a call. Without an ``opening`` the whole answer is the call."""

    opening: str
    closing: str
    arguments: Literal["arguments", "parameters"]


HERMES = CallFormat("<tool_call>", "</tool_call>", "arguments")
LLAMA = CallFormat("", "", "parameters")


def call_format(template: str) -> CallFormat | None:
    """The way of writing calls that a chat template defines; None for no or another way."""
    if "tools" not in variables(template):
        return None
    if "<tool_call>" in template:
        # Some templates have XML inside the tag: <function=name><parameter=...>.
        return HERMES if "arguments" in template and "<function=" not in template else None
    # The words in which the templates of Llama 3 ask for a call.
    return LLAMA if '{"name": function name, "parameters":' in template else None


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    parameters: Mapping[str, Any] | None = None  # a JSON schema; None takes no arguments
    strict: bool = False  # whether a call that the model begins by itself is held to the schema

    @property
    def schema(self) -> Mapping[str, Any]:
        """The schema of its arguments."""
        if self.parameters is None:
            return _ANY_OBJECT | {"properties": {}, "additionalProperties": False}
        return _ANY_OBJECT | dict(self.parameters)


def call_grammar(
    form: CallFormat,
    tools: Sequence[Tool],
    *,
    forced: bool,
    several: bool,
    answer: Mapping[str, Any] | None = None,
) -> str | None:
    """The Lark grammar of an answer that may call ``tools``, or None if nothing holds it.

    ``forced`` allows calls only, ``several`` more than one. ``answer`` is the JSON schema of an
    answer that is no call.
    """
    if not forced and answer is None and not any(tool.strict for tool in tools):
        return None
    free = not forced and answer is None  # then a call that has begun is held to its schema
    rules = [
        f"call_{i}: {_text(before)} arguments_{i} {_text(after)}\n"
        f"arguments_{i}: {json_rule(_ANY_OBJECT if free and not tool.strict else tool.schema)}"
        for i, tool in enumerate(tools)
        for before, after in [_around(form, tool.name)]
    ]
    call = f"({' | '.join(f'call_{i}' for i in range(len(tools)))})"
    if free and form.opening:
        more = "*" if several else "?"
        rules.append(f"begin[lazy]: TEXT {_text(form.opening)}\nTEXT: /(.|\\n)*/")
        start = f"(begin {call}){more} TEXT"
    elif free:
        rules.append(r"TEXT: /([^{\s](.|\n)*)?/")
        start = f"{call} | TEXT"
    else:
        opened = f"{_text(form.opening)} {call}" if form.opening else call
        start = f"{opened} ({_text(chr(10))} {opened})*" if several and form.opening else opened
        if answer is not None:
            rules.append(f"answer: {json_rule(answer)}")
            start += " | answer"
    return "\n".join([f"start: {start}", *rules])


def _around(form: CallFormat, name: str) -> tuple[str, str]:
    """The text of a call before and after its arguments, without the opening."""
    edge = "\n" if form.opening else ""
    head = f'{{"name": {json.dumps(name)}, "{form.arguments}": '
    return edge + head, "}" + edge + form.closing


def _text(text: str) -> str:
    return json.dumps(text) if text else ""


@dataclass(frozen=True)
class CallPart:
    """A part of a call: its beginning, with ``id`` and ``name``, or more of its arguments."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass
class Found:
    """What a piece of text made certain: text of the answer, and parts of calls."""

    text: str = ""
    calls: list[CallPart] = field(default_factory=list)


class CallReader:
    """Takes calls out of a text that comes in pieces.

    Text that begins like a call and is none of the ``names`` stays text. White space before and
    between calls is dropped.
    """

    def __init__(self, form: CallFormat, names: Sequence[str], *, several: bool) -> None:
        self.count = 0  # calls so far
        self._form, self._names, self._several = form, frozenset(names), several
        self._state: Literal["text", "head", "arguments", "tail"] = "text"
        self._held = ""  # text that is not certain yet
        self._opened = ""  # in the state "head": the opening and the white space before it
        self._depth, self._quoted, self._escaped = 0, False, False  # within the arguments
        self._plain = False  # whether other text has come, after which Llama 3 writes no call

    def add(self, text: str) -> Found:
        """The parts that ``text`` makes certain."""
        self._held += text
        found, before = Found(), None
        while before != (self._state, self._held):
            before = self._state, self._held
            getattr(self, f"_read_{self._state}")(found)
        return found

    def rest(self) -> Found:
        """What is held back, once nothing follows. A call that is cut off has its arguments."""
        held, self._held, found = self._held, "", Found()
        if self._state == "head" and not self._take_whole(held, found):
            found.text = self._opened + held
        elif self._state == "text" and (held.strip(_BLANKS) or not self.count):
            found.text = held
        return found

    def _read_text(self, found: Found) -> None:
        opening = self._form.opening
        if self.count and not self._several:
            self._held = ""
        elif opening and (at := self._held.find(opening)) >= 0:
            certain = self._held[:at].rstrip()
            found.text += certain
            self._opened = self._held[len(certain) : at] + opening
            self._held, self._state = self._held[at + len(opening) :], "head"
        elif not opening and not self._plain and self._held.lstrip(_BLANKS)[:1] == "{":
            self._state = "head"
        elif self.count and not opening and not self._plain and not self._held.strip(_BLANKS):
            pass  # what parts two calls, perhaps: wait for more
        else:
            certain = self._held[: len(self._held) - overlap(self._held, opening)].rstrip()
            found.text += certain
            self._held = self._held[len(certain) :]
            self._plain = self._plain or bool(certain)

    def _read_head(self, found: Found) -> None:
        text = self._held.lstrip(_BLANKS)
        closing = self._form.closing
        if (head := _HEAD.match(text)) and head["name"] in self._names:
            self._begin(found, head["name"])
            self._held, self._state = text[head.end() :], "arguments"
        elif closing and closing in self._held:
            call, _, after = self._held.partition(closing)
            if self._take_whole(call, found):
                self._held, self._state = after, "text"
            else:
                self._give_up(found)
        elif head or len(self._held) > _LONGEST_HEAD:
            self._give_up(found)

    def _give_up(self, found: Found) -> None:
        """What looked like a call is none that is known here, so it is text."""
        found.text += self._opened
        self._state, self._plain = "text", True

    def _take_whole(self, text: str, found: Found) -> bool:
        """Take a call whose keys are in another order, once all of it is there."""
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            return False
        arguments = call.get(self._form.arguments) if isinstance(call, dict) else None
        if not isinstance(arguments, dict) or call.get("name") not in self._names:
            return False
        self._begin(found, call["name"])
        found.calls.append(CallPart(self.count - 1, json.dumps(arguments, ensure_ascii=False)))
        return True

    def _begin(self, found: Found, name: str) -> None:
        found.calls.append(CallPart(self.count, "", f"call_{uuid.uuid4().hex}", name))
        self.count += 1

    def _read_arguments(self, found: Found) -> None:
        ends = (at for at, character in enumerate(self._held) if self._step(character))
        end = next(ends, None)
        length = len(self._held) if end is None else end + 1
        if length:
            found.calls.append(CallPart(self.count - 1, self._held[:length]))
        self._held = self._held[length:]
        self._state = "arguments" if end is None else "tail"

    def _step(self, character: str) -> bool:
        """Go on by one character of JSON; whether it closes the outermost object."""
        if self._quoted:
            self._quoted = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
            return False
        self._quoted = character == '"'
        self._depth += (character in "{[") - (character in "}]")
        return character in "}]" and self._depth == 0

    def _read_tail(self, found: Found) -> None:
        """Drop what closes the call."""
        closing = self._form.closing or "}"
        if (at := self._held.find(closing)) >= 0:
            self._held, self._state = self._held[at + len(closing) :], "text"
