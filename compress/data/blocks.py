"""Text to token blocks: documents, held-out pieces, packing, and the order of training.

Blocks are made once, into a cache that is mapped into memory, so a corpus may exceed the memory.

Every choice is a pure function of recipe and content, so no data position needs to be saved.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from compress.data.chat import Chat, chat_template
from compress.data.conversations import read_conversations
from compress.data.documents import documents, pieces, require_prompts
from compress.data.packing import (
    Piece,
    Row,
    Tokens,
    pack_documents,
    pack_stream,
    special_prefix,
    tokenise,
)
from limbeck.contract.data.heldout import Blocks
from limbeck.contract.errors import DataError
from limbeck.contract.lock import make_once
from limbeck.contract.progress import say
from limbeck.contract.recipe import (
    ChatRows,
    Data,
    Domain,
    Recipe,
    RowFormat,
    TextFormat,
    fingerprint,
)
from limbeck.contract.sources.places import cache_folder
from limbeck.contract.sources.texts import preference_notes, text_digest, text_files
from limbeck.runtime.chat import variables

_VERSION = 7  # of the way text becomes blocks
IGNORED = -100


@dataclass(frozen=True)
class DomainBlocks:
    """Token blocks of one domain."""

    name: str
    weight: float
    train_ids: npt.NDArray[np.int32]  # [N, block], right-padded with 0
    train_scored: npt.NDArray[np.uint8]  # [N, block], 1 where the token is a label
    train_lengths: npt.NDArray[np.int32]  # [N]
    heldout: Blocks


def load_blocks(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> list[DomainBlocks]:
    """Token blocks of every domain, from the cache where they were made before.

    Raises `DataError` for missing, empty or too little text.
    """
    for note in preference_notes(recipe):
        say(f"  {note}")
    return [_domain_blocks(domain, recipe, tokenizer) for domain in recipe.data.domains]


def training_order(
    blocks: Sequence[DomainBlocks], *, count: int, seed: int
) -> npt.NDArray[np.int64]:
    """[count, 2] of (domain, row): domains by weight; each pass over a domain shuffles its rows."""
    shares = np.array([b.weight for b in blocks]) / sum(b.weight for b in blocks)
    order = np.empty((count, 2), dtype=np.int64)
    taken = np.zeros(len(blocks), dtype=np.int64)
    for position in range(count):
        domain = int(np.argmax(shares * (position + 1) - taken))
        order[position] = domain, taken[domain]
        taken[domain] += 1
    for domain, block in enumerate(blocks):
        rows = len(block.train_ids)
        passes = -(-int(taken[domain]) // rows)
        shuffled = [
            np.random.default_rng((seed, domain, epoch)).permutation(rows)
            for epoch in range(passes)
        ]
        if shuffled:
            mine = order[:, 0] == domain
            order[mine, 1] = np.concatenate(shuffled)[: int(taken[domain])]
    return order


def labels_of(
    input_ids: npt.NDArray[np.int32], scored: npt.NDArray[np.uint8]
) -> npt.NDArray[np.int64]:
    """[N, L] next-token labels: token t + 1 at position t where it is scored, else ignored."""
    labels = np.full(input_ids.shape, IGNORED, dtype=np.int64)
    labels[:, :-1] = np.where(scored[:, 1:], input_ids[:, 1:], IGNORED)
    return labels


def conversations(
    path: Path, form: ChatRows, tokenizer: PreTrainedTokenizerFast
) -> Iterator[Piece]:
    """The conversations of one file, rendered. Raises `DataError` naming file and row.

    A key beside the messages that would change the text and is not read is named once.
    """
    known, warned = variables(chat_template(tokenizer)), set[str]()
    for where, conversation, unread in read_conversations(path, form, known):
        template = chat_template(tokenizer, conversation)
        ignored = (
            {"tools"} if conversation.tools and "tools" not in variables(template) else set[str]()
        )
        for name in sorted(unread - warned):
            say(
                f"  {where}: the chat template reads {name}, which this row has beside its "
                "messages; such a key is not given to it. Put it under chat_template_kwargs."
            )
        talk = Chat(conversation, tokenizer, template, where)
        text, answers = talk.render()
        ignored |= talk.hidden(text)
        for name in sorted(ignored - warned):
            say(
                f"  {where}: the chat template shows no {name}; what this row has of them is left "
                "out"
            )
        warned |= unread | ignored
        if conversation.silent and len(answers) != conversation.answers:
            raise DataError(
                f"{where}: the chat template merges or drops answers, so that those that are not "
                "learned cannot be separated from the others; leave the row out."
            )
        learned = (span for n, span in enumerate(answers) if n not in conversation.silent)
        yield Piece(text, tuple(learned), says_end=False)


# Before there is a tokenizer ---------------------------------------------------------------------


@dataclass(frozen=True)
class Amount:
    """How much text a domain has, in bytes, of which a token takes at least one."""

    pieces: int  # that every n-th is held out of: parts of texts, or whole conversations
    training: int  # bytes that are not held out
    longest: int  # of them in one run that blocks may fill
    blocks: int  # for training, at most


def measure_text(domain: Domain, data: Data, *, folder: Path, enough: int | None = None) -> Amount:
    """Read a domain without a tokenizer, until it holds about ``enough`` blocks; None reads it all.

    Raises `DataError` for text that is missing or cannot be read.
    """
    form, split = domain.text.format, _Split(data)
    training = longest = blocks = 0
    files = text_files(domain.text, folder=folder)
    require_prompts(files[0], form)
    for piece in split.train(
        itertools.chain.from_iterable(_unrendered(path, form) for path in files)
    ):
        size = len(piece.text.encode())
        training, longest = training + size, max(longest, size)
        if isinstance(form, ChatRows) and data.packing == "document":
            blocks += 1
        else:
            blocks += -(-size // data.block)
        if enough is not None and blocks >= enough:
            break
    return Amount(split.seen, training, longest, blocks)


def _unrendered(path: Path, form: TextFormat | RowFormat) -> Iterator[str | Piece]:
    """Documents; for conversations their JSON, which is about as long as the rendered template."""
    if isinstance(form, ChatRows):
        return (
            Piece(
                json.dumps(
                    [*(conversation.tools or ()), *conversation.messages], ensure_ascii=False
                )
            )
            for _, conversation, _ in read_conversations(path, form)
        )
    return documents(path, form)


# Blocks ------------------------------------------------------------------------------------------


@dataclass
class _Answers:
    """Count the answers of a chat domain that are kept, cut short or dropped at the block's end."""

    block: int
    kept: int = 0
    shortened: int = 0
    dropped: int = 0

    def cut(self, texts: Iterable[Tokens]) -> Iterator[Tokens]:
        """Cut conversations at ``block`` tokens: a later part would train without its context."""
        for text in texts:
            for start, end in text.answers:
                self.dropped += start >= self.block
                self.shortened += start < self.block < end
                self.kept += start < self.block
            yield Tokens(
                text.ids[: self.block], text.scored[: self.block], text.answers, text.says_end
            )

    def say(self, name: str) -> None:
        if self.dropped or self.shortened:
            say(
                f"  {name}: of {self.kept + self.dropped} answers, {self.dropped} lie past the "
                f"first {self.block} tokens of their conversation and were dropped, "
                f"{self.shortened} were cut short; a larger data.block keeps them"
            )


@dataclass
class _Split:
    """Split a corpus into training pieces (yielded) and held-out pieces (kept)."""

    data: Data
    heldout: list[Piece] = field(default_factory=list)
    seen: int = 0

    def train(self, found: Iterable[str | Piece]) -> Iterator[Piece]:
        """Hold out every n-th piece: a part of a long text, or a whole conversation."""
        for document in found:
            if isinstance(document, Piece):
                if self._holds_out():
                    self.heldout.append(document)
                else:
                    yield document
                continue
            segment: list[str] = []
            for piece in pieces(document, length=self.data.heldout.piece_chars):
                if not self._holds_out():
                    segment.append(piece)
                    continue
                self.heldout.append(Piece(piece))
                if segment:
                    yield Piece("".join(segment), says_end=False)
                segment = []
            if segment:
                yield Piece("".join(segment))

    def _holds_out(self) -> bool:
        self.seen += 1
        return self.seen % self.data.heldout.every == 0


def _domain_blocks(
    domain: Domain, recipe: Recipe, tokenizer: PreTrainedTokenizerFast
) -> DomainBlocks:
    data, paths = recipe.data, text_files(domain.text, folder=recipe.folder)
    form: TextFormat | RowFormat = domain.text.format
    key = fingerprint(
        {
            "version": _VERSION,
            "text": text_digest(domain.text, folder=recipe.folder),
            "format": form.model_dump(),
            "template": tokenizer.chat_template if isinstance(form, ChatRows) else None,
            "block": data.block,
            "packing": data.packing,
            "heldout": data.heldout.model_dump(),
            "tokenizer": fingerprint(tokenizer.backend_tokenizer.to_str()),
            "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        }
        | ({"split_special_tokens": True} if tokenizer.split_special_tokens else {})
    )
    folder = cache_folder() / "tokens" / key[:16]

    def make(out: Path) -> dict[str, Any]:
        say(
            f"  {domain.name}: tokenising {len(paths)} file{'s' * (len(paths) > 1)}, once, into "
            "the cache"
        )
        return _write_blocks(out, domain, paths, data, tokenizer)

    make_once(folder, kind="tokens", key=key, parents={}, make=make, recipe=recipe)
    arrays = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r")
        for name in ("train_ids", "train_scored")
    }
    arrays |= {name: np.load(folder / f"{name}.npy") for name in ("train_lengths", *_HELDOUT)}
    heldout = Blocks(*(arrays[name] for name in _HELDOUT))
    return DomainBlocks(
        domain.name,
        domain.weight,
        arrays["train_ids"],
        arrays["train_scored"],
        arrays["train_lengths"],
        heldout,
    )


_HELDOUT = ("heldout_ids", "heldout_lengths", "heldout_bytes", "heldout_scored")


def _write_blocks(
    folder: Path,
    domain: Domain,
    paths: Sequence[Path],
    data: Data,
    tokenizer: PreTrainedTokenizerFast,
) -> dict[str, Any]:
    """Write one .npy file per array of `DomainBlocks` into ``folder``.

    Memory holds the held-out text and one batch of the rest.
    """
    form: TextFormat | RowFormat = domain.text.format
    require_prompts(paths[0], form)
    chat = isinstance(form, ChatRows)
    prefix = [] if chat else special_prefix(tokenizer)  # a chat template writes its own
    split, answers = _Split(data), _Answers(data.block)
    found: Iterable[str | Piece] = itertools.chain.from_iterable(
        conversations(path, form, tokenizer)
        if isinstance(form, ChatRows)
        else documents(path, form)
        for path in paths
    )
    train = tokenise(split.train(found), tokenizer)
    if data.packing == "stream":
        rows = pack_stream(train, data.block, prefix, end=_end_of_text(tokenizer))
    else:
        rows = pack_documents(answers.cut(train) if chat else train, data.block, prefix)
    lengths = _write_rows(folder, (row for row in rows if row[1].any()), data.block)
    heldout = tokenise(split.heldout, tokenizer)
    heldout_rows = [
        row
        for row in pack_documents(answers.cut(heldout) if chat else heldout, data.block, prefix)
        if row[1].any()
    ]
    if not split.seen:
        raise DataError(
            f"data.domains: {domain.name}: no text in {paths[0]}{' …' * (len(paths) > 1)}; name "
            "files with text."
        )
    training = len(lengths) if chat else int((lengths == data.block).sum())
    if not training or not heldout_rows:
        missing = _shortage(data, split, answers if chat else None, training, len(heldout_rows))
        raise DataError(f"data.domains: {domain.name}: too little text: {missing}")
    answers.say(domain.name if data.packing == "document" else f"{domain.name}, held-out text")
    if not chat:  # full blocks first, so that short documents do not dominate the loss
        heldout_rows = [row for row in heldout_rows if len(row[0]) == data.block] or heldout_rows
    chosen = _spread(heldout_rows, data.heldout.blocks)
    arrays = _heldout_arrays(chosen, data.block, tokenizer, skip_special_tokens=chat)
    for name, array in {"train_lengths": lengths, **arrays}.items():
        np.save(folder / f"{name}.npy", array)
    counts = {name: getattr(answers, name) for name in ("kept", "shortened", "dropped")}
    return {
        "train_blocks": len(lengths),
        "train_tokens": int(lengths.sum()),
        "heldout_blocks": len(chosen),
        "answers": counts if chat else None,
    }


def _spread(rows: Sequence[Row], count: int) -> list[Row]:
    """At most ``count`` rows, from all over the corpus."""
    places = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return [rows[i] for i in np.unique(places)]


def _shortage(
    data: Data, split: _Split, answers: _Answers | None, training: int, heldout: int
) -> str:
    """What was found and how to get more; ``answers`` are those of chat rows.

    ``training`` counts blocks with an answer, or full blocks of text.
    """
    if answers is not None:
        return (
            f"{training} training and {heldout} held-out blocks with an answer from {split.seen} "
            f"conversations, {answers.dropped} answers past the first {data.block} tokens; "
            "expected at least one block of each. Add conversations, or make data.block larger or "
            "data.heldout.every smaller."
        )
    return (
        f"{training} full training blocks of {data.block} tokens and {heldout} held-out blocks "
        f"from {split.seen} pieces of {data.heldout.piece_chars} characters; expected at least "
        "one of each. Add text, make data.block, data.heldout.piece_chars or data.heldout.every "
        "smaller, or join short documents with data.packing: stream."
    )


def _heldout_arrays(
    rows: Sequence[Row],
    block: int,
    tokenizer: PreTrainedTokenizerFast,
    *,
    skip_special_tokens: bool,
) -> dict[str, npt.NDArray[Any]]:
    texts = [
        tokenizer.decode(ids[scored == 1].tolist(), skip_special_tokens=skip_special_tokens)
        for ids, scored in rows
    ]
    values = (
        np.stack([_padded(ids, block) for ids, _ in rows]),
        np.array([len(ids) for ids, _ in rows], dtype=np.int32),
        np.array([len(text.encode()) for text in texts], dtype=np.int32),
        np.stack([_padded(scored, block) for _, scored in rows]),
    )
    return dict(zip(_HELDOUT, values, strict=True))


def _write_rows(folder: Path, rows: Iterable[Row], block: int) -> npt.NDArray[np.int32]:
    """Write train_ids.npy and train_scored.npy row by row, and return the length of each row."""
    lengths: list[int] = []
    with contextlib.ExitStack() as stack:
        files = [
            (stack.enter_context((folder / f"train_{name}.npy").open("wb")), np.dtype(kind))
            for name, kind in (("ids", np.int32), ("scored", np.uint8))
        ]
        for file, kind in files:
            _write_header(file, kind, (0, block))
        for row in rows:
            lengths.append(len(row[0]))
            for (file, kind), values in zip(files, row, strict=True):
                file.write(_padded(np.asarray(values, kind), block).tobytes())
        for file, kind in files:
            _write_header(file, kind, (len(lengths), block))
    return np.array(lengths, dtype=np.int32)


def _write_header(file: IO[bytes], kind: np.dtype[Any], shape: tuple[int, int]) -> None:
    # numpy pads the header so that the first axis can grow: write it again once rows are counted.
    file.seek(0)
    np.lib.format.write_array_header_1_0(
        file, {"descr": kind.str, "fortran_order": False, "shape": shape}
    )


def _padded(values: npt.NDArray[Any], block: int) -> npt.NDArray[Any]:
    row = np.zeros(block, values.dtype)
    row[: len(values)] = values
    return row


def _end_of_text(tokenizer: PreTrainedTokenizerFast) -> int:
    if not isinstance(tokenizer.eos_token_id, int):
        raise DataError(
            "data.packing: stream: the tokenizer has no end-of-text token; use packing: document."
        )
    return tokenizer.eos_token_id
