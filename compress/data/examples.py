"""Text to examples for encoders: a row of tokens for each document or piece, and their order.

Every choice is a pure function of recipe and content, so no position in the data needs saving.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from compress.data.documents import documents, pieces
from limbeck.contract.data.arrays import Ids
from limbeck.contract.data.examples import Examples
from limbeck.contract.errors import DataError
from limbeck.contract.models.tokens import text_errors
from limbeck.contract.progress import say
from limbeck.contract.recipe import ChatRows, EncoderRecipe, TextSource
from limbeck.contract.sources.texts import text_files

_CHARS = 32  # of a document read for each token wanted; a token is never that long on average
_TOKENISED = 512  # texts at a time: the tokenizer's output is many times as large as its ids

Row = tuple[int, ...]  # token ids


def load_examples(
    recipe: EncoderRecipe, tokenizer: PreTrainedTokenizerFast
) -> tuple[Examples, Examples]:
    """Training and held-out examples. Raises `DataError` for missing, empty or too little text."""
    train: list[tuple[Row, int]] = []
    heldout: list[tuple[Row, int]] = []
    seen: set[Row] = set()
    every, most_heldout = recipe.data.heldout.every, recipe.data.heldout.most
    for group, (where, name, texts, most) in enumerate(_texts(recipe)):
        tokens = _tokenise(texts, tokenizer, recipe.data.max_tokens)
        fresh = [row for row in dict.fromkeys(tokens) if row not in seen]
        if len(fresh) < len(tokens):
            say(
                f"  {name}: {len(tokens) - len(fresh)} of {len(tokens)} texts repeat another and "
                "are left out"
            )
        seen.update(fresh)
        chosen = [fresh[i] for i in _spread(len(fresh), most)]
        kept = chosen[every - 1 :: every]
        if not kept or len(chosen) == len(kept):
            raise DataError(
                f"{where}: too little text for {name}: {len(chosen)} examples, of which every "
                f"{every}th is held out; expected at least one of each. Add text, or make "
                "data.heldout.every smaller."
            )
        train += [(row, group) for place, row in enumerate(chosen, start=1) if place % every]
        heldout += [(kept[i], group) for i in _spread(len(kept), most_heldout)]
    return _examples(train, tokenizer), _examples(heldout, tokenizer)


def training_order(count: int, *, examples: int, seed: int) -> Ids:
    """Row of the training examples at each of ``count`` places, shuffled anew in every pass."""
    passes = -(-count // examples)
    order = [np.random.default_rng((seed, epoch)).permutation(examples) for epoch in range(passes)]
    return np.concatenate(order)[:count]


def _texts(recipe: EncoderRecipe) -> Iterator[tuple[str, str, list[str], int | None]]:
    """Where in the recipe, name, texts and most of them taken, of every class or domain."""
    limit, length = _CHARS * recipe.data.max_tokens, recipe.piece_chars
    for (place, name, text), most in zip(recipe.groups(), recipe.limits(), strict=True):
        documents = _documents(text, recipe.folder)
        if length is None:
            found = [document[:limit] for document in documents]
        else:
            cut = (pieces(document, length=length) for document in documents)
            stripped = (piece.strip() for piece in itertools.chain.from_iterable(cut))
            found = [piece for piece in stripped if piece]
        yield place.removesuffix(".text"), name, found, most


def _documents(source: TextSource, folder: Path) -> Iterator[str]:
    form = source.format
    if isinstance(form, ChatRows):
        raise DataError(
            "format: chat is for language models; name the field that holds an example's text."
        )
    for path in text_files(source, folder=folder):
        yield from documents(path, form)


def _tokenise(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, max_tokens: int
) -> list[Row]:
    rows: list[Row] = []
    for at in range(0, len(texts), _TOKENISED):
        some = list(texts[at : at + _TOKENISED])
        with text_errors():
            found = tokenizer(some, truncation=True, max_length=max_tokens)["input_ids"]
        rows += [tuple(row) for row in found if row]
    return rows


def _spread(count: int, most: int | None) -> Ids:
    """Places of at most ``most`` of ``count`` things, at even distances."""
    if most is None or count <= most:
        return np.arange(count)
    return np.linspace(0, count - 1, most).round().astype(np.int64)


def _examples(rows: Sequence[tuple[Row, int]], tokenizer: PreTrainedTokenizerFast) -> Examples:
    lengths = np.array([len(row) for row, _ in rows], dtype=np.int32)
    ids = np.full((len(rows), int(lengths.max())), tokenizer.pad_token_id or 0, dtype=np.int32)
    for place, (row, _) in enumerate(rows):
        ids[place, : len(row)] = row
    return Examples(ids, lengths, np.array([group for _, group in rows], dtype=np.int32))
