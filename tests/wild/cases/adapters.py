"""Adapters of every kind of peft on tiny bases with trained weights, and peft's own outputs."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress.teachers.live import TeacherFolder, Teachers
from tests.pico import make_model

SIZES = {"vocab_size": 258, "max_position_embeddings": 64}
IDS = torch.randint(0, 258, (2, 12), generator=torch.Generator().manual_seed(5))
LAYERS = ["q_proj", "v_proj", "down_proj"]


def make_base(folder: Path, *, tied: bool, **over: Any) -> Path:
    """A tiny llama."""
    return make_model(folder, seed=3, tie_word_embeddings=tied, **SIZES | over)


def load(folder: Path, **options: Any) -> Any:
    """The model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def make_adapter(base: Path, folder: Path, config: Any, *, seed: int = 0, rows: int = 0) -> Path:
    """Save an adapter of ``config`` with weights far from zero; ``rows`` resizes the embedding."""
    from peft import get_peft_model

    with warnings.catch_warnings():  # peft says much that is no concern of these tests
        warnings.simplefilter("ignore")
        config = copy.deepcopy(config)
        config.task_type = "CAUSAL_LM"
        model = load(base)
        if rows:
            model.resize_token_embeddings(rows, mean_resizing=False)
        adapted = get_peft_model(model, config)
        draw = torch.Generator().manual_seed(seed)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
        adapted.save_pretrained(folder)
    return folder


def peft_model(base: Path, adapter: Path, *, rows: int = 0, **options: Any) -> Any:
    """This one adapter on this base, as peft loads it. ``rows`` resizes the embedding before.

    ``options`` are transformers', for the base.
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(base, **options)
        if rows:
            model.resize_token_embeddings(rows, mean_resizing=False)
        return PeftModel.from_pretrained(model, str(adapter)).eval()


def peft_logits(base: Path, adapter: Path, ids: Tensor = IDS, *, rows: int = 0) -> Tensor:
    """What peft computes with this one adapter on this base: the right value of every test."""
    with torch.no_grad():
        found: Tensor = peft_model(base, adapter, rows=rows)(input_ids=ids).logits
    return found


def teacher(name: str, base: Path, adapter: Path | None, **over: Any) -> TeacherFolder:
    """A teacher as a recipe would find it."""
    fields: dict[str, Any] = {
        "quantize": "none",
        "dtype": "fp32",
        "digest": name,
        "tokenizer": base,
    } | over
    return TeacherFolder(
        name=name, base=base, adapter=adapter, whole=base, whole_adapter=adapter, **fields
    )


def our_logits(folders: list[TeacherFolder], ids: Tensor = IDS) -> list[Tensor]:
    """What each teacher says, by the path that training takes: hidden states, then the head."""
    loaded = Teachers(folders, device=torch.device("cpu"), compute_dtype=torch.float32)
    states, _ = loaded.states(ids)
    return [state.head.logits(state.hidden_RLd) for state in states]
