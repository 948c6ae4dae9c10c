"""Time to read a prompt: int8-weight, the same graph with fp32 products, and the fp32 graph.

In the second graph every MatMulNBits has `accuracy_level: 1`: weights go back to fp32 before they
are multiplied. It reads the same weights file. Arms take turns, 2 threads; whole prompts are read
in one run. Prints one JSON object: `level1_ratio` and `fp32_ratio` by length of the prompt are
medians over those of int8-weight; `ms`; `rss_mb` is what opening each session added.

    make bench-prompt ARGS=runs/smollm2-135m-two-experts-.../onnx
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil

from limbeck.contract.artifact import open_artifact
from limbeck.contract.results.onnx import OnnxResult
from limbeck.runtime.session import import_onnxruntime
from tests.benchmarks.serving.peers import FORM, processor

LENGTHS = (16, 32, 128, 384, 512, 768, 1024, 1500)
_FP32_PRODUCTS = 1  # `accuracy_level` of MatMulNBits


def with_fp32_products(graph: Path, folder: Path) -> Path:
    """The graph with another accuracy level, beside hard links to the files that it reads."""
    for file in graph.parent.iterdir():  # onnxruntime refuses weights outside a graph's folder
        (folder / file.name).hardlink_to(file)
    proto = onnx.load(graph, load_external_data=False)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = _FP32_PRODUCTS
    changed = folder / "level1.onnx"
    onnx.save(proto, changed)
    return changed


def open_session(graph: Path, threads: int) -> Any:
    """A session on ``graph``."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.enable_mem_pattern = threads, False
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def read(session: Any, length: int) -> float:
    """Seconds that a prompt of ``length`` tokens takes."""
    feeds = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    feeds["input_ids"] = np.arange(100, 100 + length, dtype=np.int64)[None]
    feeds["attention_mask"] = np.ones((1, length), np.int64)
    started = time.perf_counter()
    session.run(None, feeds)
    return time.perf_counter() - started


def main() -> None:
    """Open the three sessions, time them in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("onnx", type=Path, help="an exported folder with fp32 and int8-weight")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    forms = OnnxResult.of(open_artifact(asked.onnx)).forms
    int8, memory, sessions = asked.onnx / forms[FORM].graph, {}, {}
    with tempfile.TemporaryDirectory(dir=asked.onnx.resolve().parent) as temporary:
        graphs = {
            FORM: int8,
            "level1": with_fp32_products(int8, Path(temporary)),
            "fp32": asked.onnx / forms["fp32"].graph,
        }
        for name, graph in graphs.items():
            before = psutil.Process().memory_info().rss
            sessions[name] = open_session(graph, asked.threads)
            memory[name] = round((psutil.Process().memory_info().rss - before) / 1e6, 1)
        ms: dict[str, dict[str, float]] = {name: {} for name in sessions}
        for length in LENGTHS:
            taken: dict[str, list[float]] = {name: [] for name in sessions}
            for _ in range(asked.rounds):
                for name, session in sessions.items():
                    taken[name].append(read(session, length))
            for name, seconds in taken.items():
                ms[name][str(length)] = round(1e3 * float(np.median(seconds)), 1)
    ratios = {
        f"{name}_ratio": {n: round(ms[name][n] / ms[FORM][n], 3) for n in ms[FORM]}
        for name in ("level1", "fp32")
    }
    print(json.dumps(ratios | {"ms": ms, "rss_mb": memory, "processor": processor()}))


if __name__ == "__main__":
    main()
