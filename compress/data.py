"""Text to token blocks: documents, held-out pieces, packing, and the order in which training sees them.

Every choice is a pure function of recipe and content, so nothing about the position in the data needs saving.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerFast

from limbeck import sources
from limbeck.artifact import find_artifact, write_artifact
from limbeck.errors import DataError
from limbeck.heldout import Blocks
from limbeck.progress import say
from limbeck.recipe import Data, Domain, JsonLines, PlainText, PythonStrings, Recipe, TextFormat, fingerprint

_VERSION = 1  # of the way text becomes blocks
IGNORED = -100


@dataclass(frozen=True)
class DomainBlocks:
    """Token blocks of one domain."""

    name: str
    weight: float
    train_ids: npt.NDArray[np.int32]  # [N, block], right-padded with 0
    train_lengths: npt.NDArray[np.int32]  # [N]
    heldout: Blocks


def load_blocks(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> list[DomainBlocks]:
    """Token blocks of every domain, from the cache where they were made before.

    Raises `DataError` for missing, empty or too little text.
    """
    return [_domain_blocks(domain, recipe, tokenizer) for domain in recipe.data.domains]


def training_order(blocks: Sequence[DomainBlocks], *, count: int, seed: int) -> npt.NDArray[np.int64]:
    """[count, 2] of (domain, row): each domain by its weight, rows shuffled anew in every pass over the domain."""
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
        shuffled = [np.random.default_rng((seed, domain, epoch)).permutation(rows) for epoch in range(passes)]
        if shuffled:
            mine = order[:, 0] == domain
            order[mine, 1] = np.concatenate(shuffled)[: int(taken[domain])]
    return order


def labels_of(
    input_ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32], *, prefix: int
) -> npt.NDArray[np.int64]:
    """[N, L] next-token labels: position t holds token t + 1; padding and the tokenizer's own prefix are ignored."""
    labels = np.full(input_ids.shape, IGNORED, dtype=np.int64)
    labels[:, :-1] = input_ids[:, 1:]
    positions = np.arange(input_ids.shape[1])
    labels[positions[None, :] + 1 >= lengths[:, None]] = IGNORED
    labels[:, : max(prefix - 1, 0)] = IGNORED
    return labels


def special_prefix(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids the tokenizer puts before any text, such as a begin-of-text token; often none."""
    ids = tokenizer("", add_special_tokens=True)["input_ids"]
    return [] if ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id else list(ids)


def documents(path: Path, form: TextFormat) -> Iterator[str]:
    """The documents of one file, empty ones left out. Raises `DataError` naming file and line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); convert it, for example with iconv.") from None
    match form:
        case PlainText():
            found: Iterator[str] = iter([text])
        case JsonLines():
            found = _json_lines(path, text, form.field)
        case PythonStrings():
            found = _python_strings(path, text, form.min_chars)
    return (document for document in found if document.strip())


def pieces(document: str, *, length: int) -> Iterator[str]:
    """Cut a document into pieces of about ``length`` characters at line ends, else at spaces; nothing is lost."""
    start = 0
    while start < len(document):
        end = start + length
        if end < len(document):
            cut = document.rfind("\n", start + length // 2, end)
            cut = cut if cut > 0 else document.rfind(" ", start + length // 2, end)
            end = cut + 1 if cut > 0 else end
        yield document[start:end]
        start = end


def _domain_blocks(domain: Domain, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> DomainBlocks:
    data, paths = recipe.data, sources.text_files(domain.text, folder=recipe.folder)
    key = fingerprint(
        {
            "version": _VERSION,
            "text": sources.text_digest(domain.text, folder=recipe.folder),
            "format": domain.text.format.model_dump(),
            "block": data.block,
            "heldout": data.heldout.model_dump(),
            "tokenizer": fingerprint(tokenizer.backend_tokenizer.to_str()),
        }
    )
    folder = sources.cache_folder() / "tokens" / key[:16]
    if find_artifact(folder, kind="tokens", key=key) is None:
        say(f"  {domain.name}: tokenising {len(paths)} file{'s' * (len(paths) > 1)}, once, into the cache")
        tensors = _tokenise(domain, paths, data, tokenizer)
        with write_artifact(folder, kind="tokens", key=key, parents={}, recipe=recipe) as draft:
            save_file(tensors, draft.folder / "blocks.safetensors")
            draft.result = {name: list(tensor.shape) for name, tensor in tensors.items()}
    tensors = load_file(folder / "blocks.safetensors")
    heldout = Blocks(tensors["heldout_ids"], tensors["heldout_lengths"], tensors["heldout_bytes"])
    return DomainBlocks(domain.name, domain.weight, tensors["train_ids"], tensors["train_lengths"], heldout)


def _tokenise(
    domain: Domain, paths: Sequence[Path], data: Data, tokenizer: PreTrainedTokenizerFast
) -> dict[str, npt.NDArray[np.int32]]:
    train, heldout, seen = [], [], 0
    for path in paths:
        for document in documents(path, domain.text.format):
            segment: list[str] = []
            for piece in pieces(document, length=data.heldout.piece_chars):
                seen += 1
                if seen % data.heldout.every == 0:
                    heldout.append(piece)
                    train.append("".join(segment))
                    segment = []
                else:
                    segment.append(piece)
            train.append("".join(segment))
    if not seen:
        raise DataError(
            f"data.domains: {domain.name}: no text in {paths[0]}{' …' * (len(paths) > 1)}; name files with text."
        )
    prefix = special_prefix(tokenizer)
    train_rows = _pack([t for t in train if t], data.block, prefix, tokenizer)
    heldout_rows = _pack(heldout, data.block, prefix, tokenizer)
    full = sum(len(row) == data.block for row in train_rows)
    if not full or not heldout_rows:
        raise DataError(
            f"data.domains: {domain.name}: too little text: {full} full training blocks of {data.block} tokens and "
            f"{len(heldout_rows)} held-out blocks from {seen} pieces of {data.heldout.piece_chars} characters; expected at "
            "least one of each. Add text, or make data.block, data.heldout.piece_chars or data.heldout.every smaller."
        )
    # Spread over the corpus; full blocks first, so that short documents do not fill the measurement.
    heldout_rows = [row for row in heldout_rows if len(row) == data.block] or heldout_rows
    chosen = np.unique(
        np.linspace(0, len(heldout_rows) - 1, min(data.heldout.blocks, len(heldout_rows))).round().astype(int)
    )
    heldout_rows = [heldout_rows[i] for i in chosen]
    sizes = [len(tokenizer.decode(row[max(len(prefix), 1) :]).encode()) for row in heldout_rows]
    train_ids, train_lengths = _padded(train_rows, data.block)
    heldout_ids, heldout_lengths = _padded(heldout_rows, data.block)
    return {
        "train_ids": train_ids,
        "train_lengths": train_lengths,
        "heldout_ids": heldout_ids,
        "heldout_lengths": heldout_lengths,
        "heldout_bytes": np.array(sizes, dtype=np.int32),
    }


def _pack(texts: Sequence[str], block: int, prefix: list[int], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Blocks of at most ``block`` tokens that never cross a text; a tail of one token has nothing to predict."""
    rows, room = [], block - len(prefix)
    for encoding in tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False):
        ids = encoding.ids
        rows += [prefix + ids[i : i + room] for i in range(0, len(ids), room) if len(ids) - i > 1]
    return rows


def _padded(rows: Sequence[Sequence[int]], block: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    ids = np.zeros((len(rows), block), dtype=np.int32)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    return ids, np.array([len(row) for row in rows], dtype=np.int32)


def _json_lines(path: Path, text: str, field: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error.msg}; each line is one JSON object.") from None
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            keys = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
            raise DataError(
                f"{path}, line {number}: no text under {field!r} (found: {keys}); set format.field to the right key."
            )
        yield row[field]


def _python_strings(path: Path, text: str, min_chars: int) -> Iterator[str]:
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise DataError(f"{path}, line {error.lineno}: not Python: {error.msg}.") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= min_chars:
            yield node.value
