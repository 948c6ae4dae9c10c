"""`limbeck init`: a short recipe that works, from teachers, a text and a size.

Knows recipes and their plans. Writes one file, with the reasons for its choices in comments.
"""

from __future__ import annotations

import difflib
import glob
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.app.plan import form_sizes
from limbeck.contract.errors import DataError, LimbeckError, ModelError, RecipeError
from limbeck.contract.files import write_atomically
from limbeck.contract.progress import say
from limbeck.contract.recipe import (
    ChatRows,
    Data,
    FileText,
    PlainText,
    Recipe,
    find_recipe,
    parse_recipe,
)
from limbeck.contract.sources import check_arrow, text_files

_TARGET_SHARE = 0.97  # of the size asked for: the plan is right within 2 %
_DEPTHS = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25)  # shares of the layers kept, most first
_WIDTHS = (1.0, 0.75, 0.5)  # shares of the FFN's neurons
_TOKENS, _BATCH, _PASSES = (
    204800,
    1024,
    10,
)  # of training: tokens, tokens a step, passes over the text at most
_DECODERS = (
    "ForCausalLM",
    "LMHeadModel",
    "ForConditionalGeneration",
)  # how transformers' classes that write text are called
_BYTES = 4  # of a token of text, about
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_BITS = {"int8-weight": 8, "int4-weight": 4}  # forms that may ship


@dataclass(frozen=True)
class Choice:
    """A student that fits, in YAML's flow style, the form it ships in, and why it was taken."""

    student: dict[str, Any]
    form: str
    megabytes: float
    why: str

    @property
    def caution(self) -> str | None:
        """Expected result of a cut student, as measured (docs/experiments/size.md); None if it is
        whole."""
        if self.student["kind"] != "shrink":
            return None
        return (
            "A cut heals slowly, and max_loss_vs_best_teacher will likely fail: SmolLM2-135M "
            "cut to 20 of 30 layers was still 0.8 nats "
            "above its best teacher after 24,576 tokens. Give far more text and "
            "training.tokens, or a larger --target-mb."
        )


def write_recipe(
    *,
    teachers: Sequence[str],
    texts: Sequence[str],
    target_mb: float,
    student: str | None,
    base_paths: Sequence[str] = (),
    out: Path,
) -> Choice:
    """Write the recipe to ``out`` and return the choices.

    ``teachers`` and ``student`` are model folders, GGUF files, hub ids (owner/name) or recipe
    files; teachers also PEFT adapter folders. The default base of the student is the smallest
    teacher. Raises `ModelError`, `DataError` or `RecipeError`.
    """
    if out.exists():
        raise RecipeError(f"{out}: is already there; name another file with --out.")
    if not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        raise RecipeError(
            f"{out}: {out.parent} is no folder that can be written to; name another file with "
            "--out."
        )
    local = _base_paths(base_paths)
    found = [
        {"name": name, **_teacher(given, local)}
        for name, given in zip(_names(teachers), teachers, strict=True)
    ]
    tree: dict[str, Any] = {
        "name": re.sub(r"[^a-z0-9._-]+", "-", out.stem.lower()).strip("-.") or "mine",
        "teachers": found,
        "data": {
            "domains": [
                {"name": name, "text": _data(text)}
                for name, text in zip(_names(texts), texts, strict=True)
            ],
            "block": 128,
            "heldout": {"piece_chars": 1024},
        },
        "training": {
            "tokens": _tokens(texts),
            "batch_tokens": _BATCH,
            "learning_rate": 1e-3,
            "evaluate_every": 50,
        },
        "gates": {"max_size_mb": target_mb, "max_loss_vs_best_teacher": 0.02},
    }
    if _are_short(texts, Data.model_validate(tree["data"])):
        tree["data"]["packing"] = "stream"
    bases = (
        [_source(student, "--student")]
        if student
        else [t["model"] for t in found if t["model"]["kind"] != "recipe"]
    )
    if not bases:
        raise ModelError(
            "--teacher: all teachers are recipes; name the model the student starts from with "
            "--student."
        )
    _check_tokenizers(found, bases if student else [])
    for option, source in (
        [("--student", bases[0])] if student else [("--teacher", base) for base in bases]
    ):
        if source["kind"] == "hub":
            try:
                _sizes(tree, {"kind": "lora", "base": source})
            except ModelError as error:
                raise ModelError(
                    f"{option} {source['id']}: no folder of that name here, and as a model of "
                    f"the hub: {error} An adapter's base that is here takes --base PATH."
                ) from error
    choice = choose_student(tree, bases, target_mb=target_mb)
    if choice.student["kind"] == "shrink":
        tree["training"]["learning_rate"] = 3e-4
    tree["gates"]["max_quantization_loss"] = 0.01 if choice.form == "int8-weight" else 0.05
    tree |= {"student": choice.student, "export": {"forms": ["fp32", choice.form]}}
    parse_recipe(tree, where=str(out))
    write_atomically(out, _text(tree, choice, target_mb))
    return choice


def choose_student(
    tree: dict[str, Any], bases: Sequence[dict[str, Any]], *, target_mb: float
) -> Choice:
    """The best student of at most ``target_mb``: whole before cut, largest cut, 8 bits before 4.

    4 bits cost a few percent of loss, a cut far more (docs/experiments/size.md). Raises
    `ModelError` with the smallest student found if none fits.
    """
    most = target_mb * _TARGET_SHARE
    base = min(bases, key=lambda base: _sizes(tree, {"kind": "lora", "base": base})["int8-weight"])
    whole = {"kind": "lora", "base": base, "rank": 16}
    tried = []
    for form, megabytes in _sizes(tree, whole).items():
        why = f"the smallest model fits whole in {_BITS[form]} bits"
        why += ", so adapters on it lose nothing" if form == "int8-weight" else " but not in 8"
        if megabytes <= most:
            return Choice(whole, form, megabytes, why)
        tried.append((megabytes, f"whole, {form}"))
    try:
        cuts = [(_sizes(tree, student), student, kept) for student, kept in _cuts(tree, base)]
    except ModelError as error:
        raise ModelError(f"{target_mb:g} MB: the model itself does not fit, and {error}") from error
    for sizes, student, kept in sorted(cuts, key=lambda cut: -cut[0]["int8-weight"]):
        for form, megabytes in sizes.items():
            if megabytes <= most:
                return Choice(
                    student, form, megabytes, f"whole it does not fit, so {kept} are kept"
                )
            tried.append((megabytes, f"{kept} kept, {form}"))
    least, why = min(tried)
    raise ModelError(
        f"--target-mb {target_mb:g}: no student of that size from these models; the smallest "
        f"is {least:.1f} MB ({why}). "
        "Ask for that, or name a smaller model with --student."
    )


def _cuts(tree: dict[str, Any], base: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    layers, neurons = _dimensions(tree, base)
    for width, depth in itertools.product(_WIDTHS, _DEPTHS):
        if width == depth == 1:
            continue
        kept = max(1, round(layers * depth))
        student: dict[str, Any] = {"kind": "shrink", "base": base, "layers": kept}
        if width < 1:
            student["intermediate_size"] = int(neurons * width)
        yield student, f"{kept} of {layers} layers and {width:.0%} of the neurons"


def _dimensions(tree: dict[str, Any], base: dict[str, Any]) -> tuple[int, int]:
    from compress.models.language import model_config
    from compress.models.shrink import shrunk_sizes

    recipe = _recipe(tree, {"kind": "shrink", "base": base}, "int8-weight")
    assert recipe.student.kind == "shrink"
    sizes = shrunk_sizes(model_config(recipe.student.base, folder=recipe.folder), recipe.student)
    return sizes["layers"], sizes["intermediate_size"]


def _sizes(tree: dict[str, Any], student: dict[str, Any]) -> dict[str, float]:
    """Megabytes of each form that may ship, 8 bits first."""
    sizes = form_sizes(_recipe(tree, student, *_BITS))
    return {form: sizes[form] / 1e6 for form in _BITS}


def _recipe(tree: dict[str, Any], student: dict[str, Any], *forms: str) -> Recipe:
    # Without teachers: the size is that of the student alone. Gates are about the student, not
    # about the plan.
    return parse_recipe(
        {
            **tree,
            "teachers": [],
            "gates": {},
            "student": student,
            "export": {"forms": ["fp32", *forms]},
        }
    )


def _teacher(given: str, base_paths: Mapping[str, Path]) -> dict[str, Any]:
    """A teacher's model, and its adapter where a PEFT folder was given.

    ``base_paths`` maps hub ids of adapters' bases to local folders; "" is for any. Raises
    `ModelError`.
    """
    path = _path(given)
    if not (path / "adapter_config.json").is_file() or (path / "config.json").is_file():
        return {"model": _source(given, "--teacher")}
    try:
        base = json.loads((path / "adapter_config.json").read_text("utf-8"))[
            "base_model_name_or_path"
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"--teacher {given}: its adapter_config.json names no base model ({error}); "
            "write its path there as base_model_name_or_path."
        ) from None
    base = str(base)
    if not _path(base).is_dir() and (mapped := base_paths.get(base) or base_paths.get("")):
        base = str(mapped)
    return {
        "model": _source(base, f"--teacher {given}, an adapter on"),
        "adapter": str(path.resolve()),
    }


def _base_paths(given: Sequence[str]) -> dict[str, Path]:
    """The pair of `--base [ID=]PATH`. Raises `ModelError` if the folder is no model."""
    found = {}
    for one in given:
        name, equals, place = one.rpartition("=")
        path = _path(place if equals else one)
        if not (path / "config.json").is_file():
            raise ModelError(f"--base {one}: no config.json of a model there; name its folder.")
        found[name] = path.resolve()
    return found


def _path(given: str) -> Path:
    """A path that was typed. `~nosuchuser` and a NUL in it are parts of a name that does
    not exist."""
    try:
        path = Path(given).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{given[:100]}: no path ({error}).") from None
    return path


def _files(given: str) -> list[Path]:
    """Files of one `--data`: a file, a folder, or a glob. Raises `DataError`."""
    try:
        return text_files(FileText(kind="files", paths=(given,)), folder=Path.cwd())
    except (DataError, OSError, ValueError):
        raise DataError(
            f"--data {given[:200]}: no such file; give a text file, a folder of text files, or a "
            "glob in quotes, such as 'text/*.txt'."
        ) from None


def _data(given: str) -> dict[str, Any]:
    """Text source for a --data argument; the suffix tells rows from text. Raises `DataError`."""
    from compress.data.documents import documents

    files = _files(given)
    source: dict[str, Any] = {
        "kind": "files",
        "paths": [str(Path.cwd() / Path(given).expanduser())],
    }
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
    fields = _parquet_fields(files[0]) if kind == "parquet" else _json_fields(files[0])
    if "messages" in fields:
        return source | {"format": {"kind": "chat"}}
    texts = [name for name, is_text in fields.items() if is_text]
    field = "text" if "text" in texts else texts[0] if len(texts) == 1 else None
    if field is None:
        raise DataError(
            f"--data {given}: its rows have {', '.join(fields) or 'no fields'}, and it is unclear "
            "which is the text; rename it to text, or to messages where it holds conversations."
        )
    return source | {"format": {"kind": kind, "field": field}}


def _kind(file: Path) -> str:
    return (
        "parquet"
        if file.suffix == ".parquet"
        else "jsonl"
        if file.suffix in _JSON_LINES
        else "text"
    )


def _are_short(texts: Sequence[str], data: Data) -> bool:
    """Whether the documents of a text must be joined to fill a block. Raises `DataError` for too
    little text."""
    from compress.data.blocks import measure_text

    short, block, heldout = False, _BYTES * data.block, data.heldout
    for given, domain in zip(texts, data.domains, strict=True):
        found = measure_text(domain, data, folder=Path())
        if found.pieces < heldout.every or found.training < block:
            raise DataError(
                f"--data {given}: too little text: found {found.pieces} of at least "
                f"{heldout.every} rows, or pieces of up to "
                f"{heldout.piece_chars} characters, every {heldout.every}th of which is held "
                f"out, and {found.training} of at least "
                f"{block} bytes to train on, for a block of {data.block} tokens. Add text: a "
                "single document needs about "
                f"{heldout.every * heldout.piece_chars} characters."
            )
        short = short or (not isinstance(domain.text.format, ChatRows) and found.longest < block)
    return short


def _json_fields(path: Path) -> dict[str, bool]:
    """Keys of the first row of JSON lines, and whether each holds text."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        line = next((line for line in file if line.strip()), "")
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise DataError(
            f"--data {path}: its first line is no JSON object; write one object a line."
        )
    return {name: isinstance(value, str) for name, value in row.items()}


def _parquet_fields(path: Path) -> dict[str, bool]:
    """Columns of a Parquet file, and whether each holds text."""
    check_arrow()
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"--data {path}: not a Parquet file ({error}).") from None
    return {
        field.name: pyarrow.types.is_string(field.type) or pyarrow.types.is_large_string(field.type)
        for field in schema
    }


def _tokens(texts: Sequence[str]) -> int:
    """Training tokens: at most ten passes over the text, where a token is about four bytes.

    The bytes of Parquet files say little about their text, so that they count as enough.
    """
    files = [file for text in texts for file in _files(text)]
    if any(file.suffix == ".parquet" for file in files):
        return _TOKENS
    passes = _PASSES * sum(file.stat().st_size for file in files) // _BYTES
    return max(20 * _BATCH, min(_TOKENS, passes // _BATCH * _BATCH))


def _check_tokenizers(teachers: Sequence[dict[str, Any]], bases: Sequence[dict[str, Any]]) -> None:
    """Say which folders on this machine have another tokenizer than the student.

    Raises `ModelError` for one that cannot be aligned. Of other sources `limbeck run` tells.
    """
    from compress.teachers.pairs import described

    local = {t["name"]: Path(t["model"]["path"]) for t in teachers if t["model"]["kind"] == "local"}
    student = [Path(base["path"]) for base in bases if base["kind"] == "local"]
    if not local or not (student or teachers[0]["name"] in local):
        return
    reference = student[0] if student else local[teachers[0]["name"]]
    for name, relation in described(reference, local).items():
        if "another" in relation:
            say(f"  teacher {name}: {relation}")


def _source(given: str, option: str) -> dict[str, Any]:
    """Model source for an argument. Raises `ModelError` if it is unknown or not a decoder."""
    path = _path(given)
    if path.is_dir():
        try:
            kinds = json.loads((path / "config.json").read_text("utf-8")).get("architectures") or []
        except (OSError, ValueError, AttributeError) as error:
            raise ModelError(
                f"{option} {given}: no config.json of a model there ({error})."
            ) from error
        if kinds and not any(str(kind).endswith(_DECODERS) for kind in kinds):
            raise ModelError(
                f"{option} {given}: {kinds[0]} does not write text; for classifiers and sentence "
                "encoders write a recipe with task: classification or task: embedding, as "
                "`limbeck recipes` lists them."
            )
        return {"kind": "local", "path": str(path.resolve())}
    if path.suffix == ".gguf" and path.is_file():
        return {"kind": "gguf", "path": str(path.resolve())}
    if path.suffix == ".yaml":
        return {"kind": "recipe", "recipe": str(find_recipe(given))}
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", given) and not path.exists():
        try:
            return {"kind": "recipe", "recipe": str(find_recipe(given))}
        except LimbeckError:
            if not path.parent.is_dir():  # with a folder of the owner's name it is a mistyped path
                return {"kind": "hub", "id": given}
    if re.match("https?://", given):
        raise ModelError(
            f"{option} {given}: a teacher behind a server needs the name of its model and its "
            "tokenizer; write it into a recipe: model: {kind: server, url: …, model: …, "
            "tokenizer: …}."
        )
    raise ModelError(
        f"{option} {given}: no such folder, .gguf file, recipe, or hub id (owner/name); "
        f"{_close(path) or 'give one of them.'}"
    )


def _close(path: Path) -> str:
    """Suggestion for a mistyped path, or an empty text."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / close[0]}?" if close else ""


def _names(given: Sequence[str]) -> list[str]:
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


def _text(tree: dict[str, Any], choice: Choice, target_mb: float) -> str:
    lines = [
        f"# Written by `limbeck init` for {target_mb:g} MB. Student: {choice.why}.",
        f"# It will take about {choice.megabytes:.1f} MB as {choice.form}; `limbeck plan` "
        "says more, `limbeck run` does it.",
        *([f"# {choice.caution}"] if choice.caution else []),
        f"name: {tree['name']}",
        "teachers:",
        *(f"  - {_flow(teacher)}" for teacher in tree["teachers"]),
    ]
    lines += [
        f"{key}: {_flow(tree[key])}" for key in ("data", "student", "training", "export", "gates")
    ]
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """YAML on one line."""
    import yaml

    text: str = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True
    )
    return text.strip()
