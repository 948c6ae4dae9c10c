"""Conversations to text: apply the tokenizer's chat template and find the answers in the result.

Knows templates and characters; knows nothing of tokens, files or blocks.
`compress.data.conversations` reads conversations from rows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from compress.data.conversations import Conversation
from limbeck.contract.child import TooMuch
from limbeck.contract.errors import DataError
from limbeck.runtime.chat import Messages, TemplateRefusal, bounded, fitted, shows_calls

Span = tuple[int, int]  # first character, and the one after the last

_MARK = "\ue000{}\ue001"  # private use: no template and no language means anything by it
_PROBE = Conversation(
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
)
_TAIL = 32  # characters at the end of an answer by which it is known again
_REASONING = ("reasoning_content", "reasoning", "thinking")  # transformers' names of it


def chat_template(
    tokenizer: PreTrainedTokenizerFast, conversation: Conversation | None = None
) -> str:
    """The tokenizer's chat template, for ``conversation`` where it has several.

    Raises `DataError` where it has none.
    """
    try:
        return str(tokenizer.get_chat_template(tools=conversation.tools if conversation else None))
    except ValueError:
        raise DataError(
            "the tokenizer has no chat template, so chat data cannot be rendered. Put a "
            "chat_template.jinja into the folder "
            "of the model it comes from (first teacher or student.base), use the instruct version "
            "of that model, or use the format jsonl or parquet with text that is rendered already."
        ) from None


def render(
    conversation: Conversation, tokenizer: PreTrainedTokenizerFast, template: str, where: str
) -> tuple[str, list[Span]]:
    """The conversation as text, and the span of every answer with the token that ends its turn.

    Spans come from the template's ``{% generation %}`` marks if it has them. Otherwise the
    conversation is rendered a second time with a mark in place of each answer; the text between the
    parts around the marks is the answer, even if the template changed it. An answer is what follows
    the prompt for it where the template writes more there: tool calls, reasoning, or an opening
    that the model has to write itself, such as an empty thought. Raises `DataError` that names
    ``where``, with the template's own message if it has one.
    """
    text_of = _renderer(conversation, tokenizer, template, where)
    conversation = replace(
        conversation, messages=[*map(dict, fitted(conversation.messages, text_of))]
    )
    marked = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
    text, spans = _rendered(conversation, tokenizer, template, where, marks=marked)
    if marked:
        return text, [(start, end) for start, end in spans if end > start]
    ways = [_between_marks]
    if has_more(conversation):
        ways = [_after_prompts, _between_marks]
    elif "add_generation_prompt" in template:
        ways = [_after_own_prompts, _after_prompts, _between_marks]
    refused = ""
    for way in ways:
        try:
            if (found := way(text, conversation, tokenizer, template, where)) is not None:
                return text, found
        except DataError as error:  # the template refuses the changed conversation
            refused = f" (of a part of it: {str(error).removeprefix(f'{where}: ')})"
    raise DataError(
        f"{where}: the chat template changes this conversation so that its answers cannot be "
        f"separated from the rest{refused}. Put {{% generation %}} and {{% endgeneration %}} "
        "around the answer in the template, or leave the row out."
    )


def _renderer(
    conversation: Conversation, tokenizer: PreTrainedTokenizerFast, template: str, where: str
) -> Callable[[Messages], str]:
    """Text of other messages in place of those of ``conversation``."""
    return lambda messages: _rendered(
        replace(conversation, messages=list(map(dict, messages))), tokenizer, template, where
    )[0]


def has_more(conversation: Conversation) -> bool:
    """Whether an answer is more than its content: it calls tools, or shows its reasoning."""
    return any(
        message.get(key)
        for message in conversation.messages
        if message["role"] == "assistant"
        for key in ("tool_calls", *_REASONING)
    )


def hidden(
    conversation: Conversation,
    text: str,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    where: str,
) -> set[str]:
    """What answers have besides their content that is not in the rendered ``text``.

    Templates may drop the reasoning of all answers but the last. Raises `DataError`.
    """
    answers = [m for m in conversation.messages if m["role"] == "assistant"]
    found = set[str]()
    if any(m.get("tool_calls") for m in answers):
        text_of = _renderer(conversation, tokenizer, template, where)
        if not shows_calls(fitted(conversation.messages, text_of), text_of):
            found.add("tool calls")
    thought = [m[key] for m in answers[-1:] for key in _REASONING if isinstance(m.get(key), str)]
    if thought and not any(part.strip() in text for part in thought):
        found.add("reasoning")
    return found


def around_answers(
    conversation: Conversation, tokenizer: PreTrainedTokenizerFast, template: str, where: str
) -> list[str] | None:
    """The rendered text before, between and after the answers; None where an answer is lost.

    Raises `DataError` that names ``where``.
    """
    names = [_MARK.format(index) for index in range(conversation.answers)]
    replacing = iter(names)
    more = {"tool_calls", *_REASONING}
    blank = [
        {k: v for k, v in m.items() if k not in more} | {"content": next(replacing)}
        if m["role"] == "assistant"
        else m
        for m in conversation.messages
    ]
    text = _rendered(replace(conversation, messages=blank), tokenizer, template, where)[0]
    if not names:
        return [text]
    parts = re.split("(" + "|".join(names) + ")", text)
    return parts[::2] if parts[1::2] == names else None


def _between_marks(
    text: str,
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    where: str,
) -> list[Span] | None:
    """Spans of the answers, each with the token that ends its turn; None where one is lost."""
    between = around_answers(conversation, tokenizer, template, where)
    answers = [m.get("content") or "" for m in conversation.messages if m["role"] == "assistant"]
    found = _between(text, between, answers) if between is not None else None
    if found is None:
        return None
    ends = end_of_turn(tokenizer)
    return [(start, m.end() if (m := ends.match(text, end)) else end) for start, end in found]


def _after_own_prompts(
    text: str,
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    where: str,
) -> list[Span] | None:
    """The spans of `_between_marks` if each follows the prompt for an answer at once, else None."""
    spans = _between_marks(text, conversation, tokenizer, template, where)
    first = next((n for n, m in enumerate(conversation.messages) if m["role"] == "assistant"), 0)
    if not spans or not first:
        return None
    before = _part(conversation, first, tokenizer, template, where)
    prompted = _part(conversation, first, tokenizer, template, where, prompt=True)
    prompt = prompted.removeprefix(before)
    return spans if all(text.endswith(prompt, 0, start) for start, _ in spans) else None


def _after_prompts(
    text: str,
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    where: str,
) -> list[Span] | None:
    """Spans of the answers, each from the prompt for it to the token that ends its turn.

    None unless ``text`` begins with each of these prompts, or with the conversation before it. A
    template may change an answer once another one follows, for example leave out its reasoning;
    such an answer ends at the first token that ends a turn, or where the next message begins.
    """
    ends, closing = end_of_turn(tokenizer), turn_end(tokenizer, template)
    spans: list[Span] = []
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        before = _part(conversation, index, tokenizer, template, where, prompt=True)
        whole = _part(conversation, index + 1, tokenizer, template, where)
        start = len(before)
        if not text.startswith(before):  # the prompt may begin an answer, with <think>
            start = len(os.path.commonprefix([before, text]))  # noqa: RUF071 (of characters)
            if index and start < len(_part(conversation, index, tokenizer, template, where)):
                return None
        if text.startswith(whole) and len(whole) >= start:
            end = max(start, len(whole.rstrip()))
        else:
            end = text.find(closing, start) + len(closing) if closing else -1
            if not start <= end <= len(whole) or not whole.rstrip().endswith(
                text[start:end][-_TAIL:]
            ):
                end = _before_next(text, conversation, index, tokenizer, template, where)
                if end < start:
                    return None
        if not re.search(f"(?:{ends.pattern})\\Z", text[start:end]):
            end = m.end() if (m := ends.match(text, end)) else end
        if end == start:
            return None
        spans.append((start, end))
    return spans


def _before_next(
    text: str,
    conversation: Conversation,
    index: int,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    where: str,
) -> int:
    """Where the answer ``index`` ends, by what the template writes of the next message; or -1."""
    following = conversation.messages[index + 1 : index + 2]
    if not following or following[0]["role"] == "assistant":
        return -1
    first = replace(conversation, messages=conversation.messages[: index + 2])
    whole = _part(conversation, index + 2, tokenizer, template, where)
    between = around_answers(first, tokenizer, template, where)
    if between is None or not text.startswith(whole):
        return -1
    return len(whole.removesuffix(between[-1])) if whole.endswith(between[-1]) else -1


def _part(
    conversation: Conversation,
    count: int,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    where: str,
    *,
    prompt: bool = False,
) -> str:
    """The first ``count`` messages as text, with the ``prompt`` for an answer if wanted."""
    first = replace(conversation, messages=conversation.messages[:count])
    return _rendered(first, tokenizer, template, where, prompt=prompt)[0]


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


def turn_end(tokenizer: PreTrainedTokenizerFast, template: str) -> str | None:
    """The special token that ``template`` writes right after an answer, with white space before."""
    try:
        parts = around_answers(_PROBE, tokenizer, template, "")
    except DataError:
        return None
    found = end_of_turn(tokenizer).match(parts[1]) if parts else None
    return found.group() if found else None


def _rendered(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    where: str,
    *,
    marks: bool = False,
    prompt: bool = False,
) -> tuple[str, list[Span]]:
    settings = {
        "tools": conversation.tools,
        "chat_template": template,
        "return_assistant_tokens_mask": marks,
        "add_generation_prompt": prompt,
        **tokenizer.special_tokens_map | conversation.variables,
    }
    try:
        text, spans = bounded(_render, conversation.messages, settings)
    except TemplateRefusal as error:
        raise DataError(f"{where}: the chat template refuses this conversation: {error}.") from None
    except (DataError, TooMuch) as error:
        raise DataError(
            f"{where}: the chat template fails on this conversation: {error}. "
            "Correct the template, or leave the row out."
        ) from None
    return text, spans


def _render(messages: list[Any], settings: dict[str, Any]) -> tuple[str, list[Span]]:
    """The text, and the spans that are marked in it."""
    texts, spans = render_jinja_template(conversations=[messages], **settings)
    return texts[0], spans[0] if settings["return_assistant_tokens_mask"] else []
