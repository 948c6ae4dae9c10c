"""Models whose tokenizer is a SentencePiece file alone, held to the package sentencepiece."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from limbeck.contract.errors import EnvironmentalError, ModelError
from limbeck.contract.models.tokens import tokenizer_size
from limbeck.contract.sources.preflight import preflight
from limbeck.contract.sources.tokenizer import load_tokenizer
from tests.pico import make_model, pico_recipe

TEXT = [
    "The cat sat on the mat, and the dog sat on the log; 1234 5678 years of 2024.",
    "Ünïcode “quotes” and  two spaces, naïve café: 語言模型 は 日本語.",
]
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "llama": ({**PLAIN, "split_digits": True}, "tokenizer.model", "LlamaTokenizer"),
    "gemma": (
        {**PLAIN, "split_digits": True, "add_dummy_prefix": False, "pad_id": 0, "eos_id": 1,
         "bos_id": 2, "unk_id": 3},
        "tokenizer.model", "GemmaTokenizer",
    ),
    "t5": ({"model_type": "unigram", "byte_fallback": False}, "spiece.model", "T5Tokenizer"),
}  # fmt: skip


def without_tokenizer(folder: Path, rows: int) -> Path:
    make_model(folder, vocab_size=rows)
    for path in [*folder.glob("token*"), *folder.glob("chat*")]:
        path.unlink()
    return folder


def trained(root: Path, kind: str, *, rows: int) -> Path:
    """A model folder with what sentencepiece trains on `TEXT`, of 330 pieces."""
    import sentencepiece

    options, file, class_ = KINDS[kind]
    (root / "text.txt").write_text("\n".join(TEXT * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "text.txt"), model_prefix=str(root / "made"), minloglevel=2,
        **{"vocab_size": 330, "model_type": "bpe", "byte_fallback": True, "num_threads": 1,
           "hard_vocab_limit": False, "unk_id": 0, "bos_id": 1, "eos_id": 2, **options},
    )  # fmt: skip
    folder = without_tokenizer(root / kind, rows)
    (root / "made.model").rename(folder / file)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": class_}))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_sentencepiece_is_read_as_sentencepiece_reads_it(
    tmp_path: Path, kind: str
) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    folder = trained(tmp_path, kind, rows=500)
    own = sentencepiece.SentencePieceProcessor(model_file=str(next(folder.glob("*.model"))))
    assert tokenizer_size(folder) == own.get_piece_size()
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.tokenize(t) for t in TEXT] == [own.encode(t, out_type=str) for t in TEXT]
    # Of another class, or of none, transformers cuts the first word in another way.
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer" if kind == "gemma" else "GemmaTokenizer"})
    )
    with pytest.raises(ModelError, match=r"cuts a text in other places.*where sentencepiece has"):
        load_tokenizer(folder)


def test_tokens_that_only_the_class_adds_need_rows_too(tmp_path: Path) -> None:
    """T5's class adds a hundred tokens that are not in the file."""
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    folder = trained(tmp_path, "t5", rows=500)
    config, rows = folder / "config.json", (tokenizer_size(folder) or 0) + 50
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": rows}))
    with pytest.raises(ModelError, match=rf"has {rows + 51} tokens, but its embedding has {rows}"):
        load_tokenizer(folder)


def message(number: int, content: bytes) -> bytes:
    """A field of a protobuf, as the format's documentation has it."""
    size, out = len(content), bytes([number << 3 | 2])
    while size > 127:
        size, out = size >> 7, out + bytes([size & 127 | 128])
    return out + bytes([size]) + content


@pytest.mark.parametrize(("name", "size"), [("tokenizer.model", 300), ("vocab.txt", 300)])
def test_rows_are_counted_before_anything_is_loaded(
    tmp_path: Path, name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = without_tokenizer(tmp_path / "model", 258)
    pieces = [f"piece {n} {'x' * n}".encode() for n in range(size)]
    content = b"\n".join(pieces)
    if name != "vocab.txt":
        content = b"".join(message(1, message(1, piece)) for piece in pieces)
        content += message(2, b"a trainer's settings")
    (folder / name).write_bytes(content)
    assert tokenizer_size(folder) == size
    recipe = pico_recipe(teachers=[{"name": "t", "model": {"kind": "local", "path": str(folder)}}])
    (found,) = [line for line in preflight(recipe) if line.startswith("teachers.0")]
    assert "its tokenizer has 300 tokens, but its embedding has 258 rows" in found
    if name == "vocab.txt":
        return
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EnvironmentalError, match=r"needs the package sentencepiece; run: pip"):
        load_tokenizer(folder)
    # A file of tiktoken may have the same name.
    (folder / name).write_bytes(b"IQ== 0\nIg== 1\n")
    assert tokenizer_size(folder) is None
