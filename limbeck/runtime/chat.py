"""Chat templates as clients render them, with the names and filters that transformers gives them.

Knows jinja2, and imports it when it is first needed; knows nothing of tokens. Training renders with
`compress.data.chat`.
"""

from __future__ import annotations

import ctypes
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from limbeck.contract.errors import DataError

if TYPE_CHECKING:
    from jinja2.sandbox import SandboxedEnvironment

LONGEST = 5.0  # seconds of one rendering; a conversation of 1 MB takes 0.1 s
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
    Raises `DataError` when the template refuses the messages or fails on them.
    """
    from jinja2 import TemplateError

    try:
        with limited():
            return (
                _environment()
                .from_string(without_marks(template))
                .render(
                    messages=list(messages),
                    tools=list(tools) if tools else None,
                    documents=None,
                    add_generation_prompt=True,
                    **special,
                )
            )
    except TemplateError as error:
        why = str(error)
    except Exception as error:  # a template is a program, and may fail like one
        why = f"{type(error).__name__}: {error}"
    raise DataError(f"the model's chat template cannot render these messages: {why}")


class Endless(Exception):
    """Work of a stranger's program that took too long."""

    def __str__(self) -> str:
        return f"it was still at work after {LONGEST:g} s"


@contextmanager
def limited() -> Iterator[None]:
    """Raise `Endless` in a block of Python code that takes longer than `LONGEST`.

    A template of a stranger may compute for ever. It may do so in a thread that no signal reaches,
    so another thread lets the interpreter raise the exception there.
    """
    worker, lock, ended = threading.get_ident(), threading.Lock(), False

    def stop() -> None:
        with lock:
            if not ended:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(worker), ctypes.py_object(Endless)
                )

    timer = threading.Timer(LONGEST, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            ended = True
        timer.cancel()


def variables(template: str) -> frozenset[str]:
    """Names that the template reads. Empty for a template that is no jinja2."""
    from jinja2 import TemplateError, meta

    try:
        tree = _environment().parse(without_marks(template))
    except TemplateError:
        return frozenset()
    return frozenset(meta.find_undeclared_variables(tree))


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
