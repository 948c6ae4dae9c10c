"""What the text that a student writes during its training takes: tokens, operations and memory."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from compress.footprint.base import Writing
from compress.footprint.tracing import operations_a_second, resized
from compress.host import prepare_host
from compress.models.language import DTYPES, cast_frozen
from limbeck.contract.recipe import LoraStudent, Recipe

# Bytes of sampling for each logit: fp32 scores twice, probabilities and their sums in fp64.
_SAMPLING = 4 + 4 + 8 + 8
_VOCABULARY = 1024  # of the trial, which times layers


def writing(
    recipe: Recipe, config: Any, *, parameters: int, head: float, forward: float, compute: int
) -> Writing | None:
    """Estimate the writing of ``training.on_policy`` for a student of a configuration.

    ``head`` and ``forward`` are operations a token of the head and of the layers, ``compute`` the
    bytes of a number of the forward pass. A budget in minutes counts no tokens. None where the
    student writes nothing.
    """
    own, training, block = recipe.training.on_policy, recipe.training, recipe.data.block
    if own is None or not own.share:
        return None
    prompt = min(own.prompts.tokens, block - 1)
    new, rows = min(own.new_tokens, block - prompt), training.batch_tokens // block
    steps = (training.tokens or 0) // training.batch_tokens
    written = round(-(-steps // own.every) * rows * own.share)
    group = max(1, min(own.batch, round(rows * own.share)))
    text = config.get_text_config()
    groups = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    each = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    keys = 2 * text.num_hidden_layers * groups * each * compute * group * (prompt + new)
    whole = not isinstance(recipe.student, LoraStudent) and compute < 4
    return Writing(
        tokens=written * new,
        operations=written * ((prompt + new) * forward + new * head),
        cache=keys + (parameters * compute if whole else 0),
        logits=group * text.vocab_size * _SAMPLING,
    )


def measure_writing_speed(
    recipe: Recipe, config: Any, *, seconds: float, precision: str, device: torch.device
) -> float:
    """Time the student's layers on one token a row for about ``seconds``: operations a second.

    This is far below the speed of training, because every token reads all weights.
    """
    own = recipe.training.on_policy
    assert own is not None
    prepare_host(recipe.training.threads)
    small = resized(config, layers=2)
    small.vocab_size = _VOCABULARY
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(small, name, None)  # they may lie past the smaller vocabulary
    model: Any = AutoModelForCausalLM.from_config(small, dtype=torch.float32).to(device)
    model.requires_grad_(False).eval()
    cast_frozen(model, DTYPES[precision])
    rows = recipe.training.batch_tokens // recipe.data.block
    group = max(1, min(own.batch, round(rows * own.share)))
    ids = torch.zeros((group, 1), dtype=torch.int64, device=device)
    body = getattr(model, model.base_model_prefix)

    @torch.no_grad()
    def step() -> None:
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
            body(input_ids=ids, use_cache=True)

    return operations_a_second(step, seconds=seconds, device=device)
