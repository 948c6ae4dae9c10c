"""Two tokenisations of one text, aligned on the bytes of the text.

A *common boundary* is a byte where a token ends in both tokenisations. A *chunk* is the text
between two neighbouring common boundaries; most often it is one token on each side. Knows
tokenizers and bytes, and no models.

Shapes: L tokens of a row of the reader (the student), M tokens of the other side (the teacher),
V_T vocabulary of the other side.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from limbeck.contract.data.arrays import Ids
from limbeck.contract.errors import ModelError
from limbeck.contract.models.tokens import as_written
from limbeck.contract.recipe import fingerprint

_METASPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Pieces:
    """A tokenizer as a map from token ids to bytes of text."""

    def __init__(self, tokenizer: Tokenizer, *, name: str, end: int | None = None) -> None:
        """Take a copy of ``tokenizer``. ``end`` is the id of its end-of-text token.

        Raises `ModelError`, which begins with ``name``, for a tokenizer that drops spaces.
        """
        written = tokenizer.to_str()
        self.digest = fingerprint(written)
        self.name, self.end = name, end
        self.tokenizer = as_written(Tokenizer.from_str(written), name)
        self.prefix = self._prefix()
        self.tokenizer.post_processor = None  # it may leave spaces out of a token's offsets
        # Markers that stand in a text as characters are text, and never control the other model.
        self.tokenizer.encode_special_tokens = True
        tree = json.loads(written)
        _require_bytes(tree, name)
        added = self.tokenizer.get_added_tokens_decoder()
        self.special = frozenset(i for i, token in added.items() if token.special)
        self.added = frozenset(added)
        to_bytes, written_out = _decoder(tree), _spaces(tree)
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        self.of: list[bytes] = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, index in vocabulary.items():
            if index not in self.special:
                text = added[index].content if index in added else token
                self.of[index] = written_out(text) if index in added else to_bytes(text)

    def __len__(self) -> int:
        return len(self.of)

    @cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """Ids by the bytes that they stand for; of several the least, added tokens last."""
        found: dict[bytes, int] = {}
        for index in sorted(range(len(self.of)), key=lambda i: (i in self.added, i)):
            if self.of[index]:
                found.setdefault(self.of[index], index)
        return found

    @cached_property
    def _written(self) -> dict[int, bytes]:
        """The characters of special tokens, as they stand in a rendered conversation."""
        added = self.tokenizer.get_added_tokens_decoder()
        return {index: added[index].content.encode() for index in self.special}

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max(map(len, self.of), default=0)

    @cached_property
    def adds_space(self) -> bool:
        """Whether a space is put before a text that does not begin with one."""
        ids = self.tokenizer.encode("a", add_special_tokens=False).ids
        return b"".join(self.pieces(ids)) == b" a"

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of each token; none of a special token or a padded row of a head."""
        return [self.of[i] if i < len(self.of) else b"" for i in ids]

    def written(self, ids: Sequence[int]) -> list[bytes]:
        """As `pieces`, and a special token is read as its own characters."""
        return [self._written.get(i, piece) for i, piece in zip(ids, self.pieces(ids), strict=True)]

    def first_of(self, ids: Sequence[int], data: bytes) -> int:
        """Return the first of ``ids`` if ``data`` begins with it; else the longest that does."""
        if ids and self.of[ids[0]] and data.startswith(self.of[ids[0]]):
            return ids[0]
        for length in range(min(len(data), self.longest), 0, -1):
            if (found := self.by_bytes.get(data[:length])) is not None:
                return found
        return -1

    def _prefix(self) -> list[int]:
        """Return the ids that are put before any text, such as a begin-of-text token."""
        encoding = self.tokenizer.encode("a", add_special_tokens=True)
        mask = encoding.special_tokens_mask
        return list(encoding.ids[: mask.index(0)]) if 0 in mask else []


def _types(tree: Any) -> set[str]:
    """Return all names under ``type`` in a part of tokenizer.json."""
    if isinstance(tree, dict):
        own = {tree["type"]} if isinstance(tree.get("type"), str) else set()
        return own.union(*(_types(value) for value in tree.values()))
    return set().union(*(_types(value) for value in tree)) if isinstance(tree, list) else set()


def _around(tree: dict[str, Any]) -> dict[str, Any]:
    return {part: tree.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")}


def _require_bytes(tree: dict[str, Any], name: str) -> None:
    """Raise `ModelError` unless the tokens of a tokenizer stand for bytes of the text."""
    model = tree["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "WordPiece")
    if kind not in ("BPE", "Unigram"):
        raise ModelError(
            f"{name}: its tokenizer is {kind}, whose tokens do not say where a text has spaces, so "
            "it cannot be aligned with another tokenizer. Choose a teacher with a byte-level BPE "
            "or SentencePiece tokenizer, or one with the student's own tokenizer."
        )
    for marker in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(marker):
            raise ModelError(
                f"{name}: its tokenizer marks words with {model[marker]!r} ({marker}), so its "
                "tokens do not say where a text has spaces and cannot be aligned with another "
                "tokenizer. Choose a teacher with a byte-level BPE or SentencePiece tokenizer."
            )


def _decoder(tree: dict[str, Any]) -> Callable[[str], bytes]:
    """Return the function from a token of the vocabulary to its bytes."""
    around = _around(tree)
    if "ByteLevel" in _types(around):
        table = _byte_level()
        return lambda token: bytes(table[c] for c in token) if set(token) <= table.keys() else b""
    fallback = tree["model"].get("byte_fallback") or "ByteFallback" in _types(around)

    written_out = _spaces(tree)

    def spelled(token: str) -> bytes:
        if fallback and (found := _BYTE.fullmatch(token)):
            return bytes([int(found[1], 16)])
        return written_out(token)

    return spelled


def _spaces(tree: dict[str, Any]) -> Callable[[str], bytes]:
    """Return the function from a token's characters to bytes, with spaces for metaspaces."""
    if _METASPACE in json.dumps(_around(tree), ensure_ascii=False):
        return lambda text: text.replace(_METASPACE, " ").encode()
    return str.encode


def _byte_level() -> dict[str, int]:
    """Return the bytes by the characters that byte-level BPE writes for them, as GPT-2 has it."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {
        chr(256 + place): byte for place, byte in enumerate(hidden)
    }


# One row -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aligned:
    """A row of tokens, and what the other side reads in its place."""

    ids: Ids  # [M], of the other side
    # [L]: last token of the other side with the same text up to here; -1 where there is none.
    at: Ids
    # [n, 4]: chunks, as tokens [first, last) of the row and [first, last) of the other side.
    chunks: Ids


class Aligner:
    """Writes rows of one tokenizer's tokens in another one's."""

    def __init__(self, own: Pieces, other: Pieces, *, same: bool = False) -> None:
        """``own``: the student's tokenizer. ``same``: any text has the same ids on both sides."""
        self.own, self.other, self.same = own, other, same

    def row(self, ids: Sequence[int]) -> Aligned:
        """Align one row, without padding.

        A special token ends a segment of the text. The end-of-text token is that of the other side
        too; other special tokens are not shown to it. A side of the same ids reads the row itself.
        """
        if self.same:
            places = np.arange(len(ids), dtype=np.int64)
            chunks_of_one = np.stack([places, places + 1, places, places + 1], axis=1)
            return Aligned(np.array(ids, np.int64), places, chunks_of_one)
        at = np.full(len(ids), -1, np.int64)
        theirs: list[int] = []
        chunks: list[tuple[int, int, int, int]] = []
        place = 0
        while place < len(ids) and ids[place] in self.own.special:
            place += 1
        theirs += self.other.prefix
        if place:
            at[place - 1] = len(theirs) - 1
        while place < len(ids):
            end = place
            while end < len(ids) and ids[end] not in self.own.special:
                end += 1
            self._segment(ids[place:end], place, at, theirs, chunks)
            if end < len(ids) and ids[end] == self.own.end and self.other.end is not None:
                if end and at[end - 1] == len(theirs) - 1:
                    chunks.append((end, end + 1, len(theirs), len(theirs) + 1))
                theirs += [self.other.end, *self.other.prefix]
                at[end] = len(theirs) - 1
            elif end < len(ids):
                at[end] = len(theirs) - 1
                at[end - 1] = -1  # the other side cannot expect a token that it does not have
            place = end + 1
        table = np.array(chunks, np.int64).reshape(-1, 4)
        return Aligned(np.array(theirs, np.int64), at, table)

    def _segment(
        self,
        ids: Sequence[int],
        place: int,
        at: Ids,
        theirs: list[int],
        chunks: list[tuple[int, int, int, int]],
    ) -> None:
        """Align text without special tokens, which begins at token ``place`` of the row."""
        pieces = self.own.pieces(ids)
        data = b"".join(pieces)
        if not data:
            return
        other, ends, damaged = self._encode(data)
        base = len(theirs)
        # Of several tokens that end at one byte the last one has the whole text before it.
        last = {int(end): base + index for index, end in enumerate(ends) if end >= 0}
        before = place, base
        if place and 0 in last:  # tokens of no bytes, such as a lone added space
            before = (place, last[0] + 1)
            if at[place - 1] >= 0:
                at[place - 1] = last[0]
        mine = np.cumsum([len(piece) for piece in pieces]).tolist()
        _meet(mine, place, (0, *before), last, damaged, at, chunks)
        theirs += other

    def conversation(
        self,
        ids: Sequence[int],
        data: bytes,
        answers: Iterable[Sequence[int]],
        turn: tuple[int | None, int | None],
    ) -> Aligned:
        """Align the answers of a conversation, which each side reads in a template of its own.

        ``data`` is the conversation as the other side reads it. Each of ``answers`` holds the first
        token of its text in ``ids`` and the one after the last; the bytes of ``data`` where it
        begins and ends; and how many bytes of its first token come before it. ``turn`` are both
        sides' tokens that end a turn, or None.
        """
        at = np.full(len(ids), -1, np.int64)
        chunks: list[tuple[int, int, int, int]] = []
        theirs, ends, damaged = self._encode(data, marked=True)
        last = {int(end): index for index, end in enumerate(ends) if end >= 0}
        for first, stop, begin, end, lead in answers:
            before = (-1, -1, -1)  # no common boundary yet
            if first and not lead and begin in last:
                before = begin, first, last[begin] + 1
                at[first - 1] = last[begin]
            sizes = [len(piece) for piece in self.own.pieces(ids[first:stop])]
            mine = (begin - lead + np.cumsum(sizes)).tolist()
            mine = mine[: sum(byte <= end for byte in mine)]
            before = _meet(mine, first, before, last, damaged, at, chunks)
            if stop < len(ids) and ids[stop] in self.own.special:
                after = before[2]
                if before[1] == stop and (ids[stop], *theirs[after : after + 1]) == turn:
                    chunks.append((stop, stop + 1, after, after + 1))
                elif stop:
                    at[stop - 1] = -1  # the other side cannot expect a token that it does not have
        table = np.array(chunks, np.int64).reshape(-1, 4)
        return Aligned(np.array(theirs, np.int64), at, table)

    def _encode(
        self, data: bytes, *, marked: bool = False
    ) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """Tokenise ``data`` on the other side; ``marked`` text has control tokens.

        Return ids, the byte where each token ends (-1 inside a character), and the spans of bytes
        that the other side does not read as they are.
        """
        text, bytes_of, damaged = _decoded(data)
        pieces, read = self.other, text.encode()
        if pieces.adds_space and text.startswith(" ") and not marked:
            encoding = pieces.tokenizer.encode(text[1:], add_special_tokens=False)
            found = pieces.pieces(encoding.ids)
            if b"".join(found) == read:
                return encoding.ids, [bytes_of[end] for end in _sums(found)], damaged
        # A copy for marked text would take seconds and hundreds of MB for a large vocabulary.
        pieces.tokenizer.encode_special_tokens = not marked
        encoding = pieces.tokenizer.encode(text, add_special_tokens=False)
        pieces.tokenizer.encode_special_tokens = True
        found = (pieces.written if marked else pieces.pieces)(encoding.ids)
        added = len(b"".join(found)) - len(read)
        if added in (0, 1) and b"".join(found) == b" " * added + read:
            sums = _sums(found)
            return encoding.ids, [bytes_of[n - added] if n >= added else -1 for n in sums], damaged
        # A normaliser has changed the text: only its characters can be followed.
        ends = []
        offsets = encoding.offsets
        sizes = [0, *_sums([character.encode() for character in text])]
        for index, (_, end) in enumerate(offsets):
            follows = index + 1 == len(offsets) or offsets[index + 1][0] >= end
            ends.append(bytes_of[sizes[end]] if follows else -1)
        return encoding.ids, ends, damaged


def _meet(
    mine: Sequence[int],
    place: int,
    before: tuple[int, int, int],
    last: Mapping[int, int],
    damaged: Sequence[tuple[int, int]],
    at: Ids,
    chunks: list[tuple[int, int, int, int]],
) -> tuple[int, int, int]:
    """Find the common boundaries of a text, and write ``at`` and ``chunks``.

    ``mine`` holds the byte where each token from ``place`` on ends, and ``last`` the other side's
    last token that ends at a byte. ``before`` and the result are the boundary before and the last
    one: its byte and the tokens of both sides that follow it; -1 where there is none.
    """
    for index, byte in enumerate(mine):
        if byte not in last or (index + 1 < len(mine) and mine[index + 1] == byte):
            continue
        start, after = before[0], (byte, place + index + 1, last[byte] + 1)
        at[after[1] - 1] = after[2] - 1
        read = not any(start < b and a < byte for a, b in damaged)
        if start >= 0 and after[2] > before[2] and read:
            chunks.append((before[1], after[1], before[2], after[2]))
        before = after
    return before


def _sums(pieces: Sequence[bytes]) -> list[int]:
    sums: list[int] = np.cumsum([len(piece) for piece in pieces]).tolist()
    return sums


def _decoded(data: bytes) -> tuple[str, list[int], list[tuple[int, int]]]:
    """Decode UTF-8, with U+FFFD for what is none.

    Return the text; for each number of bytes of its UTF-8 how many of ``data`` these are, or -1
    inside U+FFFD; and the spans of ``data`` that are no UTF-8. A row may begin or end inside a
    character, and a model may write half of one.
    """
    parts: list[str] = []
    bytes_of, damaged, at = [0], list[tuple[int, int]](), 0
    while at < len(data):
        try:
            good, bad = data[at:].decode(), None
        except UnicodeDecodeError as error:
            good, bad = data[at : at + error.start].decode(), (at + error.start, at + error.end)
        parts.append(good)
        stop = len(data) if bad is None else bad[0]
        bytes_of += range(at + 1, stop + 1)
        at = stop
        if bad is not None:
            parts.append("\ufffd")
            bytes_of += [-1, -1, bad[1]]
            damaged.append(bad)
            at = bad[1]
    return "".join(parts), bytes_of, damaged


# Vocabularies ------------------------------------------------------------------------------------


def projection(own: Pieces, other: Pieces, *, rows: int | None = None) -> Ids:
    """Return the own token that begins each token of the other side ``[rows]``, -1 where none does.

    Tokens of equal bytes meet; any other token goes to the first token of its bytes in this
    tokenizer's own tokenisation. It is the sparse matrix V_T -> V_S with one 1 a row. ``rows`` are
    those of the other model's head, of which the last may belong to no token.
    """
    found = np.full(max(rows or 0, len(other)), -1, np.int64)
    pending: list[int] = []
    for index, data in enumerate(other.of):
        if not data:
            continue
        exact = own.by_bytes.get(data)
        if exact is not None:
            found[index] = exact
        else:
            pending.append(index)
    texts = [other.of[index].decode(errors="replace") for index in pending]
    encodings = own.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    for index, encoding in zip(pending, encodings, strict=True):
        found[index] = own.first_of(encoding.ids, other.of[index])
    if own.end is not None and other.end is not None:
        found[other.end] = own.end
    return found[:rows]


# What tokenizers of one vocabulary differ in: capitals, spaces, digits, accents, width of letters.
_PROBE = "Don't  say 12345, \n\tnaïve Ｃafé 日本: HELLO  "


@dataclass(frozen=True)
class Relation:
    """How two tokenizers relate: one of them can stand for both, or not."""

    same: bool  # a text gives the same ids, but for the tokens of `differ`
    differ: tuple[str, ...] = ()  # added tokens that only one has, or that have other ids
    # How conversations are packed, where they are another text in each of both chat templates.
    chats: Literal["document", "stream"] | None = None
    ends: tuple[str, str] | None = None  # the end-of-text tokens of both, where these differ

    @property
    def equal(self) -> bool:
        """Whether there is nothing to say: the student's tokenizer in every way."""
        return self == Relation(True)

    @property
    def renders(self) -> bool:
        """Whether it has equal tokens but a template of its own; it needs whole conversations."""
        return self.chats == "document"

    def __str__(self) -> str:
        """Describe the second tokenizer, that of a teacher; the first one is the student's."""
        if not self.same:
            return "another tokenizer; aligned with the student's on bytes of the text"
        more = f" and {len(self.differ) - 3} more" if len(self.differ) > 3 else ""
        listed = f"{', '.join(map(repr, self.differ[:3]))}{more}"
        parts = [f"the student's tokenizer{f', but for added tokens {listed}' * bool(self.differ)}"]
        if self.chats:
            names = "its own", "the student's"
            reads, not_this = names if self.renders else reversed(names)
            parts.append(f"reads conversations in {reads} chat template, not in {not_this}")
        if self.ends:
            own, other = self.ends
            parts.append(f"ends a text with {other}, but reads the student's {own} here")
        return "; ".join(parts)


def relate(own: Tokenizer, other: Tokenizer, *, begins: bool = True) -> Relation:
    """Compare two tokenizers. Those that differ in added tokens only count as the same.

    Two of one vocabulary may begin a text with other tokens, or split it in other places. A
    teacher would then read what it was never trained on. ``begins`` says whether the tokens before
    a text count; a chat template writes its own.
    """
    mine, theirs = own.get_vocab(), other.get_vocab()
    added = {
        token.content
        for tokenizer in (own, other)
        for token in tokenizer.get_added_tokens_decoder().values()
    }
    differ = {t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t)}
    same = _split(own) == _split(other)
    if begins:
        same = same and first_tokens(own) == first_tokens(other)
    return Relation(True, tuple(sorted(differ))) if same and differ <= added else Relation(False)


def first_tokens(tokenizer: Tokenizer) -> list[str]:
    """The tokens that are put before any text, such as a begin-of-text token."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    mask = encoding.special_tokens_mask
    return list(encoding.tokens[: mask.index(0)]) if 0 in mask else []


def _split(tokenizer: Tokenizer) -> list[str]:
    return list(tokenizer.encode(_PROBE, add_special_tokens=False).tokens)
