"""Tokens to blocks: one tokeniser pass over many texts, and two ways to fill blocks.

Knows tokens; knows nothing of files or recipes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from compress.data.chat import Span
from limbeck.contract.models.tokens import text_errors

# Characters tokenised at a time: an encoding takes about 100 bytes a token while it is made.
_BATCH_CHARS = 1 << 20

Row = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]  # ids and scored of one block


@dataclass(frozen=True)
class Piece:
    """Text that is tokenised in one go."""

    text: str
    answers: tuple[Span, ...] | None = None  # the characters that are scored; none: all of them
    says_end: bool = True  # whether an end-of-text token after it is a label


@dataclass(frozen=True)
class Tokens:
    """A piece as tokens."""

    ids: npt.NDArray[np.int32]
    scored: npt.NDArray[np.uint8]
    answers: tuple[Span, ...] = ()  # by token
    says_end: bool = True


def special_prefix(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids that the tokenizer puts before any text, such as a begin-of-text token; often none.

    Tokens that it puts after a text are not among them, such as the end token of ``<s> $A </s>``.
    """
    plain = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    for token in plain[:32]:  # the first whose text is a token again
        text = tokenizer.decode([token])
        encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=True)
        if 0 in encoding.special_tokens_mask:
            return list(encoding.ids[: encoding.special_tokens_mask.index(0)])
    return []


def tokenise(texts: Iterable[Piece], tokenizer: PreTrainedTokenizerFast) -> Iterator[Tokens]:
    """Tokens of each piece, in order. A token that lies partly in an answer is scored."""
    for batch in _batches(texts):
        with text_errors(), _whole_offsets(tokenizer.backend_tokenizer) as inner:
            encodings = inner.encode_batch(
                [piece.text for piece in batch], add_special_tokens=False
            )
        for piece, encoding in zip(batch, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            if piece.answers is None:
                yield Tokens(ids, np.ones(len(ids), dtype=np.uint8), says_end=piece.says_end)
                continue
            scored, spans = np.zeros(len(ids), dtype=np.uint8), []
            starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
            for first, end in piece.answers:
                begin = int(np.searchsorted(ends, first, side="right"))
                span = begin, int(np.searchsorted(starts, end)) if end > first else begin
                scored[slice(*span)] = 1
                spans.append(span)
            yield Tokens(ids, scored, tuple(spans), piece.says_end)


@contextmanager
def _whole_offsets(tokenizer: Tokenizer) -> Iterator[Tokenizer]:
    """``tokenizer`` without its post-processor, which may leave spaces out of offsets."""
    processor = tokenizer.post_processor
    tokenizer.post_processor = None
    try:
        yield tokenizer
    finally:
        tokenizer.post_processor = processor


def _batches(texts: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text.text)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def pack_documents(texts: Iterable[Tokens], block: int, prefix: Sequence[int]) -> Iterator[Row]:
    """Blocks of at most ``block`` tokens, each of one text. A rest of one token is dropped."""
    room = block - len(prefix)
    for text in texts:
        for start in range(0, len(text.ids), room):
            if len(text.ids) - start > 1:
                yield _row(
                    text.ids[start : start + room], text.scored[start : start + room], prefix
                )


def pack_stream(
    texts: Iterable[Tokens], block: int, prefix: Sequence[int], *, end: int
) -> Iterator[Row]:
    """Full blocks of all texts joined, with the token ``end`` after each; the last may be shorter.

    ``end`` is a label only at the true end of a document of plain text: not where a held-out piece
    was cut out, and not at the end of a conversation.
    """
    room = block - len(prefix)
    ids, scored = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.uint8)
    for text in texts:
        ids = np.concatenate([ids, text.ids, np.array([end], dtype=np.int32)])
        scored = np.concatenate([scored, text.scored, np.array([text.says_end], dtype=np.uint8)])
        full = len(ids) // room * room
        for start in range(0, full, room):
            yield _row(ids[start : start + room], scored[start : start + room], prefix)
        ids, scored = ids[full:], scored[full:]
    if len(ids) > 1:
        yield _row(ids, scored, prefix)


def _row(ids: npt.NDArray[np.int32], scored: npt.NDArray[np.uint8], prefix: Sequence[int]) -> Row:
    before = np.array(prefix, dtype=np.int32)
    ids, scored = (
        np.concatenate([before, ids]),
        np.concatenate([np.zeros(len(before), dtype=np.uint8), scored]),
    )
    scored[0] = 0  # nothing comes before it
    return ids, scored
