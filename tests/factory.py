"""Tiny students and their exports, each made once a session and shared by every test that asks for
it.

A request is a key: the same architecture, sizes, forms and export options give the same folder.
Shared artifacts are read-only by agreement; a test that changes one works on a copy
(`Factory.copy`).
"""

from __future__ import annotations

import fcntl
import functools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

from limbeck.contract.artifact import Artifact, open_artifact
from limbeck.contract.recipe import fingerprint


class Factory:
    """Makes and remembers tiny random students below one folder, which processes may share."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def student(self, model_type: str = "llama", *, seed: int = 0, **sizes: Any) -> Artifact:
        """The student artifact of a random causal LM; ``sizes`` go over those of
        `tests.architectures.SIZES`.
        """
        from tests.architectures import SIZES
        from tests.pico import make_model, make_student

        sizes = SIZES.get(model_type, {}) | sizes

        def make(folder: Path) -> None:
            model = make_model(folder / "model", model_type=model_type, seed=seed, **sizes)
            make_student(folder / "student", model)

        key = {"kind": "student", "model_type": model_type, "seed": seed, "sizes": sizes}
        return self._once(key, "student", make)

    def encoder(self, model_type: str = "bert", task: str = "classification") -> Artifact:
        """The student artifact of a random encoder."""
        from tests.encoders import make_encoder_student

        key = {"kind": "encoder", "model_type": model_type, "task": task}
        return self._once(
            key, "student", lambda f: make_encoder_student(f / "student", model_type, task=task)
        )

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

    def save_onnx(self, module: Any, arguments: Any, path: Path, **options: Any) -> None:
        """`export.build.exporter.save_onnx`, which traces a model once a session: it takes 10 s."""
        from export.build.exporter import save_onnx

        model = module.model
        key = {
            "model": [type(module).__name__, str(model), model.config.to_json_string()],
            "weights": {k: sha256(v.numpy()).hexdigest() for k, v in model.state_dict().items()},
            "cache": [getattr(module, name, None) for name in ("windows", "shifts")],
            "arguments": str(arguments),
            "options": str({k: v for k, v in options.items() if k != "source"}),
        }
        folder = self._made(
            key, "model.onnx", lambda f: save_onnx(module, arguments, f / "model.onnx", **options)
        )
        for name in ("model.onnx", "model.onnx.data"):
            shutil.copy(folder / name, path.parent)

    @contextmanager
    def traced_once(self) -> Iterator[None]:
        """Exports trace a model once a session."""
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        with (
            patch("export.build.dynamo.save_onnx", self.save_onnx),
            patch("export.build.encoder.save_onnx", self.save_onnx),
            patch.object(ONNXRegistry, "from_torchlib", self._operators),
        ):
            yield

    @functools.cached_property
    def _operators(self) -> Any:
        """torch's list of the operators it exports, made once a process: each takes a second."""
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        return staticmethod(functools.cache(ONNXRegistry.from_torchlib))

    def copy(self, artifact: Artifact, to: Path) -> Path:
        """A copy of a shared artifact at ``to``, to be changed."""
        return Path(shutil.copytree(artifact.path, to))

    def _export(self, student: Artifact, recipe: Any) -> Artifact:
        from export import export_student

        def make(folder: Path) -> None:
            (folder / "student").symlink_to(student.path, target_is_directory=True)
            with self.traced_once():
                export_student(student=student.path, out=folder / "onnx", recipe=recipe)

        asked = recipe.export.model_dump(mode="json")
        return self._once({"student": str(student.path), "export": asked}, "onnx", make)

    def _once(self, key: Any, name: str, make: Callable[[Path], object]) -> Artifact:
        """The artifact ``name`` in the folder of ``key``."""
        return open_artifact(self._made(key, name, make) / name, verify=False)

    def _made(self, key: Any, name: str, make: Callable[[Path], object]) -> Path:
        """The folder of ``key``, in which the process that asks first makes ``name``."""
        folder = self._root / fingerprint(key)[:16]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / name).exists():
                make(folder)
        return folder
