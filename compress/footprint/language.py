"""The cost of training a language model, without its weights: parameters, memory, operations.

The modules of each architecture are traced (`compress.footprint.tracing`); the loop's own share
(optimiser, copies, logits of a chunk) is added here. Texts are only counted, where they are here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compress.data.blocks import measure_text
from compress.features import layer_pairs
from compress.footprint.base import Asked, Footprint, Memory
from compress.footprint.own_text import writing
from compress.footprint.tracing import (
    TRIAL_VOCABULARY,
    Trace,
    on_a_line,
    operations_a_second,
    resized,
    trace_model,
    traced_once,
)
from compress.head import CACHED
from compress.host import prepare_host
from compress.models.attention import use_short_attention
from compress.models.body import Body, causal_lm
from compress.models.language import (
    BAD_CONFIG,
    DTYPES,
    cast_frozen,
    load_tokenizer,
    model_config,
    random_config,
)
from compress.models.shrink import shrunk_config
from compress.models.students import with_lora
from compress.teachers.served import served_teacher
from limbeck.contract.errors import ModelError, UserError
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

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
config_of = model_config  # of a model source; see `compress.footprint.tasks`
_EVALUATED = 4  # blocks in one batch of held-out text


@dataclass(frozen=True)
class Shape:
    """A causal LM as its configuration describes it."""

    config: Any
    parameters: int
    linear: int  # of them in layers that bitsandbytes quantises, which leaves the head alone
    layers: int
    width: int
    vocabulary: int

    def weights(self, *, dtype: str = "fp32", quantize: str = "none") -> int:
        """Bytes in memory. nf4 keeps an fp32 scale for every 64 numbers."""
        each = {"none": _BYTES[dtype], "int8": 1, "nf4": 0.5 + 4 / 64}[quantize]
        return round((self.parameters - self.linear) * _BYTES[dtype] + self.linear * each)


@dataclass(frozen=True)
class TeacherShape:
    """A teacher in memory. Those of one ``place`` share weights; ``adapter`` is each one's own."""

    shape: Shape
    place: str
    dtype: str = "fp32"
    quantize: str = "none"
    adapter: int = 0


def meta_model(config: Any, task: str = "causal-lm") -> Any:
    """Build a causal LM on the meta device. Raises `ModelError` when transformers cannot."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except BAD_CONFIG as error:
        raise ModelError(f"{config.model_type}: transformers cannot build it: {error}") from error


def describe(config: Any, recipe: Recipe | None = None, *, name: str = "") -> Shape:
    """Count a configuration's parameters; recipe and name are needed for encoders only.

    Raises `ModelError` when transformers cannot build it.
    """
    model = meta_model(config)
    body, outputs = Body(model), model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if _is_linear(m) and m is not outputs)
    vocabulary, width = body.head.weight_Vd.shape
    return Shape(config, model.num_parameters(), linear, body.layers, width, vocabulary)


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


def lora_parameters(config: Any, student: LoraStudent) -> int:
    """Trainable parameters of the adapters of ``student`` on the configuration."""
    with torch.device("meta"):
        model = with_lora(meta_model(config), student, seed=0)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def footprint(
    recipe: Recipe,
    *,
    student: Shape,
    base: Shape | None,
    teachers: Sequence[TeacherShape],
    precision: str,
) -> Footprint:
    """Sum up a training from the sizes of student and teachers; ``precision`` is fp32 or bf16."""
    config, lora = recipe.training, isinstance(recipe.student, LoraStudent)
    tokens = config.micro_batch * recipe.data.block
    cached = not isinstance(config.teacher_cache, NoCache)
    pairs = _pairs(recipe, student, teachers)
    projections = sum(
        len(p) * student.width * t.shape.width for t, p in zip(teachers, pairs, strict=True)
    )
    adapters = (
        lora_parameters(student.config, recipe.student)
        if isinstance(recipe.student, LoraStudent)
        else 0
    )
    trained = (adapters if lora else student.parameters) + projections
    if isinstance(recipe.student, MergeStudent):
        trained = 0  # nothing is trained

    mine = trace_line(student, recipe, rows=config.micro_batch, precision=precision)
    theirs = [
        _teacher_trace(t, recipe, precision=precision, states=bool(p))
        for t, p in zip(teachers, pairs, strict=True)
    ]
    # A teacher cache holds each block once.
    cached_tokens = _different_blocks(recipe) * recipe.data.block + _heldout_tokens(recipe)
    operations, to_fill = _operations(recipe, student, mine, teachers, theirs, cached_tokens)

    # Heads are cast once to the number type of the forward pass.
    compute = _BYTES[precision]
    places = {t.place: t for t in teachers}
    heads = sum(
        t.shape.width * t.shape.vocabulary * compute
        for t in places.values()
        if cached or t.dtype != precision
    )
    bodies = sum(_body(t, compute) for t in places.values())
    bodies += sum(4 * t.adapter for t in teachers)
    quantize = recipe.student.quantize if isinstance(recipe.student, LoraStudent) else "none"
    weights = student.weights(quantize=quantize) + 4 * (projections + adapters)
    if _is_cast(recipe) and quantize == "none":
        weights -= student.linear * (4 - compute)
    head = student.width * student.vocabulary * compute if precision != "fp32" else 0
    answers = sum(
        tokens * t.shape.width * (compute + len(p) * 4)
        for t, p in zip(teachers, pairs, strict=True)
    )
    aligned = sum(
        tokens * t.shape.width * 4 * len(p) * 4 for t, p in zip(teachers, pairs, strict=True)
    )
    logits = _logits(recipe, student, len(teachers), compute)
    if not lora:
        logits += student.width * student.vocabulary * 4  # gradient of the head, summed over chunks
    teacher_peak = 0 if cached else max((t.forward_peak for t in theirs), default=0)
    activations = max(
        mine.kept + answers + aligned, mine.backward_peak - logits + answers, teacher_peak - logits
    )
    best = 4 * trained
    # The cache is mapped from disk: the kernel drops its pages when memory is short, and a GPU gets
    # one micro-batch of it at a time.
    kept_teachers = heads if cached else bodies + heads
    moments = [
        Memory(kept_teachers, weights + head, 12 * trained + best, activations, logits, "training")
    ]
    own = writing(
        recipe,
        student.config,
        parameters=student.parameters,
        head=2 * student.width * student.vocabulary,
        forward=mine.forward / tokens,
        compute=compute,
    )
    if own is not None:  # there are no gradients at this moment
        kept = 8 * trained + best
        moments.append(
            Memory(kept_teachers, weights + head, kept, own.cache, own.logits, "writing own text")
        )
    if cached:
        filling = max((t.forward_peak for t in theirs), default=0)
        moments.append(Memory(bodies + heads, weights + head, 0, filling, 0, "filling the cache"))
    if base is not None and isinstance(recipe.student, ShrinkStudent):
        moments.append(Memory(0, base.weights() + weights, 0, 0, 0, "shrinking"))
    again = student.weights()  # the student as it is saved is loaded and measured once more
    scored = trace_line(
        student, None, rows=_EVALUATED, length=recipe.data.block, precision="fp32"
    ).forward_peak
    moments.append(Memory(kept_teachers, weights + head + again, 2 * best, scored, 0, "saving"))
    if lora:  # the adapters are merged into the base as it is on disk
        moments.append(
            Memory(
                kept_teachers,
                weights + head + again + 4 * student.linear,
                2 * best,
                0,
                0,
                "merging",
            )
        )
    cache_bytes = _cache_bytes(recipe, teachers, pairs, cached_tokens)
    worst = max(moments, key=lambda m: m.total)
    return Footprint(trained, worst, cache_bytes, operations, own, to_fill)


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
        hidden = _hidden(model, ids, precision)
        hidden.backward(torch.ones_like(hidden))
        model.zero_grad(set_to_none=True)

    return operations_a_second(step, seconds=seconds, device=device)


# Tracing ---------------------------------------------------------------------------------------


def trace_line(
    shape: Shape,
    recipe: Recipe | None,
    *,
    rows: int,
    precision: str,
    length: int = 0,
    states: bool = False,
) -> Trace:
    """Trace one micro-batch through all layers of ``shape``.

    With a recipe that is its student, forward and backward; without, a teacher's forward pass.
    """
    asked: list[Any] = [rows, length, precision, states]
    if recipe is not None:
        student = recipe.student.model_dump(mode="json")
        asked += [student, recipe.data.block, recipe.training.gradient_checkpointing]

    def trace_of(layers: int) -> Trace:
        config = resized(shape.config, layers=layers)
        return traced_once(
            [config.to_json_string(use_diff=False), *asked],
            lambda: _trace(config, recipe, rows, length, precision, states),
        )

    return on_a_line(shape.layers, trace_of)


def _trace(
    config: Any, recipe: Recipe | None, rows: int, length: int, precision: str, states: bool
) -> Trace:
    with torch.device("meta"):
        model = meta_model(config)
        model.requires_grad_(recipe is not None)
        if recipe is not None and isinstance(recipe.student, LoraStudent):
            model = with_lora(model.requires_grad_(False), recipe.student, seed=0)
        if recipe is None or _is_cast(recipe):
            cast_frozen(model, DTYPES[precision])
        use_short_attention(causal_lm(model))
    if recipe is not None:
        length = recipe.data.block
        if recipe.training.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
    trains = recipe is not None
    run = functools.partial(_hidden, precision=precision, states=states)
    return trace_model(model, run, rows=rows, length=length, trains=trains)


def _hidden(model: Any, ids: Tensor, precision: str, *, states: bool = False) -> Any:
    lm = causal_lm(model)
    body = getattr(lm, lm.base_model_prefix)
    mixed = (
        torch.autocast(ids.device.type, DTYPES[precision])
        if precision != "fp32"
        else contextlib.nullcontext()
    )
    with mixed:
        return body(input_ids=ids, use_cache=False, output_hidden_states=states).last_hidden_state


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


def _is_cast(recipe: Recipe) -> bool:
    """Whether frozen matrices of the base are kept in the number type of the forward pass."""
    return isinstance(recipe.student, LoraStudent) and not recipe.student.dora


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


# Sums ------------------------------------------------------------------------------------------


def _body(teacher: TeacherShape, compute: int) -> int:
    """Bytes of a teacher's weights, whose fp32 matrices take the forward pass's number type."""
    size = teacher.shape.weights(dtype=teacher.dtype, quantize=teacher.quantize)
    cast = teacher.quantize == "none" and teacher.dtype == "fp32"
    return size - teacher.shape.linear * (4 - compute) if cast else size


def _pairs(
    recipe: Recipe, student: Shape, teachers: Sequence[TeacherShape]
) -> list[list[tuple[int, int]]]:
    if recipe.features.weight == 0:
        return [[] for _ in teachers]
    return [
        layer_pairs(recipe.features, student_layers=student.layers, teacher_layers=t.shape.layers)
        for t in teachers
    ]


def _logits(recipe: Recipe, student: Shape, teachers: int, compute: int) -> int:
    """Peak of `fused_loss`, as measured: K + 2 products [C, V] and eight fp32 blocks."""
    label_positions = recipe.training.micro_batch * (recipe.data.block - 1)
    chunk = min(recipe.fusion.chunk, label_positions) * student.vocabulary
    device = recipe.training.device
    # where a block is the chunk
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    return (teachers + 2) * chunk * compute + 8 * (chunk if on_gpu else min(CACHED, chunk)) * 4


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
    heads = sum(_BYTES[t.dtype] * t.shape.width * t.shape.vocabulary for t in teachers)
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
    tokens = config.tokens or 0
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
