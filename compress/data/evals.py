"""Rows of the short evaluations, in the student's tokens.

The texts are on every machine with Python: its library and its documentation.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from compress.data.blocks import DomainBlocks
from compress.data.packing import special_prefix
from compress.head import Head
from limbeck.contract.data.heldout import Blocks
from limbeck.contract.models.tokens import text_errors

_BLOCK, _BLOCKS = 256, 5  # tokens and rows of a text
_CONTEXT, _ROWS = 64, 24  # tokens before an answer, and rows of an evaluation or a domain
_LINE = (12, 60)  # characters of a line that is to be written
_WORD_STARTS = ("\u0120", "\u2581")  # of byte-level and sentencepiece-like vocabularies

Row = tuple[list[int], list[int]]  # token ids, and 1 where a token is scored


def evaluation_rows(
    tokenizer: PreTrainedTokenizerFast,
    heldout: Sequence[DomainBlocks],
    *,
    longest: int,
    vocabulary: int,
) -> dict[str, Blocks]:
    """The rows of each evaluation.

    Rows of more than ``longest`` tokens, or with an id of ``vocabulary`` or more, are left out.
    There is no ``last_word`` where the tokenizer does not mark the start of a word.
    """
    made: dict[str, Iterable[Row]] = {
        "facts": _facts(tokenizer),
        "last_word": _last_words(tokenizer, heldout),
        "next_line": _next_lines(tokenizer, Path(argparse.__file__).read_text("utf-8")),
        "prose": _text(tokenizer, "\n".join(pydoc_data.topics.topics.values()), longest),
        "python": _text(tokenizer, Path(statistics.__file__).read_text("utf-8"), longest),
    }
    fitting = {
        name: [(ids, s) for ids, s in rows if len(ids) <= longest and max(ids) < vocabulary]
        for name, rows in made.items()
    }
    return {name: _blocks(tokenizer, rows) for name, rows in fitting.items() if rows}


def facts() -> list[tuple[str, str]]:
    """Prompts and answers of facts.yaml."""
    text = files("compress.data").joinpath("facts.yaml").read_text(encoding="utf-8")
    return [(fact["prompt"], fact["answer"]) for fact in yaml.safe_load(text)]


def _facts(tokenizer: PreTrainedTokenizerFast) -> Iterator[Row]:
    prefix = special_prefix(tokenizer)
    for prompt, answer in facts():
        yield _answered(prefix + _ids(tokenizer, prompt), _ids(tokenizer, answer))


def _last_words(
    tokenizer: PreTrainedTokenizerFast, heldout: Sequence[DomainBlocks]
) -> Iterator[Row]:
    """The last word of the first tokens of each block, if it is whole: another word follows."""
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    starts = np.array([name is not None and name[:1] in _WORD_STARTS for name in names])
    for domain in heldout:
        blocks = domain.heldout
        for ids, length in list(zip(blocks.input_ids, blocks.lengths, strict=True))[:_ROWS]:
            row = ids[: min(length, _CONTEXT)]
            words = np.flatnonzero(starts[np.minimum(row, len(starts) - 1)])[-2:].tolist()
            if len(words) == 2 and words[0] > 0:
                yield _answered(row[: words[0]].tolist(), row[words[0] : words[1]].tolist())


def _next_lines(tokenizer: PreTrainedTokenizerFast, source: str) -> Iterator[Row]:
    """Lines of code at even distances, after the lines before them."""
    lines = source.splitlines(keepends=True)
    code = [
        number
        for number, line in enumerate(lines)
        if number > 8
        and _LINE[0] <= len(line.strip()) <= _LINE[1]
        and line.strip()[0] not in "#\"'"
    ]
    prefix = special_prefix(tokenizer)
    for number in code[:: max(len(code) // _ROWS, 1)][:_ROWS]:
        before = _ids(tokenizer, "".join(lines[number - 8 : number]))[-_CONTEXT:]
        yield _answered(prefix + before, _ids(tokenizer, lines[number]))


def _text(tokenizer: PreTrainedTokenizerFast, text: str, longest: int) -> Iterator[Row]:
    prefix = special_prefix(tokenizer)
    width = min(_BLOCK, longest) - len(prefix)
    # A token has a character at least; eight are more than the average of any tokenizer.
    ids = _ids(tokenizer, text[: 8 * _BLOCK * _BLOCKS])
    for start in range(0, min(len(ids), width * _BLOCKS) - width + 1, width):
        row = ids[start : start + width]
        yield prefix + row, [0] * max(len(prefix), 1) + [1] * (width - (not prefix))


def _answered(prompt: list[int], answer: list[int]) -> Row:
    return prompt + answer, [0] * len(prompt) + [1] * len(answer)


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    with text_errors():
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _blocks(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> Blocks:
    width = max(len(ids) for ids, _ in rows)
    scored = np.array([marks + [0] * (width - len(marks)) for _, marks in rows], np.uint8)
    texts = [
        tokenizer.decode([token for token, mark in zip(*row, strict=True) if mark]) for row in rows
    ]
    return Blocks(
        input_ids=np.array([ids + [0] * (width - len(ids)) for ids, _ in rows], np.int32),
        lengths=np.array([len(ids) for ids, _ in rows], np.int32),
        utf8_bytes=np.array([len(text.encode()) for text in texts], np.int32),
        scored=scored,
    )


@torch.no_grad()
def evaluate_rows(
    rows: dict[str, Blocks], states_of: Callable[[Tensor], Tensor], head: Head
) -> dict[str, dict[str, list[float]]]:
    """Score each row: nats of its scored tokens, and how many of them are the first choice.

    ``states_of`` gives the last hidden states ``[L, d]`` of token ids ``[L]``.
    """
    return {
        name: _scored([_row_of(blocks, index) for index in range(len(blocks))], states_of, head)
        for name, blocks in rows.items()
    }


def _row_of(blocks: Blocks, index: int) -> tuple[Tensor, Tensor]:
    length = blocks.lengths[index]
    ids, marks = blocks.input_ids[index, :length], blocks.scored[index, :length]
    return torch.from_numpy(ids).long(), torch.from_numpy(marks).bool()


def _scored(
    rows: Iterable[tuple[Tensor, Tensor]], states_of: Callable[[Tensor], Tensor], head: Head
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"nll": [], "right": []}
    for ids_L, scored_L in rows:
        # Most rows are a long prompt and a short answer: the head reads the answer alone.
        logits_NV = head.logits(states_of(ids_L)[:-1][scored_L[1:]]).cpu()
        wanted_N = ids_L[1:][scored_L[1:]]
        nll = torch.nn.functional.cross_entropy(logits_NV, wanted_N, reduction="sum")
        found["nll"].append(float(nll))
        found["right"].append(int((logits_NV.argmax(-1) == wanted_N).sum()))
    return found
