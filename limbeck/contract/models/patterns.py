"""Regular expressions in the configuration of an adapter, which may take exponential time.

A process of their own tries them first, since Python cannot stop a search. Knows how peft compares
them with the names of layers; knows nothing else of adapters.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
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


def require_quick(path: Path, config: Any, names: Sequence[str]) -> None:
    """Raise `ModelError` if a pattern in ``config``, read from ``path``, takes too much time or
    memory on the ``names`` of the layers.
    """
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
