"""Regular expressions in adapters and tokenizers, which may take exponential time.

A process of their own tries them first, since Python cannot stop a search. Knows how peft compares
them with the names of layers, and the parts of a tokenizer.json; knows nothing else of either.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from limbeck.contract.child import Child, TooMuch
from limbeck.contract.errors import ModelError

LONGEST = 5.0  # seconds of a processor for all patterns of an adapter
_CHILD = Child()
_REPEATS = re.compile(r"[*+?{|]")  # without one of these, a pattern has one way to match
# What peft 0.21.2 writes around a pattern.
_AROUND = (
    ("(?:", r")\Z"),  # of the layers that change
    (r"(.*\.)?(", ")$"),  # of layers with a rank of their own
    (r"(^|.*\.)", r"($|\..*)"),  # of saved modules
    (r"(?:^|.*?\.)", r"\.(\d+)\."),  # of numbered layers
)
# A tokenizer reads runs of these, short enough for an honest pattern of cubic time.
_RUN = 256  # characters
_KINDS = (
    "a",
    "A",
    "0",
    " ",
    "\n",
    "\t",
    ".",
    "-",
    "é",
    "世",
    "\u0301",
    "a ",
    "Ab1 ",
    ". \n",
    "'s ",
    "<|",
)
_PARTS = ("normalizer", "pre_tokenizer", "decoder")
_LONGEST_PART = 1.0  # seconds; SmolLM2's patterns take 0.03 s


def require_quick(path: Path, config: Any, names: Sequence[str]) -> None:
    """Raise `ModelError` if a pattern in ``config`` takes too long on the layers' ``names``."""
    patterns = sorted({text for text in _texts(config) if _REPEATS.search(text)})
    if not patterns:
        return
    try:
        _CHILD.call(_match_all, patterns, list(names), seconds=LONGEST)
    except TooMuch as error:
        raise ModelError(
            f"{path}: the names of the layers cannot be compared with a pattern in it: {error} "
            f"({', '.join(patterns)[:200]}). Write a list of names instead."
        ) from None


def require_quick_tokenizer(path: Path, tree: Mapping[str, Any]) -> None:
    """Raise `ModelError` if a pattern in ``tree``, read from the tokenizer.json at ``path``, takes
    too much time or memory on texts of 256 characters of a kind."""
    parts = {name: tree.get(name) for name in _PARTS}
    if '"Regex": ' not in (written := json.dumps(parts)):
        return
    if (why := _fault(written)) is not None:
        raise ModelError(
            f"{path}: what changes and splits text in it cannot be used: {why}. Take another "
            "model, or correct its regular expressions."
        )


@lru_cache(64)
def _fault(parts: str) -> str | None:
    try:
        _CHILD.call(_read_all, parts, seconds=_LONGEST_PART)
    except (TooMuch, RuntimeError) as error:  # a RuntimeError: tokenizers gives up by a panic
        return str(error)
    return None


def _read_all(parts: str) -> None:
    from tokenizers import Tokenizer

    model = {"type": "BPE", "vocab": {}, "merges": []}
    try:
        tokenizer = Tokenizer.from_str(
            json.dumps(json.loads(parts) | {"version": "1.0", "added_tokens": [], "model": model})
        )
    except Exception:
        return  # the message about the whole file is better
    runs, stderr = [(kind * _RUN)[:_RUN] for kind in _KINDS], os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a panic would write its own lines there
    try:
        for text in (*runs, "".join(runs)):
            if tokenizer.normalizer is not None:
                tokenizer.normalizer.normalize_str(text)
            if tokenizer.pre_tokenizer is not None:
                tokenizer.pre_tokenizer.pre_tokenize_str(text)
            if tokenizer.decoder is not None:
                tokenizer.decoder.decode([text])
    finally:
        os.dup2(stderr, 2)


def _match_all(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        for before, after in _AROUND:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = re.compile(before + pattern + after)
            except (re.error, OverflowError, RecursionError):
                continue  # peft's own message is better
            for name in names:
                found.match(name)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value of JSON, with the keys of its objects."""
    left = [value]
    while left:
        match left.pop():
            case str(text):
                yield text
            case dict(found):
                left += [*found, *found.values()]
            case list(found):
                left += found
