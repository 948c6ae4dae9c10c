"""The cost of training a language model, without its weights: parameters, memory, operations.

Shapes are in `compress.footprint.shapes`, memory in `compress.footprint.memory`. Texts are only
counted, where they are here.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from compress.data.blocks import measure_text
from compress.features import layer_pairs
from compress.footprint import shapes
from compress.footprint.base import Asked, Footprint
from compress.footprint.memory import Job, worst_moment
from compress.footprint.own_text import writing
from compress.footprint.shapes import (
    BYTES,
    Shape,
    TeacherShape,
    hidden_states,
    lora_parameters,
    trace_line,
)
from compress.footprint.tracing import TRIAL_VOCABULARY, Trace, operations_a_second, resized
from compress.host import prepare_host
from compress.models.language import model_config, random_config
from compress.models.shrink import shrunk_config
from compress.teachers.served import served_teacher
from limbeck.contract.errors import UserError
from limbeck.contract.recipe import (
    FreshStudent,
    HiddenCache,
    LoraStudent,
    MergeStudent,
    NoCache,
    Recipe,
    ServerModel,
    ShrinkStudent,
    TopkCache,
)
from limbeck.contract.sources.texts import text_files
from limbeck.contract.sources.tokenizer import load_tokenizer

# Of a model source, of a shape and of a model; see `compress.footprint.tasks.Task`.
config_of, describe, meta_model = model_config, shapes.describe, shapes.meta_model


def student_config(recipe: Recipe, *, base: Any, vocabulary: int) -> Any:
    """Return the student's configuration, made from its ``base``'s.

    A fresh student has no base; ``vocabulary`` is the size of its tokenizer.
    """
    match recipe.student:
        case LoraStudent() | MergeStudent():
            return base
        case ShrinkStudent() as config:
            return shrunk_config(base, config)
        case FreshStudent() as config:
            return random_config(config.config, vocab_size=vocabulary, where="student.config")


def teacher_shape(
    recipe: Recipe, index: int, shape: Shape, made: Recipe | None = None
) -> TeacherShape:
    """A teacher in memory; ``made`` is the recipe that makes it, if there is one.

    Adapters share their base in memory, whole models share nothing.
    """
    teacher, place, adapter = recipe.teachers[index], f"teacher {index}", 0
    how = f"{teacher.dtype} {teacher.quantize}"
    if made is None and teacher.adapter:
        place = f"{teacher.model.model_dump_json()} {how}"
    elif made is not None and isinstance(made.student, LoraStudent) and not teacher.adapter:
        place = f"{made.student.base.model_dump_json()} {how}"
        adapter = lora_parameters(shape.config, made.student)
    return TeacherShape(shape, place, teacher.dtype, teacher.quantize, adapter)


def footprint(
    recipe: Recipe,
    *,
    student: Shape,
    base: Shape | None,
    teachers: Sequence[TeacherShape],
    precision: str,
) -> Footprint:
    """Sum up a training from the sizes of student and teachers; ``precision`` is fp32 or bf16."""
    config = recipe.training
    pairs = _pairs(recipe, student, teachers)
    mine = trace_line(student, recipe, rows=config.micro_batch, precision=precision)
    theirs = [
        _teacher_trace(t, recipe, precision=precision, states=bool(p))
        for t, p in zip(teachers, pairs, strict=True)
    ]
    lora = recipe.student if isinstance(recipe.student, LoraStudent) else None
    adapters = lora_parameters(student.config, lora) if lora else 0
    job = Job(recipe, student, base, teachers, pairs, mine, theirs, adapters, precision)
    own = writing(
        recipe,
        student.config,
        parameters=student.parameters,
        head=2 * student.width * student.vocabulary,
        forward=mine.forward / (config.micro_batch * recipe.data.block),
        compute=job.compute,
    )
    # A teacher cache holds each block once.
    cached_tokens = _different_blocks(recipe) * recipe.data.block + _heldout_tokens(recipe)
    operations, to_fill = _operations(recipe, student, mine, teachers, theirs, cached_tokens)
    cache_bytes = _cache_bytes(recipe, teachers, pairs, cached_tokens)
    return Footprint(job.trained, worst_moment(job, own), cache_bytes, operations, own, to_fill)


def measure_speed(
    recipe: Recipe, student: Shape, *, seconds: float, precision: str, device: torch.device
) -> float:
    """Time the student's layers forward and backward for about ``seconds``: operations a second."""
    prepare_host(recipe.training.threads)
    small = resized(student.config, layers=2)
    small.vocab_size = TRIAL_VOCABULARY
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(small, name, None)  # they may lie past the smaller vocabulary
    model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).to(device)
    ids = torch.zeros(
        (recipe.training.micro_batch, recipe.data.block), dtype=torch.int64, device=device
    )

    def step() -> None:
        hidden = hidden_states(model, ids, precision)
        hidden.backward(torch.ones_like(hidden))
        model.zero_grad(set_to_none=True)

    return operations_a_second(step, seconds=seconds, device=device)


def _teacher_trace(teacher: TeacherShape, recipe: Recipe, *, precision: str, states: bool) -> Trace:
    # Quantised layers give what plain ones give, so they are traced as plain ones.
    return trace_line(
        teacher.shape,
        None,
        rows=recipe.training.micro_batch,
        length=recipe.data.block,
        precision=precision,
        states=states,
    )


def _pairs(
    recipe: Recipe, student: Shape, teachers: Sequence[TeacherShape]
) -> list[list[tuple[int, int]]]:
    if recipe.features.weight == 0:
        return [[] for _ in teachers]
    return [
        layer_pairs(recipe.features, student_layers=student.layers, teacher_layers=t.shape.layers)
        for t in teachers
    ]


def asked(recipe: Recipe) -> dict[str, Asked]:
    """See `compress.footprint.tasks.Task`. A server reads every different block once."""
    if recipe.local_teachers == recipe.teachers:
        return {}
    blocks = _different_blocks(recipe) + recipe.data.heldout.blocks * len(recipe.data.domains)
    tokens = blocks * recipe.data.block
    # Ids and shares of the likeliest tokens; two bounds and the label's log-probability.
    return {
        name: Asked(model.model, model.url, blocks, tokens, tokens * (8 * model.top + 12))
        for name, model in recipe.teacher_models.items()
        if isinstance(model, ServerModel)
    }


def served_vocabulary(recipe: Recipe) -> int | None:
    """See `compress.footprint.tasks.Task`."""
    first = recipe.teachers[0]
    if not isinstance(first.model, ServerModel):
        return None
    return len(load_tokenizer(served_teacher(first, recipe).tokenizer))


def _different_blocks(recipe: Recipe) -> int:
    """Upper bound on the number of different training blocks.

    Counts the blocks that training takes of each domain, or those of its text if it is here.
    """
    wanted, domains = (recipe.training.tokens or 0) // recipe.data.block, recipe.data.domains
    all_here = recipe.local_teachers == recipe.teachers
    if isinstance(recipe.training.teacher_cache, NoCache) and all_here:
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


def _heldout_tokens(recipe: Recipe) -> int:
    return recipe.data.heldout.blocks * recipe.data.block * len(recipe.data.domains)


def _cache_bytes(
    recipe: Recipe,
    teachers: Sequence[TeacherShape],
    pairs: Sequence[Sequence[tuple[int, int]]],
    tokens: int,
) -> int:
    heads = sum(BYTES[t.dtype] * t.shape.width * t.shape.vocabulary for t in teachers)
    match recipe.training.teacher_cache:
        case HiddenCache():
            kept = sum(
                2 * t.shape.width * len({t.shape.layers, *(layer for _, layer in p)})
                for t, p in zip(teachers, pairs, strict=True)
            )
            return tokens * kept + heads
        case TopkCache(k=k):
            return tokens * len(teachers) * (8 * k + 8) + heads
        case NoCache():
            return 0


def _operations(
    recipe: Recipe,
    student: Shape,
    mine: Trace,
    teachers: Sequence[TeacherShape],
    theirs: Sequence[Trace],
    cached_tokens: int,
) -> tuple[float, float]:
    """Operations of all steps and measurements, and those of them that fill the teacher cache.

    A product with a head of width d is 2 d V a token. With a cache the bodies read each block once;
    with the `topk` cache the heads do too.
    """
    config, cache = recipe.training, recipe.training.teacher_cache
    tokens = 0 if isinstance(recipe.student, MergeStudent) else config.tokens or 0
    micro = config.micro_batch * recipe.data.block
    heldout = _heldout_tokens(recipe)
    measurements = 2 + (tokens // config.batch_tokens) // config.evaluate_every
    head = 2 * student.width * student.vocabulary
    trains_head = not isinstance(recipe.student, LoraStudent)
    step = (mine.forward + mine.backward) / micro + head * (3 if trains_head else 2)
    own = tokens * step + measurements * heldout * (mine.forward / micro + head)
    bodies = sum(trace.forward for trace in theirs) / micro
    heads = sum(2 * teacher.shape.width * teacher.shape.vocabulary for teacher in teachers)
    if isinstance(cache, NoCache):
        return own + (tokens + heldout) * (bodies + heads), 0.0
    if isinstance(cache, TopkCache):
        filling = cached_tokens * (bodies + heads)
        return own + filling, filling
    return own + cached_tokens * bodies + (tokens + heldout) * heads, cached_tokens * bodies
