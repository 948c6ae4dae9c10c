"""The tokens that end an answer, collected from all files of a model folder."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from limbeck.contract.errors import DataError
from limbeck.contract.sources.models import stated_ends
from limbeck.runtime.chat import render
from limbeck.runtime.text import load_text

_ANSWER = "\ue000answer\ue001"  # private use: no template means anything by it


def end_tokens(model: Path) -> list[int]:
    """Ids of all end tokens of the transformers folder ``model``, those of its generation
    configuration first.

    A chat model's turn ends with its tokenizer's end token, which its generation configuration may
    not name; or with one that only its chat template names, as in conversations on a base model.
    Raises `ModelError` for a configuration whose end token is no id.
    """
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        found += stated_ends(model / name)
    if (end := _id_of(model, _read(model / "tokenizer_config.json").get("eos_token"))) is not None:
        found.append(end)
    if (end := _end_of_turn(model)) is not None:
        found.append(end)
    return list(dict.fromkeys(found))


def first_tokens(model: Path) -> list[int]:
    """Ids that the tokenizer of ``model`` puts before any text: its BOS, or nothing."""
    if not (model / "tokenizer.json").is_file():
        return []
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_file(str(model / "tokenizer.json")).encode("a")
    special: list[int] = encoded.special_tokens_mask
    count = special.index(0) if 0 in special else 0
    return list(encoded.ids[:count])


def _end_of_turn(model: Path) -> int | None:
    """The added token that the chat template writes after an answer, whatever follows.

    Some trainings add it as a token that is not special.
    """
    if not (model / "tokenizer.json").is_file():
        return None
    text = load_text(model)
    if text.template is None:
        return None
    user = {"role": "user", "content": "Hi"}
    shown: list[str] = []
    for first_turns in ([], [{"role": "system", "content": "Hi"}]):
        talk = [*first_turns, user, {"role": "assistant", "content": _ANSWER}]
        # A template may want other messages.
        with contextlib.suppress(DataError):
            shown = [render(text.template, [*talk, *more], text.special) for more in ([], [user])]
            break
    behind = [part.partition(_ANSWER)[2].lstrip() for part in shown]
    added = text.tokenizer.get_added_tokens_decoder().values()
    longest_first = sorted((token.content for token in added), key=len, reverse=True)
    first = [next((t for t in longest_first if part.startswith(t)), None) for part in behind]
    if len(set(first)) != 1 or first[0] is None:
        return None
    return int(text.tokenizer.token_to_id(first[0]))


def _id_of(model: Path, token: Any) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        return None
    tokenizer = _read(model / "tokenizer.json")
    for entry in tokenizer.get("added_tokens", ()):
        if entry["content"] == text:
            return int(entry["id"])
    vocabulary = tokenizer.get("model", {}).get("vocab")
    found = vocabulary.get(text) if isinstance(vocabulary, dict) else None
    return None if found is None else int(found)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found
