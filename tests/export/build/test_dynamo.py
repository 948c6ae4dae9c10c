"""Graphs of torch's exporter: any architecture, the same folder, the same decoder, padding and
quantisation right.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export.build.backend import build_graphs
from export.build.choice import _TRACED, KNOWN
from export.build.dynamo import build_dynamo, split_gemm
from export.check.census import require_quantized, take_census
from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import ModelError, QualityError, RecipeError
from limbeck.runtime.decoder import Decoder
from tests.architectures import (
    DOCUMENT,
    ENCODER_FORMS,
    ENCODER_HEAD,
    ENCODERS,
    FORMS,
    FURTHER,
    FURTHER_HEAD,
    HEAD,
    SIZES,
    WEIGHT4,
    document,
    prove_student,
)
from tests.pico import make_model, pico_recipe


@pytest.fixture(scope="module")
def exported(gpt2: Artifact) -> Artifact:
    return gpt2


def test_the_folder_is_the_same_and_says_why(exported: Artifact) -> None:
    backend = exported.result["backend"]
    assert backend["name"] == "dynamo"
    assert backend["why"].startswith("auto: GenAI's builder is not proven on GPT2LMHeadModel")
    assert not (exported.path / "genai_config.json").exists()
    card = (exported.path / "README.md").read_text()
    assert "onnxruntime-genai" not in card
    assert "transformers.js (`dtype: q8`), optimum-onnx and plain onnxruntime" in card
    for form, facts in exported.result["forms"].items():
        assert facts["parity"]["failures"] == []
        assert {"left_padded", "right_padded/last", "decode_from_one", "chunks"} <= facts["parity"][
            "cases"
        ].keys()
        graph = onnx.load(exported.path / facts["graph"], load_external_data=False)
        metadata = {entry.key: entry.value for entry in graph.metadata_props}
        assert metadata["limbeck.form"] == form
        assert (metadata["limbeck.logits"], metadata["limbeck.context"]) == ("last", "64")
        names = [value.name for value in graph.graph.input]
        assert names[:4] == [
            "input_ids",
            "attention_mask",
            "past_key_values.0.key",
            "past_key_values.0.value",
        ]
        past = graph.graph.input[2].type.tensor_type.shape.dim
        assert (past[1].dim_value, past[3].dim_value) == (4, 8)
    assert exported.result["forms"]["fp32"]["parity"]["max_abs"] < 5e-5


def test_nothing_in_the_folder_names_a_place_of_this_machine(exported: Artifact) -> None:
    """torch's exporter writes into each node the lines of source that it comes from."""
    files = [path for path in exported.path.rglob("*") if path.is_file()]
    assert len(files) > 8
    places = [
        str(path).encode() for path in (Path(torch.__file__).parent, Path(__file__).parents[3])
    ]
    for file in files:
        content = file.read_bytes()
        assert [place for place in places if place in content] == [], file


def test_any_mask_gives_torchs_answers(exported: Artifact) -> None:
    """Holes, padding on both sides, and several tokens appended to several rows."""
    from transformers import AutoModelForCausalLM

    draw = np.random.default_rng(0)
    mask = (draw.random((4, 14)) < 0.6).astype(np.int64)
    mask[np.arange(4), draw.integers(0, 9, 4)] = 1  # at least one token in every prompt
    ids = draw.integers(0, 256, mask.shape)
    model = AutoModelForCausalLM.from_pretrained(
        exported.path.parent / "student/model", attn_implementation="eager"
    )
    decoder = Decoder(exported.path, form="fp32", all_logits=True)
    for _ in range(2):  # the second prompt starts with an empty cache
        found = np.concatenate(
            [
                decoder.prefill(ids[:, :9], mask[:, :9], room=5),
                decoder.extend(ids[:, 9:], mask[:, 9:]),
            ],
            axis=1,
        )
    for row in range(4):
        with torch.inference_mode():
            expected = model(torch.from_numpy(ids[row][mask[row] == 1][None])).logits[0].numpy()
        np.testing.assert_allclose(found[row][mask[row] == 1], expected, atol=5e-5)


def test_the_operator_set_is_a_choice() -> None:
    """A graph of a chosen set is in test_shapes.py."""
    with pytest.raises(RecipeError, match=r"export.opset: auto leaves no choice"):
        pico_recipe(export={"opset": 20})


def test_tied_head_and_gemms_are_quantised(exported: Artifact) -> None:
    facts = exported.result["forms"]["int8-weight"]
    proto = onnx.load(exported.path / facts["graph"], load_external_data=False)
    embeddings = [
        node.input[0] for node in proto.graph.node if node.op_type == "GatherBlockQuantized"
    ]
    head = next(node for node in proto.graph.node if "logits" in node.output)
    assert head.op_type == "MatMulNBits"
    assert head.input[1] in embeddings
    assert (
        facts["census"]["operators"]["MatMulNBits 8-bit block 32"] == 9
    )  # 4 products a layer, and the head
    assert "Gemm" not in facts["census"]["operators"]
    assert facts["census"]["float_matrices"] == []
    (attention,) = facts["census"]["float_products"]
    assert (attention["operator"], attention["count"]) == ("MatMul", 4)  # two a layer
    assert "no weights" in attention["why"]
    weights = 258 * 32 + 64 * 32 + 2 * (4 * 32 * 32 + 2 * 32 * 128)
    assert (exported.path / "onnx/model_quantized.onnx_data").stat().st_size < 1.5 * weights


def test_a_gemm_that_stays_is_caught_and_one_that_is_split_is_the_same(tmp_path: Path) -> None:
    import onnxruntime

    draw = np.random.default_rng(0)
    weights, bias = (
        draw.normal(size=(5, 4)).astype(np.float32),
        draw.normal(size=5).astype(np.float32),
    )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 4])
    y = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [None, 5])
    gemm = helper.make_node("Gemm", ["x", "w", "b"], ["logits"], name="gemm", transB=1)
    constants = [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(bias, "b")]
    proto = helper.make_model(
        helper.make_graph([gemm], "g", [x], [y], constants),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(proto, tmp_path / "gemm.onnx")
    with pytest.raises(QualityError, match=r"1 x Gemm \[5, 4\].*Gemm has no 8-bit weight kernel"):
        require_quantized("int8-weight", take_census(tmp_path / "gemm.onnx"))
    split_gemm(proto)
    assert [node.op_type for node in proto.graph.node] == ["Transpose", "MatMul", "Add"]
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    given = draw.normal(size=(3, 4)).astype(np.float32)
    np.testing.assert_allclose(
        session.run(None, {"x": given})[0], given @ weights.T + bias, atol=1e-6
    )


def test_what_torch_cannot_place_is_refused(tmp_path: Path) -> None:
    bloom = make_model(tmp_path / "bloom", model_type="bloom", n_layer=1, n_head=4)
    with pytest.raises(ModelError, match=r"BloomForCausalLM takes no position_ids"):
        build_dynamo(bloom, tmp_path, {})
    mamba = make_model(tmp_path / "mamba", model_type="mamba", state_size=4)
    with pytest.raises(
        ModelError, match=r"MambaForCausalLM takes no position_ids|keeps something else"
    ):
        build_dynamo(mamba, tmp_path, {})
    with pytest.raises(ModelError, match=r"cannot build GPT2LMHeadModel .*export.backend: dynamo"):
        build_graphs(
            make_model(tmp_path / "gpt2", model_type="gpt2", **SIZES["gpt2"]),
            tmp_path,
            {},
            backend="genai",
        )


def test_auto_says_why_the_builder_gave_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "export.build.dynamo.build_dynamo",
        lambda model, folder, metadata, opset, static: (None, None),
    )
    monkeypatch.setattr("export.build.backend._width", lambda graphs: 32)
    model = make_model(tmp_path / "model", head_dim=8)
    built = build_graphs(model, tmp_path, {}, backend="auto")
    assert (built.backend, built.why) == (
        "dynamo",
        "auto: heads of 8 numbers; fused attention needs a multiple of 16",
    )


def test_the_table_names_every_architecture_and_all_of_its_students_pass() -> None:
    text = DOCUMENT.read_text()
    assert text.startswith(HEAD)
    tables, _, encoders = text[len(HEAD) :].partition(ENCODER_HEAD)
    decoders, _, further = tables.partition(FURTHER_HEAD)
    every, every_of_encoders = (
        ", ".join(form if isinstance(form, str) else form["kind"] for form in forms)
        for forms in (FORMS, ENCODER_FORMS)
    )
    rows = [line.strip("| ").split(" | ") for line in decoders.splitlines()]
    assert [row[0] for row in rows] == list(SIZES)
    others = [line.strip("| ").split(" | ") for line in further.splitlines()]
    assert [(row[0], *row[2:]) for row in others] == [
        (kind, "genai" if kind in KNOWN else "dynamo", "fp32, int8-weight") for kind in FURTHER
    ]
    assert {*SIZES, *FURTHER} == {*KNOWN, *_TRACED}
    assert {row[0] for row in rows if row[3] == "genai"} == KNOWN.keys() - FURTHER.keys()
    assert all(row[4:7] == [every] * 3 for row in rows)
    found = [line.strip("| ").split(" | ") for line in encoders.splitlines()]
    assert [row[:2] for row in found] == [
        [kind, task] for kind in ENCODERS for task in ("classification", "embedding")
    ]
    assert all(row[4:] == [every_of_encoders] * 2 for row in found)


@pytest.mark.parametrize(("model_type", "kind"), [("llama", "lora"), ("qwen2", "shrink")])
def test_a_distilled_student_goes_the_whole_way(tmp_path: Path, model_type: str, kind: str) -> None:
    exported = prove_student(tmp_path, model_type, kind, ["fp32", WEIGHT4])
    student = json.loads((tmp_path / "student/manifest.json").read_text())["result"]
    assert (student["parameters"]["trained"] < student["parameters"]["total"]) == (kind == "lora")
    assert (student["shrink"] is not None) == (kind == "shrink")
    assert exported.result["shipped"] == "int4-weight"


@pytest.mark.slow
def test_the_table_is_what_the_export_does() -> None:
    assert DOCUMENT.read_text() == document(), "run: make architectures"
