"""The fp32 graph of an encoder: `torch.onnx.export` of the transformers model and its head or
pooling.

Inputs are `input_ids` and `attention_mask` `[B, L]`, both dimensions free, padded on the right as
tokenizers of encoders pad. A classifier answers with `logits[B, C]`; a sentence encoder with
`last_hidden_state[B, L, d]` and `sentence_embedding[B, d]`, the mean under the mask, of length 1.

Shape letters: B rows, L tokens, C classes, d width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch

from export.build.backend import Built
from export.build.dynamo import split_gemm
from export.build.exporter import save_onnx
from export.graphs import Graphs, relocate, stamp
from limbeck.contract.models.encoders import load_encoder, read
from limbeck.contract.recipe import StaticShapes
from limbeck.contract.sources.models import context_in

_TRACED = (2, 5)  # rows and tokens; sizes 0 and 1 would be taken for constants


class Classifier(torch.nn.Module):
    """A transformers classifier as a function of ids and mask."""

    outputs = ("logits",)

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        """Logits ``[B, C]``."""
        return (read(self.model, input_ids, attention_mask).logits,)


class SentenceEncoder(torch.nn.Module):
    """A transformers encoder with its pooling, as a function of ids and mask."""

    outputs = ("last_hidden_state", "sentence_embedding")

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States ``[B, L, d]`` and unit vectors ``[B, d]``."""
        states = read(self.model, input_ids, attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(states.dtype)
        mean = (states * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return states, torch.nn.functional.normalize(mean, dim=-1)


def load_student(model: Path, *, task: str) -> Classifier | SentenceEncoder:
    """The transformers folder ``model`` in eager fp32, as what the graph is to compute."""
    loaded = load_encoder(model, task=task, attn_implementation="eager")
    return (Classifier if task == "classification" else SentenceEncoder)(loaded).eval()


def build_fp32(
    model: Path,
    graphs: Graphs,
    metadata: Mapping[str, str],
    *,
    task: str,
    opset: int | None = None,
    static: StaticShapes | None = None,
) -> Built:
    """Build the fp32 graph of the transformers folder ``model`` at ``graphs``.

    ``opset`` is the ONNX operator set, or None for the exporter's choice. A ``static`` graph has
    one shape.

    Raises `ModelError` for a model that torch cannot export.
    """
    graphs.data.parent.mkdir(exist_ok=True)
    student = load_student(model, task=task)
    config = student.model.config
    shape = (static.batch, static.length) if static else _TRACED
    free = {0: "batch_size", 1: "sequence_length"}
    with tempfile.TemporaryDirectory(dir=graphs.data.parent) as temporary:
        build = Path(temporary) / "model.onnx"
        save_onnx(
            student,
            (torch.ones(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.int64)),
            build,
            source=model,
            inputs=["input_ids", "attention_mask"],
            outputs=student.outputs,
            shapes=None if static else {"input_ids": free, "attention_mask": free},
            opset=opset,
        )
        (build.parent / "model.onnx.data").rename(graphs.data)
        proto = onnx.load(build, load_external_data=False)
        relocate(proto, graphs.data.name)
        split_gemm(proto)
        context = context_in(config.to_dict()) or 0
        stamp(proto, {**metadata, "limbeck.context": str(context)})
        onnx.save(proto, graphs.last)
    width = int(config.hidden_size)
    return Built(graphs, "dynamo", "encoders have no other builder", context, width, None)
