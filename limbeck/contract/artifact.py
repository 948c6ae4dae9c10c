"""Artifacts: what one stage hands the next. A folder whose manifest is written last, with a hash of
every file.

Knows folders, hashes and manifests. Knows nothing about what the files mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt, StringConstraints
from pydantic import ValidationError as PydanticError

from limbeck.contract.errors import ArtifactError, UserError
from limbeck.contract.files import (
    disk_full_is_a_user_error,
    file_digest,
    files_below,
    new_folder,
    put_in_place,
    read_json,
    require_utf8,
    write_atomically,
)
from limbeck.contract.machine import host, versions
from limbeck.contract.progress import say
from limbeck.contract.recipe import BaseRecipe, fingerprint

FORMAT = 2  # of the manifest and of the results in it; 1 had results without `task`
MANIFEST = "manifest.json"
# Files, and folders of files, with times and places of the work, such as the folder of an adapter's
# base. A change of them is found, but they do not enter the digest: equal input gives equal
# digests, in any folder and at any time.
NOTES = ("log.jsonl", "teachers.json", "adapter/adapter_config.json", "tensorboard/", "trackers/")
RECOVERED = "student-recovered"  # in a run folder: distilled again through the rounding of a form


def _is_time(text: str) -> str:
    datetime.fromisoformat(text)
    return text


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class _File(_Strict):
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    bytes: NonNegativeInt


class _Recipe(_Strict):
    text: str
    resolved: dict[str, Any]


class _Manifest(_Strict):
    format: int
    kind: str
    key: str
    parents: dict[str, str]
    result: dict[str, Any]
    recipe: _Recipe | None
    versions: dict[str, str]
    host: dict[str, Any]
    created: Annotated[str, AfterValidator(_is_time)]
    files: dict[str, _File]


@dataclass(frozen=True)
class Artifact:
    """A complete artifact on disk. ``manifest`` has the fields of `_Manifest`, each of its type."""

    path: Path
    manifest: dict[str, Any]

    @property
    def kind(self) -> str:
        """`model`, `student`, `onnx` or `bench`."""
        return str(self.manifest["kind"])

    @property
    def key(self) -> str:
        """Fingerprint of the stage's whole input.

        An artifact of the same key need not be made again.
        """
        return str(self.manifest["key"])

    @property
    def created(self) -> str:
        """Time of writing, ISO 8601."""
        return str(self.manifest["created"])

    @property
    def result(self) -> dict[str, Any]:
        """What the stage measured."""
        return dict(self.manifest["result"])

    def file(self, name: str) -> Path:
        """The file that a result calls ``name``. Raises `ArtifactError` for one of another folder.

        The name may be a stranger's, and lead anywhere.
        """
        if name not in self.manifest["files"]:
            raise ArtifactError(f"{self.path}: its result names {name}, no file of this folder.")
        return self.path / name

    @property
    def digest(self) -> str:
        """sha256 over kind, key, parents and all files but notes; no times, places or machines."""
        counted = {
            name: entry
            for name, entry in self.manifest["files"].items()
            if not name.startswith(NOTES)
        }
        return fingerprint(
            {name: self.manifest[name] for name in ("kind", "key", "parents")} | {"files": counted}
        )


@dataclass
class Draft:
    """An artifact being written. Fill ``folder``, then set ``result``."""

    folder: Path
    result: dict[str, Any] | None = field(default=None)


@contextmanager
def write_artifact(
    path: Path, *, kind: str, key: str, parents: Mapping[str, str], recipe: BaseRecipe | None = None
) -> Iterator[Draft]:
    """Write an artifact to ``path`` through a temporary folder beside it. ``path`` never holds half
    of one.

    ``parents`` maps a role (`base`, `student` …) to the digest of the artifact or file it was made
    from. Raises `EnvironmentalError` when the disk is full or ``path`` is not UTF-8. Leaving
    without a ``result`` is a defect.
    """
    require_utf8(path).parent.mkdir(parents=True, exist_ok=True)
    with disk_full_is_a_user_error(path), new_folder(path) as folder:
        draft = Draft(folder)
        yield draft
        assert draft.result is not None, f"a {kind} artifact without a measured result"
        manifest = {
            "format": FORMAT,
            "kind": kind,
            "key": key,
            "parents": dict(parents),
            "result": draft.result,
            "recipe": {"text": recipe.text, "resolved": recipe.resolved()} if recipe else None,
            "versions": versions(),
            "host": host(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "files": {name: _entry(folder / name) for name in files_below(folder)},
        }
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1))
        _share(folder)
        put_in_place(folder, path)


def open_artifact(path: Path, *, kind: str | None = None, verify: bool = True) -> Artifact:
    """Open the artifact at ``path``. Raises `ArtifactError` naming the first file that is changed,
    missing or extra.

    ``verify=False`` skips the hashes, for a caller that has just written or checked them.
    """
    manifest = _read_manifest(path)
    if manifest["format"] != FORMAT:
        former = manifest["format"] < FORMAT
        age = "a former" if former else "a newer"
        remedy = (
            f"`limbeck run RECIPE --out {path.parent}` makes it anew"
            if former
            else "update Limbeck, or delete the folder"
        )
        raise ArtifactError(
            f"{path}: written by {age} version of Limbeck (format {manifest['format']}, expected "
            f"{FORMAT}); {remedy}."
        )
    if kind is not None and manifest["kind"] != kind:
        raise ArtifactError(f"{path}: found a {manifest['kind']} artifact, expected {kind}.")
    files: dict[str, dict[str, Any]] = manifest["files"]
    present = set(files_below(path)) - {MANIFEST}
    for name in sorted(files.keys() | present):
        if name not in present:
            raise ArtifactError(
                f"{path}: {name} is missing; delete the folder and run the stage again."
            )
        if name not in files:
            raise ArtifactError(
                f"{path}: {name} is not part of this artifact; move it out of the folder."
            )
        if not (path / name).is_file():
            raise ArtifactError(
                f"{path / name}: a folder, pipe or device, where a file was expected."
            )
        if verify and _entry(path / name) != files[name]:
            raise ArtifactError(
                f"{path}: {name} has changed since it was written; delete the folder and run the "
                "stage again."
            )
    return Artifact(path, manifest)


def require_outside(out: Path) -> None:
    """Raise `UserError` if ``out`` lies inside an artifact, which would no longer be whole."""
    for folder in out.absolute().parents:
        if (folder / MANIFEST).is_file():
            raise UserError(f"{out}: inside the artifact {folder}; name a place outside of it.")


def find_artifact(path: Path, *, kind: str, key: str) -> Artifact | None:
    """The artifact at ``path`` if it is complete, unchanged and was made from ``key``; None if it
    has to be made.

    One of a former format has to be made. Raises `ArtifactError` for a damaged artifact: damage is
    never repaired in silence.
    """
    if not os.path.lexists(path / MANIFEST):
        return None
    if (found := _read_manifest(path)["format"]) < FORMAT:
        say(f"{path}: made by a former version of Limbeck (format {found}); it is made anew.")
        return None
    artifact = open_artifact(path, kind=kind)
    return artifact if artifact.key == key else None


def work_folder(path: Path) -> Path:
    """Where a stage keeps its checkpoint and log until the artifact ``path`` is complete."""
    return path.with_name(f".{path.name}.training")


def student_of(onnx: Artifact) -> Path:
    """Folder of the student that ``onnx`` was made from; the recovered one if that ships."""
    recovered = onnx.path.parent / RECOVERED
    made_from = onnx.manifest["parents"].get("student")
    if (recovered / MANIFEST).exists() and open_artifact(
        recovered, verify=False
    ).digest == made_from:
        return recovered
    return onnx.path.parent / "student"


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of ``path``, every field of its type unless the format is another one.

    Raises `ArtifactError`.
    """
    file = path / MANIFEST
    remedy = "delete the folder and run the stage again."
    try:
        manifest = read_json(file)
    except FileNotFoundError:
        raise ArtifactError(
            f"{path}: no complete artifact here ({MANIFEST} is missing); run the stage that makes "
            "it."
        ) from None
    except ArtifactError as error:
        raise ArtifactError(f"{str(error).rstrip('.')}, so not a manifest; {remedy}") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if type(found) is not int or "kind" not in manifest:
        raise ArtifactError(f"{file}: not a manifest; {remedy}")
    if found == FORMAT:
        try:
            _Manifest.model_validate(manifest)
        except PydanticError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ArtifactError(f"{file}: {where}: {first['msg']}; {remedy}") from None
    return dict(manifest)


def _entry(path: Path) -> dict[str, Any]:
    return {"sha256": file_digest(path), "bytes": path.stat().st_size}


def _share(folder: Path) -> None:
    """Let everyone read what the umask allows: safetensors writes files for their owner alone."""
    mode = (folder / MANIFEST).stat().st_mode & 0o666  # of a file that was opened as usual
    for name in files_below(folder):
        if not (folder / name).is_symlink():
            (folder / name).chmod(mode)
