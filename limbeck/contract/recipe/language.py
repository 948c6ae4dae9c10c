"""The recipe of a language model: several teachers, one student, and the gates before it ships."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from limbeck.contract.errors import RecipeError
from limbeck.contract.recipe.bench import Bench, Gates
from limbeck.contract.recipe.budget import Budget, Space
from limbeck.contract.recipe.distillation import Features, FreshStudent, Fusion, Student, Training
from limbeck.contract.recipe.export import Export, MixedByRule, Recover
from limbeck.contract.recipe.inputs import (
    BaseSource,
    Data,
    NoCache,
    ServerModel,
    Teacher,
    TextSource,
)
from limbeck.contract.recipe.root import BaseRecipe


class Recipe(BaseRecipe):
    """Several teacher language models, one student, and the gates that it must pass to ship."""

    task: Literal["causal-lm"] = Field("causal-lm", description="What the student does.")
    teachers: tuple[Teacher, ...] = Field(
        (), description="Teachers; without teachers it is plain fine-tuning."
    )
    data: Data = Field(description="Training and held-out text.")
    student: Student = Field(description="What is trained.")
    fusion: Fusion = Field(
        Fusion(), description="How the teachers are mixed; of no effect without teachers."
    )
    features: Features = Field(
        Features(), description="Feature alignment; of no effect without teachers."
    )
    training: Training = Field(description="The loop.")
    export: Export = Field(Export(), description="Graphs made from the student.")
    bench: Bench = Field(Bench(), description="What is measured.")
    gates: Gates = Field(Gates(), description="What the shipped form must meet.")
    budget: Budget | None = Field(
        None, description="Bounds for `limbeck search`; no effect elsewhere."
    )
    search: Space = Field(
        Space(), description="What `limbeck search` looks among; of no effect elsewhere."
    )

    _decides_weights: ClassVar[tuple[str, ...]] = (
        "name",
        "seed",
        "teachers",
        "data",
        "student",
        "fusion",
        "features",
        "training",
    )

    plain_export: ClassVar[Mapping[str, Any]] = {
        "recover": None,
        "adapters": "merged",
        "mixed": "rule",
    }

    @property
    def base(self) -> BaseSource | None:
        """The model that the student starts from, or None for a fresh student."""
        return None if isinstance(self.student, FreshStudent) else self.student.base

    @property
    def store(self) -> str | None:
        """URL where the teachers' outputs are shared, or None."""
        cache = self.training.teacher_cache
        return None if isinstance(cache, NoCache) else cache.store

    def require_cache(self) -> None:
        """Raise `RecipeError` for a training that keeps no teacher cache."""
        if isinstance(self.training.teacher_cache, NoCache):
            raise RecipeError(
                f"{self.name}: training.teacher_cache is none, so the training would not look for "
                "a cache. Set it to hidden or topk in the recipe, or for one command with "
                "--set 'training.teacher_cache={kind: hidden}'."
            )

    def groups(self) -> list[tuple[str, str, TextSource]]:
        """Place in the recipe, name and text of every domain and of the prompts, in order."""
        found = [
            (f"data.domains.{i}.text", d.name, d.text) for i, d in enumerate(self.data.domains)
        ]
        own = self.training.on_policy
        if own is not None and own.prompts.text is not None:
            found.append(("training.on_policy.prompts.text", "own-text prompts", own.prompts.text))
        return found

    @property
    def local_teachers(self) -> tuple[Teacher, ...]:
        """Teachers that are not behind a server."""
        return tuple(t for t in self.teachers if not isinstance(t.model, ServerModel))

    @property
    def adapters(self) -> dict[str, Path]:
        """PEFT adapter folders of the teachers that have one, by teacher name."""
        return {t.name: t.adapter for t in self.teachers if t.adapter is not None}

    @property
    def block(self) -> int:
        """Tokens in a row of text."""
        return self.data.block

    @property
    def minutes(self) -> float | None:
        """Training budget in minutes, if it is given as time."""
        return self.training.minutes

    @property
    def builder_options(self) -> dict[str, Any]:
        """Choices of the graph builder, by name."""
        return {"backend": self.export.backend, "provider": self.export.provider}

    @property
    def recover(self) -> Recover | None:
        """The remedy if rounding costs too much, or None."""
        return self.export.recover

    def exporting(self) -> dict[str, Any]:
        """As `BaseRecipe.exporting`, with the gates if `mixed` or `recover` depend on them."""
        exporting = super().exporting()
        if self.recover is None and isinstance(self.export.mixed, MixedByRule):
            return exporting
        return exporting | {"gates": [self.gates.max_size_mb, self.gates.max_quantization_loss]}
