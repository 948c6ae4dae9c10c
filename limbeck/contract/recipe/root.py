"""The root of a recipe's tree: the fields that recipes of every task share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, PrivateAttr

from limbeck.contract.recipe.base import Frozen, Int, Name, fingerprint
from limbeck.contract.recipe.export import Recover
from limbeck.contract.recipe.inputs import AnySource, ServerModel, TextSource


class BaseRecipe(Frozen):
    """Fields of recipes of every task."""

    name: Name = Field(description="Name of the run folder and of the student.")
    description: str = Field("", description="One line for `limbeck recipes`.")
    seed: Int = Field(
        0, ge=0, lt=2**32, description="Seed of initialisation, data order and sampling."
    )

    _folder: Path = PrivateAttr(default_factory=Path.cwd)
    _text: str = PrivateAttr("")
    _decides_weights: ClassVar[tuple[str, ...]]  # top-level keys
    # Values of `export:` that suit every student and form.
    plain_export: ClassVar[Mapping[str, Any]] = {}

    @property
    def folder(self) -> Path:
        """Folder that relative paths in this recipe start from."""
        return self._folder

    @property
    def text(self) -> str:
        """The file as it was read, comments included."""
        return self._text

    def groups(self) -> list[tuple[str, str, TextSource]]:
        """Place in the recipe, name and text of every domain or class, in order."""
        raise NotImplementedError

    def texts(self) -> list[tuple[str, TextSource]]:
        """Name and text of every domain or class, in order."""
        return [(name, text) for _, name, text in self.groups()]

    @property
    def adapters(self) -> dict[str, Path]:
        """PEFT adapter folders of the teachers that have one, by teacher name."""
        return {}

    @property
    def block(self) -> int | None:
        """Most tokens in a row of text; None where the text itself decides."""
        return None

    @property
    def minutes(self) -> float | None:
        """Training budget in minutes, if it is given as time."""
        return None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of a classifier's classes, in the order of its outputs; empty for other tasks."""
        return ()

    @property
    def builder_options(self) -> dict[str, Any]:
        """Choices of the graph builder, by name; empty for tasks that have one builder."""
        return {}

    @property
    def recover(self) -> Recover | None:
        """The remedy if rounding costs too much, or None."""
        return None

    @property
    def store(self) -> str | None:
        """URL where the teachers' outputs are shared, or None."""
        return None

    @property
    def base(self) -> Any:
        """The model that the student starts from, or None for a fresh student."""
        raise NotImplementedError

    @property
    def teacher_models(self) -> dict[str, AnySource]:
        """Where each teacher's weights come from, by its name, in order."""
        teachers: Any = self.teachers  # type: ignore[attr-defined]
        return {teacher.name: teacher.model for teacher in teachers}

    @property
    def stand_in(self) -> bool:
        """Whether models are random stand-ins, so that no measured quality means anything."""
        sources = [*self.teacher_models.values(), self.base]
        return any(source is not None and source.kind == "random" for source in sources)

    def resolved(self) -> dict[str, Any]:
        """Every choice with its default filled in, as plain JSON types."""
        return self.model_dump(mode="json")

    def distillation(self) -> dict[str, Any]:
        """The part of `resolved` that decides the student's weights."""
        whole = self.resolved()
        part = {key: whole[key] for key in self._decides_weights}
        training = {k: v for k, v in part["training"].items() if k != "trackers"}
        if cache := training.get("teacher_cache"):
            training["teacher_cache"] = {k: v for k, v in cache.items() if k != "store"}
        teachers = [
            {**written, "model": model.identity()} if isinstance(model, ServerModel) else written
            for written, model in zip(part["teachers"], self.teacher_models.values(), strict=True)
        ]
        return part | {"training": training, "teachers": teachers}

    def exporting(self) -> dict[str, Any]:
        """The part of `resolved` that decides the exported files of a given student."""
        exporting: dict[str, Any] = self.resolved()["export"]
        return exporting

    @property
    def digest(self) -> str:
        """sha256 of `distillation`: names the run folder, so that other gates do not train
        again."""
        return fingerprint(self.distillation())
