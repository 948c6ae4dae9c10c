"""Distillation through the rounding: the rounding itself bit for bit, the gradient, and the whole
way on a tiny model.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from compress.models.students import Student, trainable_state
from compress.recovery import FakeQuantize, RoundInput, plain_weights, prepare
from compress.recovery import quantize_blocks as torch_blocks
from export import export_student
from export.graphs import form_files
from export.heldout import heldout_losses, per_token
from export.round.blocks import Blockwise, quantize_blocks
from export.round.matrices import matrices_of
from export.round.origin import origins, rounding_of
from export.round.quantize import quantize_columns
from export.round.scheme import scheme_for
from export.round.sensitivity import rounded
from limbeck.app import run as pipeline
from limbeck.app.verify import verify
from limbeck.contract.artifact import open_artifact, student_of
from limbeck.contract.data.heldout import HELDOUT, load_heldout, mean_nll
from limbeck.contract.recipe import load_recipe
from limbeck.runtime.decoder import GraphDecoder
from tests.pico import make_model, make_student


def matrices() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    found = [
        draw.normal(size=(7, 48)).astype(np.float32),
        draw.normal(size=(5, 40)).astype(np.float32) * 1e-4,
    ]
    found += [
        draw.standard_cauchy((64, 96)).astype(np.float32),
        np.abs(draw.normal(size=(4, 32))).astype(np.float32),
    ]
    found[0][2, :16] = 0
    return found


@pytest.mark.parametrize(
    "how",
    [Blockwise(8, 16), Blockwise(8, 32), Blockwise(4, 32), Blockwise(4, 16, zero_points=True)],
)
def test_rounding_equals_the_exporters_bit_for_bit(how: Blockwise) -> None:
    for weights in matrices():
        codes, scales, zeros = quantize_blocks(weights, how)
        mine = torch_blocks(
            torch.from_numpy(weights), bits=how.bits, block=how.block, zero_points=how.zero_points
        )
        for found, expected in zip(mine, (codes, scales, zeros), strict=True):
            np.testing.assert_array_equal(found.numpy(), expected.astype(np.float32))
        rounding = {"bits": how.bits, "block": how.block, "zero_points": how.zero_points}
        for turned in (False, True):
            stored = torch.from_numpy(weights.T.copy() if turned else weights)
            back = FakeQuantize(rounding, turned=turned)(stored).numpy()
            np.testing.assert_array_equal(back.T if turned else back, rounded(weights, how))


def test_rounding_of_columns_equals_the_exporters_bit_for_bit() -> None:
    for weights, most in itertools.product(matrices(), (127, 63)):
        codes, scales = quantize_columns(weights, most)
        back = FakeQuantize({"most": most}, turned=False)(torch.from_numpy(weights)).numpy()
        np.testing.assert_array_equal(back, codes * scales[:, None])
        assert np.abs(codes).max() == most


def test_the_gradient_passes_straight_through() -> None:
    weights = torch.randn(4, 32, requires_grad=True)
    rounded_weights = FakeQuantize({"bits": 4, "block": 16, "zero_points": True}, turned=False)(
        weights
    )
    assert not torch.equal(rounded_weights, weights)
    factor = torch.randn(4, 32)
    (rounded_weights * factor).sum().backward()
    assert weights.grad is not None
    assert torch.equal(weights.grad, factor)


def test_preparing_changes_nothing_but_the_forward_pass(tmp_path: Path) -> None:
    from compress.models.language import load_model

    folder = make_model(tmp_path / "model", tie_word_embeddings=True)
    model: Any = load_model(folder)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    four = {"turned": False, "bits": 4, "block": 16, "zero_points": True}
    rounding = {
        name: four for name, values in before.items() if values.ndim == 2 and "lm_head" not in name
    }
    ids = torch.arange(12)[None]
    exact = model(ids).logits
    student = Student(model, None)
    prepare(student, rounding, activations=False)
    by_hand: Any = load_model(folder)
    with torch.no_grad():
        for name in rounding:
            weights = by_hand.get_parameter(name)
            weights.copy_(
                torch.from_numpy(rounded(weights.numpy(), Blockwise(4, 16, zero_points=True)))
            )
    assert torch.equal(model(ids).logits, by_hand(ids).logits)
    assert not torch.allclose(model(ids).logits, exact)
    back = plain_weights(trainable_state(student))
    assert back.keys() == before.keys() - {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(torch.equal(values, before[name]) for name, values in back.items())


@pytest.mark.parametrize(
    "form", ["int8-weight", "{kind: int4-weight, algorithm: rtn}", "int8-dynamic"]
)
def test_the_forward_pass_is_that_of_the_exported_graph(tmp_path: Path, form: str) -> None:
    """Weights and activations: with both rounded torch gives the graph's logits, with weights alone
    it is far from them.
    """
    from compress.models.language import load_model

    model = make_model(tmp_path / "model", hidden_size=64, intermediate_size=128, head_dim=16)
    student = make_student(tmp_path / "student", model)
    recipe = load_recipe("pico", overrides=[f"export.forms=[fp32, {form}]"])
    if form.startswith("int8"):
        recipe = load_recipe(
            "pico", overrides=[f"export.forms=[fp32, {{kind: {form}, smooth: 0}}]"]
        )
    exported = export_student(student=student.path, out=tmp_path / "onnx", recipe=recipe)
    shipped = recipe.export.forms[-1]
    fp32 = form_files(exported.path, "fp32")
    scheme = scheme_for(shipped, 64)
    assert scheme is not None
    matrices = matrices_of(fp32, scheme)
    rounding = rounding_of(matrices, origins(matrices, fp32, student.path / "model"))
    ids = np.random.default_rng(0).integers(0, 64, (1, 8))
    graph = GraphDecoder(form_files(exported.path, shipped.kind).all).score(ids)
    away = {}
    for activations in (True, False):
        prepared: Any = load_model(student.path / "model")
        prepare(Student(prepared, None), rounding, activations=activations)
        if activations:  # the head's, which training leaves alone
            prepared.lm_head.register_forward_pre_hook(
                RoundInput(rounding["lm_head.weight"]["block"])
            )
        with torch.no_grad():
            difference = np.abs(prepared(torch.from_numpy(ids)).logits.numpy() - graph).max(-1)
        away[activations] = float(
            np.median(difference)
        )  # a tie that falls the other way moves what comes after it
    assert away[True] < 1e-3 * away[False], away


@pytest.mark.usefixtures("one_roofline", "forked_arms")
def test_a_form_that_fails_its_gate_is_won_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distil, export, miss the gate, distil through the rounding, export again; then what ships is
    what is measured.
    """
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    teacher = load_recipe("pico").resolved()["teachers"][:1]
    sets = [
        f"teachers={json.dumps(teacher)}",
        "export.forms=[fp32, {kind: int4-weight, block_size: 128}]",
        "export.mixed={kind: size, mb: 0.5}",
        "export.recover={tokens: 4096, learning_rate: 1e-3}",
        "gates={max_quantization_loss: 1e-6}",
        "features.weight=0",
        "bench={prompt_tokens: 8, new_tokens: 4, minutes: 0.01, min_blocks: 3}",
        "training.tokens=4096",
        "training.learning_rate=1e-2",
        "training.threads=1",
        "training.teacher_cache=hidden",
    ]
    recipe, run = load_recipe("pico", overrides=sets), tmp_path / "run"
    pipeline.run_stage("compress", recipe, out=run)
    pipeline.run_stage("export", recipe, out=run)
    first, again = (open_artifact(run / name) for name in ("onnx-plain", "onnx"))
    graph = first.result["forms"]["fp32"]["all_logits_graph"]
    student, recovered = (open_artifact(run / name) for name in ("student", "student-recovered"))
    assert recovered.manifest["parents"] == {"student": student.digest}
    assert again.manifest["parents"] == {"student": recovered.digest}
    assert first.result["needs_recovery"]
    assert first.result["rise"] == pytest.approx(
        mean_nll(first.result["heldout"]["int4-weight"]) / mean_nll(first.result["heldout"]["fp32"])
        - 1
    )
    # Training saw the exporter's rounding: the torch student rounded this way loses what the graph
    # loses.
    told = recovered.result["recovery"]
    assert mean_nll(told["rounded"]["before"]) == pytest.approx(
        mean_nll(told["before"]["form"]), rel=5e-3
    )
    assert told["best_step"] > 0
    assert mean_nll(told["rounded"]["after"]) < mean_nll(told["rounded"]["before"])
    assert recovered.result["nll"] != student.result["nll"]
    # What keeps 8 bits was learnt too: the export of the recovered student does not choose again.
    kept = first.result["forms"]["int4-weight"]["mixed"]
    assert again.result["forms"]["int4-weight"]["mixed"] == kept
    assert {entry["bits"] for entry in kept["sensitivity"]} == {4, 8}
    # What rounding costs is told from the student that was distilled, block by block, not from the
    # one recovery made.
    heldout = load_heldout(student.path / HELDOUT)
    distilled = first.result["blocks"]["fp32"]
    assert distilled == heldout_losses(run / "onnx-plain" / graph, heldout)
    assert again.result["recovery"]["blocks"] == {
        "distilled": distilled,
        "shipped": heldout_losses(
            run / "onnx" / again.result["forms"]["int4-weight"]["all_logits_graph"], heldout
        ),
    }
    assert (
        per_token(distilled, heldout) == first.result["heldout"]["fp32"] == told["before"]["fp32"]
    )
    assert (
        again.result["rise"]
        == mean_nll(again.result["heldout"]["int4-weight"]) / mean_nll(told["before"]["fp32"]) - 1
    )
    after = again.result["recovery"]["after"]
    assert mean_nll(after["form"]) == pytest.approx(mean_nll(told["rounded"]["after"]), rel=5e-3)
    assert again.result["recovery"]["ships"]
    assert student_of(again) == run / "student-recovered"
    assert student_of(first) == run / "student"
    # The card's loss is that of what ships, since it was measured.
    (found, *_) = ModelCard.load(run / "onnx/README.md").data.eval_results or ()
    assert (found.dataset_name, found.metric_name) == (
        "prose, held out",
        "nats a token, of int4-weight",
    )
    assert found.metric_value == pytest.approx(
        again.result["heldout"]["int4-weight"]["prose"], abs=1e-6
    )
    # The bench judges by that, and the report tells both losses apart.
    pipeline.run_stage("bench", recipe, out=run)
    scored = json.loads((run / "bench/quality.json").read_text())["recovery"]
    assert scored == again.result["recovery"]["blocks"]
    (gate,) = json.loads((run / "report.json").read_text())["gates"]
    assert gate["value"] == pytest.approx(again.result["rise"])
    assert "before recovery" in gate["sentence"]
    page = (run / "report.html").read_text()
    assert f"distilled again through the rounding for {told['tokens']} tokens" in page
    assert all(step in page for step in ("distilling", "rounding", "recovery"))
    assert verify(run, speed=False) == 0
    # A second time there is nothing to do.
    pipeline.run_stage("export", recipe, out=run)
    skipped = [json.loads(line)["skipped"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert skipped == [False] * 5 + [True] * 3
    assert open_artifact(run / "onnx", verify=False).digest == again.digest
    # Without a wish to recover, the first export ships again, and nothing is trained or exported
    # for it but the graph.
    plain = load_recipe("pico", overrides=[line for line in sets if "recover" not in line])
    pipeline.run_stage("export", plain, out=run)
    assert student_of(open_artifact(run / "onnx")) == run / "student"
    assert (run / "onnx").resolve() == run.resolve() / "onnx-plain"
