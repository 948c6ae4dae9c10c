"""Files of a text source, and their fingerprint. Opens no rows; `compress.data` reads them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from limbeck.contract.errors import DataError, EnvironmentalError
from limbeck.contract.files import file_digest, parse_json
from limbeck.contract.recipe import (
    AnyRecipe,
    DatasetText,
    FileText,
    MailText,
    NpmText,
    PackageText,
    StdlibText,
    TextSource,
    fingerprint,
)
from limbeck.contract.recipe.mistakes import did_you_mean
from limbeck.contract.sources.places import (
    matching_files,
    npm_root,
    package_root,
    read_object,
    require_stored,
)


def text_files(source: TextSource, *, folder: Path) -> list[Path]:
    """Files that a text source names, sorted, each file once, whatever links lead to it.

    Read twice, a text would be both trained on and held out. Raises `DataError` if a path or glob
    matches none.
    """
    match source:
        case FileText():
            root, paths = folder, source.paths
        case PackageText():
            root, paths = package_root(source.package, source.version), source.paths
        case NpmText():
            root, paths = npm_root(source.package, source.version), source.paths
        case StdlibText():
            root, paths = Path(sysconfig.get_paths()["stdlib"]), source.paths
        case DatasetText():
            root = require_stored((folder / source.path.expanduser()).resolve())
            return _dataset_files(root, source.split)
    found: list[Path] = []
    for path in paths:
        pattern = os.path.expanduser(path)
        matches = matching_files(root, pattern, _SUFFIXES.get(source.format.kind, ()))
        if not matches:
            raise DataError(
                f"{root / pattern}: no such file{did_you_mean(root / pattern)}; check the path in "
                f"the recipe (relative paths start from {root})."
            )
        found += matches
    return _each_once(found)


def _each_once(paths: Iterable[Path]) -> list[Path]:
    """The paths in order, without those that lead to the file of an earlier one."""
    first: dict[Path, Path] = {}  # by the file behind all links
    for path in sorted(paths):
        first.setdefault(require_stored(path).resolve(), path)
    return list(first.values())


TABLES = (".csv", ".tsv")
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".json")
ARROW = (".arrow", ".feather")
ROWS = (*JSON_LINES, ".parquet", *ARROW, *TABLES)  # not plain text
_MOST_LINE = 1 << 22  # bytes
_SUFFIXES = {  # of the files taken from a folder; of other formats all
    "jsonl": JSON_LINES,
    "parquet": (".parquet",),
    "rows": ROWS,
    "chat": ROWS,
    "python-strings": (".py",),
}


def _dataset_files(root: Path, split: str | None) -> list[Path]:
    """Files of one split in row order: a `save_to_disk` split, or paths that name the split."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; check the path in the recipe.")
    if (root / "dataset_dict.json").is_file():
        splits = _names(root / "dataset_dict.json", _listed(root / "dataset_dict.json", "splits"))
        if split is None and len(splits) == 1:
            split = splits[0]
        if split not in splits:
            raise DataError(
                f"{root}: {_wrong_split(split)}; set split to one of: {', '.join(splits)}."
            )
        return _saved_files(root / str(split))
    if (root / "state.json").is_file():
        own = read_object(root / "state.json").get("_split")
        if split is not None and split != own:
            raise DataError(
                f"{root}: {_wrong_split(split)}; the folder holds one ({own or 'unnamed'}): "
                "leave split out."
            )
        return _saved_files(root)
    inside = (p for p in root.rglob("*") if p.suffix.lower() in (".parquet", ".jsonl", *ARROW))
    found = _each_once(path for path in inside if path.is_file())
    # In its cache, `datasets` keeps what a program made of the rows beside them.
    found = [path for path in found if not _MADE.fullmatch(path.name)] or found
    if not found:
        raise DataError(
            f"{root}: no dataset; expected a `save_to_disk` folder, or *.parquet or *.jsonl files."
        )
    _require_parts(found)
    names = {path: path.relative_to(root).with_suffix("").as_posix() for path in found}
    if split is not None:
        chosen = [path for path in found if _in_split(names[path], split)]
        if not chosen:
            listed = ", ".join(names.values())
            raise DataError(
                f"{root}: {_wrong_split(split)}; set split to a name that one of the files has: "
                f"{listed}."
            )
        return chosen
    splits = [word for word in ("train", "validation", "valid", "val", "dev", "test", "eval")
              if any(_in_split(name, word) for name in names.values())]  # fmt: skip
    if len(splits) > 1:
        raise DataError(f"{root}: {_wrong_split(split)}; set split to one of: {', '.join(splits)}.")
    return found


_MADE = re.compile(r"(?:cache|tmp)[-0-9a-z_]*\.arrow")
_PART = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\..*)")


def _require_parts(paths: Iterable[Path]) -> None:
    """Raise `DataError` if one of the parts that a dataset's files count is missing."""
    for path in paths:
        if (part := _PART.fullmatch(path.name)) is None:
            continue
        for number in range(int(part["count"])):
            name = f"{part['name']}-{number:05}-of-{part['count']}{part['end']}"
            if not (path.parent / name).is_file():
                raise DataError(
                    f"{path.parent}: {name} is missing, one of {int(part['count'])} parts; copy or "
                    "download the dataset again, or name the files that are there."
                )


def _wrong_split(split: str | None) -> str:
    return "several splits and none chosen" if split is None else f"no split {split!r}"


def _in_split(name: str, split: str) -> bool:
    """Whether a folder or file name in the path is the split, perhaps with a shard number."""
    return re.search(rf"(?:^|[/._-]){re.escape(split)}(?=$|[/.-]|_\d)", name) is not None


def _saved_files(root: Path) -> list[Path]:
    state = read_object(root / "state.json")
    if state.get("_indices_data_files"):
        raise DataError(
            f"{root}: a selection that an old `datasets` wrote; load it and `save_to_disk` again."
        )
    listed = _listed(root / "state.json", "_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else entry for entry in listed]
    files = [require_stored(root / name) for name in _names(root / "state.json", names)]
    for file in files:
        if not file.is_file():
            raise DataError(
                f"{file}: missing, though {root / 'state.json'} names it; copy the whole folder."
            )
    return files


_SAVE_AGAIN = "this is not what `save_to_disk` writes: save the dataset again."


def _listed(path: Path, key: str) -> list[Any]:
    found = read_object(path)
    if not isinstance(found.get(key), list):
        raise DataError(f"{path}: no list under {key!r}; {_SAVE_AGAIN}")
    return list(found[key])


def _names(path: Path, listed: list[Any]) -> list[str]:
    """``listed``, which ``path`` holds, if all are names in its own folder and not elsewhere."""
    for name in listed:
        if not isinstance(name, str) or not re.fullmatch(r"(?!\.\.?$)[^/\0]+", name):
            raise DataError(
                f"{path}: found {str(name)[:60]!r} where the name of a file or folder beside it "
                f"was expected; {_SAVE_AGAIN}"
            )
    return listed


def holds_rows(path: Path) -> bool:
    """Whether a file has the suffix of rows, or its first line is an object of JSON."""
    if path.suffix.lower() in ROWS:
        return True
    with path.open("rb") as file:
        line = file.readline(_MOST_LINE).strip(b"\xef\xbb\xbf \t\r\n")
    try:
        return line.startswith(b"{") and isinstance(parse_json(line), dict)
    except ValueError:
        return False


def check_arrow() -> None:
    """Raise `EnvironmentalError` unless pyarrow is installed; Parquet and Arrow files need it."""
    if importlib.util.find_spec("pyarrow") is None:
        raise EnvironmentalError(
            "Parquet and Arrow files need the package pyarrow, which is not installed; run: "
            "pip install 'limbeck[data]'"
        )


PREFERRED = ("chosen", "preferred_output")  # names of the better answer, TRL's and OpenAI's


def preference_notes(recipe: AnyRecipe) -> list[str]:
    """What is learned of rows of preferences, for each text whose chosen answers are named."""
    return [
        f"{where}: of preferences the chosen answers are learned, each after its prompt; rejected "
        "ones are not read"
        for where, _, text in recipe.groups()
        if where.startswith("data.") and getattr(text.format, "field", None) in PREFERRED
    ]


_MAIL_RULES = "mail 2"  # raised when a mail is read in another way


def text_digest(source: TextSource, *, folder: Path) -> str:
    """Fingerprint of a source's text files, in order, and of the rules that read them.

    Raises `DataError` if one is missing.
    """
    rules = [_MAIL_RULES] if isinstance(source.format, MailText) else []
    return fingerprint([*(file_digest(path) for path in text_files(source, folder=folder)), *rules])
