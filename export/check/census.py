"""What a graph is made of: operators by type and precision, bytes by precision, matrices still in
float and why, and which execution provider runs each node."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from limbeck.contract.errors import QualityError
from limbeck.contract.files import temporary_folder
from limbeck.contract.recipe import Provider
from limbeck.runtime.session import asked_for, import_onnxruntime

_LARGE = 0.01  # of the weights' bytes: a float matrix above it defeats the purpose of quantising
_FLOAT = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
# What the large matrices of a form are read by, and how its census line begins.
_QUANTIZED = {
    "int8-weight": ("MatMulNBits 8-bit", "8-bit"),
    "int8-dynamic": ("MatMulIntegerToFloat int8", "8-bit"),
    "int8-static": ("MatMul int8", "8-bit"),  # between quantise and dequantise operators
    "int8-trt": ("MatMul int8", "8-bit"),
    "int4-weight": ("MatMulNBits 4-bit", "4-bit"),
}
# between a constant and the operator that it is for
_PASS = ("Transpose", "Cast", "DequantizeLinear")
_PRODUCT = ("MatMul", "Gemm")  # operators that read a whole weight matrix
_MULTIPLY = (*_PRODUCT, "Gather")  # or rows of one
_NO_WEIGHTS = "both factors are activations, as in attention; there are no weights to round"


def take_census(graph: Path) -> dict[str, Any]:
    """Count the graph at ``graph`` without reading its weights.

    ``operators``: count by "type" or "type precision"; ``bytes``: by number type, bytes that two
    names share counted once; ``float_matrices``: what stayed in float, by operator and shape, with
    its share of the bytes and the reason; ``float_products``: products of two activations, which no
    form rounds, by operator.
    """
    proto = onnx.load(graph, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    origin: dict[str, str] = {}
    for node in proto.graph.node:
        if node.op_type in _PASS:
            origin[node.output[0]] = origin.get(node.input[0], node.input[0])
    operators = Counter(_label(node, tensors, origin) for node in proto.graph.node)
    sizes: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    for tensor in proto.graph.initializer:
        entry = {e.key: e.value for e in tensor.external_data}
        place = (entry.get("location", tensor.name), entry.get("offset", ""))
        if place not in seen:
            seen.add(place)
            sizes[_type(tensor)] += _bytes(tensor)
    whole = sum(sizes.values())
    floats: dict[tuple[Any, ...], dict[str, Any]] = {}
    for node in proto.graph.node:
        for name in (origin.get(n, n) for n in node.input if node.op_type in _MULTIPLY):
            tensor = tensors.get(name)
            if tensor is not None and tensor.data_type in _FLOAT and len(tensor.dims) > 1:
                shape, why = list(tensor.dims), _why(node, tensor)
                start = {
                    "operator": node.op_type,
                    "shape": shape,
                    "why": why,
                    "first": node.name,
                    "count": 0,
                    "bytes": 0,
                }
                kind = floats.setdefault((node.op_type, *shape, why), start)
                kind["count"] += 1
                kind["bytes"] += _bytes(tensor)
    for kind in floats.values():
        kind["share"] = kind["bytes"] / whole
    integers = {node.output[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    products = Counter(
        node.op_type
        for node in proto.graph.node
        if node.op_type in _PRODUCT
        and not any(origin.get(name, name) in tensors for name in node.input)
        and not integers.issuperset(node.input)
    )
    return {
        "operators": dict(sorted(operators.items())),
        "bytes": dict(sorted(sizes.items())),
        "float_matrices": list(floats.values()),
        "float_products": [
            {"operator": name, "count": n, "why": _NO_WEIGHTS}
            for name, n in sorted(products.items())
        ],
    }


def where_nodes_run(graph: Path, *, provider: Provider = "cpu") -> dict[str, dict[str, int]]:
    """Nodes by execution provider and operator, from onnxruntime's own profile: a decoder of a
    prompt and one more token, an encoder of one text.

    These are the nodes that run: onnxruntime fuses and folds some of the file's, and adds casts and
    copies of its own.
    """
    ort = import_onnxruntime()
    with temporary_folder() as folder:
        options = ort.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "profile")
        options.log_severity_level = 4
        session = ort.InferenceSession(str(graph), options, providers=asked_for(provider))
        cache: dict[str, Any] = {}
        rows, fixed = next(v.shape for v in session.get_inputs() if v.name == "attention_mask")
        static = isinstance(fixed, int)
        rows = rows if static else 1
        for value in session.get_inputs():
            if value.name.startswith("past_key_values."):
                number = np.float16 if value.type == "tensor(float16)" else np.float32
                cache[value.name] = np.zeros(
                    (rows, value.shape[1], fixed - 1 if static else 0, value.shape[3]), number
                )
        if cache:
            runs = [(1, fixed)] if static else [(2, 2), (1, 3)]
        else:
            runs = [(fixed, fixed) if static else (2, 2)]
        for new, whole in runs:
            feeds = {
                "input_ids": np.zeros((rows, new), np.int64),
                "attention_mask": np.ones((rows, whole), np.int64),
                **cache,
            }
            outputs = dict(
                zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True)
            )
            cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    nodes = {
        (event["name"], event["args"]["node_index"]): (
            event["args"]["provider"],
            event["args"]["op_name"],
        )
        for event in events
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time")
    }
    found: dict[str, Counter[str]] = {}
    for provider, operator in nodes.values():
        found.setdefault(provider, Counter())[operator] += 1
    return {provider: dict(sorted(counts.items())) for provider, counts in sorted(found.items())}


def require_quantized(form: str, census: Mapping[str, Any], *, more_bits: bool = False) -> None:
    """Raise `QualityError` when a form that claims to be quantised keeps large matrices in float.

    ``more_bits`` says that `export.round.mixed` gave 8 bits to every matrix of a 4-bit form.
    """
    if form in ("fp32", "fp16"):
        return
    large = [m for m in census["float_matrices"] if m["share"] > _LARGE]
    operator, precision = _QUANTIZED["int8-weight" if more_bits else form]
    quantized = any(name.startswith(operator) for name in census["operators"])
    if large or not quantized:
        listed = "".join(
            f"\n  {m['count']} x {m['operator']} {m['shape']}, {100 * m['share']:.0f} % of the "
            f"bytes ({m['first']}): {m['why']}"
            for m in large
        )
        raise QualityError(
            f"the {form} graph is not quantised; expected {precision} matrices, found "
            f"{listed or f'no {operator} at all'}\n"
            "Nothing was kept. Ship fp32 (export.forms: [fp32]) or report the model."
        )


def _label(node: NodeProto, tensors: Mapping[str, TensorProto], origin: Mapping[str, str]) -> str:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if "bits" in attributes:
        return f"{node.op_type} {attributes['bits']}-bit block {attributes['block_size']}"
    product = node.op_type in ("MatMul", "Gemm", "MatMulIntegerToFloat")
    weights = (
        [tensors[n] for n in (origin.get(n, n) for n in node.input) if n in tensors]
        if product
        else []
    )
    return f"{node.op_type} {_type(weights[0])}" if weights else str(node.op_type)


def _why(node: NodeProto, tensor: TensorProto) -> str:
    if node.op_type == "Gemm":
        return "Gemm has no 8-bit weight kernel; only MatMul is replaced"
    if not tensor.external_data:
        return "a small constant inside the graph"
    if len(tensor.dims) != 2:
        return f"rank {len(tensor.dims)}; only matrices are replaced"
    return "not quantised in this form"


def _type(tensor: TensorProto) -> str:
    return str(TensorProto.DataType.Name(tensor.data_type)).lower()


def _bytes(tensor: TensorProto) -> int:
    entry = {e.key: e.value for e in tensor.external_data}
    if "length" in entry:
        return int(entry["length"])
    count = 1
    for dim in tensor.dims:
        count *= dim
    return count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
