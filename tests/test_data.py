"""Text to blocks: nothing is lost, held-out text is interleaved and never trained on, order is a function of the seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.data import DomainBlocks, documents, labels_of, load_blocks, pieces, training_order
from compress.models import byte_tokenizer
from limbeck.errors import DataError
from limbeck.heldout import Blocks, all_but_first
from limbeck.recipe import JsonLines, PlainText, PythonStrings, Recipe, parse_recipe


def recipe_of(folder: Path, *paths: str, **data: Any) -> Recipe:
    recipe = parse_recipe(
        {
            "name": "t",
            "data": {
                "domains": [{"name": "d", "text": {"kind": "files", "paths": list(paths)}}],
                **{"block": 16, **data},
            },
            "student": {"kind": "lora", "base": {"kind": "random", "config": {}}},
            "training": {"tokens": 640, "batch_tokens": data.get("block", 16)},
        }
    )
    recipe._folder = folder
    return recipe


def fake(rows: int, weight: float = 1.0) -> DomainBlocks:
    ids, lengths = np.zeros((rows, 4), dtype=np.int32), np.full(rows, 4, dtype=np.int32)
    scored = all_but_first(lengths, 4)
    return DomainBlocks(
        "d", weight, ids, scored, lengths, Blocks(ids[:1], lengths[:1], np.array([3], dtype=np.int32), scored[:1])
    )


@given(st.text(max_size=400), st.integers(4, 60))
def test_pieces_lose_nothing(document: str, length: int) -> None:
    cut = list(pieces(document, length=length))
    assert "".join(cut) == document
    assert all(0 < len(p) <= length + 1 for p in cut)


def test_heldout_is_interleaved_and_apart_from_training(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"sentence number {i:05d}.\n" for i in range(400)))
    blocks = load_blocks(
        recipe_of(tmp_path, "a.txt", block=80, heldout={"every": 5, "piece_chars": 88, "blocks": 6}), byte_tokenizer()
    )[0]
    decode = byte_tokenizer().decode
    train = " ".join(decode(row[:n]) for row, n in zip(blocks.train_ids, blocks.train_lengths, strict=True))
    heldout = [decode(row[:n]) for row, n in zip(blocks.heldout.input_ids, blocks.heldout.lengths, strict=True)]
    numbers = sorted(
        int(text[i + 7 : i + 12]) for text in heldout if (i := text.find("number ")) >= 0 and len(text) >= i + 12
    )
    assert len(blocks.heldout) == 6
    assert numbers[0] < 100 < 300 < numbers[-1]
    assert not any(f"{n:05d}" in train for n in numbers)


def test_blocks_come_from_the_cache_the_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("some words to learn, again and again.\n" * 50)
    recipe, tokenizer = recipe_of(tmp_path, "a.txt", heldout={"every": 3, "piece_chars": 64}), byte_tokenizer()
    first = load_blocks(recipe, tokenizer)[0]
    monkeypatch.setattr("compress.data._write_blocks", None)
    second = load_blocks(recipe, tokenizer)[0]
    np.testing.assert_array_equal(first.train_ids, second.train_ids)


def test_order_follows_weights_and_seed() -> None:
    blocks = [fake(5, 3.0), fake(7, 1.0)]
    order = training_order(blocks, count=40, seed=1)
    assert np.bincount(order[:, 0]).tolist() == [30, 10]
    assert np.bincount(order[:4, 0]).tolist() == [3, 1]
    first_pass = order[order[:, 0] == 0][:5, 1]
    assert sorted(first_pass) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(order, training_order(blocks, count=40, seed=1))
    assert (order != training_order(blocks, count=40, seed=2)).any()


def test_labels_are_shifted_once_and_padding_is_ignored() -> None:
    ids = np.array([[5, 6, 7, 0], [5, 6, 7, 8]], dtype=np.int32)
    scored = all_but_first(np.array([3, 4], dtype=np.int32), 4)
    assert labels_of(ids, scored).tolist() == [[6, 7, -100, -100], [6, 7, 8, -100]]
    assert labels_of(ids, scored * np.array([1, 1, 0, 1], dtype=np.uint8)).tolist() == [
        [6, -100, -100, -100],
        [6, -100, 8, -100],
    ]


def test_formats(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n\n{"body": "two"}\n{"body": " "}\n')
    assert list(documents(tmp_path / "a.jsonl", JsonLines(kind="jsonl", field="body"))) == ["one", "two"]
    (tmp_path / "a.py").write_text(f"x = {'long ' * 10!r}\ny = 'short'\n")
    assert list(documents(tmp_path / "a.py", PythonStrings(kind="python-strings", min_chars=20))) == ["long " * 10]
    (tmp_path / "a.txt").write_text("\ufeffunicode ✓", encoding="utf-8")
    assert list(documents(tmp_path / "a.txt", PlainText(kind="text"))) == ["unicode ✓"]


@pytest.mark.parametrize(
    ("name", "content", "form", "message"),
    [
        ("a.jsonl", b'{"body": 1}', JsonLines(kind="jsonl"), "line 1: no text under 'text'"),
        ("a.jsonl", b"{", JsonLines(kind="jsonl"), "line 1: not JSON"),
        ("a.py", b"def", PythonStrings(kind="python-strings"), "line 1: not Python"),
        ("a.txt", b"\xff\xfe\xfa", PlainText(kind="text"), "not UTF-8 text"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, form: Any, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(documents(tmp_path / name, form))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no text in"),
        ("too short", "too little text: 0 full training blocks of 16 tokens"),
        ("x" * 40, "0 held-out blocks"),
    ],
)
def test_empty_and_short_text_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        load_blocks(recipe_of(tmp_path, "a.txt"), byte_tokenizer())


def test_a_glob_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file; check the path in the recipe"):
        load_blocks(recipe_of(tmp_path, "*.txt"), byte_tokenizer())


def test_jsonl_corpus_end_to_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"row {i} of a small corpus"}) for i in range(60)))
    recipe = recipe_of(tmp_path, "a.jsonl", heldout={"every": 4})
    text = recipe.data.domains[0].text.model_copy(update={"format": JsonLines(kind="jsonl")})
    domain = recipe.data.domains[0].model_copy(update={"text": text})
    folder, recipe = (
        recipe.folder,
        recipe.model_copy(update={"data": recipe.data.model_copy(update={"domains": (domain,)})}),
    )
    recipe._folder = folder
    blocks = load_blocks(recipe, byte_tokenizer())[0]
    assert len(blocks.heldout) == 12
    assert blocks.train_lengths.max() == 16
