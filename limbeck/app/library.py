"""The shipped recipes by target size, for `limbeck recipes`. Reads recipes and their headers, no
torch.

A header repeats the plan in one line, such as ``# Plan: 145 MB int8-weight on cpu``. A test
compares the two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.contract.errors import RecipeError
from limbeck.contract.recipe import AnyRecipe, load_any_recipe, shipped_recipes

_EDITOR = "yaml-language-server:"  # the line that tells an editor the schema
_PLAN = re.compile(r"^# Plan: ([\d.]+) MB (\S+) on (cpu|card)$", re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """One shipped recipe."""

    name: str
    path: Path
    recipe: AnyRecipe
    megabytes: float  # of the shipped form, graph and weights
    form: str
    device: str  # `cpu`, or `card` where training asks for a GPU

    @property
    def family(self) -> str:
        """The folder it lies in; of a recipe of no family its own name."""
        return self.name.partition("/")[0]

    @property
    def about(self) -> str:
        """The comment at the top of the file."""
        lines = [line for line in self.recipe.text.splitlines() if line.startswith("#")]
        words = [line.removeprefix("#").strip() for line in lines if _EDITOR not in line]
        return " ".join(words)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "name": self.name,
            "family": self.family,
            "megabytes": self.megabytes,
            "device": self.device,
            "description": self.recipe.description,
            "task": self.recipe.task,
            "teachers": list(self.recipe.teacher_models),
            "student": self.recipe.student.kind,
            "forms": [form.kind for form in self.recipe.export.forms],
            "about": self.about,
            "path": str(self.path),
        }


def library(
    *, max_mb: float | None = None, cpu: bool = False, family: str | None = None
) -> list[Entry]:
    """Shipped recipes, smallest first. Raises `RecipeError` for an unknown family."""
    entries = sorted(
        (_entry(name, path) for name, path in shipped_recipes()),
        key=lambda e: (e.megabytes, e.name),
    )
    families = sorted({entry.family for entry in entries})
    if family is not None and family not in families:
        raise RecipeError(
            f"--family {family}: no recipe of that family; there are: {', '.join(families)}."
        )
    return [
        entry
        for entry in entries
        if (max_mb is None or entry.megabytes <= max_mb)
        and (not cpu or entry.device == "cpu")
        and family in (None, entry.family)
    ]


def _entry(name: str, path: Path) -> Entry:
    recipe = load_any_recipe(path)
    found = _PLAN.search(recipe.text)
    if found is None:
        raise RecipeError(
            f"{path}: the header has no line such as `# Plan: 145 MB int8-weight on cpu`; add it."
        )
    return Entry(name, path, recipe, float(found[1]), found[2], found[3])
