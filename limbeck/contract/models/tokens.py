"""Tokenizers as files hold them, and what has to be switched off before they read text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MORE_TEMPLATES = "additional_chat_templates"  # folder of the named ones, as transformers saves it


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


def chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates of a model folder by name, those of files before those of ``config``.

    ``config`` is what tokenizer_config.json holds. The template without a name is ``default``.
    """
    written = config.get("chat_template")
    many = written if isinstance(written, list) else [{"name": "default", "template": written}]
    named = [t for t in many if isinstance(t, dict) and isinstance(t.get("template"), str)]
    found = {str(t.get("name", "default")): t["template"] for t in named}
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in (folder / MORE_TEMPLATES).glob("*.jinja")}
    return found | {n: path.read_text("utf-8") for n, path in files.items() if path.is_file()}


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name (``bos_token`` and others), of what tokenizer_config.json holds."""
    given = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in config.items()
        if name.endswith("_token")
    }
    return {name: value for name, value in given.items() if isinstance(value, str)}


def same_chat(one: Path, other: Path) -> bool:
    """Whether two model folders have chat templates, and these write a conversation alike."""
    templates, tokens = [], []
    for folder in (one, other):
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        templates.append(chat_templates(folder, config))
        tokens.append(special_tokens(config))
    if not templates[0] or templates[0] != templates[1]:
        return False
    used = [n for n in tokens[0] | tokens[1] if any(n in text for text in templates[0].values())]
    return all(tokens[0].get(name) == tokens[1].get(name) for name in used)
