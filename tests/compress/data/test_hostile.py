"""Texts that strangers made to crash a reader, to fill its memory, or to keep it busy for hours."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import tracemalloc
from email.header import Header
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compress.data import tables
from compress.data.conversations import read_conversations
from compress.data.documents import documents, rows_of
from compress.data.mail import subject_and_body
from limbeck.contract.errors import DataError
from limbeck.contract.recipe import (
    ChatRows,
    JsonLines,
    MailText,
    ParquetRows,
    PlainText,
    PythonStrings,
    Rows,
)
from tests.compress.data.texts import write_rows

# Mail --------------------------------------------------------------------------------------------

DIGITS = b"9" * 5000


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (b"Content-Disposition: attachment; filename*=a\0b'en'x", ""),
        (b"Content-Disposition: attachment; filename*=idna'en'x%FF", ""),
        (b"Content-Disposition: attachment; filename*=utf-8'en'x%C3%A9", ""),
        (b"Content-Disposition: inline; filename*" + DIGITS + b"*=a", "hello"),
        (b"Content-Type: text/plain; charset*=a\0b'en'x", "hello"),
        (b"Content-Type: text/plain; charset*" + DIGITS + b"*=a", "hello"),
        (b"Content-Type: multipart/mixed; boundary*=idna'x'%ff", "hello"),
        (b"Content-Type: multipart/mixed; boundary*=a\0b'x'%ff", "hello"),
    ],
)
def test_parameters_of_a_mail_that_python_cannot_decode(header: bytes, text: str) -> None:
    """A part with a name is an attachment, however the name is written."""
    assert subject_and_body(b"Subject: s\n" + header + b"\n\nhello") == f"s\n\n{text}".strip()


def test_an_encoded_boundary_and_character_set_are_read() -> None:
    mail = (b"Subject: s\nContent-Type: multipart/mixed; boundary*=utf-8'en'a%20b\n\n--a b\n"
            b"Content-Type: text/plain; charset*=us-ascii'en'koi8-r\n\n"
            + "привет".encode("koi8-r") + b"\n--a b--\n")  # fmt: skip
    assert subject_and_body(mail) == "s\n\nпривет"


def html(text: str) -> str:
    return subject_and_body(f"Content-Type: text/html; charset=utf-8\n\n{text}".encode())


@pytest.mark.parametrize(
    ("page", "text"),
    [  # by the HTML standard: no character has such a number; a comment or tag may hide the rest
        (f"a&#{'9' * 5000};b", "a\ufffdb"),
        (f"a&#{'0' * 5000}65;b", "aAb"),
        ("a&#12345678b", "a\ufffdb"),
        ("a" + "<!--" * 50_000, "a"),
        ("a" + "<a " * 100_000, "a"),
        ("a" + "<a a=" * 50_000, "a"),
        ("a<script>" + "</" * 50_000, "a"),
        ("a" + "</a" * 50_000, "a"),
        ("a" + "<![" * 50_000, "a"),
        ("a<!-->b<!--->c<!-- <!-- --!>d", "abcd"),
        ("a<!-- > no -->b", "ab"),
        ("a<![endif]>b <3 c < d", "ab <3 c < d"),
        ("a & b &", "a & b &"),
    ],
)
def test_markup_takes_time_in_proportion_to_its_size(page: str, text: str) -> None:
    start = time.process_time()
    assert html(page) == text
    assert time.process_time() - start < 2


def test_the_memory_of_a_long_subject_is_bounded() -> None:
    word = b"=?utf-8?q?a?= "
    tracemalloc.start()
    found = subject_and_body(b"Subject: " + word * 20_000 + b"\n\nhello")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert re.fullmatch(r"a{700,}.{0,14}\n\nhello", found)  # adjacent words join: RFC 2047
    assert peak < 100 << 20
    title = "é" * 1000
    mail = f"Subject: {Header(title, 'utf-8').encode()}\n\nhello"
    assert subject_and_body(mail) == f"{title}\n\nhello"


# Python and JSON ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"-" * 50_000 + b"1", "a.py: its expressions or statements are nested too deeply"),
        (b"if 1: pass\n" + b"elif 1: pass\n" * 20_000, "a.py: its expressions or statements"),
        (b"1" + b"+1" * 50_000, "a.py: its expressions or statements are nested too deeply"),
        (b'a = "xxxxxxxx"\n' * 9 + b"\0", "a.py, line 10: not Python: a NUL character; remove"),
    ],
)
def test_python_that_its_parser_gives_up_on_is_named(
    tmp_path: Path, source: bytes, message: str
) -> None:
    (tmp_path / "a.py").write_bytes(source)
    with pytest.raises(DataError, match=message):
        list(documents(tmp_path / "a.py", PythonStrings(kind="python-strings")))


@pytest.mark.parametrize("key", ["text", "tools"])
def test_deep_json_is_named_and_what_tools_need_is_read(tmp_path: Path, key: str) -> None:
    path, row = tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "q"}], "text": "t"}
    for levels in (98, 120, 450, 900):
        path.write_text(json.dumps(row) + "\n" + json.dumps({**row, key: 0}).replace(
            f'"{key}": 0', f'"{key}": {"[" * levels + "]" * levels}'))  # fmt: skip
        if key == "tools":
            rows: Any = read_conversations(path, ChatRows(kind="chat"))
        else:
            rows = documents(path, JsonLines(kind="jsonl"))
        reason = "a value is nested more than 100 deep; leave" if levels > 99 else "found"
        with pytest.raises(DataError, match=f"a.jsonl, line 2: .*{reason}"):
            list(rows)


# Tables ------------------------------------------------------------------------------------------


def parquet(path: Path, column: Any, **options: Any) -> Path:
    pq.write_table(pa.table({"text": column}), path, compression="zstd", **options)
    return path


def read(path: Path) -> list[str]:
    form = ParquetRows(kind="parquet") if path.suffix == ".parquet" else Rows(kind="rows")
    return list(documents(path, form))


def stream(path: Path, column: Any) -> Path:
    table = pa.table({"text": column})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    return path


@pytest.mark.parametrize("form", ["text", "dictionary", "nested"])
def test_a_small_file_does_not_fill_the_memory(tmp_path: Path, form: str) -> None:
    rows, value = 3000, "a" * 100_000  # 300 MB in less than 3 kB
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), [value])
    column = {
        "text": lambda: repeated,
        "dictionary": lambda: repeated,
        "nested": lambda: pa.ListArray.from_arrays(list(range(rows + 1)), repeated),
    }[form]()
    path = parquet(tmp_path / "a.parquet", column, store_schema=form == "dictionary")
    assert path.stat().st_size < 3000
    before, most, count = pa.total_allocated_bytes(), 0, 0
    tracemalloc.start()
    for _, row in tables.parquet_rows(path, "text"):
        assert row["text"] in (value, [value])
        count += 1
        most = max(most, pa.total_allocated_bytes() - before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (count, most < 80 << 20, peak < 80 << 20) == (rows, True, True)


def test_a_row_that_is_too_large_is_named(tmp_path: Path) -> None:
    for name, column in (
        ("a", pa.DictionaryArray.from_arrays(pa.array([0, 1]), ["x", "a" * (65 << 20)])),
        ("b", pa.ListArray.from_arrays([0, 1, 70_001], pa.DictionaryArray.from_arrays(
            pa.array([0] * 70_001), ["a" * 1000]))),
    ):  # fmt: skip
        path = parquet(tmp_path / f"{name}.parquet", column)
        rows = tables.parquet_rows(path, "text")
        assert next(rows)[0] == f"{path}, row 1"
        with pytest.raises(DataError, match=r"parquet, row 2: \d+ MB; a row has at most 64 MB"):
            next(rows)


def nested_bomb(path: Path) -> None:
    """One row of 1,500,000 times the same text: 1.5 GB."""
    repeated = pa.DictionaryArray.from_arrays(np.zeros(1_500_000, np.int32), ["a" * 1000])
    parquet(path, pa.ListArray.from_arrays([0, 1_500_000], repeated), store_schema=False)


def wide_bomb(path: Path) -> None:
    """144 times the same value of 8 MB: 1.2 GB."""
    kind, buffer = pa.binary(8 << 20), pa.py_buffer(np.full(144 << 23, ord("a"), np.uint8))
    parquet(path, pa.FixedSizeBinaryArray.from_buffers(kind, 144, [None, buffer]))


def packed_bomb(path: Path) -> None:
    """One batch of zeros: 2 GB."""
    schema = pa.schema({"text": pa.int64()})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    buffer = pa.py_buffer(np.zeros(1 << 28, np.int64))
    column = pa.Array.from_buffers(pa.int64(), 1 << 28, [None, buffer])
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, schema, options=options) as out,
    ):
        out.write_batch(pa.record_batch([column], schema))


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.parquet", nested_bomb), ("b.parquet", wide_bomb), ("c.arrow", packed_bomb)],
)
def test_columns_that_unpack_to_gigabytes_are_named(tmp_path: Path, name: str, write: Any) -> None:
    path = tmp_path / name
    write(path)
    assert path.stat().st_size < 1 << 20
    before = pa.default_memory_pool().bytes_allocated()
    with pytest.raises(DataError, match=rf"{name}: its columns cannot be unpacked: it took more"):
        next(rows_of(path, "text"))
    assert pa.default_memory_pool().bytes_allocated() - before < 100 << 20


@pytest.mark.parametrize(
    ("name", "form", "bytes_", "message"),
    [
        ("a.txt", PlainText(kind="text"), 1 << 30, "1024 MB; .* has at most 1024 MB. Cut"),
        ("a.py", PythonStrings(kind="python-strings"), 1 << 24, "16 MB; .* has at most 16 MB. "),
        ("a.eml", MailText(kind="mail"), 1 << 26, "64 MB; .* has at most 64 MB. Cut it into"),
        ("a.json", JsonLines(kind="jsonl"), 1 << 28, "256 MB; .* has at most 256 MB. Cut it"),
        ("a.jsonl", JsonLines(kind="jsonl"), 1 << 26, "line 1: longer than 64 MB. Cut it, or"),
    ],
)
def test_files_that_would_fill_the_memory_are_named(
    tmp_path: Path, name: str, form: Any, bytes_: int, message: str
) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(b"[" if name == "a.json" else b"{")
        file.truncate(bytes_ + 1)
    with pytest.raises(DataError, match=rf"{re.escape(str(path))}.*{message}"):
        list(documents(path, form))


@pytest.mark.parametrize("write", [parquet, stream])
def test_values_come_through_whatever_their_type_is(tmp_path: Path, write: Any) -> None:
    """Plain and repeated texts, more of them than a dictionary page of Parquet holds."""
    unique = [f"{n} " * 60 for n in range(12_000)]
    suffix = {parquet: "parquet", stream: "arrow"}[write]
    for number, column in enumerate((
        pa.array(unique), pa.array(unique, pa.large_string()), pa.array(unique, pa.string_view()),
        pa.array(["again"] * 9 + unique).dictionary_encode().slice(9),
    )):  # fmt: skip
        assert read(write(tmp_path / f"{number}.{suffix}", column)) == unique
    for value, kind in (
        ([{"a": ["x", "y"], "b": 1}, {"b": 2}], None),
        ([("k", "v"), ("l", "w")], pa.map_(pa.string(), pa.string())),
        (["x", "y"], pa.list_(pa.string_view())),
        (["x"], pa.list_(pa.string(), 1)),
    ):
        path = write(tmp_path / f"nested.{suffix}", pa.array([value] * 3, kind))
        rows = tables.parquet_rows if write is parquet else tables.arrow_rows
        assert [row["text"] for _, row in rows(path, "text")] == [value] * 3


@pytest.mark.parametrize("write", [parquet, stream])
@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([10**9], pa.date32()), r"type date32.* that Python cannot hold .*; write"),
        (pa.array([10**18], pa.duration("s")), r"type duration\[s\] has a value that Python"),
        (pa.array([10**12], pa.timestamp("ms", "x/y")), r"tz=x/y\] has a value that Python"),
        (pa.array([1], pa.int64()), r"row 1: no text under 'text' \(found: int\)"),
        (pa.nulls(1), "row 1: the text under 'text' is null"),
    ],
)  # fmt: skip
def test_values_that_are_no_text_are_named(
    tmp_path: Path, write: Any, column: Any, message: str
) -> None:
    suffix = {parquet: "parquet", stream: "arrow"}[write]
    with pytest.raises(DataError, match=f"a.{suffix}.*{message}"):
        read(write(tmp_path / f"a.{suffix}", column))


@pytest.mark.parametrize(
    "column",
    [
        pa.RunEndEncodedArray.from_arrays(pa.array([2**30], pa.int32()), pa.array(["a"])),
        pa.ListViewArray.from_arrays([0] * 9, [1] * 9, pa.array(["a"])),
        pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array(["a"])]),
    ],
)
def test_types_that_repeat_values_without_bound_are_refused(tmp_path: Path, column: Any) -> None:
    with pytest.raises(DataError, match=r"column 'text' has the type .*, which is not read; wri"):
        read(stream(tmp_path / "a.arrow", column))


@pytest.mark.parametrize("write", [parquet, stream])
def test_a_column_whose_name_is_no_utf8_is_named(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / {parquet: "a.parquet", stream: "a.arrow"}[write], pa.array(["b"]))
    path.write_bytes(path.read_bytes().replace(b"text", b"te\xff\xfe"))
    with pytest.raises(DataError, match=r"a\..* can't decode byte 0xff"):
        read(path)


DAMAGED = """
import random, sys
from pathlib import Path
from compress.data.documents import rows_of, well_formed
from limbeck.contract.errors import DataError
for path in map(Path, sys.argv[1:]):
    whole, draw = path.read_bytes(), random.Random(7)
    for turn in range(400):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            for _, row in rows_of(path, "text"):
                str(well_formed(row)).encode()
        except DataError as error:
            assert str(path) in str(error)
    print("survived", path.name, flush=True)
"""


def test_no_damage_of_a_table_ends_the_process(tmp_path: Path) -> None:
    """Of texts, and of lists, whose descriptions of columns pyarrow reads without a net."""
    texts: dict[str, Any] = {"text": "hello", "list": [{"role": "user", "content": "hello"}]}
    paths = [
        write_rows(tmp_path / f"{name}.{suffix}", [{"text": text}] * 40)
        for name, text in texts.items()
        for suffix in ("arrow", "parquet")
    ]
    command = [sys.executable, "-c", DAMAGED, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = [f"survived {path.name}" for path in paths]
    assert (done.returncode, done.stdout.splitlines()) == (0, said), done.stderr[-2000:]


@pytest.mark.parametrize("offset", [0x7FFFFFFF, -5, 3, 10**6])
def test_a_wrong_offset_reads_no_other_memory(tmp_path: Path, offset: int) -> None:
    path = write_rows(tmp_path / "a.arrow", [{"text": "hello world"}] * 2)
    whole = path.read_bytes()
    right = b"".join(n.to_bytes(4, "little", signed=True) for n in (0, 11, 22))
    wrong = right[:8] + offset.to_bytes(4, "little", signed=True)
    assert whole.count(right) == 1
    path.write_bytes(whole.replace(right, wrong))
    with pytest.raises(DataError, match=r"a\.arrow: column 'text' is damaged \(.*; write or copy"):
        read(path)
