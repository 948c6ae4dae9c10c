"""Tokenizers and adapters that were made to fill the memory, or to keep a program busy for ever."""

from __future__ import annotations

import base64
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers
from tokenizers.models import WordLevel

from limbeck.contract.errors import DataError, ModelError
from limbeck.contract.models import patterns
from limbeck.contract.models.patterns import require_quick
from limbeck.contract.models.tokens import read_tokenizer, tokenizers_errors
from limbeck.runtime.text import Text


def replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def charsmap(*texts: str) -> dict[str, Any]:
    """Rules of SentencePiece: a trie that maps nothing, and the texts."""
    table = (1024).to_bytes(4, "little") + bytes(1024) + "\0".join(texts).encode()
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


def write(path: Path, **parts: Any) -> Path:
    tokenizer = Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    path.write_text(json.dumps(json.loads(tokenizer.to_str()) | parts))
    return path


MANY = [replace("a", "aaa"), {"type": "NFKC"}, {"type": "Lowercase"}]


@pytest.mark.parametrize(
    ("part", "rules"),
    [
        ("normalizer", replace("a", "b" * 65)),
        ("normalizer", {"type": "Sequence", "normalizers": [*MANY, *MANY, *MANY, *MANY]}),
        ("normalizer", charsmap("b", "é" * 65, "c")),
        ("decoder", {"type": "Sequence", "decoders": [{"type": "Fuse"}, replace("a", "b" * 99)]}),
    ],
)
def test_rules_that_multiply_a_text_are_refused(tmp_path: Path, part: str, rules: Any) -> None:
    path = write(tmp_path / "tokenizer.json", **{part: rules})
    with pytest.raises(ModelError, match=rf"^{re.escape(str(path))}: its normalizers or decoders"):
        read_tokenizer(path)


@pytest.mark.parametrize(
    "rules", [None, charsmap("b", "é" * 18), {"type": "Sequence", "normalizers": MANY}]
)
def test_rules_of_real_tokenizers_are_read(tmp_path: Path, rules: Any) -> None:
    path = write(tmp_path / "tokenizer.json", normalizer=rules)
    assert read_tokenizer(path).encode("a").ids[-1] in (0, 1)


def test_a_table_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    short = base64.b64encode((4).to_bytes(4, "little") + bytes(4)).decode()
    rules = {"type": "Precompiled", "precompiled_charsmap": short}
    path = write(tmp_path / "tokenizer.json", normalizer=rules)
    with pytest.raises(
        ModelError, match=r"tokenizer.json: no tokenizer .*PanicException: index out"
    ):
        read_tokenizer(path)


def split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("part", "rules"),
    [
        ("pre_tokenizer", split(r".?" * 22 + "$^")),
        ("normalizer", replace("", "") | {"pattern": {"Regex": r"(a+)+b"}}),
        ("decoder", replace("", "") | {"pattern": {"Regex": r"\s*\s*\s*\s*$^"}}),
    ],
)
def test_an_expression_that_takes_too_long_on_text_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    part: str,
    rules: Any,
) -> None:
    why = r"it was still at work after 0\.2 s|PanicException: Onig"
    monkeypatch.setattr(patterns, "_LONGEST_PART", 0.2)
    path = write(tmp_path / "tokenizer.json", **{part: rules})
    with pytest.raises(ModelError, match=rf"what changes and splits text in it cannot .*: ({why})"):
        read_tokenizer(path)
    assert "panicked" not in capfd.readouterr().err


# Of GPT-2, Llama 3, DeepSeek V3 and o200k.
_HONEST = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+",
)


@pytest.mark.parametrize("pattern", _HONEST)
def test_expressions_of_real_tokenizers_take_a_quarter_of_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    path = write(tmp_path / "tokenizer.json", pre_tokenizer=split(pattern))
    read_tokenizer(path)  # the child has its libraries now
    monkeypatch.setattr(patterns, "_LONGEST_PART", patterns._LONGEST_PART / 4)
    patterns._fault.cache_clear()
    read_tokenizer(path)


def test_a_text_on_which_a_tokenizer_fails_is_the_fault_of_the_two(tmp_path: Path) -> None:
    """Behind a trigger that no trial knows."""
    tokenizer = read_tokenizer(write(tmp_path / "tokenizer.json", pre_tokenizer=split(r"Z(a+)+b")))
    text = Text(tokenizer, None, {}, frozenset())
    assert text.encode("a") == [0]
    with pytest.raises(DataError, match=r"fails on this text \(Onig: .*another tokenizer\."):
        text.encode("Z" + "a" * 60)


def test_the_longest_that_unicode_writes_for_one_character_is_allowed() -> None:
    """By the package tokenizers itself: U+FDFA."""
    longest = max(len(normalizers.NFKC().normalize_str(chr(n))) for n in range(0xF000, 0xFFFF))
    assert longest == 18


def test_memory_that_ran_out_is_no_fault_of_the_tokenizer() -> None:
    with pytest.raises(MemoryError), tokenizers_errors("a"):
        raise MemoryError


NAMES = [f"model.layers.{n}.self_attn.q_proj" for n in range(4)]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r"([\w.]+)+!"},
        {"rank_pattern": {r"(\w|\w)*x": 4}},
        {"layers_pattern": [r"(a|m|o|d|e|l|\w)*(\w*)*b"]},
        {"nested": {"of": ["(" * 9 + r"\w*" + ")*" * 9 + "!"]}},
    ],
)
def test_a_pattern_that_never_ends_is_named(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    monkeypatch.setattr(patterns, "LONGEST", 0.5)
    start = time.monotonic()
    with pytest.raises(ModelError, match=r"adapter_config.json: the names .* at work after 0\.5 s"):
        require_quick(Path("adapter_config.json"), config, ["x" * 60, *NAMES])
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|k|v)_proj",
        "q_proj",
        "((",
        "a{99999999999999999999}",
        "(" * 3000 + "a*" + ")" * 3000,
    ],
)
def test_other_patterns_are_left_to_peft(pattern: str) -> None:
    require_quick(Path("a"), {"target_modules": pattern, "r": 8, "alpha": None}, NAMES * 1000)
