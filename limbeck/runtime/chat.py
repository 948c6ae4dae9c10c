"""Chat templates as clients render them, with the names and filters that transformers gives them.

Knows jinja2, and imports it when it is first needed; knows nothing of tokens. Training renders with
`compress.data.chat`, in the same child process.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from limbeck.contract.child import Child, TooMuch
from limbeck.contract.errors import DataError

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import SandboxedEnvironment

LONGEST = 5.0  # seconds of a processor for one rendering; a conversation of 1 MB takes 0.1 s
_CHILD = Child()
T = TypeVar("T")
Messages = Sequence[Mapping[str, Any]]
# Names that a rendering gives to every template, so that no variable of a user may have them.
OURS = frozenset({
    "messages", "tools", "chat_template", "add_generation_prompt", "conversations",
    "return_assistant_tokens_mask", "continue_final_message",
})  # fmt: skip
_ROLES = ("system", "user", "assistant")
_NAME = "limbeck_call_{}_"  # no function is called so
_MARK = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


def without_marks(template: str) -> str:
    """``template`` without the tags ``{% generation %}`` and ``{% endgeneration %}``.

    They mark answers for training, and many clients cannot read them. An ``if`` that always holds
    takes their place: it trims the white space around it in the same way.
    """
    return _MARK.sub(lambda tag: tag[1] + ("endif" if tag[2] else "if true") + tag[3], template)


def render(
    template: str,
    messages: Messages,
    special: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as text, up to where the model answers. ``special``: bos_token and its like.

    ``tools`` are OpenAI's descriptions of functions, ``variables`` the template's own, such as
    enable_thinking. Messages have the form of `fitted`.
    Raises `DataError` when the template refuses the messages, fails on them or takes too much.
    """
    given = {**special, **(variables or {})}, list(tools) if tools else None

    def text_of(messages: Messages) -> str:
        try:
            return bounded(_render, without_marks(template), list(messages), *given)
        except (TemplateRefusal, TooMuch, DataError) as error:
            raise DataError(
                f"the model's chat template cannot render these messages: {error}"
            ) from None

    return text_of(fitted(messages, text_of))


def fitted(messages: Messages, text_of: Callable[[Messages], str]) -> Messages:
    """``messages`` in the first form of which the template shows all tool calls, else as given.

    An answer that only calls tools has no content. For a template that fails then, it is empty;
    for one that tests for it (DeepSeek's), it is null, which transformers leaves out. Arguments of
    calls are objects, and JSON text for a template that cannot write objects. ``text_of`` renders,
    and raises `DataError`.
    """
    forms = [messages]
    for change in (_with_content(""), _with_content(None), _quoted):
        forms += [new for form in list(forms) if (new := change(form)) != form and new not in forms]
    readable = messages
    for form in forms if len(forms) > 1 else ():
        try:
            if shows_calls(form, text_of):
                return form
        except DataError:
            continue
        readable = form if readable is messages else readable
    return readable


def shows_calls(messages: Messages, text_of: Callable[[Messages], str]) -> bool:
    """Whether each tool call is in the text, its arguments not as Python writes an object.

    Functions have other names there, because tools that are offered are in the text too.
    """
    names = (_NAME.format(number) for number in itertools.count())
    renamed = [
        {**m, "tool_calls": [_with(call, name=next(names)) for call in m["tool_calls"]]}
        if m.get("tool_calls")
        else m
        for m in messages
    ]
    text = text_of(renamed)
    calls = [call["function"] for m in renamed for call in m.get("tool_calls") or ()]
    objects = [a for call in calls if isinstance(a := call.get("arguments"), dict) and a]
    return all(c["name"] in text for c in calls) and not any(str(a) in text for a in objects)


def _with(call: Mapping[str, Any], **changed: Any) -> dict[str, Any]:
    """A tool call whose function has ``changed``."""
    return {**call, "function": call["function"] | changed}


def _with_content(content: str | None) -> Callable[[Messages], Messages]:
    return lambda messages: [
        {**m, "content": content} if m.get("content") is None else m for m in messages
    ]


def _quoted(messages: Messages) -> Messages:
    """With JSON text for the arguments of tool calls."""

    def quoted(call: Mapping[str, Any]) -> Mapping[str, Any]:
        given = call["function"].get("arguments")
        return _with(call, arguments=_tojson(given)) if isinstance(given, dict) else call

    return [
        {**m, "tool_calls": [quoted(c) for c in m["tool_calls"]]} if m.get("tool_calls") else m
        for m in messages
    ]


class TemplateRefusal(Exception):
    """A template's own message about a conversation."""


def bounded(function: Callable[..., T], *given: Any) -> T:
    """``function(*given)``, which renders a template, in a child process.

    A template of a stranger may compute for ever. Raises `TemplateRefusal`, `DataError` for a
    template that fails, and `TooMuch`.
    """
    result: T = _CHILD.call(_guarded, function, *given, seconds=LONGEST)
    return result


def _guarded(function: Callable[..., T], *given: Any) -> T:
    """What `bounded` runs in the child process."""
    from jinja2 import TemplateError

    try:
        return function(*given)
    except TemplateError as error:
        raise TemplateRefusal(str(error)) from None
    except MemoryError:
        raise
    except Exception as error:  # a template is a program, and may fail like one
        raise DataError(f"{type(error).__name__}: {error}") from None


def _render(
    template: str, messages: list[Any], variables: dict[str, Any], tools: list[Any] | None
) -> str:
    given = {"documents": None} | variables
    messages = with_parts(template, messages, variables)
    return _compiled(template).render(
        messages=messages, tools=tools, add_generation_prompt=True, **given
    )


def with_parts(template: str, messages: Messages, special: Mapping[str, Any]) -> list[Any]:
    """``messages``, as lists of one part for the roles of which ``template`` shows no text else.

    Templates of models for pictures go through the parts of a message, and leave out a message
    that is text without a word. ``special`` has bos_token and its like. Runs in the child process.
    """
    tokens = tuple((name, text) for name, text in special.items() if name.endswith("_token"))
    roles = _roles_of_parts(without_marks(template), tokens)
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]}
        if isinstance(m.get("content"), str) and _role(m) in roles
        else m
        for m in messages
    ]


def _role(message: Mapping[str, Any]) -> str:
    """The role of ``_ROLES`` that a template treats alike."""
    return role if (role := message.get("role")) in _ROLES else "user"


@lru_cache(4)
def _roles_of_parts(template: str, special: tuple[tuple[str, str], ...]) -> frozenset[str]:
    """The fewest roles whose messages have to be parts, so that ``template`` shows most texts."""
    shown: dict[frozenset[str], int] = {}
    for roles in (_ROLES, _ROLES[1:]):  # some templates refuse a message of the system
        for size in range(len(roles) + 1):
            for chosen in map(frozenset, itertools.combinations(roles, size)):
                shown[chosen] = _texts_shown(template, dict(special), roles, chosen)
                if shown[chosen] == len(roles):
                    return chosen
        if any(shown.values()):
            break
    return max(shown, key=lambda chosen: shown[chosen])


def _texts_shown(
    template: str, special: dict[str, str], roles: Sequence[str], chosen: frozenset[str]
) -> int:
    """How many of three messages, of the ``chosen`` roles in parts, are in the text."""
    texts = {role: f"limbeck-text-{role}" for role in roles}
    parts = {role: [{"type": "text", "text": texts[role]}] for role in chosen}
    messages = [{"role": role, "content": parts.get(role, texts[role])} for role in roles]
    try:
        text = _compiled(template).render(
            messages=messages, tools=None, add_generation_prompt=False, documents=None, **special
        )
    except MemoryError:
        raise
    except Exception:  # of a template that cannot read messages in this form
        return 0
    # A part that is written as an object is not read.
    return sum(s in text and not re.search(f"text['\"]: ['\"]{s}", text) for s in texts.values())


@lru_cache(4)
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


@lru_cache(4)
def variables(template: str) -> frozenset[str]:
    """Names that the template reads. Empty for a template that is no jinja2.

    Raises `DataError` for one that is nested too deeply.
    """
    from jinja2 import TemplateError, meta

    try:
        tree = _environment().parse(without_marks(template))
        return frozenset(meta.find_undeclared_variables(tree))
    except TemplateError:
        return frozenset()
    except RecursionError:
        raise DataError(
            "the model's chat template is nested too deeply to be read; give the model another one."
        ) from None


def _environment() -> SandboxedEnvironment:
    """What transformers renders templates with."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """The filter as transformers has it; jinja2's own escapes characters for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
