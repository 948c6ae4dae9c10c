"""Mistakes of a recipe that only this machine shows."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from limbeck.contract.errors import UserError
from limbeck.contract.models.adapter_files import adapter_facts
from limbeck.contract.recipe import (
    AnyRecipe,
    EmbeddingTeacher,
    FreshStudent,
    HubModel,
    LocalModel,
    ModelSource,
    OnnxModel,
    PackageModel,
    ParquetRows,
    PlainText,
    RandomModel,
    RecipeModel,
    ServerModel,
    find_recipe,
)
from limbeck.contract.sources.encoders import (
    require_classes,
    require_one_label,
    require_pooling,
    stated_classes,
)
from limbeck.contract.sources.hub import cached_config
from limbeck.contract.sources.models import (
    model_path,
    package_pieces,
    require_fits,
    require_language_model,
    require_reads,
    require_shrunk,
    require_tokenizer,
    tokenizer_path,
)
from limbeck.contract.sources.places import read_object, require_stored
from limbeck.contract.sources.stores import file_system
from limbeck.contract.sources.texts import ARROW, check_arrow, holds_rows, text_files
from limbeck.contract.sources.weights import stored_form

_TRACKER = {"tensorboard": "tensorboardX"}


def preflight(recipe: AnyRecipe) -> list[str]:
    """Mistakes that only this machine shows: missing files, packages and weights.

    Each names its YAML path.
    """
    return list(_mistakes(recipe))


def _mistakes(recipe: AnyRecipe) -> Iterator[str]:
    for where, _, text in recipe.groups():
        try:
            files = text_files(text, folder=recipe.folder)
            if isinstance(text.format, ParquetRows) or any(
                p.suffix.lower() in (".parquet", *ARROW) for p in files
            ):
                check_arrow()
            plain = isinstance(text.format, PlainText) and "format" not in text.model_fields_set
            if plain and (rows := next(filter(holds_rows, files), None)):
                yield (
                    f"{where}: {rows.name} would be read as plain text, with its punctuation; "
                    "set format to rows or chat, or to text where that is meant."
                )
            if not any(path.stat().st_size for path in files):
                yield f"{where}: every file is empty; name files with text."
        except UserError as error:
            yield f"{where}: {error}"
    yield from model_mistakes(recipe)
    if recipe.store is not None:
        try:
            file_system(recipe.store)
        except UserError as error:
            yield f"training.teacher_cache.store: {error}"
    for tracker in recipe.training.trackers:
        # TensorBoard's files are written by either package.
        if not any(map(importlib.util.find_spec, {tracker, _TRACKER.get(tracker, tracker)})):
            yield f"training.trackers: {tracker} is not installed here; run: pip install {tracker}"
    for index, name in enumerate(recipe.teacher_models):
        if (adapter := recipe.adapters.get(name)) is not None:
            try:
                adapter_facts(require_stored((recipe.folder / adapter.expanduser()).resolve()))
            except UserError as error:
                yield f"teachers.{index}.adapter: {error}"


def _require_task(recipe: AnyRecipe, where: str, folder: Path) -> None:
    """Raise `ModelError` if the model of ``folder`` does another task than the recipe's."""
    if recipe.task == "causal-lm":
        require_language_model(folder)
    elif not where.startswith("teachers."):
        return  # of an encoder's base only the body is read
    elif recipe.task == "classification":
        require_one_label(folder)
        found = stated_classes(read_object(folder / "config.json"), head=True)
        require_classes(found, [name for _, name, _ in recipe.groups()], who=f"{folder}: it")
    else:
        teacher = recipe.teachers[int(where.partition(".")[2])]
        assert isinstance(teacher, EmbeddingTeacher)
        require_pooling(folder, teacher)


def model_mistakes(recipe: AnyRecipe) -> Iterator[str]:
    """Models that are missing here, or too small for the recipe's text or their own tokenizer."""
    models: list[tuple[str, ModelSource | OnnxModel]] = [
        (f"teachers.{i}", model) for i, model in enumerate(recipe.teacher_models.values())
    ]
    if recipe.base is not None:
        models.append(("student.base", recipe.base))
    # An adapter may bring the tokenizer.
    adapted = {f"teachers.{i}" for i, n in enumerate(recipe.teacher_models) if n in recipe.adapters}
    if isinstance(recipe.student, FreshStudent):
        made = RandomModel(kind="random", config=recipe.student.config)
        models.append(("student.config", made))
    for where, source in models:
        try:
            if isinstance(source, RandomModel):
                own = where.startswith("student.")
                require_reads(source.config, block=recipe.block, exported=own)
                if recipe.task == "classification" and not own:
                    found = stated_classes(source.config, head=False)
                    classes = [name for _, name, _ in recipe.groups()]
                    require_classes(found, classes, who="a random model of this config")
            elif isinstance(source, RecipeModel):
                find_recipe(source.recipe, folder=recipe.folder)
            elif isinstance(source, ServerModel):
                tokenizer_path(source.tokenizer, folder=recipe.folder)
            else:
                path: Path | None = None
                if isinstance(source, HubModel):
                    path = cached_config(source.id, source.revision)
                elif isinstance(source, PackageModel) and source.sha256:
                    package_pieces(source)  # joining them is left to the run
                else:
                    path = model_path(source, folder=recipe.folder)
                if path is not None and path.is_dir():
                    _require_task(recipe, where, path)
                    require_fits(path, block=recipe.block, exported=source is recipe.base)
                    if isinstance(source, LocalModel) and where not in adapted:
                        require_tokenizer(path)
                    if source is recipe.base and recipe.student.kind == "shrink":
                        require_shrunk(read_object(path / "config.json"))
                    kept = recipe.exporting().get("adapters") == "separate"
                    if kept and source is recipe.base and (form := stored_form(path)):
                        yield (
                            f"{where}: {path}: its weights are stored as {form}, and "
                            "export.adapters: separate needs plain ones; set it to merged."
                        )
        except UserError as error:
            yield f"{where}: {error}"
