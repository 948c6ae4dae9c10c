"""Grammars that an answer must follow: any JSON, a JSON schema, or a text in llguidance's Lark.

Knows llguidance, and imports it when it is first needed; knows nothing of requests. A token that
the grammar forbids gets no probability, so an answer that ends by itself is always complete.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from limbeck.contract.child import Child, TooMuch
from limbeck.contract.errors import DataError, EnvironmentalError

LONGEST = 5.0  # seconds of a processor for one grammar
_CHILD = Child()
# Clients send the same schema again and again. Compiled, 1 MB of text took up to 61 MB of memory.
_KEPT = 64  # compiled grammars
_KEPT_TEXT = 4_000_000  # characters of their texts together
# Models write JSON on one line or indented. More freedom lets a small model write blanks for ever.
_JSON = {"whitespace_flexible": True, "whitespace_pattern": r"[ ]?|\n[ ]{0,32}", "lenient": False}


class GrammarError(DataError):
    """A grammar that cannot be compiled, or that became too complex within an answer."""


def json_rule(schema: Mapping[str, Any]) -> str:
    """The Lark expression for a value of a JSON schema. ``{"type": "object"}`` is any object."""
    return f"%json {json.dumps({**schema, 'x-guidance': _JSON})}"


class Constraint:
    """A grammar and how far one answer has come in it."""

    def __init__(self, matcher: Any, vocabulary: int, stop_ids: frozenset[int]) -> None:
        self._matcher, self._vocabulary, self._stop_ids = matcher, vocabulary, stop_ids
        self.ended = False  # whether a stop token was accepted

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Whether each token ``[V]`` may come next; stop tokens may once the text is complete.

        Raises `GrammarError` when the matcher reaches its limits.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed: {_first_line(self._matcher)}.")
        return np.unpackbits(bits, count=self._vocabulary, bitorder="little").astype(bool)

    def accept(self, token: int) -> None:
        """Go on by one token of the answer. Raises `GrammarError` as `allowed` does."""
        self.ended = token in self._stop_ids
        if not self.ended and not self._matcher.consume_token(token):
            raise GrammarError(f"the grammar cannot be followed: {_first_line(self._matcher)}.")


class Grammar:
    """A compiled grammar. It may be used by any number of answers at once."""

    def __init__(self, matcher: Any, vocabulary: int, stop_ids: frozenset[int]) -> None:
        self._matcher, self._vocabulary, self._stop_ids = matcher, vocabulary, stop_ids

    def begin(self) -> Constraint:
        """The grammar at the beginning of an answer."""
        return Constraint(self._matcher.deep_copy(), self._vocabulary, self._stop_ids)


class Grammars:
    """Compiles grammars for one tokenizer, and keeps those compiled last. Safe for threads."""

    def __init__(self, tokenizer: Any, *, vocabulary: int, stop_ids: Collection[int]) -> None:
        """``vocabulary`` is the number of logits; ``stop_ids`` end an answer, one at least."""
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._stop_ids = frozenset(stop_ids)
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Grammar] = OrderedDict()
        self._open: Any = None  # llguidance's view of the tokenizer

    def compile(self, lark: str) -> Grammar:
        """Compile a grammar in llguidance's dialect of Lark.

        Raises `GrammarError` for what it cannot express, `EnvironmentalError` without llguidance.
        """
        if (known := self._kept(lark)) is not None:
            return known
        llguidance = import_llguidance()
        try:
            _CHILD.call(_try, lark, seconds=LONGEST)
        except TooMuch as error:
            raise GrammarError(f"it is too complex ({error})") from None
        with self._lock:
            if self._open is None:
                self._open = self._opened(llguidance)
            matcher = llguidance.LLMatcher(
                self._open, llguidance.LLMatcher.grammar_from_lark(lark), log_level=0
            )
            if matcher.is_error():
                raise GrammarError(_first_line(matcher))
            self._known[lark] = grammar = Grammar(matcher, self._vocabulary, self._stop_ids)
            while len(self._known) > _KEPT or sum(map(len, self._known)) > _KEPT_TEXT:
                self._known.popitem(last=False)
            return grammar

    def _kept(self, lark: str) -> Grammar | None:
        with self._lock:
            if lark in self._known:
                self._known.move_to_end(lark)
            return self._known.get(lark)

    def _opened(self, llguidance: Any) -> Any:
        if not self._stop_ids:
            raise GrammarError("this model has no stop token, so nothing could end the answer")
        try:
            return llguidance.LLTokenizer(
                self._tokenizer.to_str(), n_vocab=self._vocabulary, eos_token=sorted(self._stop_ids)
            )
        except Exception as error:  # llguidance raises no class of its own
            raise GrammarError(f"llguidance cannot use this model's tokenizer: {error}") from error


def _try(lark: str) -> None:
    """Compile a grammar in a child process, since some take all memory and never end.

    Its tokens are bytes: what a grammar takes does not depend on the tokenizer.
    """
    llguidance = import_llguidance()
    tokenizer = llguidance.LLTokenizer("byte")
    llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(lark), log_level=0)


def import_llguidance() -> Any:
    """Return the llguidance module. Raises `EnvironmentalError` when it is missing."""
    try:
        import llguidance
    except ImportError:
        raise EnvironmentalError(
            "llguidance is not installed; run: pip install 'limbeck[serve]'."
        ) from None
    return llguidance


def _first_line(matcher: Any) -> str:
    """The matcher's error without its place in the grammar, which clients do not see."""
    line = str(matcher.get_error()).partition("\n")[0]
    _, _, after = line.partition("failed to compile JSON schema: ")
    return (after or line).rstrip(".")
