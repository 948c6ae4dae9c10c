"""The cost of training an encoder, without its weights: parameters, memory and operations.

Teachers answer one after the other, before the loop. Texts are not read: every example counts as
long as `data.max_tokens`, and there are as many as the recipe takes at most.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

from compress.footprint.base import Asked, Footprint, Memory
from compress.footprint.tracing import (
    TRIAL_VOCABULARY,
    Trace,
    on_a_line,
    operations_a_second,
    resized,
    trace_model,
    traced_once,
)
from compress.host import prepare_host
from compress.models.encoders import encoder_config, labelled, pooled, require_context
from compress.models.language import BAD_CONFIG, DTYPES, random_config
from compress.models.shrink import shrunk_config
from compress.tasks.encoder import ROWS
from limbeck.contract.errors import ModelError
from limbeck.contract.recipe import EncoderRecipe, EncoderShrinkStudent, FreshStudent, FullStudent

config_of = encoder_config  # of a model source; see `compress.footprint.tasks`
_TEMPORARIES = 2  # of its largest matrix, while AdamW steps


@dataclass(frozen=True)
class EncoderShape:
    """An encoder as its configuration describes it, with the head of its task."""

    config: Any
    task: str
    parameters: int
    largest: int  # of them in one matrix
    layers: int
    width: int
    vocabulary: int

    @property
    def weights(self) -> int:
        """Bytes in memory."""
        return 4 * self.parameters


def asked(recipe: EncoderRecipe) -> dict[str, Asked]:
    """See `compress.footprint.tasks.Task`. Encoders' teachers run here."""
    return {}


def served_vocabulary(recipe: EncoderRecipe) -> int | None:
    """See `compress.footprint.tasks.Task`."""
    return None


def meta_model(config: Any, task: str) -> Any:
    """Build an encoder on the meta device. Raises `ModelError` when transformers cannot."""
    auto = AutoModelForSequenceClassification if task == "classification" else AutoModel
    try:
        with torch.device("meta"):
            return auto.from_config(config, dtype=torch.float32)
    except BAD_CONFIG as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"{config.model_type}: transformers cannot build it for {task}: {reason}"
        ) from error


def describe(config: Any, recipe: EncoderRecipe, *, name: str) -> EncoderShape:
    """Count a configuration's parameters with the head of the recipe's task.

    ``name`` is for the message. Raises `ModelError` when transformers cannot build it, or when it
    cannot read the examples.
    """
    require_context(name, config, recipe.data.max_tokens)
    model = meta_model(config, recipe.task)
    largest = max(p.numel() for p in model.parameters())
    return EncoderShape(
        config,
        recipe.task,
        model.num_parameters(),
        largest,
        layers=int(config.num_hidden_layers),
        width=int(config.hidden_size),
        vocabulary=int(config.vocab_size),
    )


def student_config(recipe: EncoderRecipe, *, base: Any, vocabulary: int) -> Any:
    """Return the student's configuration, made from its ``base``'s.

    A fresh student has no base; ``vocabulary`` is the size of its tokenizer.
    """
    match recipe.student:
        case FullStudent():
            config = base
        case EncoderShrinkStudent() as student:
            config = shrunk_config(base, student)
        case FreshStudent(config=fields):
            config = random_config(fields, vocab_size=vocabulary, where="student.config")
    return labelled(config, recipe.classes) if recipe.classes else config


def teacher_shape(
    recipe: EncoderRecipe, index: int, shape: EncoderShape, made: EncoderRecipe | None = None
) -> EncoderShape:
    """A teacher in memory: nothing but its shape."""
    return shape


def footprint(
    recipe: EncoderRecipe,
    *,
    student: EncoderShape,
    base: EncoderShape | None,
    teachers: Sequence[EncoderShape],
    precision: str,
) -> Footprint:
    """Sum up a training from the sizes of student and teachers; ``precision`` is fp32 or bf16."""
    config, length = recipe.training, recipe.data.max_tokens
    trained = student.parameters
    if recipe.task == "embedding":
        trained += sum(student.width * t.width for t in teachers)  # projections
    mine = trace_encoder(
        student, rows=config.batch, length=length, precision=precision, trains=True
    )
    measured = trace_encoder(student, rows=ROWS, length=length, precision="fp32", trains=False)
    theirs = [
        trace_encoder(t, rows=ROWS, length=length, precision="fp32", trains=False) for t in teachers
    ]

    steps, (train, heldout) = config.examples // config.batch, example_counts(recipe)
    measurements = 1 + (steps - 1) // config.evaluate_every
    operations = (
        steps * (mine.forward + mine.backward) + measurements * heldout * measured.forward / ROWS
    )
    operations += sum((train + heldout) * t.forward / ROWS for t in theirs)

    numbers = [len(recipe.classes) or t.width for t in teachers]
    answers = 4 * (train + heldout) * sum(numbers)
    weights = student.weights + 4 * (trained - student.parameters)
    loop = max(
        mine.kept, mine.backward_peak, measured.forward_peak, 4 * _TEMPORARIES * student.largest
    )
    moments = [Memory(answers, weights, 12 * trained, loop, 0, "training")]
    if steps > config.checkpoint_every:  # a checkpoint copies the trained weights
        moments.append(Memory(answers, weights, 16 * trained, 0, 0, "saving a checkpoint"))
    moments += [
        Memory(
            t.weights + answers, student.weights, 0, trace.forward_peak, 0, "asking the teachers"
        )
        for t, trace in zip(teachers, theirs, strict=True)
    ]
    if base is not None and isinstance(recipe.student, EncoderShrinkStudent):
        moments.append(Memory(0, base.weights + student.weights, 0, 0, 0, "shrinking"))
    # The saved student is loaded and measured beside the trained one and its last gradients.
    moments.append(
        Memory(answers, weights + student.weights, 4 * trained, measured.forward_peak, 0, "saving")
    )
    return Footprint(trained, max(moments, key=lambda m: m.total), 0, operations)


def example_counts(recipe: EncoderRecipe) -> tuple[int, int]:
    """Examples that training looks at, and held-out ones: at most, text may give fewer."""
    config, held = recipe.training, recipe.data.heldout
    looked = config.examples // config.batch * config.batch
    taken = recipe.limits()
    train = sum(looked if most is None else most - most // held.every for most in taken)
    heldout = sum(
        held.most if most is None else min(held.most, most // held.every) for most in taken
    )
    return min(train, looked), heldout


def trace_encoder(
    shape: EncoderShape, *, rows: int, length: int, precision: str, trains: bool
) -> Trace:
    """One batch of ``rows`` examples of ``length`` tokens through all layers of ``shape``."""

    def trace_of(layers: int) -> Trace:
        config, asked = resized(shape.config, layers=layers), [rows, length, precision, trains]
        return traced_once(
            [config.to_json_string(use_diff=False), shape.task, *asked],
            lambda: trace_model(
                meta_model(config, shape.task).requires_grad_(trains),
                lambda m, ids: _answers(m, ids, shape.task, precision),
                rows=rows,
                length=length,
                trains=trains,
            ),
        )

    return on_a_line(shape.layers, trace_of)


def measure_speed(
    recipe: EncoderRecipe,
    student: EncoderShape,
    *,
    seconds: float,
    precision: str,
    device: torch.device,
) -> float:
    """Time the student's layers forward and backward for about ``seconds``: operations a second."""
    prepare_host(recipe.training.threads)
    small = resized(student.config, layers=min(2, student.layers))
    small.vocab_size = TRIAL_VOCABULARY
    small.pad_token_id = min(small.pad_token_id or 0, TRIAL_VOCABULARY - 1)
    auto = AutoModelForSequenceClassification if student.task == "classification" else AutoModel
    model = auto.from_config(small, dtype=torch.float32).to(device).train()
    ids = torch.ones(
        (recipe.training.batch, recipe.data.max_tokens), dtype=torch.int64, device=device
    )

    def step() -> None:
        answers = _answers(model, ids, student.task, precision)
        answers.backward(torch.ones_like(answers))
        model.zero_grad(set_to_none=True)

    return operations_a_second(step, seconds=seconds, device=device)


def _answers(model: Any, ids_RL: Tensor, task: str, precision: str) -> Tensor:
    mask_RL = torch.ones_like(ids_RL)
    mixed = (
        torch.autocast(ids_RL.device.type, DTYPES[precision])
        if precision != "fp32"
        else contextlib.nullcontext()
    )
    with mixed:
        if task == "classification":
            logits: Tensor = model(input_ids=ids_RL, attention_mask=mask_RL).logits.float()
            return logits
        return pooled(model, ids_RL, mask_RL)
