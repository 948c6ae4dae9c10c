"""Identify a path on the command line, and name the command that takes it if this one does not."""

from __future__ import annotations

from pathlib import Path

from limbeck.app.run import RUN
from limbeck.contract.artifact import MANIFEST
from limbeck.contract.errors import ArtifactError, RecipeError
from limbeck.contract.recipe import find_recipe


def exported_folder(path: Path, *, command: str) -> Path:
    """The exported folder of a run, or ``path`` itself. Raises `ArtifactError` otherwise."""
    if (path / RUN).is_file():
        return path / "onnx"
    require_made(path, command=command)
    return path


def require_made(path: Path, *, command: str) -> None:
    """Raise `ArtifactError` if ``path`` is no run or artifact, with its kind and its command."""
    if path.is_dir():
        if (path / MANIFEST).exists() or (path / RUN).exists():
            return
        if (path / "adapter_config.json").is_file():
            raise ArtifactError(
                f"{path}: is a PEFT adapter, not an exported student; `limbeck init --teacher "
                f"{path}` writes a recipe that learns from it."
            )
        if (path / "config.json").is_file():
            raise ArtifactError(
                f"{path}: is a model folder, not an exported student; "
                f"`limbeck init --teacher {path} …` writes a recipe, `limbeck run` exports its "
                f"student, and `limbeck bench {path}` times the model as it is."
            )
        return  # the caller says what is missing
    if path.suffix in (".yaml", ".yml") or (not path.exists() and _is_recipe(path)):
        other = f" `limbeck validate {path}` checks the recipe." if command == "verify" else ""
        raise ArtifactError(
            f"{path}: is a recipe, and `limbeck {command}` takes what a run made; "
            f"`limbeck run {path}` makes it.{other}"
        )
    if path.exists():
        kind = "an ONNX graph" if path.suffix == ".onnx" else "a file"
        raise ArtifactError(
            f"{path}: is {kind}; `limbeck {command}` takes the exported folder or the run folder "
            "that it belongs to."
        )
    raise ArtifactError(
        f"{path}: no such folder; expected a run folder, such as runs/pico-1a2b3c4d, or an "
        "artifact in it."
    )


def _is_recipe(path: Path) -> bool:
    try:
        find_recipe(path)
    except RecipeError:
        return False
    return True
