"""Plan a recipe before any weights are loaded: parameters, sizes, memory, operations, time.

Knows recipes and configurations; the stages estimate their own costs: `compress.footprint` the
training, `export.plan` the sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.app.products import bench_mistakes, plan_products
from limbeck.contract.errors import EnvironmentalError, LimbeckError, ModelError, RecipeError
from limbeck.contract.machine import OtherWork, host, watch_other_work
from limbeck.contract.progress import about
from limbeck.contract.recipe import (
    AnyRecipe,
    MergeStudent,
    RecipeModel,
    ServerModel,
    find_recipe,
    load_teacher_recipe,
)
from limbeck.contract.sources.preflight import model_mistakes
from limbeck.contract.sources.teacher_tokens import tokenizer_mistakes

if TYPE_CHECKING:
    from compress.footprint.base import Asked, Footprint
    from compress.footprint.tasks import Shape

# Measured resident memory of Python with torch, transformers and peft, before any model (Linux,
# CPU build of torch 2.13).
PROGRAM_BYTES = 530_000_000
TRIAL_SECONDS = 10.0
# Measured on 2 cores of an EPYC: the demo's export of 685 MB of forms took 66 s, its bench 863 s of
# which 444 s were timing.
_EXPORT_SECONDS, _EXPORT_BYTES_A_SECOND, _BENCH_OVER_TIMING = 5.0, 11e6, 2.0


@dataclass(frozen=True)
class Plan:
    """Figures of one recipe, in bytes, operations and seconds."""

    recipe: str
    teachers: dict[str, int]  # parameters by name, of those that run here
    asked: dict[str, Asked]  # of servers, by the teacher's name
    student: int  # parameters
    trained: int  # of them, or of the adapters and projections beside them
    forms: dict[str, int]  # bytes; the last that is no GGUF file is shipped
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
    speed: float | None  # operations a second by a trial on this machine
    seconds: float | None  # of training, prerequisites included; None without a trial
    export_seconds: float
    bench_seconds: float
    own_text: int = 0  # tokens that the student writes itself, at most
    advice: str = ""  # whether to merge or to distil, by measured runs; empty without advice
    other_work: OtherWork | None = None  # beside the trial
    filling: float = 0.0  # of the operations, those that fill the teacher cache

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def as_text(self) -> str:
        """For a terminal."""
        return columns(self._rows())

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "recipe", self.recipe
        for name, parameters in self.teachers.items():
            yield f"teacher {name}", f"{_count(parameters)} parameters"
        for name, asked in self.asked.items():
            yield (
                f"teacher {name}",
                f"{asked.model} at {asked.url}: at most {asked.requests:,} requests with "
                f"{asked.tokens:,} tokens, {megabytes(asked.bytes)} of answers on disk",
            )
        yield "student", f"{_count(self.student)} parameters, {_count(self.trained)} trained"
        shipped = [form for form in self.forms if not form.startswith("gguf-")][-1]
        for form, size in self.forms.items():
            yield f"form {form}", f"{megabytes(size)}{', shipped' if form == shipped else ''}"
        yield (
            "memory for training",
            f"{megabytes(self.memory_total)} on the {self.device}, most of it when "
            f"{self.worst_moment}",
        )
        for part, size in self.memory.items():
            if size:
                yield f"  {part}", megabytes(size)
        yield "teacher cache on disk", f"at most {megabytes(self.cache)}" if self.cache else "none"
        for name in self.first:
            yield "made first", name
        if self.own_text:
            yield "own text", f"at most {self.own_text:,} tokens written by the student"
        open_ = f", and those of {self.minutes:g} minutes of training" if self.minutes else ""
        if self.advice:
            yield "merge or distil", self.advice
        yield "operations", f"{(self.operations + self.operations_first) / 1e12:,.1f} TFLOP{open_}"
        if self.seconds is None:
            yield "time", "unknown without a trial on this machine: add --trial"
        else:
            whole = self.seconds + self.export_seconds + self.bench_seconds
            yield (
                "time",
                f"about {about(whole)}: {about(self.seconds)} of training by a trial on this "
                f"machine, {about(self.export_seconds)} of export, {about(self.bench_seconds)} of "
                "measuring",
            )
            if self.other_work is not None and self.other_work.is_busy:
                yield "", f"the trial is too slow: {self.other_work}. Repeat it on an idle machine"


@dataclass(frozen=True)
class _Making:
    """Cost of making one student."""

    recipe: AnyRecipe
    student: Shape
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
        """Minutes of training, if that is its budget; a merge trains nothing."""
        return None if isinstance(self.recipe.student, MergeStudent) else self.recipe.minutes

    def seconds(self, speed: float) -> float:
        """Seconds of training at ``speed`` operations per second, or its budget in time."""
        if self.minutes:
            return 60 * self.minutes
        own = self.taken.own_text
        written = own.operations / _writing_speed(self) if own is not None else 0.0
        return self.taken.operations / speed + written

    def operations(self, speed: float | None) -> float:
        """Operations of training at ``speed`` per second.

        With a budget in time and no speed, only those of its measurements.
        """
        written = self.taken.own_text.operations if self.taken.own_text is not None else 0
        timed = 60 * self.minutes * speed if self.minutes and speed else 0
        return self.taken.operations + written + timed


def plan_recipe(recipe: AnyRecipe, *, trial: bool = False, cards: bool = False) -> Plan:
    """Estimate the cost of ``recipe``. ``trial`` times the student's layers here for about 10 s.

    ``cards`` plans the memory of a CUDA card, whether one is here or not. Raises `ModelError` if a
    model's configuration is not available, `RecipeError` if a teacher's recipe is wrong, and
    `EnvironmentalError` for a trial of a card where none is.
    """
    import torch

    from compress.footprint.tasks import task_of

    checks = model_mistakes, bench_mistakes, tokenizer_mistakes
    if found := [mistake for check in checks for mistake in check(recipe)]:
        raise RecipeError("\n".join(f"{recipe.name}: {mistake}" for mistake in found))
    products = plan_products(recipe).order  # refuses wrong recipes of teachers, before the tracing
    own = _making(recipe, cards)
    first = [_making(product.recipe, cards) for product in products]
    worst = max([own, *first], key=lambda making: sum(making.memory.values()))
    moment = worst.taken.memory.moment
    speed, seconds, other_work = None, None, None
    if trial:
        if cards and not torch.cuda.is_available():
            raise EnvironmentalError(
                "--trial: this machine has no card to time; run it where one is, or give the "
                "measured rate with --tflops."
            )
        with watch_other_work() as other:
            speed = _speed(own)
            seconds = sum(making.seconds(speed) for making in (own, *first))
        other_work = other()
    forms = _forms(recipe, own.student)
    after = _seconds_after(recipe, forms)
    return Plan(
        recipe=recipe.name,
        teachers=dict(zip(_here(recipe).values(), own.teachers, strict=True)),
        asked=task_of(recipe.task).asked(recipe),
        student=own.student.parameters,
        trained=own.taken.trained,
        forms=forms,
        memory=worst.memory,
        memory_total=sum(worst.memory.values()),
        worst_moment=moment if worst is own else f"{moment} ({worst.recipe.name}, made first)",
        device=worst.device.type,
        cache=own.taken.cache_bytes,
        operations=own.operations(speed),
        minutes=None if speed else own.minutes,
        first=tuple(making.recipe.name for making in first),
        operations_first=sum(making.operations(speed) for making in first),
        speed=speed,
        seconds=seconds,
        export_seconds=after["export"],
        bench_seconds=after["bench"],
        own_text=own.taken.own_text.tokens if own.taken.own_text is not None else 0,
        advice=merge_or_distil(recipe),
        other_work=other_work,
        filling=own.taken.filling,
    )


def merge_or_distil(recipe: AnyRecipe) -> str:
    """Whether to merge the teachers or to distil them, by measured runs; empty without advice.

    Raises as `plan_recipe`.
    """
    from compress.footprint import advice

    if recipe.task != "causal-lm":
        return ""
    base = _student(recipe)[1]
    teachers = [(name, _teacher(at, recipe)[0].config) for at, name in _here(recipe).items()]
    return advice.merge_or_distil(recipe, base.config, teachers) if base is not None else ""


def form_sizes(recipe: AnyRecipe) -> dict[str, int]:
    """Bytes of graph and weights of each form, the shipped one last. Raises as `plan_recipe`."""
    return _forms(recipe, _student(recipe)[0])


def seconds_after_training(recipe: AnyRecipe) -> dict[str, float]:
    """Estimated seconds of export and bench. Raises as `plan_recipe`."""
    return _seconds_after(recipe, form_sizes(recipe))


def _seconds_after(recipe: AnyRecipe, forms: Mapping[str, int]) -> dict[str, float]:
    return {
        "export": _EXPORT_SECONDS + sum(forms.values()) / _EXPORT_BYTES_A_SECOND,
        "bench": 60 * recipe.bench.minutes * _BENCH_OVER_TIMING,
    }


def training_operations(recipe: AnyRecipe) -> float | None:
    """Planned operations of training; None for a budget in minutes. Raises as `plan_recipe`."""
    return None if recipe.minutes else _making(recipe).operations(None)


def training_memory(recipe: AnyRecipe) -> tuple[int, int]:
    """Bytes of training at its peak, and bytes available there. Raises as `plan_recipe`."""
    import torch

    making = _making(recipe)
    on_card = making.device.type == "cuda"
    here = (
        torch.cuda.get_device_properties(making.device).total_memory
        if on_card
        else host()["memory_bytes"]
    )
    return sum(making.memory.values()), int(here)


def _making(recipe: AnyRecipe, cards: bool = False) -> _Making:
    import torch

    import compress
    from compress.footprint.tasks import task_of
    from compress.host import resolve_precision
    from compress.models.language import resolve_device

    compress.quiet_libraries()
    task, precision = task_of(recipe.task), str(recipe.training.precision)
    device = torch.device("cuda") if cards else resolve_device(recipe.training.device)
    if cards and not torch.cuda.is_available() and precision == "auto":
        precision = "bf16"  # every card since 2020 computes it
    precision = resolve_precision(precision, device)
    # Mistakes of teachers are reported first.
    teachers = [(index, *_teacher(index, recipe)) for index in _here(recipe)]
    student, base = _student(recipe)
    taken = task.footprint(
        recipe,
        student=student,
        base=base,
        teachers=[
            task.teacher_shape(recipe, index, shape, made) for index, shape, made in teachers
        ],
        precision=precision,
    )
    parameters = [shape.parameters for _, shape, _ in teachers]
    return _Making(recipe, student, parameters, taken, device, precision)


def _speed(making: _Making) -> float:
    """Operations per second of the student's layers on this machine."""
    from compress.footprint.tasks import task_of

    return task_of(making.recipe.task).measure_speed(
        making.recipe,
        making.student,
        seconds=TRIAL_SECONDS,
        precision=making.precision,
        device=making.device,
    )


def _writing_speed(making: _Making) -> float:
    """Operations per second of the student's layers when it writes text on this machine."""
    from compress.footprint.own_text import measure_writing_speed

    recipe: Any = making.recipe  # a language model's: no other student writes
    return measure_writing_speed(
        recipe,
        making.student.config,
        seconds=TRIAL_SECONDS / 2,
        precision=making.precision,
        device=making.device,
    )


def _forms(recipe: AnyRecipe, student: Shape) -> dict[str, int]:
    from compress.footprint.tasks import task_of
    from export.plan import form_bytes

    model = task_of(recipe.task).meta_model(student.config, recipe.task)
    try:
        return {
            form.kind: form_bytes(model, form, task=recipe.task, **recipe.builder_options)
            for form in recipe.export.forms
        }
    except ModelError as error:
        raise ModelError(f"{recipe.name}: student: {error}") from error


def _here(recipe: AnyRecipe) -> dict[int, str]:
    """Names of the teachers that are not behind a server, by their place in the recipe."""
    named = enumerate(recipe.teacher_models.items())
    return {at: name for at, (name, model) in named if not isinstance(model, ServerModel)}


def _student(recipe: AnyRecipe, chain: tuple[Path, ...] = ()) -> tuple[Shape, Shape | None]:
    """Shapes of the student and its base; a fresh one has the first teacher's vocabulary.

    ``chain`` holds the recipes that lead to this one.
    """
    from compress.footprint.tasks import task_of

    task, base, vocabulary = task_of(recipe.task), None, 0
    if recipe.base is None and (size := task.served_vocabulary(recipe)) is not None:
        vocabulary = size
    elif recipe.base is None:
        vocabulary = _teacher(0, recipe, chain)[0].vocabulary
    else:
        try:
            config = task.config_of(recipe.base, folder=recipe.folder)
            base = task.describe(config, recipe, name="student.base")
        except LimbeckError as error:
            raise type(error)(f"{recipe.name}: student.base: {error}") from error
    config = task.student_config(recipe, base=base.config if base else None, vocabulary=vocabulary)
    return task.describe(config, recipe, name="the student"), base


def _teacher(
    index: int, recipe: AnyRecipe, chain: tuple[Path, ...] = ()
) -> tuple[Shape, AnyRecipe | None]:
    """Shape of a teacher, and the recipe that makes it, if there is one."""
    from compress.footprint.tasks import task_of

    task, teacher, made = task_of(recipe.task), recipe.teachers[index], None
    try:
        if not isinstance(teacher.model, RecipeModel):
            config = task.config_of(teacher.model, folder=recipe.folder)
        else:
            path = find_recipe(teacher.model.recipe, folder=recipe.folder)
            if path in chain:
                raise RecipeError(
                    f"{path.stem} is made from itself; name another model for one of them."
                )
            made = load_teacher_recipe(path, of=recipe)
            config = _student(made, (*chain, path))[0].config
        return task.describe(config, recipe, name=f"teacher {teacher.name}"), made
    except LimbeckError as error:
        raise type(error)(f"{recipe.name}: teachers.{index}: {error}") from error


def columns(rows: Iterable[tuple[str, str]]) -> str:
    """Lines of a name and a value, the values below each other."""
    shown = list(rows)
    width = max(22, *(len(name) + 1 for name, _ in shown))
    return "\n".join(f"{name:{width}}{value}".rstrip() for name, value in shown)


def megabytes(size: float) -> str:
    """A size for a person."""
    return f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def _count(parameters: int) -> str:
    return (
        f"{parameters / 1e9:.2f}B"
        if parameters >= 1e9
        else f"{parameters / 1e6:.1f}M"
        if parameters >= 1e5
        else f"{parameters:,}"
    )
