"""Teachers that are students of other recipes: their list, their order, and their folders.

Knows recipes and folders; makes nothing (see `limbeck.app.run`). A run plans them once and passes
the plan on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from limbeck.contract.errors import DataError, RecipeError, UserError
from limbeck.contract.recipe import (
    AnyRecipe,
    BaseSource,
    FreshStudent,
    OnnxModel,
    RecipeModel,
    ServerModel,
    ShrinkStudent,
    find_recipe,
    load_teacher_recipe,
)
from limbeck.contract.sources.models import context_in, exported_context, stored_config
from limbeck.contract.sources.places import cache_folder
from limbeck.contract.sources.preflight import preflight
from limbeck.contract.sources.teacher_tokens import tokenizer_mistakes


@dataclass(frozen=True)
class Product:
    """The student of another recipe, made before the recipe that learns from it."""

    recipe: AnyRecipe
    folder: Path  # its run folder
    teachers: dict[str, Product]  # its own teachers that are products, by name

    @property
    def student(self) -> Path:
        """The student artifact."""
        return self.folder / "student"

    @property
    def artifacts(self) -> dict[str, Path]:
        """Student artifacts of its teachers that are products, by name."""
        return {name: teacher.student for name, teacher in self.teachers.items()}


@dataclass(frozen=True)
class Products:
    """All products that one recipe needs."""

    order: tuple[Product, ...]  # teachers before their pupils
    teachers: dict[str, Product]  # the recipe's own teachers that are products, by name
    errors: tuple[str, ...] = ()  # teacher recipes that are missing, wrong, or made from themselves

    @property
    def artifacts(self) -> dict[str, Path]:
        """Student artifacts of the recipe's own teachers that are products, by name."""
        return {name: teacher.student for name, teacher in self.teachers.items()}


@dataclass
class _Planner:
    products: dict[Path, Product] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def teachers_of(
        self, recipe: AnyRecipe, *, chain: tuple[Path, ...] = (), where: str = ""
    ) -> dict[str, Product]:
        """Plan the teachers of ``recipe``; ``chain`` holds the recipes that lead to it."""
        teachers = {}
        for index, (name, model) in enumerate(recipe.teacher_models.items()):
            if not isinstance(model, RecipeModel):
                continue
            here = f"{where}teachers.{index}"
            try:
                path = find_recipe(model.recipe, folder=recipe.folder)
                if path in chain:
                    circle = " -> ".join(p.stem for p in (*chain[chain.index(path) :], path))
                    raise RecipeError(
                        f"a recipe that is made from itself ({circle}); "
                        "name another model for one of them."
                    )
                made = load_teacher_recipe(path, of=recipe)
            except RecipeError as error:
                self.errors.append(f"{here}: {error}")
                continue
            inner = self.teachers_of(made, chain=(*chain, path), where=f"{here} ({made.name}): ")
            folder = cache_folder() / "products" / f"{made.name}-{made.digest[:8]}"
            teachers[name] = self.products.setdefault(folder, Product(made, folder, inner))
        return teachers


def find_products(recipe: AnyRecipe) -> Products:
    """Products that ``recipe`` needs; mistakes in a teacher's recipe go into ``errors``."""
    planner = _Planner()
    teachers = planner.teachers_of(recipe)
    return Products(tuple(planner.products.values()), teachers, tuple(planner.errors))


def plan_products(recipe: AnyRecipe) -> Products:
    """As `find_products`; raises `RecipeError` listing every teacher recipe that cannot be made."""
    products = find_products(recipe)
    if products.errors:
        lines = [
            f"{recipe.name}: its teachers cannot be made",
            *(f"  {e}" for e in products.errors),
        ]
        raise RecipeError("\n".join(lines))
    return products


def mistakes(
    recipe: AnyRecipe, products: Products | None = None, *, timed: bool = True
) -> list[str]:
    """Mistakes of ``recipe`` and its products on this machine, one per line.

    Missing files and packages; a student that cannot be exported, or if it is ``timed``, measured;
    teacher recipes that are missing, wrong, or depend on themselves.
    """
    products = products or find_products(recipe)
    found = [*preflight(recipe), *_export_mistakes(recipe), *products.errors]
    if timed:
        found += bench_mistakes(recipe)
    found += tokenizer_mistakes(recipe)
    for product in products.order:
        found += [f"{product.recipe.name}: {line}" for line in preflight(product.recipe)]
    return list(dict.fromkeys(found))


def _export_mistakes(recipe: AnyRecipe) -> list[str]:
    """What the export would refuse after training: from the configuration of student or base."""
    from export.build.choice import choose_backend
    from export.check.trial import require_encoder_graph

    if isinstance(recipe.base, RecipeModel | OnnxModel):
        return []
    student, base = recipe.student, cast(BaseSource, recipe.base)
    where = "student.config" if isinstance(student, FreshStudent) else "student.base"
    try:
        config = (
            student.config
            if isinstance(student, FreshStudent)
            else stored_config(base, folder=recipe.folder)
        )
    except UserError:  # preflight has named it
        return []
    try:
        if config is not None and recipe.task != "causal-lm":
            opset, shapes = recipe.export.opset, recipe.export.shapes
            require_encoder_graph(config, task=recipe.task, opset=opset, shapes=shapes)
        elif config is not None:
            choose_backend(config, **recipe.builder_options)
            if recipe.export.ggufs:
                from export.gguf.architecture import architecture, whole_config  # needs numpy

                architecture(_cut(whole_config(config), student))
    except UserError as error:
        return [f"{where}: {error}"]
    return []


def _cut(config: Mapping[str, Any], student: object) -> Mapping[str, Any]:
    """``config``, which is whole, with the sizes that a student to be cut out of it will have."""
    if not isinstance(student, ShrinkStudent) or "hidden_size" not in config:
        return config
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads")
    sizes = student.model_dump(include={"hidden_size", "intermediate_size"}, exclude_none=True)
    sizes["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    if student.layers is not None:  # which of them are kept is not known yet
        sizes |= {"num_hidden_layers": student.layers, "layer_types": None}
    if student.kv_heads is not None and groups:
        sizes["num_attention_heads"] = student.kv_heads * (heads // groups)
    return {**config, **sizes}


def bench_mistakes(recipe: AnyRecipe) -> list[str]:
    """Models that read fewer tokens than the bench gives them, as far as they are known here."""
    models = {"the student's base": recipe.base} | recipe.teacher_models
    found: dict[str, str] = {}  # each model once
    for name, model in models.items():
        if model is None or isinstance(model, RecipeModel | ServerModel | OnnxModel):
            continue
        try:
            config = stored_config(model, folder=recipe.folder)
        except UserError:  # preflight has named it
            continue
        try:
            reads = exported_context if model is recipe.base else context_in
            recipe.bench.require_context(reads(config or {}), name)
        except DataError as error:
            found.setdefault(str(model), str(error))
    return list(found.values())


def require_inputs(recipe: AnyRecipe, *, timed: bool = True) -> Products:
    """Plan the products of ``recipe``, which is ``timed`` at the end or not.

    Raises `RecipeError` listing all that is missing on this machine.
    """
    products = find_products(recipe)
    if missing := mistakes(recipe, products, timed=timed):
        lines = [f"{recipe.name}: cannot run here", *(f"  {line}" for line in missing)]
        raise RecipeError("\n".join(lines))
    return products
