"""Fingerprints of what a student is made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from limbeck.contract.artifact import open_artifact
from limbeck.contract.files import file_digest, folder_digest
from limbeck.contract.models.adapter_files import adapter_facts
from limbeck.contract.recipe import (
    AnyRecipe,
    HubModel,
    ModelSource,
    OnnxModel,
    PackageModel,
    RandomModel,
    RecipeModel,
    ServerModel,
    fingerprint,
)
from limbeck.contract.sources.models import (
    adapter_tokenizer,
    model_path,
    package_pieces,
    tokenizer_path,
)
from limbeck.contract.sources.places import require_stored
from limbeck.contract.sources.texts import text_digest


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
    for name, adapter in recipe.adapters.items():
        path = require_stored((recipe.folder / adapter.expanduser()).resolve())
        digest = adapter_digest(path)
        if adapter_tokenizer(path) is not None:  # which older versions did not read
            digest = fingerprint([digest, "tokenizer"])
        found[f"adapter {name}"] = digest
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
            found = file_digest(path / "tokenizer.json") if path.is_dir() else gguf_digest(path)
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
            return gguf_digest(path) if path.is_file() else folder_digest(path)


def gguf_digest(file: Path) -> str:
    """Fingerprint of a GGUF file, and of the tokenizer.json beside it if there is one."""
    beside = file.parent / "tokenizer.json"
    digests = [file_digest(file), *([file_digest(beside)] if beside.is_file() else [])]
    return digests[0] if len(digests) == 1 else fingerprint(digests)


def adapter_digest(path: Path) -> str:
    """Fingerprint of a teacher's own adapter folder. Raises `ModelError` where it is not one."""
    adapter_facts(path)
    return folder_digest(path)
