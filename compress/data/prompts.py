"""Prompts from a text: the first tokens of every document, or what comes before an answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from compress.data.blocks import conversations
from compress.data.documents import documents
from compress.data.packing import Piece, special_prefix, tokenise
from limbeck.contract.errors import DataError
from limbeck.contract.recipe import ChatRows, TextSource
from limbeck.contract.sources.texts import text_files


def first_tokens(
    text: TextSource, tokenizer: PreTrainedTokenizerFast, *, folder: Path, tokens: int, most: int
) -> list[list[int]]:
    """Return the first ``tokens`` token ids of each document, with the tokenizer's own before them.

    A conversation is rendered up to its first answer, and left out where that takes more than
    ``most`` tokens. Raises `DataError` where there is no prompt.
    """
    form = text.format
    chat = isinstance(form, ChatRows)

    def found() -> Iterator[Piece]:
        for path in text_files(text, folder=folder):
            if isinstance(form, ChatRows):
                for piece in conversations(path, form, tokenizer):
                    yield Piece(piece.text[: (piece.answers or ((len(piece.text), 0),))[0][0]])
            else:
                # A token is rarely longer than 16 characters; a longer one shortens the prompt.
                yield from (Piece(document[: 16 * tokens]) for document in documents(path, form))

    prefix = [] if chat else special_prefix(tokenizer)
    rows = (piece.ids.tolist() for piece in tokenise(found(), tokenizer))
    cut = (row if chat else [*prefix, *row][:tokens] for row in rows)
    prompts = [row for row in cut if 0 < len(row) <= most]
    if not prompts:
        raise DataError(
            "training.on_policy.prompts.text: no document, or no conversation whose first answer "
            f"begins within {most} tokens, in {text_files(text, folder=folder)[0]}; name "
            "files with text."
        )
    return prompts
