"""What one stage hands the next: a folder whose manifest is written last, atomically, with a hash of every file.

Knows folders, hashes and manifests; knows nothing of what the files mean.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from limbeck.contract.errors import ArtifactError, EnvironmentalError
from limbeck.contract.recipe import BaseRecipe, fingerprint

FORMAT = 1
MANIFEST = "manifest.json"
RECOVERED = "student-recovered"  # in a run folder, beside `student`: distilled again through the rounding of a form
_VERSIONED = (
    "limbeck", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "optimum", "onnx",
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "onnxruntime-genai-cuda", "numpy",
)  # fmt: skip


@dataclass(frozen=True)
class Artifact:
    """A complete artifact on disk."""

    path: Path
    manifest: dict[str, Any]

    @property
    def kind(self) -> str:
        """`model`, `student`, `onnx` or `bench`."""
        return str(self.manifest["kind"])

    @property
    def key(self) -> str:
        """Fingerprint of everything the stage was given; equal keys need no second run."""
        return str(self.manifest["key"])

    @property
    def result(self) -> dict[str, Any]:
        """What the stage measured."""
        return dict(self.manifest["result"])

    @property
    def digest(self) -> str:
        """sha256 over kind, key, parents and the hash of every file: the same bytes, the same digest."""
        return fingerprint(
            {name: self.manifest[name] for name in ("kind", "key", "parents", "files")}
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
    """Write an artifact to ``path`` through a temporary folder beside it; nothing half-written ever has that name.

    ``parents`` maps a role (`base`, `student` …) to the digest of the artifact or file it was made from.
    Raises `EnvironmentalError` when the disk is full. Leaving without a ``result`` is a defect.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / f".{path.name}.writing"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    draft = Draft(folder)
    try:
        with disk_full_is_a_user_error(path):
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
                "files": {name: _entry(folder / name) for name in _files(folder)},
            }
            write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1))
            _share(folder)
            _replace(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def open_artifact(path: Path, *, kind: str | None = None, verify: bool = True) -> Artifact:
    """Open the artifact at ``path``. Raises `ArtifactError` naming the first file changed, missing or extra.

    ``verify=False`` skips the hashes, for a caller that has just written or checked them.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        found, expected = (manifest["kind"], manifest["format"]), (kind or manifest["kind"], FORMAT)
    except FileNotFoundError:
        raise ArtifactError(
            f"{path}: no complete artifact here ({MANIFEST} is missing); run the stage that makes it."
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        raise ArtifactError(
            f"{path / MANIFEST}: not a manifest; delete the folder and run the stage again."
        ) from None
    if found != expected:
        raise ArtifactError(
            f"{path}: found a {found[0]} artifact of format {found[1]}, expected {expected[0]} of format {expected[1]}."
        )
    files: dict[str, dict[str, Any]] = manifest["files"]
    present = set(_files(path)) - {MANIFEST}
    for name in sorted(files.keys() | present):
        if name not in present:
            raise ArtifactError(
                f"{path}: {name} is missing; delete the folder and run the stage again."
            )
        if name not in files:
            raise ArtifactError(
                f"{path}: {name} is not part of this artifact; move it out of the folder."
            )
        if verify and _entry(path / name) != files[name]:
            raise ArtifactError(
                f"{path}: {name} has changed since it was written; delete the folder and run the stage again."
            )
    return Artifact(path, manifest)


def find_artifact(path: Path, *, kind: str, key: str) -> Artifact | None:
    """The artifact at ``path`` when it is complete, unchanged and was made from ``key``; none when it must be made.

    Raises `ArtifactError` when an artifact is there but damaged: that is never repaired in silence.
    """
    if not (path / MANIFEST).exists():
        return None
    artifact = open_artifact(path, kind=kind)
    return artifact if artifact.key == key else None


def student_of(onnx: Artifact) -> Path:
    """The folder beside ``onnx`` of the student that its graphs were made from: the recovered one where that ships."""
    recovered = onnx.path.parent / RECOVERED
    made_from = onnx.manifest["parents"].get("student")
    if (recovered / MANIFEST).exists() and open_artifact(
        recovered, verify=False
    ).digest == made_from:
        return recovered
    return onnx.path.parent / "student"


def file_digest(path: Path) -> str:
    """sha256 of one file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(path: Path) -> str:
    """sha256 over the name and content of every file below ``path``."""
    return fingerprint({name: file_digest(path / name) for name in _files(path)})


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` holds either the old content or all of the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    with disk_full_is_a_user_error(path):
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Version of Python and of every installed library that can change a result."""
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def host() -> dict[str, Any]:
    """What this machine is: processor, its vector flags, cores this process may use, memory in bytes."""
    processor, flags = platform.processor() or platform.machine(), set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                processor = value.strip()
            elif name.strip() == "flags":
                flags = set(value.split())
                break
    except OSError:
        pass  # not Linux: the processor's name is all there is
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": processor,
        "flags": [flag for flag in wanted if flag in flags],
        "cores": available_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def sums_overflow() -> bool:
    """Whether this processor adds pairs of 8-bit products in 16 bits, where signed weights of 8 bits overflow: x86 without VNNI.

    True of an x86 whose flags are not known, as on macOS.
    """
    flags = set(host()["flags"])
    if not flags and platform.machine().lower() in ("x86_64", "amd64"):
        return platform.system() != "Linux"
    return "avx2" in flags and not flags & {"avx512_vnni", "avx_vnni", "amx_int8"}


def available_cores() -> int:
    """Processor cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def disk_full_is_a_user_error(path: Path) -> Iterator[None]:
    """Turn "no space left" into an error that names ``path``; libraries that wrap it are seen through."""
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) in (
            errno.ENOSPC,
            errno.EDQUOT,
        ) or "No space left" in str(error)
        if not full:
            raise
        raise EnvironmentalError(
            f"{path}: no space left on the disk; free some room and run again. Nothing half-written was kept."
        ) from error


@contextmanager
def unwritable_is_a_user_error(
    folder: Path, *, remedy: str = "name another with --out"
) -> Iterator[None]:
    """Turn a lack of permission and a read-only file system into an error that names ``folder`` and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise EnvironmentalError(
            f"{folder}: cannot be written ({error.strerror}); {remedy}."
        ) from None


def _files(folder: Path) -> list[str]:
    return sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() or p.is_symlink()
    )


def _entry(path: Path) -> dict[str, Any]:
    return {"sha256": file_digest(path), "bytes": path.stat().st_size}


def _share(folder: Path) -> None:
    """Let everyone read what the umask lets them: safetensors writes files for their owner alone."""
    mode = (folder / MANIFEST).stat().st_mode & 0o666  # of a file that was opened as usual
    for name in _files(folder):
        if not (folder / name).is_symlink():
            (folder / name).chmod(mode)


def _replace(folder: Path, path: Path) -> None:
    for name in _files(folder):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    if path.exists():
        old = path.parent / f".{path.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        folder.rename(path)
        shutil.rmtree(old)
    else:
        folder.rename(path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
