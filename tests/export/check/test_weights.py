"""Rounded weights are read back as onnxruntime reads them, and a fault in one of them is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper

from export import export_student
from export.check.weights import _read, weight_errors
from export.graphs import form_files
from export.round.calibrate import Calibration
from export.round.matrices import find_matrices
from export.round.quantize import quantize_weights
from export.round.scheme import scheme_for
from limbeck.contract.errors import ParityError
from limbeck.contract.recipe import Int4WeightForm, Int8DynamicForm, Int8WeightForm
from tests.benchmarks.bench_parity import measure
from tests.factory import Factory
from tests.pico import pico_recipe

FORMS = {
    "int8-weight": Int8WeightForm(kind="int8-weight"),
    "int4-weight": Int4WeightForm(kind="int4-weight", algorithm="rtn"),
    "int8-dynamic": Int8DynamicForm(kind="int8-dynamic"),
}


@pytest.mark.parametrize("form", FORMS)
def test_codes_are_read_as_the_kernels_read_them(tiny: Factory, tmp_path: Path, form: str) -> None:
    """Each product of the identity is its matrix: onnxruntime's answer, and ours from the file."""
    source = form_files(tiny.exported(sizes={"hidden_size": 48}).path, "fp32")
    scheme = scheme_for(FORMS[form], 48)
    assert scheme
    made = form_files(tmp_path, form)
    made.data.parent.mkdir()
    quantize_weights(source, made, scheme=scheme, metadata={})
    proto = onnx.load(made.last, load_external_data=False)
    tensors = {t.name: t for t in proto.graph.initializer}
    fp32 = onnx.load(source.last, load_external_data=False)
    matrices = find_matrices(fp32, {t.name: t for t in fp32.graph.initializer}, scheme)
    for matrix in matrices.values():
        ours_NK = _read(matrix, tensors, made.data.parent, 0)
        theirs_KN = product(proto, matrix.names("codes")[0], made.data.parent, matrix.width)
        np.testing.assert_allclose(theirs_KN.T, ours_NK, atol=1e-6, err_msg=matrix.name)
    errors = list(weight_errors(source, made.last, scheme, Calibration()))
    assert {e.name for e in errors} >= set(matrices)
    assert [e for e in errors if e.error > e.limit / 2] == []


def product(proto: ModelProto, codes: str, folder: Path, width: int) -> Any:
    """What onnxruntime makes of the identity ``[K, K]`` times the matrix with these codes."""
    last = next(n for n in proto.graph.node if codes in n.input and "MatMul" in n.op_type)
    made_by = {name: node for node in proto.graph.node for name in node.output}
    constants = {t.name: t for t in proto.graph.initializer}
    if last.op_type == "MatMulIntegerToFloat":
        last = next(n for n in proto.graph.node if n.input and n.input[0] == last.output[0])
    nodes, todo, x = [], [last], ""
    while todo:
        node = todo.pop()
        if node in nodes:
            continue
        nodes.insert(0, node)
        for name in node.input:
            if name in constants or not name:
                continue
            if "limbeck/dynamic" in name:
                todo.append(made_by[name])
            else:
                x = name
    used = [constants[name] for node in nodes for name in node.input if name in constants]
    order = [n for n in proto.graph.node if n in nodes]
    graph = helper.make_graph(
        order,
        "product",
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["rows", width])],
        [helper.make_tensor_value_info(last.output[0], TensorProto.FLOAT, None)],
        list({t.name: t for t in used}.values()),
    )
    model = helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    path = folder / "product.onnx"
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {x: np.eye(width, dtype=np.float32)})[0]


# GenAI's builder and torch's exporter; gpt2 is another decoder of the latter.
@pytest.mark.parametrize("model", ["qwen2", pytest.param("gpt2", marks=pytest.mark.slow), "bert"])
def test_every_fault_is_seen_and_no_sound_graph_refused(model: str) -> None:
    """Faults of one matrix, vector or activation are told from rounding without running a graph."""
    forms = ["int8-weight", "int8-static", *(["int4-weight"] if model != "bert" else [])]
    rows = list(measure(model, forms, run=False))
    assert {row["form"] for row in rows} == set(forms)
    for row in rows:
        seen = [said for said in row["says"] if "positions" not in said]
        assert bool(seen) == bool(row["fault"]), row
    assert len(rows) > 15


def test_a_form_with_a_wrong_matrix_is_not_kept(
    tiny: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.round import quantize

    rounded = quantize.round_blocks
    wrong: list[bool] = []

    def one_wrong(*args: Any) -> Any:
        codes, scales, zeros = rounded(*args)
        wrong.append(True)
        return codes, scales * (2 if len(wrong) == 3 else 1), zeros

    monkeypatch.setattr(quantize, "round_blocks", one_wrong)
    with pytest.raises(ParityError, match=r"does not hold the student's weights; 1 differ") as told:
        export_student(student=tiny.student().path, out=tmp_path / "onnx", recipe=pico_recipe())
    assert "of its size, limit 0.1" in str(told.value)
    assert "Kept in" in str(told.value)
