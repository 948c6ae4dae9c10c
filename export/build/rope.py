"""Rope in a graph of GenAI's builder: layers that have none, and tables of angles that are too
large to ship.

Knows ONNX protobufs and the builder's names.

Shape letters: L positions of the context, R numbers of half a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.build.choice import rope_kinds, ropes_of
from export.graphs import ROPE
from export.weights import WeightsFile, external_array
from limbeck.contract.data.arrays import Floats

COMPUTED = ({"default"}, {"llama3"})  # kinds of rope whose tables are computed if they are large
LARGE = 4 << 20  # bytes of all tables of a model, from which on they are computed
_TABLES = ("cos_cache", "sin_cache")
_SAMPLE = 256  # rows of a table that are compared with the formula


def drop_rope(proto: ModelProto, model: Path) -> None:
    """Take rope from the attention of layers that have none (`no_rope_layers` of SmolLM3)."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    if not hasattr(type(config), "no_rope_layers"):  # files of other models may name it
        return
    attentions = [node for node in proto.graph.node if node.op_type == "GroupQueryAttention"]
    for node, has_rope in zip(attentions, config.no_rope_layers, strict=True):
        if not has_rope:
            next(a for a in node.attribute if a.name == "do_rotary").i = 0
            node.input[7] = node.input[8] = ""  # cosines and sines


def compute_tables(graph: Path, model: Path) -> None:
    """Let the builder's ``graph`` of ``model`` compute its tables of cosines and sines ``[L, R]``.

    onnxruntime does it once, when it opens the graph. Tables that are smaller than `LARGE`
    together stay in the weights. So do those of other ropes than the plain one, whose angle of
    position p and number i is p θ^(-i/R) (Su et al., arXiv 2104.09864), and Llama 3's.
    """
    from transformers import AutoConfig

    proto = onnx.load(graph, load_external_data=False)
    tables = [t for t in proto.graph.initializer if t.name.startswith(_TABLES)]
    if sum(4 * int(np.prod(table.dims)) for table in tables) < LARGE:
        return
    config = AutoConfig.from_pretrained(model)
    computed: list[NodeProto] = []
    constants: list[TensorProto] = []
    for table in tables:
        values = external_array(table, graph.parent)
        for frequencies in _frequencies(config, values.shape[1]):
            if _gives(values, table.name, frequencies):
                computed += _formula(table.name, len(values), frequencies, constants)
                break
    if not computed:
        return
    names = {name for node in computed for name in node.output}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in names]
    nodes = [*computed, *proto.graph.node]
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend([*constants, *_moved(kept, graph)])
    onnx.save(proto, graph)


def _frequencies(config: Any, half: int) -> Iterator[Floats]:
    """The angle of position 1 ``[1, R]``, of each rope of ``config`` that is computed.

    Rounded as torch does it, because large positions multiply the rounding.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kinds = rope_kinds(config.to_dict())
    if kinds not in COMPUTED:
        return
    if kinds == {"llama3"}:
        yield ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()[None]
    else:
        shares = torch.arange(0, 2 * half, 2, dtype=torch.int64).float() / (2 * half)
        for rope in ropes_of(config.to_dict()):
            yield (1.0 / rope["rope_theta"] ** shares).numpy()[None]


def _operator(table: str) -> str:
    return "Cos" if table.startswith("cos") else "Sin"


def _gives(values: npt.NDArray[Any], table: str, frequencies: Floats) -> bool:
    """Whether the formula gives rows from all over the table, up to rounding."""
    rows = np.unique(np.linspace(0, len(values) - 1, _SAMPLE).astype(int))
    function = np.cos if _operator(table) == "Cos" else np.sin
    angles = rows[:, None].astype(np.float32) * frequencies
    return bool(np.abs(function(angles) - values[rows]).max() < 1e-6)


def _formula(
    table: str, length: int, frequencies: Floats, constants: list[TensorProto]
) -> Iterator[NodeProto]:
    """Operators that compute ``table``; what they read is added to ``constants``."""

    def name(short: str) -> str:
        return f"{ROPE}{table}/{short}"

    def constant(short: str, value: Any) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value), name(short)))
        return name(short)

    def make(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> NodeProto:
        return helper.make_node(op, inputs, [output], name=name(op), **attributes)

    limits = [
        constant(short, np.float32(value))
        for short, value in (("start", 0), ("length", length), ("one", 1))
    ]
    yield make("Range", limits, name("positions"))
    yield make("Unsqueeze", [name("positions"), constant("axis", [1])], name("column"))
    yield make("Mul", [name("column"), constant("frequencies", frequencies)], name("angles"))
    yield make(_operator(table), [name("angles")], name("values"))
    # For a graph in fp16: angles need fp32, and the attention reads its own number type.
    yield make("Cast", [name("values")], table, to=TensorProto.FLOAT)


def _moved(tensors: Sequence[TensorProto], graph: Path) -> list[TensorProto]:
    """Write the weights file of ``graph`` again with ``tensors`` alone; what refers to it then."""
    data = next(
        entry.value for t in tensors for entry in t.external_data if entry.key == "location"
    )
    path, written = graph.parent / data, dict[str, TensorProto]()
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as out:
        file = WeightsFile(out, data, written)
        for tensor in tensors:
            if tensor.external_data:
                file.append(tensor.name, external_array(tensor, graph.parent))
    part.replace(path)
    return [written.get(tensor.name, tensor) for tensor in tensors]
