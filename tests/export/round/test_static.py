"""int8-static: moving outliers is exact, ranges are what was seen, and the runtime multiplies in 8
bits.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from export import export_student
from export.build.backend import build_graphs
from export.graphs import Graphs, form_files
from export.round.calibrate import _ranges, calibrate
from export.round.matrices import calibrated_reads
from export.round.operators import activation_scale
from export.round.quantize import quantize_weights
from export.round.scheme import scheme_for
from export.round.smooth import find_boundaries
from limbeck.contract.artifact import Artifact
from limbeck.contract.data.heldout import CALIBRATION, load_calibration
from limbeck.contract.errors import ArtifactError, EnvironmentalError, RecipeError
from limbeck.contract.recipe import Int8DynamicForm, Int8StaticForm
from limbeck.runtime.decoder import Decoder, GraphDecoder
from tests.architectures import SIZES
from tests.factory import Factory
from tests.pico import make_model, make_student, pico_recipe

ROWS = [np.random.default_rng(seed).integers(0, 256, 20) for seed in range(3)]


@pytest.fixture(scope="module")
def fp32(tiny: Factory) -> Graphs:
    return form_files(tiny.exported().path, "fp32")


def static_names(graphs: Graphs) -> list[str]:
    scheme = scheme_for(Int8StaticForm(kind="int8-static"), 32)
    assert scheme is not None
    return list(dict.fromkeys(calibrated_reads(graphs, scheme).values()))


def logits(proto: onnx.ModelProto, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    past = {
        v.name: np.zeros((1, v.shape[1], 0, v.shape[3]), np.float32)
        for v in session.get_inputs()
        if "past" in v.name
    }
    found = session.run(
        ["logits"],
        {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64), **past},
    )
    return np.asarray(found[0])


def test_moving_outliers_changes_nothing_in_fp32(fp32: Graphs) -> None:
    proto = onnx.load(fp32.all)
    boundaries = find_boundaries(proto)
    # Of each layer: the values into what attention ends in, `up` into `down`, and the norms into
    # queries, keys and values (one product) and into gate and up. Not the tied head.
    assert [len(boundary.matrices) for boundary in boundaries.values()] == [1, 1, 1, 1, 1, 2, 1, 2]
    assert [boundary.shared is not None for boundary in boundaries.values()] == [
        True,
        False,
    ] * 2 + [False] * 4
    names = static_names(fp32)
    found = calibrate(fp32, ROWS, names, method="min-max", alpha=0.5)
    assert len(found.factors.inputs) == 5 * 2
    assert len(found.factors.outputs) == 4 * 2  # values and `up` are multiplied on both sides
    assert all(
        np.ptp(factor) > 0.1
        for factor in (*found.factors.inputs.values(), *found.factors.outputs.values())
    )
    before = logits(proto, ROWS[0])
    for tensor in proto.graph.initializer:
        if tensor.name in found.factors:
            values = found.factors.apply(tensor.name, numpy_helper.to_array(tensor), rows=False)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    np.testing.assert_allclose(logits(proto, ROWS[0]), before, atol=2e-4)
    # The moved graph has the ranges that were promised for it.
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    past = {
        v.name: np.zeros((1, 2, 0, 16), np.float32)
        for v in session.get_inputs()
        if "past" in v.name
    }
    seen = [
        session.run(
            names, {"input_ids": r[None], "attention_mask": np.ones((1, 20), np.int64), **past}
        )
        for r in ROWS
    ]
    for at, name in enumerate(names):
        low, high = min(s[at].min() for s in seen), max(s[at].max() for s in seen)
        np.testing.assert_allclose(found.ranges[name], (low, high), rtol=1e-3)


@pytest.mark.parametrize(
    ("kind", "layers", "moved"),
    [
        ("qwen2", 2, 4),  # biases, side by side as the weights are
        # norms of queries and keys between product and attention: nothing is packed
        ("qwen3", 2, 4),
        # torch's exporter: no fused attention or gate, norms with a bias, and a Reshape before
        # products; each layer of it takes seconds
        ("gpt2", 1, 2),
    ],
)
def test_moving_is_exact_in_every_layout(
    kind: str, layers: int, moved: int, tmp_path: Path
) -> None:
    sizes = SIZES[kind] | {"num_hidden_layers": layers}
    folder = make_model(tmp_path / "model", model_type=kind, **sizes)
    weights = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(0)
    for values in weights.values():
        if values.ndim == 1:
            values += 0.5 * torch.rand(values.shape, generator=draw)
    assert any(name.endswith("bias") for name in weights) == (kind != "qwen3")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    built = build_graphs(folder, tmp_path, {}, backend="auto").graphs
    proto = onnx.load(built.all)
    assert len(find_boundaries(proto)) == moved * layers
    factors = calibrate(built, ROWS, [], method="min-max", alpha=0.5).factors
    before = logits(proto, ROWS[0])
    turned = {node.input[0] for node in proto.graph.node if node.op_type == "Transpose"}
    for tensor in proto.graph.initializer:
        if tensor.name in factors:
            values = factors.apply(
                tensor.name, numpy_helper.to_array(tensor), rows=tensor.name in turned
            )
            assert np.abs(values / numpy_helper.to_array(tensor) - 1).max() > 0.1
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    np.testing.assert_allclose(logits(proto, ROWS[0]), before, atol=2e-4)


@pytest.mark.parametrize(
    "name", ["int8-weight", pytest.param("int8-dynamic", marks=pytest.mark.slow)]
)
def test_outliers_cost_less_once_they_have_moved(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One neuron, one value and one channel of a norm a hundred times the others, and their
    readers' weights a hundredth.
    """
    folder = make_model(
        tmp_path / "model", tie_word_embeddings=True, hidden_size=64, intermediate_size=128
    )
    weights = load_file(folder / "model.safetensors")
    for layer in ("model.layers.0", "model.layers.1"):
        for maker, reader in (
            ("mlp.up_proj", "mlp.down_proj"),
            ("self_attn.v_proj", "self_attn.o_proj"),
        ):
            weights[f"{layer}.{maker}.weight"][0] *= 100
            reads = weights[f"{layer}.{reader}.weight"]
            for head in range(2 if "o_proj" in reader else 1):  # two heads share a value
                reads[:, head * 16] /= 100
        weights[f"{layer}.input_layernorm.weight"][3] *= 100
        for reader in ("q_proj", "k_proj", "v_proj"):
            weights[f"{layer}.self_attn.{reader}.weight"][:, 3] /= 100
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    student = make_student(tmp_path / "student", folder).path
    monkeypatch.setattr(
        "export.check.parity.require_parity", lambda *_: None
    )  # it refuses what is left where they are
    kls, smooth = {}, {}
    for alpha in (0.0, None):
        codes = {"reduce_range": True} if name == "int8-dynamic" else {}  # alike on every machine
        recipe = pico_recipe(export={"forms": ["fp32", {"kind": name, "smooth": alpha, **codes}]})
        form = export_student(student=student, out=tmp_path / str(alpha), recipe=recipe).result[
            "forms"
        ][name]
        kls[alpha], smooth[alpha] = form["parity"]["kl"], form["smooth"]
    assert smooth == {0.0: 0.0, None: 0.5}
    assert kls[None] < kls[0.0] / 2


def test_methods_differ_in_how_much_they_cut_off(fp32: Graphs) -> None:
    names = static_names(fp32)
    widths = {}
    for method in ("min-max", "percentile", "entropy"):
        found = calibrate(fp32, ROWS, names, method=method, alpha=0)
        assert not found.factors.inputs
        assert found.ranges.keys() == set(names)
        assert all(low < 0 < high for low, high in found.ranges.values())
        widths[method] = sum(high - low for low, high in found.ranges.values())
    assert widths["entropy"] < 0.99 * widths["min-max"]


def test_what_is_rare_is_cut_off_by_all_methods_but_min_max() -> None:
    """200,000 normal values and two far from them, one in 100,000."""
    draw = np.random.default_rng(0)
    rows = [draw.normal(size=(1, 500, 100)).astype(np.float32) for _ in range(4)]
    rows[2][0, 0, 0], rows[3][0, 0, 1] = 50, -30
    found = {}
    for method in ("min-max", "percentile", "entropy"):
        found[method] = _ranges(lambda row, _: {"x": row}, rows, ["x"], {}, method)["x"]  # type: ignore[arg-type]
    assert found["min-max"] == (-30.0, 50.0)
    assert found["percentile"] == pytest.approx((-4.60, 4.73), abs=0.01)
    assert found["entropy"] == pytest.approx((-4.84, 4.86), abs=0.01)


@pytest.mark.parametrize(
    "flags", [["avx2"], ["avx2", "avx512f"], ["avx2", "avx_vnni"], ["avx512_vnni", "avx2"], []]
)
def test_weights_have_7_bits_where_sums_would_overflow_and_a_graph_of_8_warns(
    flags: list[str],
    fp32: Graphs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("limbeck.contract.machine.host", lambda: {"flags": flags})
    overflows = bool(flags) and not {"avx512_vnni", "avx_vnni"} & set(flags)
    most = {}
    for reduce_range in (None, False, True):
        form = Int8DynamicForm(kind="int8-dynamic", reduce_range=reduce_range)
        scheme = scheme_for(form, 32)
        assert scheme is not None
        graphs = form_files(tmp_path / str(reduce_range), form.kind)
        graphs.data.parent.mkdir(parents=True)
        quantize_weights(fp32, graphs, scheme=scheme, metadata={"limbeck.form": form.kind})
        names = {
            n.input[1]
            for n in onnx.load(graphs.last).graph.node
            if n.op_type == "MatMulIntegerToFloat"
        }
        codes = [
            numpy_helper.to_array(t)
            for t in onnx.load(graphs.last).graph.initializer
            if t.name in names
        ]
        most[reduce_range] = max(int(np.abs(c.astype(int)).max()) for c in codes)
        capsys.readouterr()
        GraphDecoder(graphs.last)
        assert ("overflow on this processor" in capsys.readouterr().err) == (
            overflows and most[reduce_range] == 127
        )
    assert most == {None: 63 if overflows else 127, False: 127, True: 63}


def test_scales_of_activations() -> None:
    step, zero = activation_scale((-1.0, 4.1), symmetric=False)
    assert (step, zero.dtype, int(zero)) == (pytest.approx(0.02), np.uint8, 50)
    step, zero = activation_scale((-1.0, 6.35), symmetric=True)
    assert (step, zero.dtype, int(zero)) == (pytest.approx(0.05), np.int8, 0)
    assert (
        int(activation_scale((0.5, 2.0), symmetric=False)[1]) == 0
    )  # 0 is always among the values


def require_scales_of(
    exported: Artifact, form: str, method: Literal["percentile", "entropy"]
) -> None:
    """Assert that the activations of ``form`` have the scales that ``method``, and not min-max,
    finds on the training rows.
    """
    facts, rows = (
        exported.result["forms"][form],
        load_calibration(exported.path.parent / "student" / CALIBRATION),
    )
    tensors = {
        t.name: t
        for t in onnx.load(
            exported.path / facts["graph"], load_external_data=False
        ).graph.initializer
    }
    stem = "limbeck/static/"
    names = [
        n[len(stem) : -len("/scale")]
        for n in tensors
        if n.startswith(stem) and n.endswith("/scale")
    ]
    written = [float(numpy_helper.to_array(tensors[f"{stem}{name}/scale"])) for name in names]
    fp32, scales = form_files(exported.path, "fp32"), {}
    for used in (method, "min-max"):
        ranges = calibrate(fp32, rows, names, method=used, alpha=facts["smooth"]).ranges
        scales[used] = [
            activation_scale(ranges[name], symmetric=form == "int8-trt")[0] for name in names
        ]
    assert written == pytest.approx(scales[method], rel=1e-5)
    assert written != pytest.approx(scales["min-max"], rel=1e-5)


def test_the_runtime_multiplies_in_8_bits(tiny: Factory, tmp_path: Path) -> None:
    forms = ["fp32", {"kind": "int8-static", "calibration": "entropy"}]
    recipe = pico_recipe(export={"forms": forms})
    exported = tiny.exported(forms=forms)
    facts = exported.result["forms"]["int8-static"]
    require_scales_of(exported, "int8-static", "entropy")
    assert facts["parity"]["failures"] == []
    assert facts["graph"] == "onnx/model_uint8.onnx"
    operators = facts["census"]["operators"]
    assert (
        operators["MatMul int8"] == 6
    )  # of two layers: one of q/k/v, gate and up; what narrows and the head stay in blocks
    assert operators["MatMulNBits 8-bit block 32"] == 5
    assert operators["QuantizeLinear"] == 4  # gate and up share their input's
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", "optimised.data"
    )
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(
        exported.path / facts["graph"], options, providers=["CPUExecutionProvider"]
    )
    run = onnx.load(tmp_path / "optimised.onnx", load_external_data=False)
    ran = Counter(node.op_type for node in run.graph.node)
    assert ran["MatMulIntegerToFloat"] == 6
    assert ran["MatMul"] == 0

    (tmp_path / "older").mkdir()
    older = make_student(tmp_path / "older/student", make_model(tmp_path / "other"))
    (older.path / CALIBRATION).unlink()
    with pytest.raises(ArtifactError, match=r"calibration.safetensors"):
        export_student(student=older.path, out=tmp_path / "older/onnx", recipe=recipe)


def test_tensorrt_gets_signed_codes_and_standard_operators(tiny: Factory) -> None:
    form = {"kind": "int8-trt", "calibration": "percentile"}
    exported = tiny.exported(
        forms=["fp32", form], provider="tensorrt", sizes={"num_hidden_layers": 1}
    )
    require_scales_of(exported, "int8-trt", "percentile")
    assert exported.result["backend"]["why"].startswith("auto: TensorRT has no kernel")
    facts = exported.result["forms"]["int8-trt"]
    assert (facts["provider"], facts["number_type"], facts["parity"]["provider"]) == (
        "tensorrt",
        "fp32",
        "cpu",
    )
    assert facts["parity"]["failures"] == []
    assert facts["census"]["float_matrices"] == []
    assert facts["census"]["operators"]["MatMul int8"] == 8  # seven of the layer, and the head
    proto = onnx.load(exported.path / facts["graph"])
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    tensors = {t.name: t for t in proto.graph.initializer}
    made_by = {node.output[0]: node for node in proto.graph.node}
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            zero = numpy_helper.to_array(tensors[node.input[2]])
            assert (zero.dtype, int(zero)) == (np.int8, 0)
    (gather,) = [
        n
        for n in proto.graph.node
        if n.op_type == "Gather" and made_by.get(n.input[0], n).op_type == "DequantizeLinear"
    ]
    head = made_by["logits"]
    assert (
        made_by[made_by[head.input[1]].input[0]].input[0] == made_by[gather.input[0]].input[0]
    )  # one copy of the codes
    with pytest.raises(
        EnvironmentalError,
        match=r"CPUExecutionProvider has no kernel .* int8-trt: .*form int8-static",
    ):
        Decoder(exported.path, form="int8-trt", provider="cpu")
    with pytest.raises(EnvironmentalError, match=r"no TensorrtExecutionProvider here"):
        Decoder(exported.path)


@pytest.mark.parametrize(
    ("export", "message"),
    [
        ({"forms": ["fp32", "int8-trt"]}, r"cpu has no kernel for int8-trt .*; use int8-static"),
        (
            {"forms": ["fp32", "int8-static"], "provider": "cuda"},
            r"cuda has no kernel for int8-static .*; use int8-weight",
        ),
        (
            {"forms": ["fp32", "int8-weight"], "provider": "tensorrt"},
            r"tensorrt has no kernel for int8-weight .*; use int8-trt",
        ),
        (
            {"forms": ["fp32", "fp16"], "provider": "tensorrt", "backend": "genai"},
            r"export.backend: TensorRT has no kernel",
        ),
    ],
)
def test_where_it_cannot_run_it_is_a_mistake(export: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        pico_recipe(export=export)
