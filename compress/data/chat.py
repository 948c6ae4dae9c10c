"""Conversations to text: apply the tokenizer's chat template and find the answers in the result.

Knows templates and characters; knows nothing of tokens, files or blocks.
`compress.data.conversations` reads conversations from rows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from compress.data.conversations import Conversation
from limbeck.contract.child import TooMuch
from limbeck.contract.errors import DataError
from limbeck.runtime.chat import Messages, TemplateRefusal, bounded, fitted, shows_calls, with_parts

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
        if isinstance(tokenizer.chat_template, dict) and tokenizer.chat_template:
            raise DataError(
                f"the tokenizer's chat templates are called {', '.join(tokenizer.chat_template)}, "
                "and none is the default. Write the one that is meant into chat_template.jinja in "
                "the folder of the model it comes from (first teacher or student.base)."
            ) from None
        raise DataError(
            "the tokenizer has no chat template, so chat data cannot be rendered. Put a "
            "chat_template.jinja into the folder "
            "of the model it comes from (first teacher or student.base), use the instruct version "
            "of that model, or use the format jsonl or parquet with text that is rendered already."
        ) from None


def has_more(conversation: Conversation) -> bool:
    """Whether an answer is more than its content: it calls tools, or shows its reasoning."""
    return any(
        message.get(key)
        for message in conversation.messages
        if message["role"] == "assistant"
        for key in ("tool_calls", *_REASONING)
    )


@dataclass(frozen=True)
class Chat:
    """A conversation and the chat template that renders it; ``where`` names it in errors."""

    conversation: Conversation
    tokenizer: PreTrainedTokenizerFast
    template: str
    where: str

    @property
    def _answers(self) -> list[dict[str, Any]]:
        return [m for m in self.conversation.messages if m["role"] == "assistant"]

    def render(self) -> tuple[str, list[Span]]:
        """The conversation as text, and the span of every answer with the token that ends its turn.

        Spans come from the template's ``{% generation %}`` marks if it has them. Otherwise the
        conversation is rendered again with a mark in place of each answer; the text between the
        parts around the marks is the answer, even if the template changed it. An answer is what
        follows the prompt for it where the template writes more there: tool calls, reasoning, or an
        opening that the model has to write itself, such as an empty thought. Raises `DataError`,
        with the template's own message if it has one.
        """
        fit = self._of(fitted(self.conversation.messages, self._text_of))
        marked = re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None
        text, spans = fit._rendered(marks=marked)
        if marked:
            return text, [(start, end) for start, end in spans if end > start]
        ways = [fit._between_marks]
        if has_more(fit.conversation):
            ways = [fit._after_prompts, fit._between_marks]
        elif "add_generation_prompt" in self.template:
            ways = [fit._after_own_prompts, fit._after_prompts, fit._between_marks]
        refused = ""
        for way in ways:
            try:
                if (found := way(text)) is not None:
                    return text, found
            except DataError as error:  # the template refuses the changed conversation
                refused = f" (of a part of it: {str(error).removeprefix(f'{self.where}: ')})"
        raise DataError(
            f"{self.where}: the chat template changes this conversation so that its answers cannot "
            f"be separated from the rest{refused}. Put {{% generation %}} and "
            "{% endgeneration %} around the answer in the template, or leave the row out."
        )

    def hidden(self, text: str) -> set[str]:
        """What answers have besides their content that is not in the rendered ``text``.

        Templates may drop the reasoning of all answers but the last. Raises `DataError`.
        """
        found, answers, text_of = set[str](), self._answers, self._text_of
        calls = any(m.get("tool_calls") for m in answers)
        if calls and not shows_calls(fitted(self.conversation.messages, text_of), text_of):
            found.add("tool calls")
        thought = [
            m[key] for m in answers[-1:] for key in _REASONING if isinstance(m.get(key), str)
        ]
        if thought and not any(part.strip() in text for part in thought):
            found.add("reasoning")
        return found

    def around_answers(self) -> list[str] | None:
        """The rendered text before, between and after the answers; None where an answer is lost.

        Raises `DataError`.
        """
        names = [_MARK.format(index) for index in range(self.conversation.answers)]
        replacing = iter(names)
        more = {"tool_calls", *_REASONING}
        blank = [
            {k: v for k, v in m.items() if k not in more} | {"content": next(replacing)}
            if m["role"] == "assistant"
            else m
            for m in self.conversation.messages
        ]
        text = self._text_of(blank)
        if not names:
            return [text]
        parts = re.split("(" + "|".join(names) + ")", text)
        return parts[::2] if parts[1::2] == names else None

    def _between_marks(self, text: str) -> list[Span] | None:
        """Spans of the answers, each with the token that ends its turn; None where one is lost."""
        between = self.around_answers()
        answers = [message.get("content") or "" for message in self._answers]
        found = _between(text, between, answers) if between is not None else None
        if found is None:
            return None
        ends = end_of_turn(self.tokenizer)
        return [(start, m.end() if (m := ends.match(text, end)) else end) for start, end in found]

    def _after_own_prompts(self, text: str) -> list[Span] | None:
        """The spans of `_between_marks` if each follows the prompt for an answer at once."""
        spans = self._between_marks(text)
        first = next(
            (n for n, m in enumerate(self.conversation.messages) if m["role"] == "assistant"), 0
        )
        if not spans or not first:
            return None
        prompt = self._part(first, prompt=True).removeprefix(self._part(first))
        return spans if all(text.endswith(prompt, 0, start) for start, _ in spans) else None

    def _after_prompts(self, text: str) -> list[Span] | None:
        """Spans of the answers, each from the prompt for it to the token that ends its turn.

        None unless ``text`` begins with each of these prompts, or with the conversation before it.
        A template may change an answer once another one follows, for example leave out its
        reasoning; such an answer ends at the first token that ends a turn, or where the next
        message begins.
        """
        ends, closing = end_of_turn(self.tokenizer), turn_end(self.tokenizer, self.template)
        spans: list[Span] = []
        for index, message in enumerate(self.conversation.messages):
            if message["role"] != "assistant":
                continue
            before = self._part(index, prompt=True)
            whole = self._part(index + 1)
            start = len(before)
            if not text.startswith(before):  # the prompt may begin an answer, with <think>
                start = len(os.path.commonprefix([before, text]))  # noqa: RUF071 (of characters)
                if index and start < len(self._part(index)):
                    return None
            if text.startswith(whole) and len(whole) >= start:
                end = max(start, len(whole.rstrip()))
            else:
                end = text.find(closing, start) + len(closing) if closing else -1
                if not start <= end <= len(whole) or not whole.rstrip().endswith(
                    text[start:end][-_TAIL:]
                ):
                    end = self._before_next(text, index)
                    if end < start:
                        return None
            if not re.search(f"(?:{ends.pattern})\\Z", text[start:end]):
                end = m.end() if (m := ends.match(text, end)) else end
            if end == start:
                return None
            spans.append((start, end))
        return spans

    def _before_next(self, text: str, index: int) -> int:
        """Where the answer ``index`` ends, by what follows it in the template; -1 if unknown."""
        following = self.conversation.messages[index + 1 : index + 2]
        if not following or following[0]["role"] == "assistant":
            return -1
        whole = self._part(index + 2)
        between = self._of(self.conversation.messages[: index + 2]).around_answers()
        if between is None or not text.startswith(whole):
            return -1
        return len(whole.removesuffix(between[-1])) if whole.endswith(between[-1]) else -1

    def _part(self, count: int, *, prompt: bool = False) -> str:
        """The first ``count`` messages as text, with the ``prompt`` for an answer if wanted."""
        return self._of(self.conversation.messages[:count])._rendered(prompt=prompt)[0]

    def _of(self, messages: Messages) -> Chat:
        """The same with other messages."""
        conversation = replace(self.conversation, messages=list(map(dict, messages)))
        return replace(self, conversation=conversation)

    def _text_of(self, messages: Messages) -> str:
        return self._of(messages)._rendered()[0]

    def _rendered(self, *, marks: bool = False, prompt: bool = False) -> tuple[str, list[Span]]:
        settings = {
            "tools": self.conversation.tools,
            "chat_template": self.template,
            "return_assistant_tokens_mask": marks,
            "add_generation_prompt": prompt,
            **self.tokenizer.special_tokens_map | self.conversation.variables,
        }
        try:
            text, spans = bounded(_render, self.conversation.messages, settings)
        except TemplateRefusal as error:
            raise DataError(
                f"{self.where}: the chat template refuses this conversation: {error}."
            ) from None
        except (DataError, TooMuch) as error:
            raise DataError(
                f"{self.where}: the chat template fails on this conversation: {error}. "
                "Correct the template, or leave the row out."
            ) from None
        return text, spans


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
        parts = Chat(_PROBE, tokenizer, template, "").around_answers()
    except DataError:
        return None
    found = end_of_turn(tokenizer).match(parts[1]) if parts else None
    return found.group() if found else None


def _render(messages: list[Any], settings: dict[str, Any]) -> tuple[str, list[Span]]:
    """The text, and the spans that are marked in it."""
    messages = with_parts(settings["chat_template"], messages, settings)
    texts, spans = render_jinja_template(conversations=[messages], **settings)
    return texts[0], spans[0] if settings["return_assistant_tokens_mask"] else []
