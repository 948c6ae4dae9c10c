"""The graph for long prompts multiplies in fp32, and keeps no matrix that it has made."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.check.prompts import require_same_products, save_in_fp32
from export.graphs import form_files
from export.round.floats import multiply_in_floats
from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import ParityError
from limbeck.runtime.decoder import GraphDecoder
from limbeck.runtime.session import open_session


@pytest.fixture(params=["fused", "growing"])
def exported(request: pytest.FixtureRequest, served: Artifact, gpt2: Artifact) -> Artifact:
    return served if request.param == "fused" else gpt2


def test_it_equals_the_fp32_products_of_onnxruntime(exported: Artifact, tmp_path: Path) -> None:
    shutil.copytree(exported.path / "onnx", tmp_path / "onnx")
    graphs = form_files(tmp_path, "int8-weight", prompt=True)
    assert graphs.prompt is not None
    theirs = graphs.last.with_name("theirs.onnx")
    save_in_fp32(graphs.last, graphs.prompt, theirs)
    ids = np.arange(40)[None] * 5
    right = GraphDecoder(theirs, threads=1).prefill(ids)
    decoder = GraphDecoder(graphs.last, threads=1, prompts=graphs.prompt)
    rounded = GraphDecoder(graphs.last, threads=1).prefill(ids)
    np.testing.assert_allclose(decoder.prefill(ids), right, atol=2e-5)
    assert np.abs(rounded - right).max() > 1e-3  # activations of 8 bits, where it is not used
    np.testing.assert_array_equal(
        decoder.prefill(ids[:, :8]), GraphDecoder(graphs.last, threads=1).prefill(ids[:, :8])
    )


def test_it_reads_the_weights_of_the_form(exported: Artifact) -> None:
    graphs = form_files(exported.path, "int8-weight", prompt=True)
    assert graphs.prompt is not None
    last, prompt = (
        onnx.load(path, load_external_data=False).graph for path in (graphs.last, graphs.prompt)
    )
    products = [node for node in last.node if node.op_type == "MatMulNBits"]
    left = [node.output[0] for node in prompt.node if node.op_type == "MatMulNBits"]
    assert left[-1] == products[-1].output[0]  # the head
    assert len(left) < len(products) / 3  # some rows do not end with a block
    tensors = [*last.initializer, *prompt.initializer]
    entries = [entry for tensor in tensors for entry in tensor.external_data]
    data = {entry.value for entry in entries if entry.key == "location"}
    assert data == {graphs.data.name}


def test_a_graph_for_prompts_with_a_wrong_matrix_is_refused(
    served: Artifact, tmp_path: Path
) -> None:
    shutil.copytree(served.path / "onnx", tmp_path / "onnx")
    graphs = form_files(tmp_path, "int8-weight", prompt=True)
    assert graphs.prompt is not None
    rows = [np.arange(40)]
    require_same_products("int8-weight", graphs, rows)
    proto = onnx.load(graphs.prompt, load_external_data=False)
    scales = [t for t in proto.graph.initializer if t.name.endswith("_scales/rows")]
    one, other = [t for t in scales if t.dims == scales[0].dims][:2]
    place = {entry.key: entry.value for entry in other.external_data}
    for entry in one.external_data:
        entry.value = place[entry.key]
    onnx.save(proto, graphs.prompt)
    with pytest.raises(ParityError, match=r"the int8-weight graph for prompts is"):
        require_same_products("int8-weight", graphs, rows)
    assert not list(graphs.prompt.parent.glob(".*"))


def test_rows_that_do_not_end_with_a_block_stay() -> None:
    """MatMulNBits fills the last block up; a matrix made of it would have too many inputs."""
    products = [
        helper.make_node(
            "MatMulNBits", ["x", f"{name}_codes", f"{name}_scales"], [name],
            domain="com.microsoft", K=40, N=8, bits=8, block_size=32,
        )
        for name in ("first", "head")
    ]  # fmt: skip
    graph = helper.make_graph(products, "graph", [], [])
    multiply_in_floats(graph, {})
    assert [node.op_type for node in graph.node] == ["MatMulNBits", "MatMulNBits"]


def test_each_matrix_is_freed_after_its_product(tmp_path: Path) -> None:
    width, count = 1024, 40
    nodes, constants = [], []
    for at in range(count):
        codes = np.full((width, width), 127, np.uint8)
        constants += [
            numpy_helper.from_array(codes, f"codes{at}"),
            numpy_helper.from_array(np.full(width, 1e-3, np.float32), f"scales{at}"),
        ]
        nodes += [
            helper.make_node("DequantizeLinear", [f"codes{at}", f"scales{at}"], [f"w{at}"], axis=0),
            helper.make_node("MatMul", [f"x{at}", f"w{at}"], [f"x{at + 1}"]),
        ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])
        for name in ("x0", f"x{count}")
    ]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:], constants)
    opsets = [helper.make_opsetid("", 21)]
    path = tmp_path / "graph.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    session = open_session(path, threads=1, memory_pattern=False, dequantizes=True)
    before = psutil.Process().memory_info().rss
    session.run(None, {"x0": np.ones((2, width), np.float32)})
    grown = psutil.Process().memory_info().rss - before
    assert grown < 8 * width * width * 4  # of 40
