"""Tokenizers as files hold them, and what has to be switched off before they read text."""

from __future__ import annotations

from typing import Any


def as_written(tokenizer: Any, *, split_special: bool = False) -> Any:
    """``tokenizer``, of the package tokenizers, so that a text always gives all of its tokens.

    A file may still hold what a training used: a length that texts are cut to or filled up to, and
    a share of BPE merges that are left out at random. ``split_special`` reads the names of special
    tokens in a text as text (``split_special_tokens`` in tokenizer_config.json).
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    if split_special:
        tokenizer.encode_special_tokens = True
    return tokenizer
