"""Plan a recipe before any weights are loaded: parameters, sizes, memory, operations, time.

Knows recipes and configurations; the stages estimate their own costs. For language models these are
`compress.footprint.language` and `export.plan.language`, for encoders
`compress.footprint.encoders` and `export.plan.encoders`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.app.products import plan_products
from limbeck.contract.errors import LimbeckError, ModelError, RecipeError, UserError
from limbeck.contract.machine import host
from limbeck.contract.recipe import (
    AnyRecipe,
    EncoderRecipe,
    FreshStudent,
    LoraStudent,
    NoCache,
    Recipe,
    RecipeModel,
    find_recipe,
    load_recipe,
    load_teacher_recipe,
)
from limbeck.contract.sources import text_files

if TYPE_CHECKING:
    from compress.footprint.encoders import EncoderShape
    from compress.footprint.language import Footprint, Shape, TeacherShape

# Measured resident memory of Python with torch, transformers and peft, before any model (Linux,
# CPU build of torch 2.13).
PROGRAM_BYTES = 530_000_000
TRIAL_SECONDS = 10.0


@dataclass(frozen=True)
class Plan:
    """Figures of one recipe, in bytes, operations and seconds."""

    recipe: str
    teachers: dict[str, int]  # parameters by name
    student: int  # parameters
    trained: int  # of them, or of the adapters and projections beside them
    forms: dict[str, int]  # bytes of graph and weights, the shipped one last
    memory: dict[str, int]  # of training by purpose; peak over recipe and prerequisites
    memory_total: int
    worst_moment: str
    device: str  # that the memory is on
    cache: int  # bytes of the teacher cache, at most
    # of training; without a trial and with a budget in minutes, of its measurements alone
    operations: float
    minutes: float | None  # of training, where its operations are not known
    first: tuple[str, ...]  # recipes whose students are made first
    operations_first: float
    seconds: float | None  # of training, prerequisites included; None without a trial
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
            yield (
                f"form {form}",
                f"{_mb(size)}{', shipped' if index == len(self.forms) - 1 else ''}",
            )
        yield (
            "memory for training",
            f"{_mb(self.memory_total)} on the {self.device}, most of it when {self.worst_moment}",
        )
        for part, size in self.memory.items():
            if size:
                yield f"  {part}", _mb(size)
        yield "teacher cache on disk", f"at most {_mb(self.cache)}" if self.cache else "none"
        for name in self.first:
            yield "made first", name
        open_ = f", and what {self.minutes:g} minutes of training hold" if self.minutes else ""
        yield "operations", f"{(self.operations + self.operations_first) / 1e12:,.1f} TFLOP{open_}"
        if self.seconds is None:
            yield "time", "unknown without a trial on this machine: add --trial"
        else:
            yield (
                "time",
                f"about {_clock(self.seconds)} of training, by a trial on this machine; "
                f"measuring takes {_clock(self.bench_seconds)}",
            )


@dataclass(frozen=True)
class _Making:
    """Cost of making one student."""

    recipe: AnyRecipe
    student: Shape | EncoderShape
    teachers: list[int]  # parameters
    taken: Footprint
    device: Any  # of torch
    precision: str

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by purpose, including the program's own."""
        parts = {
            part: value for part, value in asdict(self.taken.memory).items() if part != "moment"
        }
        return parts | ({"program": PROGRAM_BYTES} if self.device.type == "cpu" else {})

    @property
    def minutes(self) -> float | None:
        """Minutes of training, if that is its budget."""
        return self.recipe.training.minutes if isinstance(self.recipe, Recipe) else None

    def seconds(self, speed: float) -> float:
        """Seconds of training at ``speed`` operations per second, or its budget in time."""
        return 60 * self.minutes if self.minutes else self.taken.operations / speed

    def operations(self, speed: float | None) -> float:
        """Operations of training at ``speed`` per second.

        With a budget in time and no speed, only those of its measurements.
        """
        return self.taken.operations + (60 * self.minutes * speed if self.minutes and speed else 0)


def plan_recipe(recipe: AnyRecipe, *, trial: bool = False) -> Plan:
    """Estimate the cost of ``recipe``. ``trial`` times the student's layers here for about 10 s.

    Raises `ModelError` if a model's configuration is not available, and `RecipeError` if a
    teacher's recipe is wrong.
    """
    import compress

    compress.quiet_libraries()
    own = _making(recipe)
    first = [_making(product.recipe) for product in plan_products(recipe).order]
    worst = max([own, *first], key=lambda making: sum(making.memory.values()))
    moment = worst.taken.memory.moment
    speed = _speed(own) if trial else None
    seconds = sum(making.seconds(speed) for making in (own, *first)) if speed else None
    return Plan(
        recipe=recipe.name,
        teachers=dict(zip(recipe.teacher_models, own.teachers, strict=True)),
        student=own.student.parameters,
        trained=own.taken.trained,
        forms=_forms(recipe, own.student),
        memory=worst.memory,
        memory_total=sum(worst.memory.values()),
        worst_moment=moment if worst is own else f"{moment} ({worst.recipe.name}, made first)",
        device=worst.device.type,
        cache=own.taken.cache_bytes,
        operations=own.operations(speed),
        minutes=None if speed else own.minutes,
        first=tuple(making.recipe.name for making in first),
        operations_first=sum(making.operations(speed) for making in first),
        seconds=seconds,
        bench_seconds=60 * recipe.bench.minutes,
    )


def form_sizes(recipe: AnyRecipe) -> dict[str, int]:
    """Bytes of graph and weights of each form, the shipped one last. Raises as `plan_recipe`."""
    if isinstance(recipe, Recipe):
        return _forms(recipe, _student(recipe, vocabulary=_vocabulary(recipe))[0])
    return _forms(recipe, _encoder_student(recipe, ())[0])


def training_memory(recipe: AnyRecipe) -> tuple[int, int]:
    """Bytes of training at its peak, and bytes available there. Raises as `plan_recipe`."""
    import torch

    import compress

    compress.quiet_libraries()
    making = _making(recipe)
    on_card = making.device.type == "cuda"
    here = (
        torch.cuda.get_device_properties(making.device).total_memory
        if on_card
        else host()["memory_bytes"]
    )
    return sum(making.memory.values()), int(here)


def _making(recipe: AnyRecipe) -> _Making:
    from compress.host import resolve_precision
    from compress.models.language import resolve_device

    device = resolve_device(recipe.training.device)
    precision = resolve_precision(recipe.training.precision, device)
    if isinstance(recipe, Recipe):
        return _Making(recipe, *_footprint(recipe, precision), device, precision)
    return _Making(recipe, *_encoder_footprint(recipe, precision), device, precision)


def _speed(making: _Making) -> float:
    """Operations per second of the student's layers on this machine."""
    from compress.footprint.encoders import EncoderShape, measure_encoder_speed
    from compress.footprint.language import measure_speed

    recipe, student, options = (
        making.recipe,
        making.student,
        {"precision": making.precision, "device": making.device},
    )
    if isinstance(recipe, Recipe):
        return measure_speed(recipe, student.config, seconds=TRIAL_SECONDS, **options)
    assert isinstance(student, EncoderShape)
    return measure_encoder_speed(recipe, student, seconds=TRIAL_SECONDS, **options)


def _forms(recipe: AnyRecipe, student: Shape | EncoderShape) -> dict[str, int]:
    import torch
    from transformers import AutoModelForCausalLM

    from compress.footprint.encoders import meta_encoder
    from export.plan import form_bytes

    if not isinstance(recipe, Recipe):
        encoder = meta_encoder(student.config, recipe.task)
        return {
            form.kind: form_bytes(encoder, form, task=recipe.task) for form in recipe.export.forms
        }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(student.config, dtype=torch.float32)
    export = recipe.export
    try:
        return {
            form.kind: form_bytes(model, form, backend=export.backend, provider=export.provider)
            for form in export.forms
        }
    except ModelError as error:
        raise ModelError(f"{recipe.name}: student: {error}") from error


# Language models ----------------------------------------------------------------------------------


def _footprint(recipe: Recipe, precision: str) -> tuple[Shape, list[int], Footprint]:
    from compress.footprint.language import footprint

    teachers = _teachers(recipe, ())  # their mistakes are told first
    student, base = _student(recipe, vocabulary=teachers[0].shape.vocabulary if teachers else 0)
    taken = footprint(
        recipe,
        student=student,
        base=base,
        teachers=teachers,
        precision=precision,
        blocks=_different_blocks(recipe),
    )
    return student, [t.shape.parameters for t in teachers], taken


def _different_blocks(recipe: Recipe) -> int:
    """Upper bound on the number of different training blocks.

    Counts the blocks that training takes of each domain, or those of its text if it is here.
    """
    from compress.data.blocks import measure_text

    wanted, domains = (recipe.training.tokens or 0) // recipe.data.block, recipe.data.domains
    if isinstance(recipe.training.teacher_cache, NoCache):  # the one that asks
        return wanted
    blocks = 0
    for domain in domains:
        share = ceil(wanted * domain.weight / sum(d.weight for d in domains))
        try:
            text_files(domain.text, folder=recipe.folder)
        except UserError:  # a plan needs no text
            blocks += share
        else:
            blocks += min(
                share, measure_text(domain, recipe.data, folder=recipe.folder, enough=share).blocks
            )
    return blocks


def _student(recipe: Recipe, *, vocabulary: int) -> tuple[Shape, Shape | None]:
    """Shapes of the student and its base; ``vocabulary`` is the size for a fresh student."""
    from compress.footprint.language import describe, student_config
    from compress.models.language import model_config

    base = None
    if not isinstance(recipe.student, FreshStudent):
        try:
            base = describe(model_config(recipe.student.base, folder=recipe.folder))
        except LimbeckError as error:
            raise type(error)(f"{recipe.name}: student.base: {error}") from error
    if isinstance(recipe.student, LoraStudent) and base is not None:
        return base, base
    return describe(
        student_config(recipe, base=base.config if base else None, vocabulary=vocabulary)
    ), base


def _teachers(recipe: Recipe, chain: tuple[Path, ...]) -> list[TeacherShape]:
    teachers = []
    for index in range(len(recipe.teachers)):
        try:
            teachers.append(_teacher(index, recipe, chain))
        except LimbeckError as error:
            raise type(error)(f"{recipe.name}: teachers.{index}: {error}") from error
    return teachers


def _vocabulary(recipe: Recipe, chain: tuple[Path, ...] = ()) -> int:
    """Vocabulary of the first teacher, whose tokenizer a fresh student takes; else 0."""
    return (
        _teacher(0, recipe, chain).shape.vocabulary
        if isinstance(recipe.student, FreshStudent)
        else 0
    )


def _teacher(index: int, recipe: Recipe, chain: tuple[Path, ...]) -> TeacherShape:
    from compress.footprint.language import TeacherShape, describe, lora_parameters
    from compress.models.language import model_config

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
    return TeacherShape(
        shape, place, teacher.dtype, teacher.quantize, lora_parameters(shape.config, made.student)
    )


# Encoders -----------------------------------------------------------------------------------------


def _encoder_footprint(
    recipe: EncoderRecipe, precision: str
) -> tuple[EncoderShape, list[int], Footprint]:
    from compress.footprint.encoders import encoder_footprint

    teachers = [_encoder_teacher(index, recipe, ()) for index in range(len(recipe.teachers))]
    student, base = _encoder_student(recipe, ())
    taken = encoder_footprint(
        recipe, student=student, base=base, teachers=teachers, precision=precision
    )
    return student, [t.parameters for t in teachers], taken


def _encoder_student(
    recipe: EncoderRecipe, chain: tuple[Path, ...]
) -> tuple[EncoderShape, EncoderShape | None]:
    """Shapes of the student and its base; a fresh one has the first teacher's vocabulary."""
    from compress.footprint.encoders import describe_encoder, encoder_student_config
    from compress.models.encoders import encoder_config

    base: EncoderShape | None = None
    vocabulary = 0
    if isinstance(recipe.student, FreshStudent):
        vocabulary = int(_encoder_teacher(0, recipe, chain).config.vocab_size)
    else:
        try:
            config = encoder_config(recipe.student.base, folder=recipe.folder)
            base = describe_encoder(config, name="student.base", recipe=recipe)
        except LimbeckError as error:
            raise type(error)(f"{recipe.name}: student.base: {error}") from error
    config = encoder_student_config(
        recipe, base=base.config if base else None, vocabulary=vocabulary
    )
    return describe_encoder(config, name="the student", recipe=recipe), base


def _encoder_teacher(index: int, recipe: EncoderRecipe, chain: tuple[Path, ...]) -> EncoderShape:
    from compress.footprint.encoders import describe_encoder
    from compress.models.encoders import encoder_config, require_context

    name, model = f"teacher {recipe.teachers[index].name}", recipe.teachers[index].model
    try:
        if not isinstance(model, RecipeModel):
            config = encoder_config(model, folder=recipe.folder)
            return describe_encoder(config, name=name, recipe=recipe)
        path = find_recipe(model.recipe, folder=recipe.folder)
        if path in chain:
            raise RecipeError(
                f"{path.stem} is made from itself; name another model for one of them."
            )
        made = load_teacher_recipe(path, of=recipe)
        assert not isinstance(made, Recipe)
        shape = _encoder_student(made, (*chain, path))[0]
        require_context(name, shape.config, recipe.data.max_tokens)
        return shape
    except LimbeckError as error:
        raise type(error)(f"{recipe.name}: teachers.{index}: {error}") from error


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
