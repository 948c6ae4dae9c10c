"""Text to blocks: no text is lost, held-out text is never trained on, the seed sets the order."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.data import packing
from compress.data.blocks import DomainBlocks, labels_of, load_blocks, training_order
from compress.data.documents import documents, pieces
from compress.data.packing import Piece, Tokens, pack_documents, pack_stream, tokenise
from compress.models.language import byte_tokenizer
from limbeck.contract.data.heldout import Blocks, all_but_first
from limbeck.contract.errors import DataError, EnvironmentalError
from limbeck.contract.recipe import (
    DatasetText,
    JsonLines,
    ParquetRows,
    PlainText,
    PythonStrings,
    Rows,
)
from limbeck.contract.sources.preflight import preflight
from limbeck.contract.sources.texts import text_files
from tests.compress.data.texts import recipe_of, write_rows


def fake(rows: int, weight: float = 1.0) -> DomainBlocks:
    ids, lengths = np.zeros((rows, 4), dtype=np.int32), np.full(rows, 4, dtype=np.int32)
    scored = all_but_first(lengths, 4)
    return DomainBlocks(
        "d",
        weight,
        ids,
        scored,
        lengths,
        Blocks(ids[:1], lengths[:1], np.array([3], dtype=np.int32), scored[:1]),
    )


@given(st.text(max_size=400), st.integers(4, 60))
def test_pieces_lose_nothing(document: str, length: int) -> None:
    cut = list(pieces(document, length=length))
    assert "".join(cut) == document
    assert all(0 < len(p) <= length + 1 for p in cut)


def test_texts_are_tokenised_in_batches_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_BATCH_CHARS", 10)
    tokenizer = byte_tokenizer()
    texts = ["one", "two and three", "", "four", "five six", "x" * 30, "last"]
    found = [tokens.ids.tolist() for tokens in tokenise([Piece(t) for t in texts], tokenizer)]
    assert found == [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def test_heldout_is_interleaved_and_apart_from_training(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"sentence number {i:05d}.\n" for i in range(400)))
    blocks = load_blocks(
        recipe_of(
            tmp_path, "a.txt", block=80, heldout={"every": 5, "piece_chars": 88, "blocks": 6}
        ),
        byte_tokenizer(),
    )[0]
    decode = byte_tokenizer().decode
    train = " ".join(
        decode(row[:n]) for row, n in zip(blocks.train_ids, blocks.train_lengths, strict=True)
    )
    heldout = [
        decode(row[:n])
        for row, n in zip(blocks.heldout.input_ids, blocks.heldout.lengths, strict=True)
    ]
    numbers = sorted(
        int(text[i + 7 : i + 12])
        for text in heldout
        if (i := text.find("number ")) >= 0 and len(text) >= i + 12
    )
    assert len(blocks.heldout) == 6
    assert numbers[0] < 100 < 300 < numbers[-1]
    assert not any(f"{n:05d}" in train for n in numbers)


def test_blocks_come_from_the_cache_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("some words to learn, again and again.\n" * 50)
    recipe, tokenizer = (
        recipe_of(tmp_path, "a.txt", heldout={"every": 3, "piece_chars": 64}),
        byte_tokenizer(),
    )
    first = load_blocks(recipe, tokenizer)[0]
    monkeypatch.setattr("compress.data.blocks._write_blocks", None)
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
    assert list(documents(tmp_path / "a.jsonl", JsonLines(kind="jsonl", field="body"))) == [
        "one",
        "two",
    ]
    rows = [{"body": "one"}, {"body": "[two]"}]
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(f"\ufeff {json.dumps(rows, indent=indent)}")
        found = documents(tmp_path / "a.json", JsonLines(kind="jsonl", field="body"))
        assert list(found) == ["one", "[two]"]
    (tmp_path / "a.py").write_text(f"x = {'long ' * 10!r}\ny = 'short'\n")
    assert list(
        documents(tmp_path / "a.py", PythonStrings(kind="python-strings", min_chars=20))
    ) == ["long " * 10]
    (tmp_path / "a.txt").write_text("\ufeffunicode ✓", encoding="utf-8")
    assert list(documents(tmp_path / "a.txt", PlainText(kind="text"))) == ["unicode ✓"]


@pytest.mark.parametrize(
    ("name", "content", "form", "message"),
    [
        ("a.jsonl", b'{"body": 1}', JsonLines(kind="jsonl"), "line 1: no text under 'text'"),
        ("a.jsonl", b"{", JsonLines(kind="jsonl"), "line 1: not JSON"),
        ("a.py", b"def", PythonStrings(kind="python-strings"), "line 1: not Python"),
        ("a.txt", b"\xfe\xfa", PlainText(kind="text"), "not UTF-8 text"),
        ("a.txt", "text".encode("utf-16"), PlainText(kind="text"), "UTF-16 text; .*iconv"),
        ("a.txt", "text".encode("utf-16-le"), PlainText(kind="text"), "full of NUL"),
        (
            "a.txt",
            gzip.compress(b"text", mtime=0),
            PlainText(kind="text"),
            "gzip; unpack it with gunzip",
        ),
        (
            "a.jsonl",
            gzip.compress(b"{}", mtime=0),
            JsonLines(kind="jsonl"),
            "gzip; unpack it with gunzip",
        ),
        ("a.txt", b"%PDF-1.7\xe2", PlainText(kind="text"), "a PDF; save its text"),
        ("a.json", b'[{"text": "a"}', JsonLines(kind="jsonl"), "not JSON: .*; expected one array"),
        ("a.json", b'[{"body": "a"}]', JsonLines(kind="jsonl"), "row 1: no text under 'text'"),
    ],
)
def test_bad_files_are_named(
    tmp_path: Path, name: str, content: bytes, form: Any, message: str
) -> None:
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


def test_each_row_is_a_document_and_some_documents_are_held_out(tmp_path: Path) -> None:
    rows = [{"text": f"row {i:03d} of a small corpus"} for i in range(60)]
    text = {"format": {"kind": "jsonl"}}
    for name, kind in (("a.jsonl", "jsonl"), ("a.parquet", "parquet")):
        write_rows(tmp_path / name, rows)
        recipe = recipe_of(
            tmp_path, name, text={"format": {"kind": kind}}, block=25, heldout={"every": 4}
        )
        blocks = load_blocks(recipe, byte_tokenizer())[0]
        train = [
            byte_tokenizer().decode(row[:n])
            for row, n in zip(blocks.train_ids, blocks.train_lengths, strict=True)
        ]
        heldout = [byte_tokenizer().decode(row) for row in blocks.heldout.input_ids]
        assert train == [row["text"] for i, row in enumerate(rows) if i % 4 != 3]
        assert set(heldout) <= {row["text"] for row in rows[3::4]}
        assert len(heldout) == 12
        assert isinstance(blocks.train_ids, np.memmap)
    stream = load_blocks(
        recipe_of(tmp_path, "a.jsonl", text=text, packing="stream", block=64), byte_tokenizer()
    )[0]
    assert (stream.train_lengths[:-1] == 64).all()
    assert (
        byte_tokenizer()
        .decode(stream.train_ids[0])
        .startswith("row 000 of a small corpus<|endoftext|>row 001")
    )
    with pytest.raises(
        DataError, match=r"0 full training blocks of 64 tokens .* data\.packing: stream"
    ):
        load_blocks(recipe_of(tmp_path, "a.jsonl", text=text, block=64), byte_tokenizer())


def test_json_that_python_cannot_take_is_named(tmp_path: Path) -> None:
    for number, (line, reason) in enumerate(
        (('{"text": ' + "[" * 100_000, "recursion"), ('{"text": ' + "9" * 5000 + "}", "4300"))
    ):
        path = tmp_path / f"{number}.jsonl"
        path.write_text('{"text": "good"}\n' + line + "\n")
        with pytest.raises(DataError, match=rf"line 2: not JSON: .*{reason}"):
            list(documents(path, JsonLines(kind="jsonl")))


def test_a_parquet_column_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    values = pyarrow.array([b"good", b"\xff\xfe"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="column 'text' is not UTF-8 text"):
        list(documents(tmp_path / "x.parquet", ParquetRows(kind="parquet")))


# Packing -----------------------------------------------------------------------------------------


@st.composite
def token_texts(draw: st.DrawFn) -> list[Tokens]:
    """Texts whose tokens are numbered through, so that what is lost or moved is seen."""
    sizes = draw(st.lists(st.integers(0, 30), max_size=8))
    numbers = np.arange(100, 100 + sum(sizes), dtype=np.int32)
    masks = draw(st.lists(st.integers(0, 1), min_size=sum(sizes), max_size=sum(sizes)))
    cuts = np.cumsum([0, *sizes])
    ends = draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    return [
        Tokens(numbers[a:b], np.array(masks[a:b], dtype=np.uint8), says_end=end)
        for a, b, end in zip(cuts, cuts[1:], ends, strict=False)
    ]


@given(token_texts(), st.integers(4, 12), st.sampled_from([[], [1], [1, 2]]))
def test_document_blocks_lose_nothing_and_cross_nothing(
    texts: list[Tokens], block: int, prefix: list[int]
) -> None:
    rows = list(pack_documents(texts, block, prefix))
    room, where = block - len(prefix), {}
    for index, text in enumerate(texts):
        where |= dict.fromkeys(text.ids.tolist(), index)
    expected = [
        t
        for text in texts
        for t in text.ids[: len(text.ids) - (len(text.ids) % room == 1)].tolist()
    ]
    assert [t for ids, _ in rows for t in ids[len(prefix) :].tolist()] == expected
    for ids, scored in rows:
        assert len(ids) == len(scored) <= block
        assert ids[: len(prefix)].tolist() == prefix
        assert len({where[t] for t in ids[len(prefix) :].tolist()}) == 1
        assert not scored[: max(1, len(prefix))].any()
    kept = {int(t): int(s) for text in texts for t, s in zip(text.ids, text.scored, strict=True)}
    for ids, scored in rows:
        start = max(1, len(prefix))
        assert scored[start:].tolist() == [kept[t] for t in ids[start:].tolist()]


@given(token_texts(), st.integers(4, 12), st.sampled_from([[], [1]]))
def test_stream_blocks_are_full_and_lose_nothing(
    texts: list[Tokens], block: int, prefix: list[int]
) -> None:
    rows = list(pack_stream(texts, block, prefix, end=7))
    whole = [
        (t, s)
        for text in texts
        for t, s in [
            *zip(text.ids.tolist(), text.scored.tolist(), strict=True),
            (7, int(text.says_end)),
        ]
    ]
    found = [
        (t, s)
        for ids, scored in rows
        for t, s in zip(ids[len(prefix) :], scored[len(prefix) :], strict=True)
    ]
    if len(whole) % (block - len(prefix)) == 1:
        whole.pop()  # a tail of one token has nothing to predict
    assert [t for t, _ in found] == [t for t, _ in whole]
    firsts = {0 if prefix else i * block for i in range(len(rows))} if not prefix else set()
    assert all(
        int(f) == w
        for i, ((_, f), (_, w)) in enumerate(zip(found, whole, strict=True))
        if i not in firsts
    )
    assert all(len(ids) == block for ids, _ in rows[:-1])


# Chat --------------------------------------------------------------------------------------------


def test_a_damaged_arrow_file_and_a_missing_package_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "a.arrow", [{"text": "words " * 100}])
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"a\.arrow: not an Arrow file"):
        list(documents(path, Rows(kind="rows")))
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "pyarrow" else real(name, *a)
    )
    with pytest.raises(EnvironmentalError, match=r"pip install 'limbeck\[data\]'"):
        list(documents(path, ParquetRows(kind="parquet")))
    recipe = recipe_of(tmp_path, "a.arrow", text={"format": {"kind": "parquet"}})
    assert any("limbeck[data]" in mistake for mistake in preflight(recipe))


# Folders of datasets -----------------------------------------------------------------------------


def save_to_disk(root: Path, shards: Sequence[Sequence[str]]) -> None:
    """What `datasets` 5.2 writes, as far as it is read here."""
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, texts in zip(names, shards, strict=True):
        write_rows(root / name, [{"text": text} for text in texts])
    (root / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": n} for n in names], "_split": None})
    )


def read(root: Path, split: str | None = None) -> list[str]:
    source = DatasetText(kind="datasets", path=Path(root.name), split=split)
    return [
        text
        for file in text_files(source, folder=root.parent)
        for text in documents(file, Rows(kind="rows"))
    ]


def test_saved_datasets_are_read_by_split(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "one", [["a", "b", "c"], ["d"]])
    assert read(tmp_path / "one") == ["a", "b", "c", "d"]
    for split, texts in (("train", ["e"]), ("test", ["f"])):
        save_to_disk(tmp_path / "two" / split, [texts])
    (tmp_path / "two" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert read(tmp_path / "two", "test") == ["f"]
    for split, message in ((None, "several splits and none chosen"), ("dev", "no split 'dev'")):
        with pytest.raises(DataError, match=f"two: {message}; set split to one of: train, test"):
            read(tmp_path / "two", split)
    with pytest.raises(DataError, match=r"one: no split 'dev'; the folder holds one \(unnamed\)"):
        read(tmp_path / "one", "dev")
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002.arrow: missing"):
        read(tmp_path / "one")
    for content, message in (
        ("{}", "no list under '_data_files'"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
    ):
        (tmp_path / "one" / "state.json").write_text(content)
        with pytest.raises(DataError, match=f"state.json: {message}"):
            read(tmp_path / "one")


def test_folders_of_parquet_and_jsonl_are_read_by_split(tmp_path: Path) -> None:
    root = tmp_path / "hub"
    for name in (
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "train_sft.parquet",
        "test.jsonl",
    ):
        write_rows(root / name, [{"text": name}])
    assert read(root, "train") == [
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
    ]
    assert read(root, "train_sft") == ["train_sft.parquet"]
    assert read(root, "test") == ["test.jsonl"]
    with pytest.raises(
        DataError, match="hub: several splits and none chosen; set split to one of: train, test"
    ):
        read(root)
    with pytest.raises(
        DataError, match="hub: no split 'validation'; set split to a name that one of the files has"
    ):
        read(root, "validation")
    write_rows(tmp_path / "flat" / "a.parquet", [{"text": "a"}])
    assert read(tmp_path / "flat") == ["a"]
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "no dataset; expected"), ("missing", "no such folder")):
        with pytest.raises(DataError, match=message):
            read(tmp_path / name)
