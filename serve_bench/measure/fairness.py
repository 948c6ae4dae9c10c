"""Check that compared arms do the same work; a mismatch is an error, not a footnote.

Knows the facts that workers report about themselves and each generation; knows nothing of time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from limbeck.contract.errors import DataError


def require_same_work(
    arm: str, answer: Mapping[str, Any], *, rows: int, prompt_tokens: int, new_tokens: int
) -> None:
    """Raise `DataError` unless a generation read and wrote exactly the tokens that were asked."""
    lengths = sorted({len(row) for row in answer["rows"]} | {len(answer["at"])})
    if answer["prompt_tokens"] != prompt_tokens:
        raise DataError(
            f"{arm}: counted {answer['prompt_tokens']} prompt tokens where {prompt_tokens} were "
            "given, so it does other work than "
            "the rest; leave it out, or (for a server) turn off whatever adds tokens to a prompt."
        )
    if len(answer["rows"]) != rows or lengths != [new_tokens]:
        raise DataError(
            f"{arm}: generated {len(answer['rows'])} rows of {lengths} tokens where {rows} of "
            f"{new_tokens} were asked, so it does other work than the rest; leave it out, or (for "
            "a server) let it honour max_tokens and ignore_eos."
        )


def manifest(
    facts: Mapping[str, Mapping[str, Any]], *, prompts: Sequence[Sequence[int]], **asked: Any
) -> dict[str, Any]:
    """The settings that all arms share, from each arm's ``facts``.

    A runtime behind a URL does not know its threads and cache, so it is left out of those two.
    Raises `DataError` with the arms that differ in threads or KV cache, or lack a token of the
    prompts.
    """
    common: dict[str, Any] = dict(asked)
    for what, hint in (
        ("threads", "bench.threads sets it for all"),
        ("kv_cache", "without one, decoding is other work"),
    ):
        known = {arm: fact[what] for arm, fact in facts.items() if fact.get(what) is not None}
        values = sorted(set(known.values()))
        if len(values) > 1:
            apart = ", ".join(f"{arm} {value}" for arm, value in known.items())
            raise DataError(
                f"these arms cannot be compared: they differ in {what} ({apart}); {hint}."
            )
        common[what] = values[0] if values else None
    if common["kv_cache"] is False:
        raise DataError(
            "these arms keep no KV cache, so every token costs the whole prompt again; measure "
            "with one."
        )
    largest = max(token for prompt in prompts for token in prompt)
    for arm, fact in facts.items():
        if fact.get("vocabulary") is not None and largest >= fact["vocabulary"]:
            raise DataError(
                f"{arm} knows {fact['vocabulary']} tokens, the prompts hold token {largest}: the "
                "same tokens are not the same text to it. Compare models of one vocabulary."
            )
    digest = hashlib.sha256(json.dumps([list(prompt) for prompt in prompts]).encode()).hexdigest()
    return {**common, "prompts_sha256": digest}
