"""Parity: graphs that compute something else are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from export import export_student, verify_parity
from export.build.genai import build_genai
from export.check.census import require_quantized, take_census
from export.check.greedy import answer_greedily, first_differences
from export.check.parity import load_cases, margins, measure_parity, require_parity
from export.graphs import form_files
from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import ArtifactError, ParityError, QualityError
from limbeck.runtime.decoder import Decoder
from tests.export.test_export import texts_of
from tests.factory import Factory
from tests.pico import make_model, pico_recipe


def test_parity_is_measured_again_without_torch(
    exported: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    measured = verify_parity(exported.path)
    assert measured.keys() == {"fp32", "int8-weight"}
    assert measured["fp32"]["max_abs"] < 5e-5


def test_a_tampered_graph_fails_parity(copy: Path) -> None:
    graphs = form_files(copy, "fp32")
    for path in (graphs.last, graphs.all):
        proto = onnx.load(path, load_external_data=False)
        attention = next(node for node in proto.graph.node if node.op_type == "GroupQueryAttention")
        next(a for a in attention.attribute if a.name == "scale").f *= 1.1
        onnx.save(proto, path)
    with pytest.raises(ArtifactError, match=r"onnx/model.onnx has changed"):
        verify_parity(copy)
    cases = load_cases(copy / "parity.safetensors")
    assert any(
        "left_padded" in failure for failure in measure_parity("fp32", graphs, cases)["failures"]
    )


def test_one_wrong_matrix_of_a_quantised_form_fails_parity(copy: Path) -> None:
    graphs = form_files(copy, "int8-weight")
    cases = load_cases(copy / "parity.safetensors")
    require_parity("int8-weight", measure_parity("int8-weight", graphs, cases))
    tensors = onnx.load(graphs.last, load_external_data=False).graph.initializer
    codes = next(
        t for t in tensors if "layers.1.mlp.down_proj" in t.name and t.name.endswith("_codes")
    )
    place = {entry.key: entry.value for entry in codes.external_data}
    at, length = int(place["offset"]), int(place["length"])
    with (copy / "onnx" / place["location"]).open(
        "r+b"
    ) as file:  # its outputs, the other way round
        file.seek(at)
        turned = np.frombuffer(file.read(length), np.uint8).reshape(codes.dims)[::-1].tobytes()
        file.seek(at)
        file.write(turned)
    with pytest.raises(
        ParityError, match=r"the int8-weight graph does not compute what the student computes"
    ):
        require_parity("int8-weight", measure_parity("int8-weight", graphs, cases))


def test_one_wrong_case_fails_although_all_cases_together_pass(exported: Artifact) -> None:
    """First and second choice exchanged at a few positions: too few to move any mean."""
    cases = load_cases(exported.path / "parity.safetensors")
    graphs = form_files(exported.path, "fp32")
    long = cases["long"]
    leads = margins(long.logits)
    few = np.flatnonzero((leads > 0.5) & (leads < 1))[:6]
    logits = long.logits[few]
    first, second = logits.argsort(axis=1)[:, :-3:-1].T
    row = np.arange(6)
    logits[row, first], logits[row, second] = logits[row, second], logits[row, first]
    cases["wrong"] = replace(long, rows=long.rows[few], columns=long.columns[few], logits=logits)
    parity = measure_parity("int8-dynamic", graphs, cases)
    assert parity["top1_sure"] > parity["tolerance"]["top1_sure"]
    assert parity["kl"] < parity["tolerance"]["kl"]
    assert parity["failures"] == ["wrong: 6 of 6 first choices that torch is sure of differ, 3 may"]
    with pytest.raises(ParityError, match=r"wrong: 6 of 6"):
        require_parity("int8-dynamic", parity)


def test_a_graph_that_pads_wrongly_fails_parity_and_leaves_nothing(
    tiny: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the padding surgery the fused graph is wrong on left-padded batches and on those
    only.
    """

    def unfixed(proto: Any, *, logits: str) -> None:
        if logits == "last":
            real(proto, logits=logits)

    from export.build import genai

    real = genai.handle_padding
    monkeypatch.setattr(genai, "handle_padding", unfixed)
    student = tiny.student().path
    with pytest.raises(ParityError, match=r"left_padded: max_abs") as caught:
        export_student(student=student, out=tmp_path / "onnx", recipe=pico_recipe())
    assert "prompt:" not in str(caught.value)
    assert caught.value.exit_code == 1
    assert not list(tmp_path.iterdir())


def test_census_refuses_a_form_that_stayed_float(tmp_path: Path) -> None:
    fp32, _ = build_genai(make_model(tmp_path / "model"), tmp_path, {})
    census = take_census(fp32.last)
    assert census["operators"]["MatMul float"] == 11
    assert census["operators"]["GroupQueryAttention"] == 2
    assert sum(census["bytes"].values()) == pytest.approx(fp32.data.stat().st_size, rel=0.01)
    with pytest.raises(
        QualityError,
        match=r"not quantised; expected 8-bit matrices, found \n(.*\n)*.*MatMul \[32, 258\]",
    ):
        require_quantized("int8-weight", census)
    require_quantized("fp32", census)


def test_greedy_answers_part_where_the_forms_own_answer_does(exported: Artifact) -> None:
    texts = dict(zip("ab", texts_of(40, 33), strict=True))
    fp32, rounded = Decoder(exported.path, form="fp32"), Decoder(exported.path, form="int8-weight")
    answers = answer_greedily(fp32, texts)
    assert [len(answer.tokens) for answer in answers.values()] == [32, 32]  # the context is 64
    for difference, exact in zip(
        first_differences(rounded, answers), answers.values(), strict=True
    ):
        own = list(rounded.generate(exact.prompt, 32))
        assert list(fp32.generate(exact.prompt, 32)) == exact.tokens
        same = next((at for at in range(32) if own[at] != exact.tokens[at]), 32)
        assert difference["same"] == same
        assert difference["lead"] == (exact.leads[same] if same < 32 else None)
    flipped = {
        "a": replace(answers["a"], tokens=[*answers["a"].tokens[:5], 300, *answers["a"].tokens[6:]])
    }
    assert first_differences(fp32, flipped) == [
        {"text": "a", "tokens": 32, "same": 5, "lead": pytest.approx(answers["a"].leads[5])}
    ]
    stopped = answer_greedily(fp32, texts, stop_ids={answers["a"].tokens[3]})
    assert len(stopped["a"].tokens) <= 4
