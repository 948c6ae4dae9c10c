"""Tiny students and their exports, each made once a session and shared by every test that asks for
it.

A request is a key: the same architecture, sizes, forms and export options give the same folder.
Shared artifacts are read-only by agreement; a test that changes one works on a copy
(`Factory.copy`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from limbeck.contract.artifact import Artifact, open_artifact
from limbeck.contract.recipe import fingerprint


class Factory:
    """Makes and remembers tiny random students below one folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def student(self, model_type: str = "llama", *, seed: int = 0, **sizes: Any) -> Artifact:
        """The student artifact of a random causal LM; ``sizes`` go over those of
        `tests.architectures.SIZES`.
        """
        from tests.architectures import SIZES
        from tests.pico import make_model, make_student

        sizes = SIZES.get(model_type, {}) | sizes
        folder = self._folder(kind="student", model_type=model_type, seed=seed, sizes=sizes)
        if not (folder / "student").exists():
            model = make_model(folder / "model", model_type=model_type, seed=seed, **sizes)
            make_student(folder / "student", model)
        return open_artifact(folder / "student", verify=False)

    def encoder(self, model_type: str = "bert", task: str = "classification") -> Artifact:
        """The student artifact of a random encoder."""
        from tests.encoders import make_encoder_student

        folder = self._folder(kind="encoder", model_type=model_type, task=task)
        if not (folder / "student").exists():
            make_encoder_student(folder / "student", model_type, task=task)
        return open_artifact(folder / "student", verify=False)

    def exported(
        self,
        model_type: str = "llama",
        forms: list[Any] | None = None,
        *,
        seed: int = 0,
        sizes: dict[str, Any] | None = None,
        bench: dict[str, Any] | None = None,
        **export: Any,
    ) -> Artifact:
        """The export of `student`: ``forms`` (default: the recipe's) and further fields of the
        recipe's `export:` part.

        The student lies beside it as ``student``, as in a run folder.
        """
        from tests.pico import pico_recipe

        student = self.student(model_type, seed=seed, **(sizes or {}))
        if forms:
            export["forms"] = forms
        parts = {"export": export, "bench": bench}
        return self._export(student, pico_recipe(**{k: v for k, v in parts.items() if v}))

    def exported_encoder(
        self, model_type: str = "bert", task: str = "classification", **export: Any
    ) -> Artifact:
        """The export of `encoder`."""
        from tests.encoders import classifier_recipe, embedding_recipe

        make = classifier_recipe if task == "classification" else embedding_recipe
        recipe = make(**({"export": export} if export else {}))
        return self._export(self.encoder(model_type, task), recipe)

    def copy(self, artifact: Artifact, to: Path) -> Path:
        """A copy of a shared artifact at ``to``, to be changed."""
        return Path(shutil.copytree(artifact.path, to))

    def _export(self, student: Artifact, recipe: Any) -> Artifact:
        from export import export_student

        asked = recipe.export.model_dump(mode="json")
        folder = self._folder(kind="export", student=str(student.path), export=asked)
        if not (folder / "student").exists():
            (folder / "student").symlink_to(student.path, target_is_directory=True)
        if not (folder / "onnx").exists():
            export_student(student=student.path, out=folder / "onnx", recipe=recipe)
        return open_artifact(folder / "onnx", verify=False)

    def _folder(self, **key: Any) -> Path:
        folder = self._root / fingerprint(key)[:16]
        folder.mkdir(parents=True, exist_ok=True)
        return folder
