"""The licence of a model or text, as its own card, GGUF file or package states it.

Nothing is guessed: no statement gives `unknown`. Reads no weights.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from limbeck.contract.artifact import open_artifact
from limbeck.contract.errors import ArtifactError, DataError
from limbeck.contract.files import open_regular
from limbeck.contract.recipe import (
    AnyRecipe,
    AnySource,
    DatasetText,
    GgufModel,
    HubModel,
    LocalModel,
    NpmText,
    OnnxModel,
    PackageModel,
    PackageText,
    RecipeModel,
    StdlibText,
    TextSource,
)
from limbeck.contract.recipe.reading import load_yaml_texts
from limbeck.contract.sources.gguf import quick_reader
from limbeck.contract.sources.models import model_path
from limbeck.contract.sources.places import npm_root, read_object

UNKNOWN = "unknown"
_MOST_HEADER = 64 << 10  # bytes of a card in which its header must end
# The hub's names for `license:`, from
# https://huggingface.co/docs/hub/repositories-licenses.
_HUB = frozenset(
    """afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m
    bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause
    bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0
    cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0
    epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 h-research
    intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3
    llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0
    other pddl postgresql unknown unlicense wtfpl zlib""".split()  # noqa: SIM905 - a line a name would be long
)


@dataclass(frozen=True)
class Licence:
    """A licence as it was stated, in the hub's spelling if the hub lists it, and who states it."""

    license: str = UNKNOWN
    said_by: str = ""


def sources_of(recipe: AnyRecipe, *, base: Path, teachers: Sequence[Path]) -> dict[str, Any]:
    """Licences of the sources of a student: ``base`` (None if fresh), ``teachers``, ``texts``.

    ``base`` and ``teachers`` are the model folders made from the recipe's sources. A text also has
    the name of its ``dataset`` on the hub, or None.
    """
    folder, chosen = recipe.folder, recipe.base
    found: dict[str, Any] = {"base": None, "teachers": {}, "texts": {}}
    if chosen is not None:
        found["base"] = asdict(of_model(chosen, folder=folder, made=base))
    for (name, model), made in zip(recipe.teacher_models.items(), teachers, strict=True):
        licence = of_model(model, folder=folder, made=made)
        if adapter := recipe.adapters.get(name):
            licence = of_all([licence, _of_readme(folder / adapter.expanduser())])
        found["teachers"][name] = asdict(licence)
    for name, text in recipe.texts():
        found["texts"][name] = asdict(of_text(text, folder=folder)) | {
            "dataset": hub_dataset(text, folder=folder)
        }
    return found


def of_model(source: AnySource, *, folder: Path, made: Path) -> Licence:
    """The licence of a model. ``made`` is its folder (of a student, inside its artifact)."""
    match source:
        case RecipeModel():
            product = open_artifact(made.parent, kind="student", verify=False)
            return of_student(
                product.result, json.loads((product.path / "teachers.json").read_text("utf-8"))
            )
        case HubModel():
            return _of_readme(made)
        case LocalModel() | GgufModel() | PackageModel():
            path = model_path(source, folder=folder)
            assert path is not None
            own = _of_gguf(path) if path.is_file() else _of_readme(path)
            return (
                _of_package(source.package)
                if own == Licence() and isinstance(source, PackageModel)
                else own
            )
        case OnnxModel(package=str(package)):
            return _of_package(package)
        case _:
            return Licence()


def of_text(source: TextSource, *, folder: Path) -> Licence:
    """The licence of a text."""
    match source:
        case PackageText():
            return _of_package(source.package)
        case NpmText():
            package = json.loads(
                (npm_root(source.package, source.version) / "package.json").read_text("utf-8")
            )
            return _said(package.get("license"), by=f"package.json of {source.package}")
        case StdlibText():
            return Licence("PSF-2.0", "Python, whose standard library it is")
        case DatasetText():
            own = _of_readme(folder / source.path.expanduser())
            infos = _dataset_infos(source, folder=folder) if own == Licence() else []
            return next(
                (_said(i["license"], by="dataset_info.json") for i in infos if i.get("license")),
                own,
            )
        case _:
            return Licence()


def of_student(result: Mapping[str, Any], teachers: Iterable[Mapping[str, Any]]) -> Licence:
    """The licence of a student, combined from base and teachers.

    Takes the `result` and the `teachers.json` of its artifact.
    """
    if "sources" not in result:  # distilled before licences were written down
        return Licence()
    models = [m for m in (result["sources"]["base"], *teachers) if m is not None]
    return of_all(Licence(m.get("license", UNKNOWN), m.get("said_by", "")) for m in models)


def of_all(licences: Iterable[Licence]) -> Licence:
    """The licence of a combination: the common one, or all of them; unknown if one is unknown."""
    found = set(licences)
    names = sorted({licence.license for licence in found})
    if not names or UNKNOWN in names:
        return Licence()
    return Licence(" and ".join(names), "; ".join(sorted({licence.said_by for licence in found})))


def hub_dataset(source: TextSource, *, folder: Path) -> str | None:
    """The hub's name of a folder saved by `datasets`, from the addresses of its download."""
    addresses = [
        a for info in _dataset_infos(source, folder=folder) for a in info["download_checksums"]
    ]
    return next(
        (found[1] for a in addresses if (found := re.match(r"hf://datasets/([^@]+)@", a))), None
    )


def hub_fields(licence: Licence) -> dict[str, str]:
    """Card fields: ``license``, and ``license_name`` if the hub does not list the licence."""
    if licence.license in _HUB:
        return {"license": licence.license}
    return {
        "license": "other",
        "license_name": re.sub(r"[^a-z0-9.+-]+", "-", licence.license.lower()).strip("-"),
    }


# Statements of licences ---------------------------------------------------------------------------


def _of_readme(folder: Path) -> Licence:
    header = _header(folder / "README.md")
    return _said(header.get("license"), header.get("license_name"), by="its README.md")


def _of_gguf(path: Path) -> Licence:
    fields = quick_reader()(path).fields
    name, other = (
        fields[key].contents() if key in fields else None
        for key in ("general.license", "general.license.name")
    )
    return _said(name, other, by="general.license of the GGUF file")


def _of_package(package: str) -> Licence:
    metadata = importlib.metadata.metadata(package)
    classifiers = [
        c for c in metadata.get_all("Classifier", []) if c.startswith("License :: OSI Approved :: ")
    ]
    said = [
        *metadata.get_all("License-Expression", []),
        # some hold the whole text
        *(text for text in metadata.get_all("License", []) if "\n" not in text),
        *(c.rpartition(" :: ")[2] for c in classifiers),
    ]
    return _said(next(iter(said), None), by=f"metadata of the package {package}")


def _said(name: Any, other: Any = None, *, by: str) -> Licence:
    """``other`` is the hub's name for a licence that it does not list."""
    if isinstance(name, list):
        name = " and ".join(part for part in name if isinstance(part, str))
    if name == "other" and other:
        name = other
    words = " ".join(name.split()) if isinstance(name, str) else ""
    if words.lower() in ("", UNKNOWN):
        return Licence()
    return Licence(words.lower() if words.lower() in _HUB else words, by)


def _header(readme: Path) -> dict[str, Any]:
    """The YAML header of a card; empty if there is none or it cannot be read."""
    try:
        with open_regular(readme) as file:
            first, *lines = file.read(_MOST_HEADER).decode("utf-8", "replace").splitlines()
        marks = [at for at, line in enumerate(lines) if line.rstrip() == "---"]
        if first.rstrip() != "---" or not marks:
            return {}
        header = load_yaml_texts("\n".join(lines[: marks[0]]))
    except (OSError, ValueError, ArtifactError, yaml.YAMLError):
        return {}
    return header if isinstance(header, dict) else {}


def _dataset_infos(source: TextSource, *, folder: Path) -> list[dict[str, Any]]:
    """The description that `save_to_disk` wrote of each split; none for other text.

    Each has the addresses of its download under ``download_checksums``.
    """
    if not isinstance(source, DatasetText):
        return []
    found = []
    for file in sorted((folder / source.path.expanduser()).rglob("dataset_info.json")):
        info = read_object(file)
        info["download_checksums"] = info.get("download_checksums") or {}
        if not isinstance(info["download_checksums"], dict):
            raise DataError(
                f"{file}: download_checksums: expected an object, as `save_to_disk` writes it; "
                "save the dataset again, or delete this file."
            )
        found.append(info)
    return found
