"""Rows of chat data to conversations, in the form that chat templates take.

Knows the ways in which datasets write conversations; knows no tokenizer and no template.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.data.documents import rows_of, well_formed
from limbeck.contract.errors import DataError
from limbeck.contract.progress import say
from limbeck.contract.recipe import ChatRows
from limbeck.runtime.chat import OURS

Messages = list[dict[str, Any]]

# ShareGPT's names, and OpenAI's newer name of system and older one of tool.
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool",
          "developer": "system", "function": "tool"}  # fmt: skip
# Names of a model that are not the role of an answer.
_MISNAMED = {"model", "bot", "ai", "chatgpt", "bard", "bing", "chatbot"}
_KNOWN = {"system", "user", "assistant", "tool"}
_SYSTEMS = ("system", "system_prompt")
_VARIABLES = "chat_template_kwargs"  # TRL's name
_INSTRUCTION, _DETAILS = "instruction", ("input", "context")  # of Alpaca, and of Dolly
_WANTED = ("label", "kto_tag")  # of TRL's and LLaMA-Factory's KTO: whether to learn the answer
_HISTORY = "history"  # LLaMA-Factory's: pairs of what was asked and answered before
_READ = ("tools", "functions", *_SYSTEMS, _VARIABLES)
_TEXTS = ("text", "input_text", "output_text")  # types of parts of a message
# Marks of answers to learn: OpenAI's, axolotl's, ms-swift's.
_LEARNED = ("weight", "train", "training", "train_on_turn", "loss", "loss_scale")
_PARTS = ("train_detail", "training_detail")  # axolotl's marks of parts of an answer


@dataclass(frozen=True)
class Conversation:
    """A conversation, and what else its chat template is given."""

    messages: Messages
    tools: list[dict[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)  # of the template
    silent: frozenset[int] = frozenset()  # answers that are not learned, counted from 0

    @property
    def answers(self) -> int:
        """Number of answers, those of the prompt included."""
        return sum(message["role"] == "assistant" for message in self.messages)


def read_conversations(
    path: Path, form: ChatRows, watched: frozenset[str] = frozenset()
) -> Iterator[tuple[str, Conversation, frozenset[str]]]:
    """Where each conversation of a file is, itself, and keys ``watched`` that its row fills.

    Keys that are read are not among these. Raises `DataError` that names the row.
    """
    read = {form.field, form.prompt, *_READ, *_WANTED}
    if form.field != "messages":
        read |= {*_DETAILS, _HISTORY}
    watched -= read
    unwanted = False
    for where, row in rows_of(path, form.field, read | watched):
        if bad := next((name for name in _WANTED if _is_false(row.get(name))), None):
            if not unwanted:
                say(f"  {where}: {bad} is false; such answers are not learned")
            unwanted = True
            continue
        unread = frozenset(n for n in watched & row.keys() if row[n] not in (None, "", [], {}))
        yield where, _conversation(row, form, where), unread


def _is_false(value: Any) -> bool:
    """Whether a mark is false, of JSON or as a table writes it. A number may be a class."""
    return value is False or (isinstance(value, str) and value.strip().lower() == "false")


def _conversation(row: Mapping[str, Any], form: ChatRows, where: str) -> Conversation:
    prompt, answer = row.get(form.prompt), row[form.field]
    if prompt == "" and isinstance(answer, str) and not _lists_messages(answer):
        raise DataError(f"{where}: {form.prompt} is empty; leave the row out.")
    if prompt and answer == "":  # nobody wants a model that learns to say nothing
        raise DataError(f"{where}: {form.field} is empty; leave the row out.")
    if form.field == "completion" and any(type(row.get(name)) is int for name in _WANTED):
        raise DataError(
            f"{where}: a label that is a number, beside a completion. If it says whether to learn "
            "the answer, write true or false; otherwise give it another name."
        )
    if isinstance(prompt, dict) and prompt.get("messages"):  # of OpenAI's preferences
        row = {name: prompt[name] for name in _READ if prompt.get(name)} | dict(row)
        prompt = prompt["messages"]
    if prompt and isinstance(answer, str) and not _lists_messages(answer):
        answer = [{"role": "assistant", "content": answer}]
    messages, given = _messages(answer, where), 0
    opens = next((m["role"] for m in messages if m["role"] != "system"), "assistant")
    if prompt and opens == "assistant":  # otherwise the messages hold their prompt
        if isinstance(prompt, str) and not _lists_messages(prompt):
            prompt = _asked(prompt, row, form, where)
        before = _messages(prompt, f"{where}: {form.prompt}")
        messages, given = before + messages, sum(m["role"] == "assistant" for m in before)
    system = _system(row, where)
    if system is not None:
        first = messages[0]
        if first["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        elif first["content"] != system:
            raise DataError(
                f"{where}: a system message and another one beside the messages; leave one of "
                "them out."
            )
    variables = row.get(_VARIABLES) or {}
    if not isinstance(variables, dict) or (clash := OURS & variables.keys()):
        found = type(variables).__name__ if not isinstance(variables, dict) else min(clash)
        raise DataError(
            f"{where}: {_VARIABLES}: found {found}; expected an object of the chat template's own "
            "variables."
        )
    marks = [m for m in messages if m["role"] == "assistant"]
    silent = {n for n, m in enumerate(marks) if not all(m.get(name, 1) for name in _LEARNED)}
    return Conversation(
        messages, _tools(row, where), variables, frozenset({*range(given), *silent})
    )


def _asked(prompt: str, row: Mapping[str, Any], form: ChatRows, where: str) -> Messages:
    """A prompt as messages, with what Alpaca's columns hold besides."""
    details = {name: row[name] for name in _DETAILS if row.get(name)}
    details = {n: value for n, value in details.items() if n not in (form.field, form.prompt)}
    history = _parsed(row.get(_HISTORY)) or []
    if form.prompt != _INSTRUCTION and (details or history):
        name = next(iter(details), _HISTORY)
        raise DataError(
            f"{where}: {name} beside {form.prompt} would not be learned from; join both texts "
            f"under {form.prompt}, or take {name} out of the file."
        )
    pairs = isinstance(history, list) and all(isinstance(p, list) and len(p) == 2 for p in history)
    if not pairs or not all(isinstance(text, str) for text in details.values()):
        raise DataError(
            f"{where}: expected text under {' and '.join(_DETAILS)}, and pairs of texts under "
            f"{_HISTORY}."
        )
    turns = [turn for pair in history for turn in zip(("user", "assistant"), pair, strict=True)]
    turns.append(("user", "\n".join([prompt, *details.values()])))  # as LLaMA-Factory joins them
    return [{"role": role, "content": text} for role, text in turns]


def _lists_messages(text: str) -> bool:
    """Whether a text is the JSON of a list of objects."""
    found = _parsed(text)
    return isinstance(found, list) and bool(found) and all(isinstance(m, dict) for m in found)


def _messages(value: Any, where: str) -> Messages:
    """``value`` as messages, of {role, content} or ShareGPT's {from, value}, or their JSON."""
    value = _parsed(value)
    if isinstance(value, dict) and ("role" in value or "from" in value):
        value = [value]
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        if isinstance(value, str) and value.lstrip().startswith("["):
            found = "text that is no JSON, perhaps a list as Python prints it (use json.dumps)"
        raise DataError(
            f"{where}: expected a list of messages, found {found}; set format.field to the right "
            "key. Where it holds answers alone, set format.prompt to the key of their prompts."
        )
    return [_message(message, f"{where}: message {n}") for n, message in enumerate(value, start=1)]


def _message(given: Any, where: str) -> dict[str, Any]:
    message = {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else {}
    if {"from", "value"} <= message.keys():
        message["role"], message["content"] = message.pop("from"), message.pop("value")
    if message.get("role") == "function_call":  # LLaMA-Factory's
        message |= {"role": "assistant", "tool_calls": message.pop("content", None)}
    if "function_call" in message:  # OpenAI's older form
        message["tool_calls"] = [message.pop("function_call")]
    if message.get("tool_calls"):
        message["tool_calls"] = _calls(message["tool_calls"], where)
    content = message.get("content")
    if isinstance(content, list) and content:
        message["content"] = "".join(_text_of_part(part, where) for part in content)
    if "content" not in message and message.get("tool_calls"):
        wanted: tuple[str, ...] = ("role",)
    else:
        wanted = ("role", "content")
    for key in wanted:
        if not isinstance(message.get(key), str):
            raise DataError(
                f"{where} has no text under {key!r}; expected {{role: …, content: …}}, both text."
            )
    role = message["role"] = _ROLES.get(message["role"], message["role"])
    plain = role.strip().lower()
    meant = "assistant" if plain in _MISNAMED else _ROLES.get(plain, plain)
    if role != meant and meant in _KNOWN:
        raise DataError(
            f"{where} has the role {role!r}, which a chat template would write as it is; call it "
            f"{meant}."
        )
    if name := next((name for name in _PARTS if message.get(name)), None):
        raise DataError(
            f"{where} has {name}, but an answer is learned as a whole; take {name} out, or leave "
            "the row out."
        )
    for name in _LEARNED:
        if message.get(name, 1) not in (0, 1):
            raise DataError(
                f"{where} has {name} {message[name]}, but an answer is learned or it is not; write "
                "1 or 0, or leave the row out."
            )
    return message


def _text_of_part(part: Any, where: str) -> str:
    """The text of a part of a message, as OpenAI, Anthropic or Amazon write it."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind in _TEXTS and isinstance(part.get("text"), str):
        return str(part["text"])
    raise DataError(
        f"{where} has a part of type {kind}, but only text is learned; leave the part or the row "
        "out."
    )


def _calls(given: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls as chat templates take them: the arguments as an object, where they are one.

    OpenAI and datasets write them as JSON text, which a template would quote once more.
    """
    calls = _parsed(given)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(_parsed(call), dict) for call in calls):
        raise DataError(
            f"{where} has tool calls that are no list of objects; expected [{{type: function, "
            "function: {name: …, arguments: {…}}}]."
        )
    found = []
    for call in map(_parsed, calls):
        inner = call if "function" not in call else _parsed(call["function"])
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise DataError(f"{where} has a tool call without the name of its function.")
        if isinstance(parsed := _parsed(inner.get("arguments")), dict):
            inner = inner | {"arguments": parsed}
        outer = call if "function" in call else {"type": "function"}
        found.append(outer | {"function": inner})
    return found


def _system(row: Mapping[str, Any], where: str) -> str | None:
    """The system message that a row has beside its messages."""
    given = {name: row[name] for name in _SYSTEMS if row.get(name)}
    for name, text in given.items():
        if not isinstance(text, str):
            raise DataError(f"{where}: {name}: found {type(text).__name__}; expected text.")
    return next(iter(given.values()), None)


def _tools(row: Mapping[str, Any], where: str) -> list[dict[str, Any]] | None:
    """Descriptions of functions, as `apply_chat_template` takes them; None where there are none."""
    given = {name: row[name] for name in ("tools", "functions") if row.get(name)}
    if len(given) > 1:
        raise DataError(f"{where}: both tools and functions; leave one of them out.")
    for name, value in given.items():
        found = _parsed(value)
        one = isinstance(found, dict) and bool({"function", "name"} & found.keys())
        found = [found] if one else found
        tools = [_parsed(tool) for tool in found] if isinstance(found, list) else []
        if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in tools):
            raise DataError(
                f"{where}: {name}: found {str(value)[:60]!r}; expected a list of descriptions of "
                "functions, or its JSON."
            )
        if name == "functions":  # OpenAI's older form
            tools = [t if "function" in t else {"type": "function", "function": t} for t in tools]
        return tools or None
    return None


def _parsed(value: Any) -> Any:
    """``value``, or what it is the JSON text of."""
    if not isinstance(value, str):
        return value
    try:
        return well_formed(json.loads(value))
    except (ValueError, RecursionError):
        return value
