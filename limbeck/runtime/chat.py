"""Chat templates as clients render them, with the names and filters that transformers gives them.

Knows jinja2, and imports it when it is first needed; knows nothing of tokens. Training renders with
`compress.data.chat`, in the same child process.
"""

from __future__ import annotations

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
_MARK = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


def without_marks(template: str) -> str:
    """``template`` without the tags ``{% generation %}`` and ``{% endgeneration %}``.

    They mark answers for training, and many clients cannot read them. An ``if`` that always holds
    takes their place: it trims the white space around it in the same way.
    """
    return _MARK.sub(lambda tag: tag[1] + ("endif" if tag[2] else "if true") + tag[3], template)


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The conversation as text, up to where the model answers. ``special``: bos_token and its like.

    ``tools`` are OpenAI's descriptions of functions.
    Raises `DataError` when the template refuses the messages, fails on them or takes too much.
    """
    given = list(messages), dict(special), list(tools) if tools else None
    try:
        return bounded(_render, without_marks(template), *given)
    except (TemplateRefusal, TooMuch, DataError) as error:
        raise DataError(
            f"the model's chat template cannot render these messages: {error}"
        ) from None


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
    template: str, messages: list[Any], special: dict[str, str], tools: list[Any] | None
) -> str:
    return _compiled(template).render(
        messages=messages, tools=tools, documents=None, add_generation_prompt=True, **special
    )


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
