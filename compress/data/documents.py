"""Files to documents: plain text, rows of JSON lines, Parquet, Arrow and tables, strings of Python,
mail.

Knows files and formats, not tokens. Every error names the file and the line or row.
"""

from __future__ import annotations

import ast
import csv
import itertools
import json
import re
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from compress.data.mail import subject_and_body
from compress.data.tables import Place, arrow_rows, parquet_rows
from limbeck.contract.errors import DataError
from limbeck.contract.recipe import JsonLines, MailText, ParquetRows, PlainText, PythonStrings, Rows

# First bytes of files that are not UTF-8 text, what they are, and what to do.
_OTHER_FILES = {
    b"\x1f\x8b": "compressed with gzip; unpack it with gunzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it with unzstd",
    b"\xfd7zXZ": "compressed with xz; unpack it with unxz",
    b"BZh": "compressed with bzip2; unpack it with bunzip2",
    b"PK\x03\x04": "a zip archive or an office document; unpack it, or save its text as UTF-8",
    b"%PDF": "a PDF; save its text, for example with pdftotext",
    b"{\\rtf": "rich text; save it as UTF-8 text",
    b"%!PS": "PostScript; save its text, for example with ps2txt",
    b"PAR1": "a Parquet file; set format to parquet",
    b"ARROW1": "an Arrow file; call it .arrow or .feather, and set format to rows or chat",
    b"\x89PNG": "a picture; leave it out",
    b"\xff\xd8\xff": "a picture; leave it out",
    b"\xff\xfe\0\0": "UTF-32 text; convert it with iconv -f UTF-32 -t UTF-8",
    b"\xff\xfe": "UTF-16 text; convert it with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16 text; convert it with iconv -f UTF-16 -t UTF-8",
}
# Bytes of a file that is read as a whole, by its form: a text takes up to 5 times as much memory,
# an array of JSON 20 times, the parts of a mail and the syntax tree of Python 100 times.
_MOST_TEXT, _MOST_ARRAY, _MOST_MAIL, _MOST_PYTHON = 1 << 30, 1 << 28, 1 << 26, 1 << 24
_MOST_LINE = 1 << 26  # bytes of a line of JSON; a novel has about one million
_MOST_LEVELS = 100  # of lists and objects in a row, more than descriptions of tools need
_MOST_CELL = 64 << 20  # characters of a table's cell
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which has no UTF-8

# Names of an answer and of what it answers, as datasets have them.
_ANSWERS = ("completion", "chosen", "rejected", "output", "response", "answer", "solution")
_PROMPTS = ("prompt", "instruction", "question", "query", "problem", "input")


def documents(
    path: Path, form: PlainText | JsonLines | ParquetRows | PythonStrings | MailText | Rows
) -> Iterator[str]:
    """The documents of one file, empty ones left out. Raises `DataError` naming file and line."""
    match form:
        case PlainText():
            found: Iterator[str] = iter([_text(path)])
        case PythonStrings():
            found = _python_strings(path, _text(path, _MOST_PYTHON), form.min_chars)
        case MailText(field=None):
            found = iter([_mail(str(path), _small(path, _MOST_MAIL).read_bytes())])
        case MailText(field=str(field)):
            found = (
                _mail(f"{path}: a mail under {field!r}", text)
                for text in _texts(_json_lines(path, field), field)
            )
        case JsonLines():
            found = _texts(_json_lines(path, form.field), form.field)
        case ParquetRows():
            found = _texts(parquet_rows(path, form.field), form.field)
        case Rows():
            found = _texts(rows_of(path, form.field), form.field)
    return (well_formed(document) for document in found if document.strip())


def require_prompts(path: Path, form: object) -> None:
    """Raise `DataError` where a file's first row has an answer as its text, and a prompt beside."""
    if not isinstance(form, JsonLines | ParquetRows | Rows) or form.field not in _ANSWERS:
        return
    for where, row in itertools.islice(rows_of(path, form.field, _PROMPTS), 1):
        if prompt := next((name for name in _PROMPTS if row.get(name)), None):
            raise DataError(
                f"{where}: {form.field} would be learned without its {prompt}; set format to "
                f"{{kind: chat, field: {form.field}, prompt: {prompt}}}, or join both texts under "
                "one key."
            )


def pieces(document: str, *, length: int) -> Iterator[str]:
    """Cut a document into pieces of about ``length`` characters, at line ends or else at spaces.

    The pieces joined are the document again.
    """
    start = 0
    while start < len(document):
        end = start + length
        if end < len(document):
            cut = document.rfind("\n", start + length // 2, end)
            cut = cut if cut > 0 else document.rfind(" ", start + length // 2, end)
            end = cut + 1 if cut > 0 else end
        yield document[start:end]
        start = end


def _small(path: Path, most: int) -> Path:
    """``path``, a file that is read as a whole. Raises `DataError` for over ``most`` bytes."""
    if (size := path.stat().st_size) > most:
        raise DataError(
            f"{path}: {size >> 20} MB; a file of this form is read as a whole, and has at most "
            f"{most >> 20} MB. Cut it into several files, or write JSON lines."
        )
    return path


def _text(path: Path, most: int = _MOST_TEXT) -> str:
    try:
        text = _small(path, most).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(_not_text(path, f"byte {error.start}")) from None
    if text.startswith(("%PDF-", "%!PS-", "{\\rtf", "PK\x03\x04")):  # may be valid UTF-8
        raise DataError(_not_text(path, "a document"))
    if text.count("\0") > len(text) // 10:  # UTF-16 without a mark is valid UTF-8 in English
        raise DataError(_not_text(path, "it is full of NUL characters, as UTF-16 is"))
    return text


def _not_text(path: Path, found: str) -> str:
    """Say what a file is that is not UTF-8 text, as far as its first bytes tell."""
    with path.open("rb") as file:
        head = file.read(8)
    kind = next((kind for magic, kind in _OTHER_FILES.items() if head.startswith(magic)), None)
    if kind is not None:
        return f"{path}: {kind}."
    return f"{path}: not UTF-8 text ({found}); convert it, for example with iconv, or leave it out."


def _mail(where: str, message: str | bytes) -> str:
    try:
        return subject_and_body(message)
    except RecursionError:
        raise DataError(
            f"{where}: its parts are nested too deeply to be read; leave it out."
        ) from None


def _texts(rows: Iterator[Place], field: str) -> Iterator[str]:
    for where, row in rows:
        if not isinstance(value := row[field], str):
            raise DataError(f"{where}: {_no_text(value, field)}")
        yield value


def _no_text(value: Any, field: str) -> str:
    if value is None:
        return f"the text under {field!r} is null; leave the row out, or write an empty text."
    return (
        f"no text under {field!r} (found: {type(value).__name__}); set format.field to the right "
        "key."
    )


def well_formed(value: Any, levels: int = _MOST_LEVELS) -> Any:
    """A text, or JSON with texts in it, in which U+FFFD replaces every lone surrogate.

    JSON can escape half a character. Tokenizers take UTF-8, which has no such thing. Raises
    `RecursionError` for what is nested deeper than ``levels``, which chat templates cannot take.
    """
    match value:
        case str():
            try:
                value.encode()  # much faster than the search
            except UnicodeEncodeError:
                return _SURROGATE.sub("\ufffd", value)
            return value
        case list() | dict() if levels == 0:
            raise RecursionError(f"nested more than {_MOST_LEVELS} deep")
        case list():
            return [well_formed(item, levels - 1) for item in value]
        case dict():
            return {well_formed(k): well_formed(v, levels - 1) for k, v in value.items()}
        case _:
            return value


def rows_of(path: Path, field: str, beside: Collection[str] = ()) -> Iterator[Place]:
    """Where each row is, and its values under ``field`` and, as far as it has them, ``beside``."""
    match path.suffix.lower():
        case ".parquet":
            return parquet_rows(path, field, beside)
        case ".arrow" | ".feather":
            return arrow_rows(path, field, beside)
        case ".csv" | ".tsv":
            return _csv_rows(path, field, beside)
        case _:
            return _json_lines(path, field, beside)


def _csv_rows(path: Path, field: str, beside: Collection[str]) -> Iterator[Place]:
    """Where each row of a table is, and its cells of the columns that its first line names."""
    csv.field_size_limit(_MOST_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            between = "\t" if path.suffix.lower() == ".tsv" else ","
            rows = csv.DictReader(file, delimiter=between, strict=True)
            names = list(rows.fieldnames or ())
            if len(names) == 1 and (other := next((c for c in ",;\t|" if c in names[0]), None)):
                raise DataError(
                    f"{path}: its columns seem to be separated by {other!r}, not by {between!r}; "
                    "save it again as .csv with commas, or as .tsv with tabs."
                )
            if names.count(field) != 1:
                raise DataError(
                    f"{path}: {names.count(field)} columns are called {field!r} (found: "
                    f"{', '.join(names)}); set format.field to the right one."
                )
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                if None in row or None in row.values():
                    raise DataError(
                        f"{where}: not one cell for each of the {len(names)} columns; put texts "
                        "with commas or line ends in quotes."
                    )
                yield where, {n: v for n, v in row.items() if n == field or n in beside}
    except UnicodeDecodeError as error:
        raise DataError(_not_text(path, f"byte {error.start}")) from None
    except csv.Error as error:
        raise DataError(
            f"{path}, line {rows.line_num + 1}: no table ({error}); write it again."
        ) from None


def _json_lines(path: Path, field: str, beside: Collection[str] = ()) -> Iterator[Place]:
    for where, row in json_rows(path):
        if row is None:
            raise DataError(f"{where}: the row is null; leave it out.")
        if not isinstance(row, dict) or field not in row:
            keys = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
            raise DataError(
                f"{where}: no text under {field!r} (found: {keys}); set format.field to the "
                "right key."
            )
        kept = {n: v for n, v in row.items() if n == field or n in beside}
        try:
            found = well_formed(kept)
        except RecursionError as error:
            raise DataError(f"{where}: a value is {error}; leave the row out.") from None
        yield where, found


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each row of JSON lines is, and the row; of a file that is one array, its items.

    Raises `DataError` naming file and line.
    """
    with path.open("rb") as file:
        if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
            text = _small(path, _MOST_ARRAY).read_bytes()
            rows = _parsed(str(path), text, "expected one array, or one object a line")
            yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
            return
        file.seek(0)
        lines = iter(partial(file.readline, _MOST_LINE + 1), b"")
        for number, line in enumerate(lines, start=1):
            if len(line) > _MOST_LINE:
                raise DataError(
                    f"{path}, line {number}: longer than {_MOST_LINE >> 20} MB. Cut it, or leave "
                    "it out."
                )
            if number == 1 and line.startswith(tuple(_OTHER_FILES)):
                raise DataError(_not_text(path, "line 1"))
            if line.strip():
                where = f"{path}, line {number}"
                yield where, _parsed(where, line, "each line is one JSON object")


def _parsed(where: str, text: bytes, expected: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 text (byte {error.start} of it); convert the file."
        ) from None
    except (ValueError, RecursionError) as error:  # no JSON, a number too long, too deep
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where}: not JSON: {reason}; {expected}.") from None


def _python_strings(path: Path, text: str, min_chars: int) -> Iterator[str]:
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}, line {line}: not Python: a NUL character; remove it.")
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise DataError(f"{path}, line {error.lineno}: not Python: {error.msg}.") from None
    except (MemoryError, RecursionError):  # the parser's own bounds
        raise DataError(
            f"{path}: its expressions or statements are nested too deeply for Python's parser; "
            "leave the file out."
        ) from None
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and len(node.value) >= min_chars
        ):
            yield node.value
