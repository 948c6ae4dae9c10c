"""Attention over keys and values in 8 bits against fp32: onnxruntime's GroupQueryAttention alone.

The two arms take turns, with SmolLM2-135M's heads by default. Prints one JSON object: `ratio` is
the time of 8 bits over that of fp32, the median over rounds, by "new tokens after past tokens";
`us` has both times in microseconds, for one layer.

    make bench-cache-type ARGS="--threads 1"
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from tests.benchmarks.serving.peers import processor

HEADS, KV_HEADS, WIDTH, CONTEXT = 9, 3, 64, 2048
CASES = ((1, 128), (1, 512), (1, 1500), (64, 0), (128, 0), (512, 0), (128, 1000), (512, 1000))


def session(kind: type[np.generic], threads: int) -> onnxruntime.InferenceSession:
    """One attention whose past and present keys and values are of type ``kind``."""
    rounded = kind == np.int8
    cache = TensorProto.INT8 if rounded else TensorProto.FLOAT
    shapes: dict[str, tuple[int, list[Any]]] = {
        "query": (TensorProto.FLOAT, [1, "S", HEADS * WIDTH]),
        "key": (TensorProto.FLOAT, [1, "S", KV_HEADS * WIDTH]),
        "value": (TensorProto.FLOAT, [1, "S", KV_HEADS * WIDTH]),
        "past_key": (cache, [1, KV_HEADS, CONTEXT, WIDTH]),
        "past_value": (cache, [1, KV_HEADS, CONTEXT, WIDTH]),
        "seqlens_k": (TensorProto.INT32, [1]),
        "total": (TensorProto.INT32, []),
    }
    names = list(shapes)
    attributes: dict[str, Any] = {"num_heads": HEADS, "kv_num_heads": KV_HEADS}
    if rounded:
        shapes |= dict.fromkeys(
            ("k_scale", "v_scale"), (TensorProto.FLOAT, [1, KV_HEADS, 1, WIDTH])
        )
        names += [""] * 5 + ["k_scale", "v_scale"]
        attributes |= {"kv_cache_bit_width": 8}
        attributes |= dict.fromkeys(("k_quant_type", "v_quant_type"), "PER_CHANNEL")
    node = helper.make_node(
        "GroupQueryAttention", names, ["output", "present_key", "present_value"],
        domain="com.microsoft", **attributes,
    )  # fmt: skip
    given = [helper.make_tensor_value_info(n, *about) for n, about in shapes.items()]
    kinds = {"output": TensorProto.FLOAT, "present_key": cache, "present_value": cache}
    made = [helper.make_tensor_value_info(n, kind, None) for n, kind in kinds.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "attention", given, made), opset_imports=opsets, ir_version=10
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def bind(session: onnxruntime.InferenceSession, new: int, past: int) -> onnxruntime.IOBinding:
    """Random inputs; past and present share their memory."""
    draw, binding = np.random.default_rng(0), session.io_binding()
    for found in session.get_inputs():
        shape = [new if size == "S" else size for size in found.shape]
        values = draw.standard_normal(shape).astype(np.float32)
        if found.type == "tensor(int8)":
            values = np.clip(30 * values, -127, 127).astype(np.int8)
        elif found.name.endswith("scale"):
            values = np.full(shape, 4 / 127, np.float32)
        elif found.type == "tensor(int32)":
            values = np.full(shape, past + new - (found.name == "seqlens_k"), np.int32)
        value = onnxruntime.OrtValue.ortvalue_from_numpy(values)
        binding.bind_ortvalue_input(found.name, value)
        if found.name.startswith("past"):
            binding.bind_ortvalue_output(found.name.replace("past", "present"), value)
    binding.bind_output("output")
    return binding


def main() -> None:
    """Time both types in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    sessions = {k.__name__: session(k, asked.threads) for k in (np.float32, np.int8)}
    us: dict[str, dict[str, float]] = {}
    for new, past in CASES:
        times: dict[str, list[float]] = {name: [] for name in sessions}
        bound = {name: bind(found, new, past) for name, found in sessions.items()}
        runs = 400 if new == 1 else 20
        for _ in range(asked.rounds):
            for name, found in sessions.items():
                found.run_with_iobinding(bound[name])
                started = time.perf_counter()
                for _ in range(runs):
                    found.run_with_iobinding(bound[name])
                times[name].append(1e6 * (time.perf_counter() - started) / runs)
        us[f"{new} after {past}"] = {n: round(statistics.median(t), 1) for n, t in times.items()}
    ratio = {case: round(found["int8"] / found["float32"], 2) for case, found in us.items()}
    versions = {"onnxruntime": onnxruntime.__version__, "threads": asked.threads}
    print(json.dumps({"ratio": ratio, "us": us, "processor": processor(), **versions}))


if __name__ == "__main__":
    main()
