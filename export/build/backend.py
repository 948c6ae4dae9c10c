"""Which builder makes a student's fp32 graph, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from export.build.genai import KNOWN, build_genai
from export.build.surgery import Graphs, head_of, width_of
from limbeck.contract.errors import ModelError
from limbeck.contract.progress import say
from limbeck.contract.recipe import Provider, StaticShapes

_NO_LIMIT = 1 << 20  # tokens; of a model that names no context


@dataclass(frozen=True)
class Built:
    """The fp32 graphs and what the rest of the export needs to know of them."""

    graphs: Graphs
    backend: str
    why: str
    context: int  # tokens
    width: int  # numbers in the state that the head reads
    genai: dict[str, Any] | None  # the configuration of ONNX Runtime GenAI, where it can run the graph


def build_graphs(
    model: Path,
    folder: Path,
    metadata: Mapping[str, str],
    *,
    backend: str,
    provider: Provider = "cpu",
    opset: int | None = None,
    static: StaticShapes | None = None,
) -> Built:
    """Build the fp32 graphs of the transformers folder ``model`` with ``backend``: genai, dynamo, or auto.

    ``auto`` takes the fused graph of GenAI's builder for the architectures it is proven on, and torch's exporter where
    it is not, where the builder gives up, and for TensorRT. ``static`` shapes are for dynamo alone. Raises `ModelError` when the builder asked for cannot do it.
    """
    config = json.loads((model / "config.json").read_text())
    architecture = (config.get("architectures") or ["this architecture"])[0]
    why = "the recipe names it"
    if backend == "auto" and config.get("model_type") not in KNOWN:
        backend = "dynamo"
        why = f"auto: GenAI's builder is not proven on {architecture}, only on {', '.join(KNOWN)}"
    if backend == "auto" and provider == "tensorrt":
        backend, why = "dynamo", "auto: TensorRT has no kernel for the builder's fused attention"
    if backend in ("auto", "genai"):
        try:
            graphs, genai = build_genai(model, folder, metadata)
        except ModelError as error:
            if backend == "genai":
                raise
            why = f"auto: {str(error).partition(': ')[2].partition(';')[0]}"
            say(f"export: {why}; torch's exporter takes over")
        else:
            if backend == "auto":
                why = f"auto: ONNX Runtime GenAI's builder knows {architecture} and fuses its attention"
            return Built(graphs, "genai", why, int(genai["model"]["context_length"]), _width(graphs), genai)
    from export.build.dynamo import build_dynamo

    graphs, context = build_dynamo(model, folder, metadata, opset=opset, static=static)
    context = min(context or _NO_LIMIT, static.length if static else _NO_LIMIT)
    return Built(graphs, "dynamo", why, context, _width(graphs), None)


def _width(graphs: Graphs) -> int:
    proto = onnx.load(graphs.last, load_external_data=False)
    return width_of(proto, head_of(proto))
