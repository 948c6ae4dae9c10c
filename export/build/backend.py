"""Which builder makes a student's fp32 graph, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from export.build.choice import choose_backend
from export.build.genai import build_genai
from export.build.surgery import head_of, width_of
from export.graphs import Graphs
from limbeck.contract.errors import ModelError
from limbeck.contract.progress import say
from limbeck.contract.recipe import Provider, StaticShapes
from limbeck.contract.results.onnx import Backend

_NO_LIMIT = 1 << 20  # tokens; of a model that names no context


@dataclass(frozen=True)
class Built:
    """The fp32 graphs and what the rest of the export needs to know of them."""

    graphs: Graphs
    backend: str
    why: str
    context: int  # tokens
    width: int  # numbers in the state that the head reads
    genai: dict[str, Any] | None  # GenAI's configuration, where GenAI can run the graph

    def named(self) -> Backend:
        """The builder's entry in the artifact's result."""
        return Backend(self.backend, self.why)


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
    """Build the fp32 graphs of the transformers folder ``model`` with ``backend``: genai, dynamo,
    or auto.

    ``auto`` takes what `export.build.choice.choose_backend` says, and torch's exporter where
    GenAI's builder gives up. ``static`` shapes are for dynamo alone. Raises `ModelError` when the
    builder asked for cannot do it.
    """
    config = json.loads((model / "config.json").read_text("utf-8"))
    automatic = backend == "auto"
    backend, why = choose_backend(config, backend=backend, provider=provider)
    if backend == "genai":
        try:
            graphs, genai = build_genai(model, folder, metadata)
        except ModelError as error:
            if not automatic:
                raise
            why = f"auto: {str(error).partition(': ')[2].partition(';')[0]}"
            choose_backend(config, backend="dynamo")
            say(f"export: {why}; torch's exporter takes over")
        else:
            context = int(genai["model"]["context_length"])
            return Built(graphs, "genai", why, context, _width(graphs), genai)
    from export.build.dynamo import build_dynamo

    graphs, positions = build_dynamo(model, folder, metadata, opset=opset, static=static)
    context = min(positions or _NO_LIMIT, static.length if static else _NO_LIMIT)
    return Built(graphs, "dynamo", why, context, _width(graphs), None)


def _width(graphs: Graphs) -> int:
    proto = onnx.load(graphs.last, load_external_data=False)
    return width_of(proto, head_of(proto))
