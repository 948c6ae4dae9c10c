"""Conversations for teachers with another tokenizer: each reads them in its own chat template.

A teacher's text of a conversation is what its template writes around the answers, and the very
answers that the student is trained on. So both sides have the same bytes there, whatever a template
does to a message, and only they are aligned. The texts are rendered once, into a cache that is
mapped into memory, and found by the student's tokens of a row.

Shapes: N conversations, A answers of all of them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from compress.data.chat import Chat, chat_template, end_of_turn, has_more, turn_end
from compress.data.conversations import Conversation, read_conversations
from compress.data.packing import Piece, tokenise
from compress.teachers.pairs import Pairs
from limbeck.contract.errors import DataError, RecipeError
from limbeck.contract.lock import make_once
from limbeck.contract.models.alignment import Aligned, Aligner, Pieces
from limbeck.contract.progress import say
from limbeck.contract.recipe import ChatRows, Domain, Recipe, fingerprint
from limbeck.contract.sources.places import cache_folder
from limbeck.contract.sources.teacher_tokens import conversations_are_unknown
from limbeck.contract.sources.texts import text_digest, text_files
from limbeck.contract.sources.tokenizer import load_tokenizer

_VERSION = 3
_NEAR = 64  # characters around an answer that a token of it may reach into

_ARRAYS = ("keys", "starts", "firsts", "answers")

Answer = tuple[int, int, int, int, int]  # see `Aligner.conversation`


@dataclass(frozen=True)
class Side:
    """One tokenizer with its chat template."""

    tokenizer: PreTrainedTokenizerFast
    pieces: Pieces
    template: str

    @cached_property
    def turn_end(self) -> int | None:
        """The special token that its template writes right after an answer."""
        found = turn_end(self.tokenizer, self.template)
        return self.tokenizer.convert_tokens_to_ids(found.strip()) if found else None

    @cached_property
    def ends(self) -> re.Pattern[str]:
        """Match a special token that ends a turn, perhaps after white space."""
        return end_of_turn(self.tokenizer)

    @cached_property
    def closing(self) -> re.Pattern[str]:
        """Match special tokens at the end of an answer, and white space after them."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = "|".join(re.escape(str(token)) for token in added if token.special)
        return re.compile(rf"(?:{special})(?:\s|{special})*\Z" if special else r"\Z")

    @cached_property
    def digest(self) -> str:
        """Fingerprint of everything that decides how a conversation is rendered."""
        special = {name: str(t) for name, t in self.tokenizer.special_tokens_map.items()}
        return fingerprint([self.pieces.digest, self.template, special])


class Conversations:
    """See `compress.aligned.Rendered`. Texts of one teacher, by the student's tokens."""

    def __init__(
        self, folders: Sequence[Path], turn: tuple[int | None, int | None], *, digest: str
    ) -> None:
        """Map a folder for each domain. ``turn`` are both sides' tokens that end a turn."""
        self.digest, self.turn = digest, turn
        self._domains: list[dict[str, npt.NDArray[Any]]] = []
        for folder in folders:
            found = {n: np.load(folder / f"{n}.npy", mmap_mode="r") for n in _ARRAYS}
            self._domains.append(found | {"text": np.memmap(folder / "text.bin", np.uint8, "r")})

    def align(self, aligner: Aligner, ids: Sequence[int]) -> Aligned | None:
        key = _key(ids)
        for found in self._domains:
            place = int(np.searchsorted(found["keys"], key))
            if place < len(found["keys"]) and found["keys"][place] == key:
                starts, firsts = found["starts"][place], found["firsts"][place]
                data = found["text"][starts[0] : starts[1]].tobytes()
                answers = found["answers"][firsts[0] : firsts[1]].tolist()
                return aligner.conversation(ids, data, answers, self.turn)
        return None


def with_conversations(
    recipe: Recipe, pairs: Pairs, student: Path, teachers: Mapping[str, Path]
) -> Pairs:
    """The pairs with the recipe's conversations, rendered for each teacher of another tokenizer.

    Raises `RecipeError` for what cannot be aligned, and `DataError` for a template that is missing
    or refuses a conversation.
    """
    domains = [d for d in recipe.data.domains if isinstance(d.text.format, ChatRows)]
    found = list(pairs.pairs)
    for k, (name, folder) in enumerate(teachers.items()):
        pair = found[k]
        if pair is None:
            continue
        if not pair.aligner.same and (why := conversations_are_unknown(recipe, name)):
            raise RecipeError(why)
        if not domains:
            continue
        own = _side(student, pair.aligner.own, "the student")
        other = _side(folder, pair.aligner.other, f"teacher {name}")
        same = pair.aligner.same
        folders = tuple(
            _rendered(domain, recipe, own, other, name, same=same) for domain in domains
        )
        turn = own.turn_end, other.turn_end
        target_V = pair.target_V
        if turn[0] is not None and turn[1] is not None:
            target_V = target_V.clone()
            target_V[turn[1]] = turn[0]
        digest = fingerprint([turn, [f.name for f in folders]])
        found[k] = replace(
            pair, target_V=target_V, conversations=Conversations(folders, turn, digest=digest)
        )
    return replace(pairs, pairs=tuple(found))


def _side(folder: Path, pieces: Pieces, who: str) -> Side:
    tokenizer = load_tokenizer(folder)
    try:
        return Side(tokenizer, pieces, chat_template(tokenizer))
    except DataError:
        raise DataError(
            f"{who}: {folder} has no chat template, so conversations cannot be rendered for it; "
            "put a chat_template.jinja there, use the instruct version of that model, or plain "
            "text."
        ) from None


def _rendered(
    domain: Domain, recipe: Recipe, own: Side, other: Side, name: str, *, same: bool
) -> Path:
    """Folder with the conversations of a domain; made when missing."""
    form = domain.text.format
    assert isinstance(form, ChatRows)
    key = fingerprint(
        {
            "conversations": _VERSION,
            "text": text_digest(domain.text, folder=recipe.folder),
            "format": form.model_dump(),
            "block": recipe.data.block,
            "sides": [own.digest, other.digest],
            **({"same": True} if same else {}),
        }
    )
    path = cache_folder() / "conversations" / key[:16]

    def make(out: Path) -> dict[str, Any]:
        say(f"  {domain.name}: rendering it in the chat template of teacher {name}, once")
        rows = (
            (conversation, where)
            for file in text_files(domain.text, folder=recipe.folder)
            for where, conversation, _ in read_conversations(file, form)
        )
        return _write(out, rows, own, other, block=recipe.data.block, name=name, same=same)

    make_once(path, kind="conversations", key=key, parents={}, make=make)
    return path


def _write(
    folder: Path,
    rows: Iterator[tuple[Conversation, str]],
    own: Side,
    other: Side,
    *,
    block: int,
    name: str,
    same: bool,
) -> dict[str, Any]:
    """Write the arrays of `Conversations`; memory holds the places of texts, not the texts.

    With the ``same`` tokens, a teacher reads the student's text of what two templates do not align.
    """
    kept_out = 0
    keys, starts, firsts, answers = list[int](), list[int]([0]), list[int]([0]), list[Answer]()
    with (folder / "text.bin").open("wb") as file:
        for conversation, where in rows:
            if same and has_more(conversation):
                kept_out += 1
                continue
            found = rendered_for(conversation, where, own, other, block=block, name=name)
            if found is None:
                continue
            ids, data, places = found
            file.write(data)
            answers += places
            keys.append(int(_key(ids)))
            starts.append(starts[-1] + len(data))
            firsts.append(len(answers))
        if not keys:  # an empty file cannot be mapped
            file.write(b"\0")
    if kept_out:
        say(
            f"    {kept_out} of them call tools or show reasoning; teacher {name} reads these in "
            "the student's chat template"
        )
    kept, order = np.unique(np.array(keys, np.uint64), return_index=True)
    spans = {n: np.lib.stride_tricks.sliding_window_view(np.array(v, np.int64), 2)[order]
             for n, v in (("starts", starts), ("firsts", firsts))}  # fmt: skip
    table = np.array(answers, np.int64).reshape(-1, 5)
    for label, array in {"keys": kept, "answers": table, **spans}.items():
        np.save(folder / f"{label}.npy", array)
    return {"conversations": len(kept), "answers": len(table)}


def rendered_for(
    conversation: Conversation, where: str, own: Side, other: Side, *, block: int, name: str
) -> tuple[list[int], bytes, list[Answer]] | None:
    """Tokens of a conversation up to its last label, the teacher's text of it, and its answers.

    None where no answer begins within ``block`` tokens. Raises `DataError`.
    """
    if has_more(conversation):
        raise DataError(
            f"{where}: an answer calls tools or shows its reasoning, which teacher {name} would "
            "see in another form, because it has another tokenizer. Leave the row out, or use a "
            "teacher with the student's tokenizer."
        )
    text, spans = Chat(conversation, own.tokenizer, own.template, where).render()
    (tokens,) = tokenise([Piece(text, tuple(spans), says_end=False)], own.tokenizer)
    learned = np.zeros(len(tokens.ids), bool)
    for n, (begin, end) in enumerate(tokens.answers):
        learned[begin:end] = n not in conversation.silent
    labels = np.flatnonzero((tokens.scored * learned)[:block])
    if not len(labels):
        return None
    ids = tokens.ids[: labels[-1] + 1].tolist()
    here = f"{where}: teacher {name}"
    parts = Chat(conversation, other.tokenizer, other.template, here).around_answers()
    if parts is None or len(parts) != len(spans) + 1:
        raise DataError(
            f"{here}: its chat template and that of the student do not show the same answers of "
            f"this conversation ({'none' if parts is None else len(parts) - 1} and {len(spans)}); "
            "leave the row out, or use a teacher with the student's tokenizer and template."
        )
    data, answers, closing = b"", list[Answer](), b""
    whole = tokens.ids.tolist()
    for (first, end), (begin, stop), before, after in zip(
        spans, tokens.answers, parts[:-1], parts[1:], strict=True
    ):
        if begin >= len(ids):
            break
        found = own.closing.search(text, first, end)
        end = found.start() if found else end
        content = text[first:end].encode()
        data += before.encode()
        stop = _stop(whole, begin, stop, own.pieces)
        pieces = own.pieces.pieces(whole[begin:stop])
        lead = _lead(b"".join(pieces), content, text[max(0, first - _NEAR) : first].encode(),
                     text[end : end + _NEAR].encode())  # fmt: skip
        if lead is None:  # the student's tokens are not these bytes: nothing here is aligned
            data, closing = data + content, b""
            continue
        stop = min(stop, len(ids))
        size = min(sum(map(len, pieces[: stop - begin])) - lead, len(content))
        answers.append((begin, stop, len(data), len(data) + size, lead))
        data += content[:size]
        ending = other.ends.match(after) if stop < len(ids) else None
        closing = ending.group().encode() if ending else b""
    return ids, data + closing, answers


def _stop(ids: Sequence[int], begin: int, end: int, pieces: Pieces) -> int:
    """The end of an answer's text, before special tokens (and white space after them)."""
    first = end
    while first > begin and (
        ids[first - 1] in pieces.special or not pieces.of[ids[first - 1]].strip()
    ):
        first -= 1
    return next((at for at in range(first, end) if ids[at] in pieces.special), end)


def _lead(joined: bytes, content: bytes, before: bytes, after: bytes) -> int | None:
    """How many bytes of the tokens of an answer come before it; None where that is not known.

    A token may reach into the text ``before`` or ``after`` the answer.
    """
    extra, found = len(joined) - len(content), []
    for lead in range(extra + 1):
        head = joined[:lead]
        added = head == b" " and not before.endswith(b" ")  # by the tokenizer, to a first word
        if (added or before.endswith(head)) and joined[lead:] == content + after[: extra - lead]:
            found.append(lead)
    return found[0] if len(found) == 1 else None


def _key(ids: Sequence[int]) -> np.uint64:
    digest = hashlib.sha256(np.asarray(ids, np.int64).tobytes()).digest()
    return np.uint64(int.from_bytes(digest[:8], "big"))
