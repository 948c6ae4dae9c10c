"""Teachers and texts as they are typed for `limbeck init`, as parts of a recipe.

Knows paths, names and suffixes. Looks into files as far as a choice needs it.
"""

from __future__ import annotations

import csv
import glob
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.contract.errors import DataError, LimbeckError, ModelError
from limbeck.contract.files import parse_json, require_utf8
from limbeck.contract.progress import say
from limbeck.contract.recipe import ChatRows, Data, DatasetText, FileText, PlainText, find_recipe
from limbeck.contract.recipe.mistakes import did_you_mean
from limbeck.contract.sources.texts import (
    ARROW,
    PREFERRED,
    TABLES,
    check_arrow,
    holds_rows,
    text_files,
)

BATCH = 1024  # tokens a training step
_TOKENS = 204800  # of training
_PASSES = 10  # over the text at most
# Names of the classes of transformers that write text end so.
_DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_CONFIGS = ("config.json", "adapter_config.json")
_BYTES = 4  # of a token of text, about
_TEXT = "text"  # the type of a field that holds text
_PAIRS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("prompt", "response"),
    ("problem", "solution"),
    ("input", "output"),
)
# Prompts of preferences: TRL's, LLaMA-Factory's, Alpaca's, OpenAI's.
_ASKED = ("prompt", "conversations", "instruction", "question", "query", "input")
# Names of fields that tell rows apart, and hold no text.
_LABEL = re.compile(
    r"(?:.*_)?(?:id|uuid|hash|name|path|date|lang|language|source|category|split|url|model|license)",
    re.IGNORECASE,
)
# Names of fields that are a text, whatever is beside them.
_TEXTS = ("content", "body", "article", "document", "passage", "code", "story", "output")
_DATASETS = (".parquet", *ARROW)
# The page of a model, as it is copied from a browser.
_PAGE = r"(?:hf://|(?:https?://)?(?:huggingface\.co|hf\.co)/)"
_HUB = re.compile(_PAGE + r"(?P<id>[\w.-]+/[\w.-]+?)(?:(?:/tree/|@)(?P<revision>[\w.-]+))?/?")
_REVISION = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)@(?P<revision>[\w./-]+)")
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.zst", ".7z", ".rar")


def short_names(given: Sequence[str]) -> list[str]:
    """A short name for each, all different."""
    names: list[str] = []
    for index, one in enumerate(given):
        path = Path(one)
        exists = _path(one).exists()
        if not exists and glob.has_magic(one):  # `text/*.txt` is named after its folder
            path = next((p for p in path.parents if not glob.has_magic(str(p)) and p.name), path)
        # Only in a file name does a dot begin a suffix.
        name = path.stem if exists and _path(one).is_file() else path.name
        stem = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:40] or f"n{index + 1}"
        names.append(stem if stem not in names else f"{stem}-{index + 1}")
    return names


def teacher_source(given: str, base_paths: Mapping[str, Path]) -> dict[str, Any]:
    """A teacher's model, and its adapter where a PEFT folder was given.

    ``base_paths`` maps hub ids of adapters' bases to local folders; "" is for any. Raises
    `ModelError`, or `EnvironmentalError` for a server that does not answer.
    """
    hub = _HUB.fullmatch(given)
    if hub is None and not _path(given).exists():
        hub = _REVISION.fullmatch(given)
    if hub is not None:
        if hub["revision"] not in (None, "main"):
            return {"model": {"kind": "hub", **hub.groupdict()}}
        given = hub["id"]
    elif re.match(_PAGE, given):
        raise ModelError(
            f"--teacher {given}: no page of a model; give owner/name, or download the file and "
            "give its path."
        )
    if re.match("https?://", given):
        return {"model": _server_source(given)}
    path = _path(given)
    # axolotl and others save the configuration of the base beside an adapter.
    is_model = (path / "config.json").is_file() and any(path.glob("model*.safetensors"))
    if is_model or not (path / "adapter_config.json").is_file():
        return {"model": model_source(given, "--teacher")}
    try:
        base = parse_json((path / "adapter_config.json").read_text("utf-8"))[
            "base_model_name_or_path"
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"--teacher {given}: its adapter_config.json names no base model ({error}); "
            "write its path there as base_model_name_or_path."
        ) from None
    if not (isinstance(base, str) and base) and not base_paths.get(""):
        raise ModelError(
            f"--teacher {given}: its adapter_config.json names no base model; add --base PATH with "
            "the folder of the model that it was trained on."
        )
    base = str(base or "")
    if not (base and _path(base).is_dir()) and (
        mapped := base_paths.get(base) or base_paths.get("")
    ):
        base = str(mapped)
    elif (Path(base).is_absolute() or base.startswith(".")) and not _path(base).exists():
        raise ModelError(
            f"--teacher {given}: it was trained on {base}, which is not on this machine; add "
            "--base PATH with the folder of that model."
        )
    return {
        "model": model_source(base, f"--teacher {given}, an adapter on"),
        "adapter": str(path.resolve()),
    }


def _server_source(given: str) -> dict[str, Any]:
    """A model behind a server, of URL[#MODEL]=TOKENIZER; the server is asked for its models."""
    from limbeck.runtime.endpoint import find_endpoint

    address, equals, tokenizer = given.rpartition("=")
    if not equals:
        raise ModelError(
            f"--teacher {given}: a server does not say which tokenizer it uses; write "
            f"{given}=TOKENIZER, where TOKENIZER is the folder or hub id of the model there."
        )
    url, _, model = address.partition("#")
    source = model_source(tokenizer, f"--teacher {address}, whose tokenizer is")
    if source["kind"] == "recipe":
        raise ModelError(
            f"--teacher {given}: {tokenizer} is a recipe; name a folder or hub id with the "
            "tokenizer that the server uses."
        )
    found = find_endpoint(url, model or None)
    say(f"  {url}: teacher {found.model}")
    return {"kind": "server", "url": url, "model": found.model, "tokenizer": source}


def adapter_bases(given: Sequence[str]) -> dict[str, Path]:
    """The pair of `--base [ID=]PATH`. Raises `ModelError` if the folder is no model."""
    found = {}
    for one in given:
        name, equals, place = one.rpartition("=")
        path = _path(place if equals else one)
        if not (path / "config.json").is_file():
            raise ModelError(f"--base {one}: no config.json of a model there; name its folder.")
        found[name] = path.resolve()
    return found


def model_source(given: str, option: str) -> dict[str, Any]:
    """Model source for an argument. Raises `ModelError` if it is unknown or not a decoder."""
    path = _path(given)
    if path.is_dir():
        if option.endswith("an adapter on") and (path / "adapter_config.json").is_file():
            raise ModelError(
                f"{option} {given}: that is an adapter too; merge it into its base first "
                "(`merge_and_unload` of peft), and give the merged model with --base."
            )
        try:
            kinds = parse_json((path / "config.json").read_text("utf-8")).get("architectures") or []
        except (OSError, ValueError, AttributeError) as error:
            places = ("*", "snapshots/*")  # the second in a hub's cache
            files = [f for p in places for n in _CONFIGS for f in path.glob(f"{p}/{n}")]
            inside = sorted(
                f"{given.rstrip('/')}/{file.parent.relative_to(path)}" for file in files
            )
            hint = f" Did you mean {' or '.join(inside[:3])}?" if inside else ""
            raise ModelError(
                f"{option} {given}: no config.json of a model there ({error}).{hint}"
            ) from error
        if kinds and not any(str(kind).endswith(_DECODERS) for kind in kinds):
            raise ModelError(
                f"{option} {given}: {kinds[0]} does not write text; for classifiers and sentence "
                "encoders write a recipe with task: classification or task: embedding, as "
                "`limbeck recipes` lists them."
            )
        return {"kind": "local", "path": str(path.resolve())}
    if path.suffix == ".gguf" and path.is_file():
        return {"kind": "gguf", "path": str(path.absolute())}
    if path.is_file() and path.name.lower().endswith(_ARCHIVES):
        raise ModelError(f"{option} {given}: an archive; unpack it, and give the folder.")
    if path.is_file() and any((path.parent / name).is_file() for name in _CONFIGS):
        raise ModelError(f"{option} {given}: a file of a model; give its folder, {path.parent}.")
    if path.suffix == ".yaml":
        return {"kind": "recipe", "recipe": str(find_recipe(given))}
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", given) and not path.exists():
        try:
            return {"kind": "recipe", "recipe": str(find_recipe(given))}
        except LimbeckError:
            # With a folder of the owner's name, or a path of nearly this name, it is a typing
            # mistake.
            if not path.parent.is_dir() and not did_you_mean(path):
                return {"kind": "hub", "id": given}
    if re.match("https?://", given):
        raise ModelError(
            f"{option} {given}: only a --teacher may be behind a server; its weights "
            "stay there. Name a folder, .gguf file or hub id."
        )
    raise ModelError(
        f"{option} {given}: no such folder, .gguf file, recipe, or hub id (owner/name); "
        f"{did_you_mean(path).removeprefix(', ') or 'give one of them.'}"
    )


def _path(given: str) -> Path:
    """A path that was typed, such as ``~/text``, or ``~notes.txt`` in this folder."""
    try:
        path = Path(os.path.expanduser(given))
        path.exists()
    except (OSError, ValueError) as error:  # too long, or a NUL in it
        raise ModelError(f"{given[:100]}: no path ({error}).") from None
    return require_utf8(path)


def text_source(given: str) -> dict[str, Any]:
    """Text source for a --data argument; the suffix tells rows from text. Raises `DataError`."""
    from compress.data.documents import documents

    files, dataset = _files(given), _dataset(given)
    source: dict[str, Any] = dataset or {"kind": "files", "paths": [str(Path.cwd() / _path(given))]}
    kinds = {_kind(file): file for file in files}
    if len(kinds) > 1:
        named = ", ".join(f"{file.name} ({kind})" for kind, file in sorted(kinds.items()))
        raise DataError(
            f"--data {given}: found files of several kinds: {named}; give each kind its own --data."
        )
    kind = next(iter(kinds))
    if kind == "text":
        for file in files:
            for _ in documents(file, PlainText(kind="text")):  # fails now if it cannot be read
                pass
        return source
    fields = _fields(files[0])
    talks = ("messages", "preferred_output", "chosen", "conversations")
    if answer := next((name for name in talks if name in fields), None):
        chosen = {} if answer == "messages" else {"field": answer}
        prompt = next((name for name in _ASKED if name in fields), "prompt")
        if answer in PREFERRED and prompt != "prompt":
            chosen["prompt"] = prompt
        return source | {"format": {"kind": "chat", **chosen}}
    if "text" not in fields:
        for prompt, answer in _PAIRS:
            if {prompt, answer} <= fields.keys():
                extra = {} if prompt == "prompt" else {"prompt": prompt}
                return source | {"format": {"kind": "chat", "field": answer, **extra}}
    if (inner := next((n for n, type_ in fields.items() if type_ == "list"), None)) and _one(files):
        raise DataError(
            f"--data {given}: one object, whose rows seem to be under {inner!r}; save that list "
            "alone."
        )
    texts = [n for n, type_ in fields.items() if type_ == _TEXT and not _LABEL.fullmatch(n)]
    # An object beside it, such as the body of a request, may hold the text instead.
    nested = any(type_.startswith(("dict", "struct")) for type_ in fields.values())
    alone = len(texts) == 1 and (not nested or texts[0] in _TEXTS)
    field = "text" if "text" in texts else texts[0] if alone else None
    if field is None:
        raise DataError(
            f"--data {given}: its rows have {_listed(fields)}, and it is unclear which is the "
            "text; write it under text, or a conversation under messages: "
            '[{"role": "user", "content": …}, {"role": "assistant", "content": …}].'
        )
    return source | {"format": {"kind": "rows" if dataset else kind, "field": field}}


def _listed(fields: Mapping[str, str]) -> str:
    """Names of fields, and the types of those that hold no text."""
    named = (name if type_ == _TEXT else f"{name} ({type_})" for name, type_ in fields.items())
    return ", ".join(named) or "no fields"


def _dataset(given: str) -> dict[str, Any] | None:
    """Source of a folder that holds a dataset, its split for training; None for anything else."""
    path = _path(given)
    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if not saved and not any(file for end in _DATASETS for file in path.rglob(f"*{end}")):
        return None
    source: dict[str, Any] = {"kind": "datasets", "path": str(Path.cwd() / path)}
    try:
        text_files(DatasetText(**source), folder=Path.cwd())
    except DataError:
        source["split"] = "train"
        text_files(DatasetText(**source), folder=Path.cwd())
    return source


def _files(given: str) -> list[Path]:
    """Files of one `--data`: a file, a folder, or a glob. Raises `DataError`."""
    if _path(given).is_dir() and (dataset := _dataset(given)) is not None:
        return text_files(DatasetText(**dataset), folder=Path.cwd())
    try:
        here = str(Path.cwd() / _path(given))
        return text_files(FileText(kind="files", paths=(here,)), folder=Path.cwd())
    except (DataError, OSError, ValueError):
        path = _path(given)
        found = "no file with text there" if path.exists() else f"no such file{did_you_mean(path)}"
        raise DataError(
            f"--data {given[:200]}: {found}; give a text file, a folder of text files, or a glob "
            "in quotes, such as 'text/*.txt'."
        ) from None


def _kind(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return "parquet"
    if suffix in (*ARROW, *TABLES):
        return "rows"
    return "jsonl" if holds_rows(file) else "text"


def _fields(path: Path) -> dict[str, str]:
    """Names of what the first row of a file has, and the type of each."""
    from compress.data.documents import rows_of

    suffix = path.suffix.lower()
    if suffix in _DATASETS:
        return _columns(path)
    if suffix in TABLES:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            names = next(csv.reader(file, delimiter="\t" if suffix == ".tsv" else ","), [])
        if any("\ufffd" in name for name in names):
            next(rows_of(path, names[0]), None)  # says what the file is
        return dict.fromkeys(names, _TEXT)
    return _json_fields(path)


def _json_fields(path: Path) -> dict[str, str]:
    """Keys of the first row of JSON lines, and the type of each."""
    from compress.data.documents import json_rows

    where, row = next(json_rows(path), (str(path), None))
    if row is None:
        raise DataError(f"--data {path}: it has no rows; leave it out.")
    if not isinstance(row, dict):
        raise DataError(
            f"--data {where}: {type(row).__name__}, where an object was expected; write one object "
            "a line."
        )
    return {name: _TEXT if isinstance(v, str) else type(v).__name__ for name, v in row.items()}


def _one(files: Sequence[Path]) -> bool:
    """Whether all that is there is one object of JSON."""
    from compress.data.documents import json_rows

    return (
        len(files) == 1
        and files[0].suffix.lower() == ".json"
        and len(list(itertools.islice(json_rows(files[0]), 2))) == 1
    )


def _columns(path: Path) -> dict[str, str]:
    """Columns of a Parquet or Arrow file, and the type of each."""
    check_arrow()
    import pyarrow
    import pyarrow.parquet

    from compress.data.tables import arrow_schema

    try:
        is_parquet = path.suffix.lower() == ".parquet"
        schema = (pyarrow.parquet.read_schema if is_parquet else arrow_schema)(path)
    except (pyarrow.ArrowException, OSError) as error:
        kind = "a Parquet file" if is_parquet else "an Arrow file"
        raise DataError(f"--data {path}: not {kind} ({error}).") from None
    types = pyarrow.types
    found = {}
    for field in schema:
        kind = field.type.value_type if types.is_dictionary(field.type) else field.type
        # polars writes views
        is_text = any(
            f(kind) for f in (types.is_string, types.is_large_string, types.is_string_view)
        )
        found[field.name] = _TEXT if is_text else str(field.type)
    return found


def are_short(texts: Sequence[str], data: Data) -> bool:
    """Whether documents must be joined to fill a block. Raises `DataError` for too little text."""
    from compress.data.blocks import measure_text

    short, block, heldout = False, _BYTES * data.block, data.heldout
    for given, domain in zip(texts, data.domains, strict=True):
        found = measure_text(domain, data, folder=Path())
        if found.pieces < heldout.every or found.training < block:
            raise DataError(
                f"--data {given}: too little text: found {found.pieces} of at least "
                f"{heldout.every} rows, or pieces of up to {heldout.piece_chars} characters, every "
                f"{heldout.every}th of which is held out, and {found.training} of at least {block} "
                f"bytes to train on, for a block of {data.block} tokens. Add text: a single "
                f"document needs about {heldout.every * heldout.piece_chars} characters."
            )
        short = short or (not isinstance(domain.text.format, ChatRows) and found.longest < block)
    return short


def training_tokens(texts: Sequence[str]) -> int:
    """Training tokens: at most ten passes over the text, where a token is about four bytes.

    The bytes of Parquet and Arrow files say little about their text, so that they count as enough.
    """
    files = [file for text in texts for file in _files(text)]
    if any(file.suffix.lower() in _DATASETS for file in files):
        return _TOKENS
    passes = _PASSES * sum(file.stat().st_size for file in files) // _BYTES
    return max(20 * BATCH, min(_TOKENS, passes // BATCH * BATCH))
