"""The external weights file past 2 GiB: a sparse file stands for the weights before, so that
nothing large is written or held.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export.weights import ALIGN, WeightsFile, external_array

PAST = {
    "2 GiB": 2**31 + 5,
    "4 GiB": 2**32 + 5,
}  # bytes before; past what 32 bits count, and not aligned


@pytest.mark.parametrize("before", PAST.values(), ids=PAST.keys())
def test_weights_past_two_gibibytes_are_where_the_graph_says(tmp_path: Path, before: int) -> None:
    file, written = tmp_path / "model.onnx_data", dict[str, TensorProto]()
    first, second = (
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.arange(100, dtype=np.uint8).reshape(4, 25),
    )
    with file.open("wb") as out:
        out.seek(before)
        weights = WeightsFile(out, file.name, written)
        weights.append("first", first)
        weights.rename(weights.append("second", second), "again", [10, 10])
    graph = helper.make_graph([], "far", [], [], initializer=list(written.values()))
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")

    found = {
        t.name: t
        for t in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
    }
    offsets = {
        name: int({e.key: e.value for e in t.external_data}["offset"]) for name, t in found.items()
    }
    assert before < offsets["first"] < offsets["second"] == offsets["again"]
    assert not any(offset % ALIGN for offset in offsets.values())
    assert file.stat().st_size == offsets["second"] + second.nbytes
    assert file.stat().st_blocks * 512 < 2**20  # the seek left a hole
    for name, values in {"first": first, "second": second, "again": second.reshape(10, 10)}.items():
        read = external_array(found[name], tmp_path)
        assert isinstance(read, np.memmap)
        np.testing.assert_array_equal(read, values)
        assert read.dtype == values.dtype


def test_onnxruntime_reads_what_lies_past_two_gibibytes(tmp_path: Path) -> None:
    import onnxruntime

    file, written = tmp_path / "far.onnx_data", dict[str, TensorProto]()
    values = np.arange(
        64, dtype=np.float32
    )  # more than 127 bytes: smaller ones onnxruntime wants in the graph
    with file.open("wb") as out:
        out.seek(PAST["2 GiB"])
        WeightsFile(out, file.name, written).append("far", values)
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [64])
    sums = helper.make_tensor_value_info("y", TensorProto.FLOAT, [64])
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "far"], ["y"])],
        "far",
        [given],
        [sums],
        initializer=[*written.values()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "far.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "far.onnx", providers=["CPUExecutionProvider"]
    )
    np.testing.assert_array_equal(session.run(None, {"x": np.ones(64, np.float32)})[0], values + 1)
