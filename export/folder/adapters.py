"""LoRA beside the base instead of in it: inputs of the base's graph that are empty by default, and
the file that fills them.

Knows peft's adapters and ONNX protobufs. A product's adapter is found by the weights it sits on,
not by names, so that a builder may call and pack its matrices as it likes; products that are packed
into one get one adapter with blocks, and the products of a packed layer that is split get one each.

Shape letters: K inputs of a product, N outputs, R rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.graphs import Graphs, stamp
from export.weights import external_array
from limbeck.contract.data.arrays import Floats
from limbeck.contract.errors import ModelError
from limbeck.contract.models.adapters import attach
from limbeck.contract.models.loading import load_pretrained
from limbeck.runtime.session import import_onnxruntime

ADAPTER = "adapters/student.onnx_adapter"


@dataclass(frozen=True)
class Update:
    """What an adapter adds to the weights ``[N, K]`` of one linear layer: ``up_NR @ down_RK``."""

    name: str
    # first and last column of the base's weights, by which the layer is found in a graph
    ends_2N: Floats
    inputs: int  # K
    down_RK: Floats
    up_NR: Floats  # scaled


def read_updates(base: Path, adapter: Path) -> list[Update]:
    """The updates of the peft folder ``adapter`` to the transformers folder ``base``.

    Raises `ModelError` for an adapter that is more than low-rank updates of linear layers.
    """
    import torch
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM, Conv1D

    model = attach(load_pretrained(AutoModelForCausalLM, base, dtype=torch.float32), adapter)
    updates = []
    for name, module in model.base_model.model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer = module.get_base_layer()
        if not isinstance(layer, torch.nn.Linear | Conv1D) or any(module.use_dora.values()):
            raise ModelError(
                f"{adapter}: its update of {name} ({type(layer).__name__}) is no plain low-rank "
                "update of a linear layer; set export.adapters: merged."
            )
        weight_NK = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        down = module.lora_A["default"].weight
        up = module.lora_B["default"].weight * module.scaling["default"]
        ends = weight_NK[:, [0, -1]].T
        updates.append(
            Update(name, _array(ends), int(weight_NK.shape[1]), _array(down), _array(up))
        )
    return updates


def _array(tensor: object) -> Floats:
    return np.array(tensor.detach().float().numpy(), np.float32)  # type: ignore[attr-defined]


def add_adapter_inputs(
    graphs: Graphs, updates: Sequence[Update], *, base: int
) -> dict[str, Floats]:
    """Give the products that ``updates`` touch an input for a low-rank update each, in both graph
    files of the base numbered ``base``.

    Returns what these inputs must hold for the updates to take effect, by name; left out they are
    empty and the graph computes what the base computes. Raises `ModelError` when a layer is not in
    the graph.
    """
    first = onnx.load(graphs.last, load_external_data=False)
    places = _find(first, graphs.data.parent, updates)
    values: dict[str, Floats] = {}
    for matrix, found in places.items():
        width, channels = found.shape
        rank = sum(len(update.down_RK) for update, _ in found.updates)
        down_KR, up_RN = np.zeros((width, rank), np.float32), np.zeros((rank, channels), np.float32)
        at = 0
        for update, column in found.updates:
            end = at + len(update.down_RK)
            down_KR[:, at:end] = update.down_RK.T
            up_RN[at:end, column : column + len(update.up_NR)] = update.up_NR.T
            at = end
        values |= {f"{matrix}.lora_A": down_KR, f"{matrix}.lora_B": up_RN}
    for path in (graphs.last, graphs.all):
        proto = onnx.load(path, load_external_data=False)
        _add_inputs(proto, {matrix: found.shape for matrix, found in places.items()})
        stamp(proto, {"limbeck.base": str(base)})
        onnx.save(proto, path)
    return values


def base_number(graphs: Graphs) -> int:
    """31 bits of the sha256 of the base's weights, in an adapter file and its graphs."""
    with graphs.data.open("rb") as file:
        return int.from_bytes(hashlib.file_digest(file, "sha256").digest()[:4], "big") >> 1


def write_adapter(path: Path, values: Mapping[str, Floats], *, base: int) -> None:
    """Write ``values`` as an ONNX Runtime adapter for the base numbered ``base``."""
    ort = import_onnxruntime()
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(base)
    adapter.set_parameters(
        {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in values.items()}
    )
    path.parent.mkdir(exist_ok=True)
    adapter.export_adapter(str(path))


@dataclass(frozen=True)
class _Found:
    shape: tuple[int, int]  # K, N of the graph's matrix
    # with the column of the matrix where the layer's outputs begin
    updates: list[tuple[Update, int]]


def _find(proto: ModelProto, folder: Path, updates: Sequence[Update]) -> dict[str, _Found]:
    """Where in the graph's constant matrices each updated layer lies, by the matrix's name."""
    tensors = {t.name: t for t in proto.graph.initializer}
    turned = {n.output[0]: n.input[0] for n in proto.graph.node if n.op_type == "Transpose"}
    read = {node.input[1] for node in proto.graph.node if node.op_type == "MatMul"}
    ends: dict[str, tuple[tuple[int, int], Floats]] = {}
    for name in sorted(read):
        tensor = tensors.get(turned.get(name, name))
        if tensor is not None and len(tensor.dims) == 2:
            array = external_array(tensor, folder)
            matrix_KN = array.T if name in turned else array
            ends[tensor.name] = (tuple(matrix_KN.shape), np.array(matrix_KN[[0, -1]]))
    found: dict[str, _Found] = {}
    for update in (part for whole in updates for part in _split(whole, ends)):
        matches = [
            (name, column)
            for name, (shape, ends_2N) in ends.items()
            if shape[0] == update.inputs
            for column in _columns(ends_2N, update.ends_2N)
        ]
        if len(matches) != 1:
            raise ModelError(
                f"{update.name}: found {len(matches)} products with its weights in the graph, "
                "expected one; its adapter cannot be kept apart. Set export.adapters: merged."
            )
        name, column = matches[0]
        found.setdefault(name, _Found(ends[name][0], [])).updates.append((update, column))
    return found


def _split(update: Update, ends: Mapping[str, tuple[tuple[int, int], Floats]]) -> list[Update]:
    """``update`` cut into those of the matrices that a builder has split its layer into.

    A layer that is not split, or not into matrices that make it up in order, comes back whole.
    """
    cuts = sorted(
        (column, column + shape[1])
        for shape, ends_2N in ends.values()
        if shape[0] == update.inputs
        for column in _columns(update.ends_2N, ends_2N)
    )
    edges = [0, *(stop for _, stop in cuts)]
    if edges[:-1] != [start for start, _ in cuts] or edges[-1] != len(update.up_NR):
        return [update]
    return [
        replace(update, ends_2N=update.ends_2N[:, start:stop], up_NR=update.up_NR[start:stop])
        for start, stop in cuts
    ]


def _columns(whole_2N: Floats, part_2N: Floats) -> list[int]:
    """Where ``part`` begins in ``whole``."""
    count = part_2N.shape[1]
    starts = np.flatnonzero(whole_2N[0, : whole_2N.shape[1] - count + 1] == part_2N[0, 0])
    return [int(at) for at in starts if np.array_equal(whole_2N[:, at : at + count], part_2N)]


def _add_inputs(proto: ModelProto, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Add the low-rank branch to every product on the matrices named in ``shapes``, in place."""
    graph = proto.graph
    turned = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Transpose"}
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        matrix = turned.get(node.input[1], node.input[1]) if node.op_type == "MatMul" else None
        if matrix not in shapes:
            continue
        out, stem = node.output[0], f"limbeck/lora/{node.output[0]}"
        node.output[0] = f"{stem}/base"
        down, up = f"{matrix}.lora_A", f"{matrix}.lora_B"
        nodes += [
            helper.make_node("MatMul", [node.input[0], down], [f"{stem}/low"], name=f"{stem}/Down"),
            helper.make_node("MatMul", [f"{stem}/low", up], [f"{stem}/update"], name=f"{stem}/Up"),
            helper.make_node("Add", [f"{stem}/base", f"{stem}/update"], [out], name=f"{stem}/Add"),
        ]
    for matrix, (width, channels) in shapes.items():
        rank = f"{matrix}.rank"
        for name, dims in (
            (f"{matrix}.lora_A", [width, rank]),
            (f"{matrix}.lora_B", [rank, channels]),
        ):
            graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))
            empty = np.zeros([dim if isinstance(dim, int) else 0 for dim in dims], np.float32)
            graph.initializer.append(numpy_helper.from_array(empty, name))
    del graph.node[:]
    graph.node.extend(nodes)
