"""Text to blocks: no text is lost, held-out text is never trained on, the seed sets the order."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import compress
from compress.data.blocks import DomainBlocks, conversations, labels_of, load_blocks, training_order
from compress.data.chat import render
from compress.data.documents import documents, pieces
from compress.data.packing import Piece, Tokens, pack_documents, pack_stream, tokenise
from compress.models.language import byte_tokenizer
from limbeck.contract.data.heldout import HELDOUT, Blocks, all_but_first, load_heldout
from limbeck.contract.errors import DataError, EnvironmentalError
from limbeck.contract.recipe import (
    ChatRows,
    DatasetText,
    JsonLines,
    ParquetRows,
    PlainText,
    PythonStrings,
    Recipe,
    Rows,
    parse_recipe,
)
from limbeck.contract.sources.preflight import preflight
from limbeck.contract.sources.texts import text_files
from tests.pico import CHAT, make_model, make_tokenizer


def recipe_of(folder: Path, *paths: str, text: dict[str, Any] | None = None, **data: Any) -> Recipe:
    recipe = parse_recipe(
        {
            "name": "t",
            "data": {
                "domains": [
                    {"name": "d", "text": {"kind": "files", "paths": list(paths), **(text or {})}}
                ],
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
        ("a.txt", b"\xff\xfe\xfa", PlainText(kind="text"), "not UTF-8 text"),
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


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows as the file's name says: Parquet, JSONL, or the Arrow stream that `datasets` writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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

GENERATION = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ eos_token }}{% endfor %}"
)
TRIMMED = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{{ m['content'] | trim }} {{ eos_token }}\n{% endfor %}"
)
WITHOUT_THOUGHT = CHAT.replace("message['content']", "message['content'].split('</think>')[-1]")


def chat(*turns: str) -> list[dict[str, str]]:
    return [
        {"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)
    ]


def answers_of(piece: Piece, tokenizer: Any) -> list[str]:
    tokens = next(tokenise([piece], tokenizer))
    assert sum(end - start for start, end in tokens.answers) == tokens.scored.sum()
    return [tokenizer.decode(tokens.ids[start:end].tolist()) for start, end in tokens.answers]


@pytest.mark.parametrize("template", [CHAT, GENERATION])
@given(st.lists(st.text(max_size=12), min_size=1, max_size=5))
def test_exactly_the_answers_are_scored(template: str, turns: list[str]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    text, spans = render(chat(*turns), tokenizer, template, "here")
    end = "<|end|>" if template is CHAT else ""
    expected = [turn + end for turn in turns[1::2]]
    assert [text[a:b] for a, b in spans] == [e for e in expected if e]
    assert answers_of(Piece(text, tuple(spans)), tokenizer) == [e for e in expected if e]


@pytest.mark.parametrize(
    ("template", "turns", "expected"),
    [
        (TRIMMED, ("assistant", " assistant ", "a", "user"), ["assistant <|end|>", "user <|end|>"]),
        (CHAT, ("✓ 👩‍🚀", "é\n\n👩‍🚀"), ["é\n\n👩‍🚀<|end|>"]),
        (
            WITHOUT_THOUGHT,
            ("why", "<think>hm</think>because", "so", "yes"),
            ["because<|end|>", "yes<|end|>"],
        ),
        (
            "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
            ("a", "b", "a", "b"),
            ["b", "b"],
        ),
    ],
    ids=["trimmed", "unicode", "thought left out", "no special tokens"],
)
def test_answers_are_what_the_template_made_of_them(
    template: str, turns: tuple[str], expected: list[str]
) -> None:
    tokenizer = make_tokenizer()
    text, spans = render(chat(*turns), tokenizer, template, "here")
    assert answers_of(Piece(text, tuple(spans)), tokenizer) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('no system role') }}",
            "here: the chat template refuses this conversation: no system role",
        ),
        (
            "{{ messages[0]['content'] + 1 }}",
            "here: the chat template fails on this conversation: TypeError: ",
        ),
        (
            "{% for m in messages %}{{ m['content'] | upper }}{{ m['content'] }}{% endfor %}",
            "here: .*cannot be told from",
        ),
        (
            "{{ messages[0]['content'] }}",
            "here: .* cannot be told from the rest. Put {% generation %}",
        ),
    ],
)
def test_templates_that_hide_the_answers_are_refused(template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        render(chat("a", "b"), make_tokenizer(), template, "here")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".arrow"])
def test_chat_blocks_hold_one_conversation_and_say_what_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    said: list[str] = []
    monkeypatch.setattr("compress.data.blocks.say", said.append)
    short = [{"messages": chat(f"question {i}", f"answer {i}")} for i in range(7)]
    long = [
        {"messages": chat("x" * 100, "never seen")},
        {"messages": chat("q", "a" * 100, "more", "never seen")},
    ]
    write_rows(
        tmp_path / f"a{suffix}", [*short, *long, {"messages": chat("a question without an answer")}]
    )
    recipe = recipe_of(
        tmp_path, f"a{suffix}", text={"format": {"kind": "chat"}}, block=64, heldout={"every": 4}
    )
    blocks = load_blocks(recipe, make_tokenizer())[0]
    decode = make_tokenizer().decode
    learnt = [
        decode(ids[scored == 1].tolist())
        for ids, scored in zip(blocks.train_ids, blocks.train_scored, strict=True)
    ]
    assert learnt[:-1] == [f"answer {i}<|end|>" for i in (0, 1, 2, 4, 5, 6)]
    assert set(learnt[-1]) == {"a"}
    (heldout,) = blocks.heldout.scored
    assert decode(blocks.heldout.input_ids[0][heldout == 1].tolist()) == "answer 3<|end|>"
    assert blocks.heldout.utf8_bytes.tolist() == [len("answer 3")]
    assert (
        "of 10 answers, 2 lie past the first 64 tokens of their conversation and were dropped, "
        "1 were cut short" in said[-1]
    )
    labels = labels_of(blocks.train_ids, blocks.train_scored)
    assert decode(labels[0][labels[0] >= 0].tolist()) == "answer 0<|end|>"
    stream = load_blocks(
        recipe_of(
            tmp_path,
            f"a{suffix}",
            text={"format": {"kind": "chat"}},
            block=64,
            heldout={"every": 4},
            packing="stream",
        ),
        make_tokenizer(),
    )
    assert stream[0].train_lengths[0] == 64


def test_chat_without_a_usable_answer_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"messages": chat("x" * 40, "y")}] * 8)
    recipe = recipe_of(tmp_path, "a.jsonl", text={"format": {"kind": "chat"}}, heldout={"every": 2})
    with pytest.raises(
        DataError,
        match=r"0 training and 0 held-out blocks with an answer from 8 conversations, 8 answers",
    ):
        load_blocks(recipe, make_tokenizer())
    with pytest.raises(DataError, match=r"no chat template.*chat_template\.jinja"):
        load_blocks(recipe, byte_tokenizer())


GOOD = {"messages": chat("q", "a")}


@pytest.mark.parametrize(
    ("name", "rows", "form", "message"),
    [
        ("a.parquet", [{"text": "x"}], ParquetRows(kind="parquet", field="body"),
         r"a.parquet: no column 'body' \(found: text"),
        ("a.parquet", [{"text": "x"}, {"text": None}], ParquetRows(kind="parquet"),
         "a.parquet, row 2: the text under 'text' is null"),
        ("a.jsonl", [{"text": "x"}], ParquetRows(kind="parquet"), "a.jsonl: not a Parquet file"),
        ("a.arrow", [{"text": "x"}], Rows(kind="rows", field="body"),
         "a.arrow: no column 'body'"),
        ("a.jsonl", [GOOD, {"text": "x"}], ChatRows(kind="chat"),
         r"a.jsonl, line 2: .*'messages' \(found: text\)"),
        ("a.jsonl", [GOOD, {"messages": "x"}], ChatRows(kind="chat"),
         "a.jsonl, line 2: expected a list of messages, found str"),
        ("a.jsonl", [{"messages": []}], ChatRows(kind="chat"),
         "a.jsonl, line 1: .* found an empty list"),
        ("a.jsonl", [{"messages": ["x"]}], ChatRows(kind="chat"),
         "line 1: message 1 has no text under 'role'"),
        ("a.parquet", [GOOD, {"messages": [{"role": "user", "content": None}]}],
         ChatRows(kind="chat"), "a.parquet, row 2: message 1 has no text under 'content'"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(
    tmp_path: Path, name: str, rows: list[Any], form: Any, message: str
) -> None:
    path = write_rows(tmp_path / name, rows)
    with pytest.raises(DataError, match=message):
        list(
            conversations(path, form, make_tokenizer())
            if isinstance(form, ChatRows)
            else documents(path, form)
        )


def test_a_damaged_arrow_file_and_a_missing_package_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "a.arrow", [{"text": "words " * 100}])
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"a\.arrow: not an Arrow stream"):
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


# The whole stage ---------------------------------------------------------------------------------


def test_a_student_learns_the_answers_of_a_chat_and_nothing_else(tmp_path: Path) -> None:
    """One answer to ever new questions: it is learnt, and the NLL is that of the answers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    teacher = make_model(tmp_path / "teacher", scale=0.05)
    draw = np.random.default_rng(0)
    rows = [
        {"messages": chat("".join(map(chr, draw.integers(97, 123, 12))), "yes, of course")}
        for _ in range(48)
    ]
    write_rows(tmp_path / "set" / "train.parquet", rows)
    tree = {
        "name": "chat",
        "teachers": [{"name": "a", "model": {"kind": "local", "path": str(teacher)}}],
        "data": {
            "domains": [{"name": "d", "text": {
                "kind": "datasets", "path": "set", "split": "train", "format": {"kind": "chat"},
            }}],
            "block": 64,
            "heldout": {"every": 6, "blocks": 4},
        },
        "student": {"kind": "fresh", "config": {
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 1, "num_attention_heads": 2,
        }},
        "fusion": {"weight": 0.1, "cross_entropy": 1.0},
        "training": {
            "tokens": 64 * 4 * 20, "batch_tokens": 256, "learning_rate": 3e-2, "threads": 1,
            "precision": "fp32",
        },
    }  # fmt: skip
    recipe = parse_recipe(tree)
    recipe._folder = tmp_path
    artifact = compress.distill(recipe=recipe, out=tmp_path / "student")
    steps = [json.loads(line) for line in (artifact.path / "log.jsonl").read_text().splitlines()]
    losses = [step["cross_entropy"] for step in steps if step["event"] == "step"]
    assert losses[-1] < 0.5 * losses[0]
    answer = len("yes, of course") + 1
    assert artifact.result["tokens"] == 20 * 4 * answer
    blocks = load_heldout(artifact.path / HELDOUT)["d"]
    assert blocks.labels == 4 * answer
    model = AutoModelForCausalLM.from_pretrained(artifact.path / "model")
    ids = torch.from_numpy(blocks.input_ids).long()
    with torch.no_grad():
        logp = torch.log_softmax(model(ids).logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    nll = -float(logp[torch.from_numpy(blocks.scored[:, 1:]) == 1].mean())
    assert artifact.result["mean_nll"] == pytest.approx(nll, rel=1e-4)
    assert (artifact.path / "model" / "chat_template.jinja").read_text() == CHAT
