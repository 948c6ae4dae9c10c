"""Rows of text files as programs of 2026 write them, held to transformers and pyarrow."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import feather, ipc, parquet

from compress.data.blocks import conversations
from compress.data.documents import documents
from limbeck.app.init.inputs import text_source
from limbeck.contract.recipe import ChatRows, DatasetText, FileText, TextSource
from limbeck.contract.sources.preflight import preflight
from limbeck.contract.sources.texts import text_files
from tests.pico import make_tokenizer, pico_recipe
from tests.wild.cases.row import Row, said

_ASK, _GOOD, _BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "q"), ("assistant", "good"), ("assistant", "bad"))
)
_SYSTEM = {"role": "system", "content": "s"}
_FROM = {"from": "human", "value": "q"}
_TEXT = b'{"text": "a"}\n{"text": "b"}\n'
_CHATS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {  # rows, and what is read
    "OpenAI's preferences": (
        [{"input": {"messages": [_SYSTEM, _ASK], "tools": [], "parallel_tool_calls": True},
          "preferred_output": [_GOOD], "non_preferred_output": [_BAD]}], [_SYSTEM, _ASK, _GOOD]),
    "LLaMA-Factory's preferences": (
        [{"conversations": [_FROM], "chosen": {"from": "gpt", "value": "good"},
          "rejected": {"from": "gpt", "value": "bad"}}], [_ASK, _GOOD]),
    "preferences whose answers are single messages": (
        [{"prompt": [_ASK], "chosen": _GOOD, "rejected": _BAD}], [_ASK, _GOOD]),
    "ORPO, of a question and a system text": (
        [{"system": "s", "question": "q", "chosen": "good", "rejected": "bad"}],
        [_SYSTEM, _ASK, _GOOD]),
    "LLaMA-Factory's KTO": (
        [{"messages": [_ASK, _BAD], "kto_tag": False}, {"messages": [_ASK, _GOOD],
                                                        "kto_tag": True}], [_ASK, _GOOD]),
    "KTO of whole conversations": (
        [{"messages": [_ASK, answer], "label": answer is _GOOD} for answer in (_BAD, _GOOD)],
        [_ASK, _GOOD]),
    "an answer that opens the conversation": (
        [{"conversations": [{"from": "gpt", "value": "good"}, _FROM]}], [_GOOD, _ASK]),
    "a part with null keys": (
        [{"messages": [_ASK | {"content": [{"type": "text", "text": "q", "image": None}]},
                       _GOOD]}], [_ASK, _GOOD]),
    "two system messages": ([{"messages": [_SYSTEM, _SYSTEM, _ASK, _GOOD]}],
                            [_SYSTEM, _SYSTEM, _ASK, _GOOD]),
}  # fmt: skip
_ROWS: dict[str, tuple[str, bytes]] = {  # texts "a" and "b"
    "JSON lines in capitals": ("A.JSONL", _TEXT),
    "JSON lines called .jsonlines": ("a.jsonlines", _TEXT),
    "JSON lines called .txt": ("a.txt", _TEXT),
    "JSON lines of Windows, with a BOM": (
        "a.jsonl", b"\xef\xbb\xbf" + _TEXT.replace(b"\n", b"\r\n")),
    "JSON lines with NaN and blank lines": ("a.jsonl", _TEXT.replace(b"}\n", b', "x": NaN}\n\n')),
    "a table with an index, as pandas saves it": ("a.CSV", b",text\n0,a\n1,b\n"),
    "a table with quotes inside its cells": ("a.tsv", b"n\ttext\n1\ta\n2\tb\n"),
}  # fmt: skip
_REFUSED: dict[str, tuple[str, bytes, str]] = {
    "a table of semicolons, as Excel saves it in Europe": (
        "a.csv", b"text;n\na;1\n", "seem to be separated by ';', not by ','"),
    "rows inside one object": (
        "a.json", b'{"version": "1", "data": [{"text": "a"}]}', "rows seem to be under 'data'"),
    "columns inside one object": ("a.json", b'{"text": ["a", "b"]}', "under 'text'; save that"),
    "objects without line ends": ("a.jsonl", b'{"text":"a"}{"text":"b"}', "Extra data"),
    "JSON lines, packed with gzip": ("a.jsonl.gz", b"\x1f\x8b\x08", "unpack it with gunzip"),
    "JSON lines, packed with zstd": ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\0", "with unzstd"),
    "JSON lines in UTF-16": ("a.jsonl", _TEXT.decode().encode("utf-16"), "UTF-16 text"),
    "HH-RLHF, of whole dialogues in one text": (
        "a.jsonl", b'{"chosen": "Human: q Assistant: a", "rejected": "b"}', "found str"),
    "axolotl's marks of parts of an answer": (
        "a.jsonl", json.dumps({"messages": [_ASK, _GOOD | {"train_detail": [1]}]}).encode(),
        "message 2 has train_detail, but an answer is learned as a whole"),
    "an id, and turns without roles": (
        "a.jsonl", b'{"id": "1", "data": ["q", "a"]}', "id, data .list., and it is unclear"),
    "a label that is a number, beside a completion": (
        "a.jsonl", b'{"prompt": "q", "completion": "bad", "label": 0}', "write true or false"),
    "a list as Python prints it, in a table": (
        "a.csv", b"messages\n\"[{'role': 'user', 'content': 'q'}]\"\n", "as Python prints it"),
    "a table in UTF-16": ("a.csv", "prompt,completion\nq,a\n".encode("utf-16"), "UTF-16 text"),
    "tools by name": (
        "a.jsonl", json.dumps({"messages": [_ASK, _GOOD], "tools": {"f": {}}}).encode(),
        "tools: found .*; expected a list of descriptions of functions"),
    "an empty prompt": ("a.csv", b"prompt,completion\n,a\n", "line 2: prompt is empty"),
    "an empty answer, as pandas writes what is missing": (
        "a.csv", b"prompt,completion\nq,\n", "line 2: completion is empty"),
    "OpenAI's batches": (
        "a.jsonl", b'{"custom_id": "1", "method": "POST", "url": "/v1", "body": {"messages": []}}',
        "custom_id, method, url, body .dict., and it is unclear"),
    "JSON lines without a row": ("a.jsonl", b"\n\n", "a.jsonl: it has no rows"),
    "a text of WordPad's": ("a.txt", rb"{\rtf1\ansi x}", "rich text; save it as UTF-8 text"),
    "PostScript": ("a.txt", b"%!PS-Adobe-3.0", "PostScript; save its text"),
    "a PDF that is all ASCII": ("a.txt", b"%PDF-1.4 x", "a PDF; save its text"),
    **{
        f"the role {role!r}": (
            "a.jsonl",
            json.dumps({"messages": [_ASK | {"role": role}]}).encode(),
            f"has the role {re.escape(repr(role))}, .* call it {meant}",
        )
        for role, meant in {"User": "user", "user ": "user", "Human": "user",
                            "assistant\n": "assistant", "ChatGPT": "assistant"}.items()
    },
}  # fmt: skip


def texts(root: Path) -> Iterator[Row]:
    """All of them, made below ``root``."""
    root = root / "texts of 2026"
    tokenizer = make_tokenizer()
    for what, (rows, messages) in _CHATS.items():
        path = _file(root / what / "rows.jsonl", "\n".join(map(json.dumps, rows)).encode())
        answers = [f"{m['content']}<|end|>" for m in messages if m["role"] == "assistant"]
        right = tokenizer.apply_chat_template(messages, tokenize=False)
        yield Row(f"chat: {what}", _read(path), f"{right} learned: {answers}")
    for what, (name, content) in _ROWS.items():
        yield Row(f"text: {what}", _read(_file(root / what / name, content)), "a b")
    table = pyarrow.table({"text": ["a", "b"]})
    for name in ("a.feather", "a.arrow"):
        path = _file(root / name / name, b"")
        feather.write_feather(table, path)
        found = " ".join(ipc.open_file(path).read_all()["text"].to_pylist())
        yield Row(f"text: {name}, as pandas and polars save it", _read(path), found)
    for what, (name, content, says) in _REFUSED.items():
        path = _file(root / what.replace("\n", "-") / name, content)
        yield Row(f"text: {what}", said(lambda path=path: _read(path)), "-", says)
    yield from _datasets(root / "folders of datasets")
    path = _file(root / "plain" / "a.txt", _TEXT)
    source = {"kind": "files", "paths": [str(path)]}
    domains = {"domains": [{"name": "a", "text": source}], "block": 32}
    yield Row(
        "text: JSON lines called .txt, in a recipe that names no format",
        said(lambda: preflight(pico_recipe(data=domains))),
        "-",
        "a.txt would be read as plain text, with its punctuation",
    )


def _datasets(root: Path) -> Iterator[Row]:
    """Folders as a hub and the cache of `datasets` keep them."""
    table = pyarrow.table({"text": ["a", "b"]})
    for name in ("x-train.arrow", "cache-0123456789abcdef.arrow", "cache-1_00000_of_00001.arrow"):
        path = _file(root / "cache" / name, b"") if name[0] == "x" else root / "cache" / name
        with ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    yield Row("text: a cache of datasets, with what a program made", _read(root / "cache"), "a b")
    part = _file(root / "hub" / "data" / "train-00000-of-00002.parquet", b"")
    parquet.write_table(table, part)
    yield Row(
        "text: a dataset of a hub of which a part is missing",
        said(lambda: _read(root / "hub")),
        "-",
        "train-00001-of-00002.parquet is missing, one of 2 parts",
    )


def _file(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def _read(path: Path) -> str:
    """What is read of a file, and of chats what is learned, in the form that `init` chooses."""
    made = text_source(str(path))
    kind: Callable[..., TextSource] = DatasetText if made["kind"] == "datasets" else FileText
    source = kind(**made)
    if not isinstance(source.format, ChatRows):
        found = (documents(file, source.format) for file in text_files(source, folder=Path()))
        return " ".join(text for texts in found for text in texts)
    (piece,) = conversations(path, source.format, make_tokenizer())
    return f"{piece.text} learned: {[piece.text[slice(*span)] for span in piece.answers or ()]}"
