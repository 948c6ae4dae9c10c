"""Does the graph for long prompts compute what the form's own graph would compute in fp32?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from export.graphs import Graphs
from limbeck.contract.errors import ParityError
from limbeck.runtime.decoder import GraphDecoder

_IN_FP32 = 1  # `accuracy_level` of MatMulNBits: onnxruntime's own products in fp32, from the blocks
# The largest difference of two logits over the largest logit. Both add the same products in other
# orders; that is 1e-6 to 1e-5 (`tests/export/round/test_floats.py`).
_LIMIT = 1e-3


def require_same_products(form: str, graphs: Graphs, rows: Sequence[npt.NDArray[np.int64]]) -> None:
    """Raise `ParityError` if the graph for prompts differs from onnxruntime's own fp32 products.

    Each of the token ``rows`` is read as one prompt. Those that are too short for the graph are
    left out.
    """
    if graphs.prompt is None:
        return
    beside = graphs.last.with_name(f".{graphs.last.stem}.checked.onnx")  # beside its weights
    try:
        save_in_fp32(graphs.last, graphs.prompt, beside)
        theirs = GraphDecoder(beside)
        ours = GraphDecoder(graphs.last, prompts=graphs.prompt)
        for row in rows:
            if ours.is_long(len(row)):
                right, found = theirs.prefill(row[None]), ours.prefill(row[None])
                off = float(np.abs(found - right).max() / np.abs(right).max())
                if not off <= _LIMIT:  # NaN is past it too
                    raise ParityError(
                        f"the {form} graph for prompts is {off:.3g} of the largest logit from "
                        f"onnxruntime's own products, limit {_LIMIT:g}. Choose another form in the "
                        "recipe, or report the model."
                    )
    finally:
        beside.unlink(missing_ok=True)


def save_in_fp32(graph: Path, prompt: Path, target: Path) -> None:
    """Save ``graph`` with those products in fp32 that ``prompt`` has in fp32."""
    others = onnx.load(prompt, load_external_data=False).graph.node
    rounded = {node.output[0] for node in others if node.op_type == "MatMulNBits"}
    proto = onnx.load(graph, load_external_data=False)
    for node in proto.graph.node:
        if node.op_type == "MatMulNBits" and node.output[0] not in rounded:
            next(a for a in node.attribute if a.name == "accuracy_level").i = _IN_FP32
    onnx.save(proto, target)
