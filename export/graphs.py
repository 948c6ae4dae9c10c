"""Where the graphs and weights of a form lie, and the metadata that every graph carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto, helper

ROPE = "limbeck/rope/"  # prefix of what computes tables of angles, which needs fp32
# transformers.js's names of dtypes fp32, fp16, q8, int8, uint8 and q4
_STEMS = {
    "fp32": "model",
    "fp16": "model_fp16",
    "int8-weight": "model_quantized",
    "int8-dynamic": "model_int8",
    "int8-static": "model_uint8",
    "int8-trt": "model_int8_trt",
    "int4-weight": "model_q4",
}


# The form whose products a processor may do faster in fp32 where there are many rows.
_HAS_PROMPT_GRAPH = "int8-weight"


@dataclass(frozen=True)
class Graphs:
    """The graphs of one form and their weights file; paths below the deployable folder."""

    last: Path
    all: Path
    data: Path
    prompt: Path | None = None  # reads long prompts: `export.round.floats`

    @property
    def running(self) -> tuple[Path, ...]:
        """What is read to answer; ``all`` is for scoring."""
        return (self.last, self.data, *([self.prompt] if self.prompt else []))

    @property
    def files(self) -> tuple[Path, ...]:
        """What must be shipped for the form to run."""
        return (*self.running, self.all)


def form_files(folder: Path, form: str, *, prompt: bool = False) -> Graphs:
    """Where the graphs of ``form`` lie in ``folder``; the names are transformers.js's.

    With ``prompt`` also the graph for long prompts, of the form that has one. Its name does not end
    as a graph's, because optimum would choose between the two.
    """
    stem = _STEMS[form]
    return Graphs(
        folder / f"onnx/{stem}.onnx",
        folder / f"onnx/{stem}_all_logits.onnx",
        folder / f"onnx/{stem}.onnx_data",
        folder / f"onnx/{stem}.onnx_prompt" if prompt and form == _HAS_PROMPT_GRAPH else None,
    )


def stamp(proto: ModelProto, metadata: Mapping[str, str]) -> None:
    """Set ``metadata`` in the graph's ``metadata_props``; other entries are kept."""
    merged = {entry.key: entry.value for entry in proto.metadata_props} | dict(metadata)
    del proto.metadata_props[:]
    helper.set_model_props(proto, merged)


def relocate(proto: ModelProto, location: str) -> None:
    """Name another external file for every initialiser."""
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
