"""Rows of Parquet files and Arrow streams, which strangers may have written.

Every batch is validated before a value is read: a wrong offset would read any memory of the
process. Memory holds one part of a batch; what is refused names file, row or column.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.contract.child import Child, TooMuch
from limbeck.contract.errors import DataError
from limbeck.contract.sources.texts import check_arrow

Place = tuple[str, dict[str, Any]]  # where a row is, for errors, and its values by key or column

_ROWS = 1024  # read at a time, at most
# The same of lists and structs, in which Arrow writes out each text, even where a file stores one
# text and repeats it.
_NESTED_ROWS = 64
_TEXTS = ("STRING", "NONE")  # types of Parquet that are text, or bytes of an unknown kind
_BYTES = 32 << 20  # of values that are read at a time, unless one row has more
# Seconds of a processor for a first reading of a file, and the bytes for which it gets one more.
_LEAST, _SPEED = 5.0, 2 << 20
_CHILD = Child()
_MOST_BYTES = 64 << 20  # of one row; a novel has about one million


def parquet_rows(path: Path, field: str, beside: Collection[str] = ()) -> Iterator[Place]:
    """Where each row of a Parquet file is, and its columns ``field`` and ``beside``.

    Raises `DataError` naming the file.
    """
    check_arrow()
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            columns = _columns(path, field, beside, schema)
        if not all(_is_flat(schema.field(name).type) for name in columns):
            _try(_parquet_batches, path, columns)
        yield from _numbered(path, _parquet_batches(path, columns), columns)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not a Parquet file ({error}); check format.kind, or write the file again."
        ) from None


def _parquet_batches(path: Path, columns: list[str]) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        facts, most, texts = file.metadata, _ROWS, list[str]()
        # Of all columns. Those of one could end the process: pyarrow does not catch what C++
        # throws at a damaged description of a column.
        encoded = sum(facts.row_group(n).total_byte_size for n in range(facts.num_row_groups))
        for leaf in range(len(file.schema)):
            column = file.schema.column(leaf)
            if column.path.partition(".")[0] not in columns:
                continue
            if column.path not in columns:
                most = _NESTED_ROWS
            elif column.physical_type == "BYTE_ARRAY" and column.logical_type.type in _TEXTS:
                texts.append(column.path)
        rows = max(1, min(most, _BYTES * facts.num_rows // max(encoded, 1)))
    # A text that is stored once and repeated in every row stays stored once.
    with ParquetFile(path, read_dictionary=texts) as file:
        yield from file.iter_batches(batch_size=rows, columns=columns)


def arrow_rows(path: Path, field: str, beside: Collection[str] = ()) -> Iterator[Place]:
    """As `parquet_rows`, of an Arrow stream (`datasets`) or Arrow file (Feather)."""
    check_arrow()
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file:
            schema, batches = _arrow(file)
            columns = _columns(path, field, beside, schema)
            _try(_arrow_batches, path, columns)  # they may be compressed
            yield from _numbered(path, batches, columns)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not an Arrow file ({error}); save the dataset again.") from None


def arrow_schema(path: Path) -> Any:
    """The schema of an Arrow stream or file. Raises what pyarrow raises."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        return _arrow(file)[0]


def _arrow(file: Any) -> tuple[Any, Iterable[Any]]:
    """Schema and batches of an open Arrow stream or file."""
    from pyarrow import ipc

    magic = file.read(6)
    file.seek(0)
    if magic != b"ARROW1":
        stream = ipc.open_stream(file)
        return stream.schema, stream
    whole = ipc.open_file(file)
    return whole.schema, map(whole.get_batch, range(whole.num_record_batches))


def _arrow_batches(path: Path, columns: list[str]) -> Iterator[Any]:
    import pyarrow

    # A map of a large file would count as memory of the process.
    with pyarrow.OSFile(str(path)) as file:
        yield from _arrow(file)[1]


def _try(
    batches: Callable[[Path, list[str]], Iterator[Any]], path: Path, columns: list[str]
) -> None:
    """Read a file in another process, which ends if a batch takes too much memory.

    A few bytes of such a file can stand for gigabytes, and nothing says so before they are read.
    """
    try:
        _CHILD.call(
            _read_all, batches, path, columns, seconds=_LEAST + path.stat().st_size / _SPEED
        )
    except TooMuch as error:
        raise DataError(
            f"{path}: its columns cannot be unpacked: {error}. Write it again, with fewer rows in "
            "each row group or batch."
        ) from None


def _read_all(
    batches: Callable[[Path, list[str]], Iterator[Any]], path: Path, columns: list[str]
) -> None:
    import pyarrow

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # others warn where memory ends
    try:
        for _ in batches(path, columns):
            pass
    except MemoryError:
        raise
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError):
        pass  # the reader meets it again, and names it


def _columns(path: Path, field: str, beside: Collection[str], schema: Any) -> list[str]:
    """The columns to read. Raises `DataError` unless there is one of the name ``field``."""
    found: list[str] = schema.names
    if field not in found:
        raise DataError(
            f"{path}: no column {field!r} (found: {', '.join(found)}); set format.field to the "
            "right one."
        )
    if (count := found.count(field)) > 1:
        raise DataError(
            f"{path}: {count} columns are called {field!r}; rename the others, and write it again."
        )
    columns = [field, *(name for name in beside if name != field and found.count(name) == 1)]
    for name in columns:
        if not _is_read(kind := schema.field(name).type):
            raise DataError(
                f"{path}: column {name!r} has the type {str(kind)[:200]}, which is not read; write "
                "it as text, or as lists and structs."
            )
    return columns


def _is_read(kind: Any) -> bool:
    """Whether the size of a value of this type can be known before it is made."""
    import pyarrow
    import pyarrow.types as types

    if isinstance(kind, pyarrow.BaseExtensionType):
        return _is_read(kind.storage_type)
    if types.is_dictionary(kind):
        return _is_text(kind.value_type) or types.is_primitive(kind.value_type)
    if not types.is_nested(kind):
        return not types.is_run_end_encoded(kind)
    known = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_struct,
             types.is_map)  # fmt: skip
    return any(is_kind(kind) for is_kind in known) and all(
        _is_read(kind.field(n).type) for n in range(kind.num_fields)
    )


def _is_flat(kind: Any) -> bool:
    """Whether a batch of such values takes memory that is bounded by its rows."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return _is_text(kind) or types.is_primitive(kind) or types.is_null(kind)


def _is_text(kind: Any) -> bool:
    """Whether `binary_length` knows the size of each value of this type."""
    import pyarrow.types as types

    known = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return any(is_kind(kind) for is_kind in known)


def _numbered(path: Path, batches: Iterable[Any], columns: list[str]) -> Iterator[Place]:
    number = 0
    for batch in batches:
        found = batch.select(columns)
        for name, column in zip(columns, found.columns, strict=True):
            _require_sound(path, name, column)
        for first in range(0, len(found), _ROWS):
            for row in _rows(path, number, found.slice(first, _ROWS), columns):
                number += 1
                yield f"{path}, row {number}", row


def _require_sound(path: Path, name: str, column: Any) -> None:
    import pyarrow

    try:
        column.validate(full=True)
    except pyarrow.ArrowException as error:
        if "UTF8" in str(error):
            raise DataError(
                f"{path}: column {name!r} is not UTF-8 text ({error}); convert it."
            ) from None
        raise DataError(
            f"{path}: column {name!r} is damaged ({error}); write or copy the file again."
        ) from None


def _rows(path: Path, before: int, part: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of ``part``, which follow ``before`` others, in halves that are not too large."""
    size = sum(_size(column) for column in part.columns)
    if len(part) == 1 and size > _MOST_BYTES:
        raise DataError(
            f"{path}, row {before + 1}: {size >> 20} MB; a row has at most {_MOST_BYTES >> 20} MB. "
            "Cut it, or leave it out."
        )
    if len(part) > 1 and size > _BYTES:
        half = len(part) // 2
        yield from _rows(path, before, part.slice(0, half), columns)
        yield from _rows(path, before + half, part.slice(half), columns)
        return
    values = [_values(path, *named) for named in zip(columns, part.columns, strict=True)]
    for row in zip(*values, strict=True):
        yield {name: _without_nulls(value) for name, value in zip(columns, row, strict=True)}


def _size(array: Any) -> int:
    """Bytes of the values, each counted as often as it occurs."""
    import pyarrow
    import pyarrow.compute as compute
    import pyarrow.types as types

    kind, size = array.type, 16 * len(array)
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _size(array.storage)
    if types.is_dictionary(kind):
        if _is_text(kind.value_type):
            lengths = compute.binary_length(array.dictionary).take(array.indices)
            size += compute.sum(lengths).as_py() or 0
        return size
    if types.is_string_view(kind) or types.is_binary_view(kind):
        views = np.frombuffer(array.buffers()[1] or b"", np.int32).reshape(-1, 4)
        return size + int(views[array.offset : array.offset + len(array), 0].sum(dtype=np.int64))
    if types.is_struct(kind):
        return size + sum(_size(child) for child in array.flatten())
    if types.is_map(kind):
        return size + _size(array.keys) + _size(array.items)
    if types.is_nested(kind):  # lists
        return size + _size(array.flatten())
    return size + int(array.nbytes)


def _values(path: Path, name: str, column: Any) -> list[Any]:
    try:
        return list(column.to_pylist())
    except (ArithmeticError, ValueError, LookupError) as error:  # dates after the year 9999
        raise DataError(
            f"{path}: column {name!r} of the type {column.type} has a value that Python cannot "
            f"hold ({error}); write the column as text, or leave it out."
        ) from None


def _without_nulls(value: Any) -> Any:
    """``value`` without null keys. Arrow writes one where only other rows have that key."""
    match value:
        case list():
            return [_without_nulls(item) for item in value]
        case dict():
            return {k: _without_nulls(item) for k, item in value.items() if item is not None}
        case _:
            return value
