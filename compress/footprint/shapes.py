"""Language models as their configurations describe them: parameters, and one batch traced.

Nothing has weights; modules are traced on the meta device (`compress.footprint.tracing`).
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compress.footprint.tracing import Trace, on_a_line, resized, trace_model, traced_once
from compress.models.attention import use_short_attention
from compress.models.body import Body, causal_lm
from compress.models.language import BAD_CONFIG, DTYPES, cast_frozen
from compress.models.students import with_lora
from limbeck.contract.errors import ModelError
from limbeck.contract.recipe import LoraStudent, Recipe

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


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
        each = {"none": BYTES[dtype], "int8": 1, "nf4": 0.5 + 4 / 64}[quantize]
        return round((self.parameters - self.linear) * BYTES[dtype] + self.linear * each)


_SHAPES = dict[str, Shape]()  # by the configuration's JSON


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

    A configuration is counted once in a process: a search asks for the same ones again and again.
    Raises `ModelError` when transformers cannot build it.
    """
    key = config.to_json_string(use_diff=False)
    if key not in _SHAPES:
        model = meta_model(config)
        body, head = Body(model), model.get_output_embeddings()
        linear = sum(m.weight.numel() for m in model.modules() if _is_linear(m) and m is not head)
        vocabulary, width = body.head.weight_Vd.shape
        _SHAPES[key] = Shape(config, model.num_parameters(), linear, body.layers, width, vocabulary)
    return replace(_SHAPES[key], config=config)


def lora_parameters(config: Any, student: LoraStudent) -> int:
    """Trainable parameters of the adapters of ``student`` on the configuration."""
    with torch.device("meta"):
        model = with_lora(meta_model(config), student, seed=0)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


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
        if recipe is None or is_cast(recipe):
            cast_frozen(model, DTYPES[precision])
        use_short_attention(causal_lm(model))
    if recipe is not None:
        length = recipe.data.block
        if recipe.training.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
    trains = recipe is not None
    run = functools.partial(hidden_states, precision=precision, states=states)
    try:
        return trace_model(model, run, rows=rows, length=length, trains=trains)
    except BAD_CONFIG as error:
        raise ModelError(
            f"{config.model_type}: cannot answer a batch without weights ({type(error).__name__}: "
            f"{error}); take the config.json that was saved with its weights."
        ) from error


def hidden_states(model: Any, ids: Tensor, precision: str, *, states: bool = False) -> Any:
    """The last hidden states of a causal LM without its head."""
    lm = causal_lm(model)
    body = getattr(lm, lm.base_model_prefix)
    mixed = (
        torch.autocast(ids.device.type, DTYPES[precision])
        if precision != "fp32"
        else contextlib.nullcontext()
    )
    with mixed:
        return body(input_ids=ids, use_cache=False, output_hidden_states=states).last_hidden_state


def is_cast(recipe: Recipe) -> bool:
    """Whether frozen matrices of the base are kept in the number type of the forward pass."""
    return isinstance(recipe.student, LoraStudent) and not recipe.student.dora


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
