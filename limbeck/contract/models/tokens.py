"""Tokenizers as files hold them, and what has to be switched off before they read text."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from limbeck.contract.errors import DataError, LimbeckError, ModelError
from limbeck.contract.files import parse_json
from limbeck.contract.models.patterns import require_quick_tokenizer

_MOST_GROWTH = 64  # characters for one; Unicode's longest ligature becomes 18
MORE_TEMPLATES = "additional_chat_templates"  # folder of the named ones, as transformers saves it


@contextmanager
def tokenizers_errors(what: Path | str) -> Iterator[None]:
    """Turn what the package tokenizers raises into a `ModelError` that names ``what``.

    It raises plain `Exception` for most faults of a file, and for a panic of its own code a
    `BaseException`, which no `except Exception` catches.
    """
    try:
        yield
    except (LimbeckError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ModelError(
            f"{what}: no tokenizer that can be read ({type(error).__name__}: {error}); save the "
            "tokenizer again."
        ) from error


@contextmanager
def text_errors() -> Iterator[None]:
    """Turn a panic of the package tokenizers over a text into a `DataError`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"the model's tokenizer fails on this text ({error}); leave the text out, or take a "
            "model with another tokenizer."
        ) from None


def read_tokenizer(path: Path) -> Any:
    """The tokenizer of a tokenizer.json, `as_written`. Raises `ModelError`."""
    from tokenizers import Tokenizer  # `validate` of most recipes needs none of it

    with tokenizers_errors(path):
        require_bounded(path)
        return as_written(Tokenizer.from_file(str(path)), path)


def require_bounded(path: Path) -> None:
    """Refuse a tokenizer.json whose rules multiply a text or take too long, with a `ModelError`, or
    a `ValueError` for what is no JSON.

    The package tokenizers applies them when it opens the file, to the tokens that were added.
    """
    tree = parse_json(path.read_bytes())
    for part in ("normalizer", "decoder"):
        _require_growth(tree.get(part), path)
    require_quick_tokenizer(path, tree)


def _require_growth(tree: Any, where: Path | str) -> None:
    if _growth(tree) > _MOST_GROWTH:
        raise ModelError(
            f"{where}: its normalizers or decoders may replace one character by more than "
            f"{_MOST_GROWTH}, so a text could fill the memory. Take another model, or correct "
            "these rules."
        )


def _growth(tree: Any) -> int:
    """Characters that the rules of a normalizer or decoder make of one character, at most."""
    match tree:
        case {"normalizers": [*rules]} | {"decoders": [*rules]}:
            return math.prod(map(_growth, rules))
        case {"type": "Replace", "content": str(text)}:
            return max(len(text), 1)
        case {"type": "Precompiled", "precompiled_charsmap": str(written)}:
            table = base64.b64decode(written)  # the size of a trie, the trie, and texts
            texts = table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")
            return max(1, *(len(text.decode(errors="replace")) for text in texts))
        case _:
            return 1


def as_written(tokenizer: Any, where: Path | str, *, split_special: bool = False) -> Any:
    """``tokenizer``, of the package tokenizers, so that a text always gives all of its tokens.

    A file may still hold what a training used: a length that texts are cut to or filled up to, and
    a share of BPE merges that are left out at random. ``split_special`` reads the names of special
    tokens in a text as text (``split_special_tokens`` in tokenizer_config.json). Raises
    `ModelError` that names ``where`` if its normalizers multiply a text.
    """
    if (normalizer := tokenizer.normalizer) is not None:  # which a SentencePiece file has too
        rules = normalizer.__getstate__()
        _require_growth(parse_json(rules), where)
        if b"precompiled_charsmap" in rules:  # a wrong table ends in a panic at some characters
            with tokenizers_errors(where):
                normalizer.normalize_str(
                    "".join(map(chr, (*range(0xD800), *range(0xE000, 1 << 16))))
                )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    if split_special:
        tokenizer.encode_special_tokens = True
    return tokenizer


def tokenizer_size(folder: Path) -> int | None:
    """Largest token id of a folder's tokenizer, plus one; None where no vocabulary is found.

    Further tokens may be in tokenizer_config.json or, where it lists none, in added_tokens.json.
    Raises `ModelError` for a file that cannot be read.
    """
    ids: list[int] = []
    path = folder / "tokenizer.json"
    try:
        if (tree := _read(path)) is not None:
            vocabulary = tree["model"]["vocab"]  # of Unigram a list, numbered by its order
            ids += vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
            ids += (token["id"] for token in tree.get("added_tokens") or ())
        elif (vocabulary := _read(path := folder / "vocab.json")) is not None:
            ids += vocabulary.values()
        elif (path := folder / "vocab.txt").is_file():
            ids += range(path.read_bytes().rstrip(b"\n").count(b"\n") + 1)
        elif (pieces := sentencepiece_file(folder)) is not None:
            ids += range(count_pieces(pieces.read_bytes()))
        else:
            return None
        config = _read(path := folder / "tokenizer_config.json") or {}
        if "added_tokens_decoder" in config:
            ids += map(int, config["added_tokens_decoder"] or ())
        else:
            ids += (_read(path := folder / "added_tokens.json") or {}).values()
        return 1 + max(ids, default=-1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); save the tokenizer again."
        ) from None


def _read(path: Path) -> Any:
    return parse_json(path.read_text(encoding="utf-8")) if path.is_file() else None


def sentencepiece_file(folder: Path) -> Path | None:
    """The SentencePiece file that a tokenizer has to be made of; None where there is a better one.

    A tiktoken file may have such a name too.
    """
    if any(match for pattern in _BETTER for match in folder.glob(pattern)):
        return None
    found = sorted(path for path in folder.glob("*.model") if path.is_file())
    return next((path for path in found if count_pieces(path.read_bytes())), None)


_BETTER = ("tokenizer.json", "vocab.*", "tekken.json", "*.tiktoken")
_PIECE = 1 << 3 | 2  # key of `repeated SentencePiece pieces = 1` in the protobuf of a model


def count_pieces(content: bytes) -> int:
    """Number of pieces in the bytes of a SentencePiece file; 0 where they are something else."""
    at, count = 0, 0
    while at < len(content):
        key, at = _varint(content, at)
        size, at = _varint(content, at)
        if key & 7 != 2 or at + size > len(content):  # a message of messages only
            return 0
        count, at = count + (key == _PIECE), at + size
    return count


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A number of a protobuf at a place of its bytes, and the place behind it."""
    value = shift = 0
    while at < len(content):
        byte, at = content[at], at + 1
        value, shift = value | (byte & 0x7F) << shift, shift + 7
        if byte < 0x80 or shift > 63:
            break
    return value, at


def chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates of a model folder by name, those of files before those of ``config``.

    ``config`` is what tokenizer_config.json holds. The template without a name is ``default``.
    Raises `ModelError` for a file that is not UTF-8.
    """
    written = config.get("chat_template")
    by_name = written if isinstance(written, dict) else {"default": written}
    many = [{"name": name, "template": text} for name, text in by_name.items()]
    many = written if isinstance(written, list) else many
    named = [t for t in many if isinstance(t, dict) and isinstance(t.get("template"), str)]
    found = {str(t.get("name", "default")): t["template"] for t in named}
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in (folder / MORE_TEMPLATES).glob("*.jinja")}
    for name, path in files.items():
        try:
            found |= {name: path.read_text("utf-8")} if path.is_file() else {}
        except UnicodeDecodeError:
            raise ModelError(f"{path}: not UTF-8 text; save it as UTF-8.") from None
    return found


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name (``bos_token`` and others), of what tokenizer_config.json holds."""
    given = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in config.items()
        if name.endswith("_token")
    }
    return {name: value for name, value in given.items() if isinstance(value, str)}
