"""What a recipe will take and give, before any weights are loaded: parameters, sizes, memory, operations, time.

Knows recipes and configurations; the stages say what they would do with them (`compress.footprint`, `export.sizes`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.errors import LimbeckError, RecipeError
from limbeck.recipe import FreshStudent, LoraStudent, Recipe, RecipeModel, find_recipe, load_recipe

if TYPE_CHECKING:
    from compress.footprint import Footprint, Shape, TeacherShape

# Resident memory of Python with torch, transformers and peft before any model: Linux, CPU build of torch 2.13, measured.
PROGRAM_BYTES = 530_000_000
TRIAL_SECONDS = 10.0


@dataclass(frozen=True)
class Plan:
    """The figures of one recipe; bytes, operations and seconds."""

    recipe: str
    teachers: dict[str, int]  # parameters by name
    student: int  # parameters
    trained: int  # of them, or of the adapters and projections beside them
    forms: dict[str, int]  # bytes of graph and weights, the shipped one last
    memory: dict[str, int]  # training, by what it is for
    memory_total: int
    worst_moment: str
    device: str
    cache: int  # bytes of the teacher cache
    operations: float  # of training
    first: tuple[str, ...]  # recipes whose students are made first
    operations_first: float
    seconds: float | None  # of training and of what is made first; none without a trial
    bench_seconds: float

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def as_text(self) -> str:
        """For a terminal."""
        return "\n".join(f"{name:22}{value}".rstrip() for name, value in self._rows())

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "recipe", self.recipe
        for name, parameters in self.teachers.items():
            yield f"teacher {name}", f"{_count(parameters)} parameters"
        yield "student", f"{_count(self.student)} parameters, {_count(self.trained)} trained"
        for index, (form, size) in enumerate(self.forms.items()):
            yield f"form {form}", f"{_mb(size)}{', shipped' if index == len(self.forms) - 1 else ''}"
        yield (
            "memory for training",
            f"{_mb(self.memory_total)} on the {self.device}, most of it when {self.worst_moment}",
        )
        for part, size in self.memory.items():
            if size:
                yield f"  {part}", _mb(size)
        if self.cache:
            yield "teacher cache on disk", _mb(self.cache)
        for name in self.first:
            yield "made first", name
        yield "operations", f"{(self.operations + self.operations_first) / 1e12:,.1f} TFLOP"
        if self.seconds is None:
            yield "time", "unknown without a trial on this machine: add --trial"
        else:
            yield (
                "time",
                f"about {_clock(self.seconds)} of training, by a trial on this machine; measuring takes {_clock(self.bench_seconds)}",
            )


def plan_recipe(recipe: Recipe, *, trial: bool = False) -> Plan:
    """Work out what ``recipe`` takes; ``trial`` times its student's layers on this machine for about ten seconds.

    Raises `ModelError` for a model whose configuration cannot be had, `RecipeError` for a teacher recipe that is wrong.
    """
    import compress

    compress.quiet_libraries()
    from compress import footprint
    from compress.models import resolve_device
    from compress.train import resolve_precision

    device = resolve_device(recipe.training.device)
    precision = resolve_precision(recipe.training.precision, device)
    student, taken, teachers = _footprint(recipe, precision)
    forms = _forms(recipe, student)
    first = {path: load_recipe(path) for path in _first(recipe)}
    before = sum(_footprint(made, precision)[1].operations for made in first.values())
    memory = {part: value for part, value in asdict(taken.memory).items() if part != "moment"}
    if device.type == "cpu":
        memory["program"] = PROGRAM_BYTES
    seconds = None
    if trial:
        speed = footprint.measure_speed(
            recipe, student.config, seconds=TRIAL_SECONDS, precision=precision, device=device
        )
        minutes = recipe.training.minutes  # a budget in time is what it is
        seconds = (60 * minutes if minutes else taken.operations / speed) + before / speed
    return Plan(
        recipe=recipe.name,
        teachers={t.name: shape.shape.parameters for t, shape in zip(recipe.teachers, teachers, strict=True)},
        student=student.parameters,
        trained=taken.trained,
        forms=forms,
        memory=memory,
        memory_total=sum(memory.values()),
        worst_moment=taken.memory.moment,
        device=device.type,
        cache=taken.cache_bytes,
        operations=taken.operations,
        first=tuple(made.name for made in first.values()),
        operations_first=before,
        seconds=seconds,
        bench_seconds=60 * recipe.bench.minutes,
    )


def form_sizes(recipe: Recipe) -> dict[str, int]:
    """Bytes of graph and weights of each form of ``recipe``, the shipped one last. Raises as `plan_recipe` does."""
    return _forms(recipe, _student(recipe, vocabulary=_vocabulary(recipe))[0])


def _forms(recipe: Recipe, student: Shape) -> dict[str, int]:
    import torch
    from transformers import AutoModelForCausalLM

    from export.sizes import form_bytes

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(student.config, dtype=torch.float32)
    export = recipe.export
    return {
        form.kind: form_bytes(model, form, backend=export.backend, provider=export.provider) for form in export.forms
    }


def _footprint(recipe: Recipe, precision: str) -> tuple[Shape, Footprint, list[TeacherShape]]:
    from compress.footprint import footprint

    teachers = _teachers(recipe, ())  # their mistakes are told first
    student, base = _student(recipe, vocabulary=teachers[0].shape.vocabulary if teachers else 0)
    return student, footprint(recipe, student=student, base=base, teachers=teachers, precision=precision), teachers


def _student(recipe: Recipe, *, vocabulary: int) -> tuple[Shape, Shape | None]:
    """The student and its base; ``vocabulary`` is the tokenizer's size, for a fresh one."""
    from compress.footprint import describe, student_config
    from compress.models import model_config

    base = None
    if not isinstance(recipe.student, FreshStudent):
        try:
            base = describe(model_config(recipe.student.base, folder=recipe.folder))
        except LimbeckError as error:
            raise type(error)(f"{recipe.name}: student.base: {error}") from error
    if isinstance(recipe.student, LoraStudent) and base is not None:
        return base, base
    return describe(student_config(recipe, base=base.config if base else None, vocabulary=vocabulary)), base


def _teachers(recipe: Recipe, chain: tuple[Path, ...]) -> list[TeacherShape]:
    teachers = []
    for index in range(len(recipe.teachers)):
        try:
            teachers.append(_teacher(index, recipe, chain))
        except LimbeckError as error:
            raise type(error)(f"{recipe.name}: teachers.{index}: {error}") from error
    return teachers


def _vocabulary(recipe: Recipe, chain: tuple[Path, ...] = ()) -> int:
    """Of the first teacher, whose tokenizer a fresh student takes; 0 for any other student."""
    return _teacher(0, recipe, chain).shape.vocabulary if isinstance(recipe.student, FreshStudent) else 0


def _teacher(index: int, recipe: Recipe, chain: tuple[Path, ...]) -> TeacherShape:
    from compress.footprint import TeacherShape, describe, lora_parameters
    from compress.models import model_config

    teacher = recipe.teachers[index]
    model, how = teacher.model, f"{teacher.dtype} {teacher.quantize}"
    alone = f"teacher {index}"  # adapters share their base in memory, whole models share nothing
    if not isinstance(model, RecipeModel):
        shape = describe(model_config(model, folder=recipe.folder))
        place = f"{model.model_dump_json()} {how}" if teacher.adapter else alone
        return TeacherShape(shape, place, teacher.dtype, teacher.quantize)
    path = find_recipe(model.recipe, folder=recipe.folder)
    if path in chain:
        raise RecipeError(f"{path.stem} is made from itself; name another model for one of them.")
    made = load_recipe(path)
    shape, _ = _student(made, vocabulary=_vocabulary(made, (*chain, path)))
    if not isinstance(made.student, LoraStudent) or teacher.adapter:
        return TeacherShape(shape, alone, teacher.dtype, teacher.quantize)
    place = f"{made.student.base.model_dump_json()} {how}"
    return TeacherShape(shape, place, teacher.dtype, teacher.quantize, lora_parameters(shape.config, made.student))


def _first(recipe: Recipe) -> list[Path]:
    """Recipes of teachers, and of their teachers, each once, in the order they are made."""
    found: dict[Path, None] = {}
    for teacher in recipe.teachers:
        if isinstance(teacher.model, RecipeModel):
            path = find_recipe(teacher.model.recipe, folder=recipe.folder)
            found |= dict.fromkeys([*_first(load_recipe(path)), path])
    return list(found)


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def _count(parameters: int) -> str:
    return (
        f"{parameters / 1e9:.2f}B"
        if parameters >= 1e9
        else f"{parameters / 1e6:.1f}M"
        if parameters >= 1e5
        else f"{parameters:,}"
    )


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
