"""A causal LM as the loss sees it: hidden states and a head.

Shapes: R rows, L positions, d width.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.head import Head
from limbeck.contract.errors import ModelError
from limbeck.contract.models.probe import probe_ids, require_equal


class Body:
    """A causal LM seen as hidden states and a head."""

    def __init__(self, model: Any, adapter: str | None = None) -> None:
        """Take a transformers model or a `PeftModel`, of which ``adapter`` names one adapter."""
        self.model, self.adapter = model, adapter

    @functools.cached_property
    def head(self) -> Head:
        """The last layer, as the adapter has it."""
        self._activate()
        return head_of(causal_lm(self.model))

    @property
    def width(self) -> int:
        """d, of the states that enter the head."""
        return int(self.head.weight_Vd.shape[1])

    @property
    def layers(self) -> int:
        """Hidden layers."""
        return int(causal_lm(self.model).config.get_text_config().num_hidden_layers)

    def states(
        self, input_ids_RL: Tensor, layers: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Last hidden states [R, L, d], and those after each of ``layers`` (counted from 1).

        Runs in the caller's grad mode. Padding on the right needs no mask: attention is causal, so
        no label position sees it.
        """
        self._activate()
        lm = causal_lm(self.model)
        body = getattr(lm, lm.base_model_prefix)
        output = body(input_ids=input_ids_RL, use_cache=False, output_hidden_states=bool(layers))
        return output.last_hidden_state, {i: output.hidden_states[i] for i in layers}

    def _activate(self) -> None:
        if self.adapter is not None:
            self.model.set_adapter(self.adapter, inference_mode=True)


@torch.no_grad()
def require_faithful(body: Body, where: str) -> None:
    """Raise `ModelError` unless ``body`` gives the model's own logits and is causal.

    The loss reads hidden states and head, and pads rows on the right without a mask.
    """
    lm = causal_lm(body.model)
    config = lm.config.get_text_config()
    if not hasattr(lm, lm.base_model_prefix):
        raise ModelError(
            f"{where}: {type(lm).__name__} keeps its layers in no part of their own "
            f"({lm.base_model_prefix}); Limbeck cannot read its hidden states."
        )
    rows = min(int(config.vocab_size), len(lm.get_input_embeddings().weight))
    context = getattr(config, "max_position_embeddings", None)
    ids = torch.tensor(probe_ids(rows, context=context), device=lm.device)
    # int8 rounds activations by what the whole batch holds, so it has to be the same.
    rows_read = ids if getattr(lm, "is_quantized", False) else ids[:1]
    try:
        with _evaluating(body.model):
            hidden, _ = body.states(rows_read)  # first: it chooses the adapter
            theirs = body.model(input_ids=ids).logits
        ours = body.head.logits(hidden[:1].to(body.head.weight_Vd.dtype))
    except Exception as error:  # sizes of a configuration that do not go together raise anything
        remedy = (
            "peft cannot run this adapter in one model with its base: merge it where it was trained"
            if body.adapter
            else "take the config.json that was saved with its weights"
        )
        raise ModelError(
            f"{where}: {type(lm).__name__} cannot answer a test batch "
            f"({type(error).__name__}: {error}); {remedy}."
        ) from error
    dtype = lm.get_output_embeddings().weight.dtype
    require_equal(
        ours,
        theirs[:1],
        where=where,
        what="the product of its last hidden states and its head",
        dtype=dtype,
    )
    half = ids.shape[1] // 2  # the rows are equal up to here
    require_equal(
        theirs[0, :half],
        theirs[1, :half],
        where=where,
        what="a row with other tokens behind",
        dtype=dtype,
    )


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout; afterwards every module is in its former mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def causal_lm(model: Any) -> Any:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(model: Any) -> Head:
    """The head of a causal LM with its active adapters, logit scale and soft-capping.

    Raises `ModelError` for a model without one.
    """
    config, output = model.config.get_text_config(), model.get_output_embeddings()
    if output is None:
        raise ModelError(
            f"{type(model).__name__} has no output embeddings; only causal language models can be "
            "distilled."
        )
    weight, bias = _matrix(output)
    return Head(weight, bias, _scale(config), _softcap(config))


# Names of the logit factor in transformers' architectures, and whether it divides the logits.
_FACTORS = (
    ("logit_scale", False),  # cohere
    ("logits_scaling", True),  # granite
    ("lm_head_multiplier", False),  # falcon_h1
    ("output_multiplier", False),
)
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")  # gemma, recurrent_gemma


def _scale(config: Any) -> float:
    scale = 1.0
    for name, divides in _FACTORS:
        value = _own(config, name)
        if isinstance(value, int | float) and value:
            # HyperCLOVA X multiplies by what granite divides by.
            scale = (
                scale / value if divides and config.model_type != "hyperclovax" else scale * value
            )
    return scale


def _softcap(config: Any) -> float | None:
    found = (_own(config, name) for name in _SOFTCAPS)
    return next((float(value) for value in found if value), None)


def _own(config: Any, name: str) -> Any:
    """A field that the architecture has. A file may hold others, which transformers ignores."""
    return getattr(config, name, None) if hasattr(type(config), name) else None


def _matrix(output: Any) -> tuple[Tensor, Tensor | None]:
    """Weight [V, d] and bias [V] of an output layer with its active adapter."""
    if type(output) is nn.Linear:  # no adapter on it; importing peft takes seconds
        return output.weight, output.bias
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if isinstance(output, ModulesToSaveWrapper):
        saved = [name for name in output.active_adapters if name in output.modules_to_save]
        output = output.modules_to_save[saved[0]] if saved else output.original_module
    if not isinstance(output, BaseTunerLayer | AuxiliaryTrainingWrapper):
        return output.weight, getattr(output, "bias", None)
    # All supported adapters are affine: applied to the identity, they give the merged matrix.
    weight = output.weight
    unit_dd = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        bias_V = output(torch.zeros_like(unit_dd[:1]))[0]
        weight_Vd = (output(unit_dd) - bias_V).T.contiguous()
    return weight_Vd, bias_V if bool(bias_V.any()) else None
