"""Conversations to text: apply the tokenizer's chat template and find the answers in the result.

Knows templates and characters; knows nothing of tokens, files or blocks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from limbeck.contract.errors import DataError
from limbeck.runtime.chat import limited

Messages = list[dict[str, Any]]
Span = tuple[int, int]  # first character, and the one after the last

_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}  # ShareGPT's names
_MARK = "\ue000{}\ue001"  # private use: no template and no language means anything by it


def check_messages(value: Any, where: str) -> Messages:
    """``value`` as a conversation, of {role, content} or ShareGPT's {from, value}.

    Raises `DataError` that names ``where`` and the bad message.
    """
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise DataError(
            f"{where}: expected a list of messages, found {found}; set format.field to the right "
            "key."
        )
    messages = []
    for number, message in enumerate(value, start=1):
        if isinstance(message, dict) and {"from", "value"} <= message.keys():
            role = message.pop("from")
            message["role"] = _ROLES.get(role, role)
            message["content"] = message.pop("value")
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise DataError(
                    f"{where}: message {number} has no text under {key!r}; expected "
                    "{role: …, content: …}, both text."
                )
        if message.get("weight", 1) not in (1, None):
            raise DataError(
                f"{where}: message {number} has weight {message['weight']}, but every answer is "
                "learned alike; end the conversation before it, or leave the row out."
            )
        messages.append({key: inner for key, inner in message.items() if inner is not None})
    return messages


def chat_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """The tokenizer's chat template. Raises `DataError` where it has none."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        raise DataError(
            "the tokenizer has no chat template, so chat data cannot be rendered. Put a "
            "chat_template.jinja into the folder "
            "of the model it comes from (first teacher or student.base), use the instruct version "
            "of that model, or use the format jsonl or parquet with text that is rendered already."
        ) from None


def render(
    messages: Messages, tokenizer: PreTrainedTokenizerFast, template: str, where: str
) -> tuple[str, list[Span]]:
    """The conversation as text, and the span of every answer with the token that ends its turn.

    Spans come from the template's ``{% generation %}`` marks if it has them. Otherwise the
    conversation is rendered a second time with a mark in place of each answer; the text between the
    parts around the marks is the answer, even if the template changed it. Raises `DataError` that
    names ``where``.
    """
    marked = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
    text, spans = _rendered(messages, tokenizer, template, where, marks=marked)
    if marked:
        return text, [(start, end) for start, end in spans if end > start]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    between = around_answers(messages, tokenizer, template, where)
    found = _between(text, between, answers) if between is not None else None
    if found is None:
        raise DataError(
            f"{where}: the chat template changes this conversation so that its answers cannot be "
            "told from the rest. Put {% generation %} and {% endgeneration %} around the answer "
            "in the template, or leave the row out."
        )
    turn_end = end_of_turn(tokenizer)
    return text, [
        (start, m.end() if (m := turn_end.match(text, end)) else end) for start, end in found
    ]


def around_answers(
    messages: Messages, tokenizer: PreTrainedTokenizerFast, template: str, where: str
) -> list[str] | None:
    """The rendered text before, between and after the answers; None where an answer is lost.

    Raises `DataError` that names ``where``.
    """
    count = sum(message["role"] == "assistant" for message in messages)
    names = [_MARK.format(index) for index in range(count)]
    replacing = iter(names)
    blank = [{**m, "content": next(replacing)} if m["role"] == "assistant" else m for m in messages]
    text = _rendered(blank, tokenizer, template, where)[0]
    if not names:
        return [text]
    parts = re.split("(" + "|".join(names) + ")", text)
    return parts[::2] if parts[1::2] == names else None


def _between(text: str, between: Sequence[str], answers: Sequence[str]) -> list[Span] | None:
    """Spans of ``text`` between the parts ``between``; None unless spans and parts fill it."""
    if not text.startswith(between[0]):
        return None
    spans, at = [], len(between[0])
    for index, (answer, after) in enumerate(zip(answers, between[1:], strict=True)):
        last = index == len(answers) - 1
        for candidate in (answer, answer.strip(), answer.lstrip(), answer.rstrip()):
            end = at + len(candidate)
            if text.startswith(candidate + after, at) and (
                not last or end + len(after) == len(text)
            ):
                break
        else:  # the template changed the answer, for example dropped the reasoning of earlier turns
            end = len(text) - len(after) if last else text.find(after, at)
            if end < at or not text.startswith(after, end):
                return None
        spans.append((at, end))
        at = end + len(after)
    return spans


def end_of_turn(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Match a special token after an answer, perhaps after white space: it teaches to stop."""
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    if not special:
        return re.compile(r"(?!)")  # matches nothing
    return re.compile(
        r"\s*(?:" + "|".join(re.escape(s) for s in sorted(special, key=len, reverse=True)) + ")"
    )


def _rendered(
    messages: Messages,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    where: str,
    *,
    marks: bool = False,
) -> tuple[str, list[Span]]:
    try:
        with limited():
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=template,
                return_assistant_tokens_mask=marks,
                **tokenizer.special_tokens_map,
            )
    except TemplateError as error:
        raise DataError(f"{where}: the chat template refuses this conversation: {error}.") from None
    except Exception as error:  # a template is a program, and may fail like one
        raise DataError(
            f"{where}: the chat template fails on this conversation: {type(error).__name__}: "
            f"{error}. "
            "Correct the template, or leave the row out."
        ) from error
    return texts[0], spans[0] if marks else []
