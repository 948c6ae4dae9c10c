"""The bench on tiny real models: what is timed, what is scored, and what happens when a worker
dies.
"""

from __future__ import annotations

import io
import json
import shutil
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from limbeck.contract.artifact import MANIFEST, Artifact, open_artifact, write_artifact
from limbeck.contract.data.evals import EVALS
from limbeck.contract.data.heldout import HELDOUT, load_heldout
from limbeck.contract.errors import ArtifactError, DataError
from limbeck.contract.recipe import Bench, Gates, Recipe, ServerScenario
from serve_bench import bench as measure
from serve_bench import replay, write_report
from serve_bench.judge import figures, quality
from serve_bench.judge.certificate import CERTIFICATE
from serve_bench.measure.arms import list_arms, require_context
from serve_bench.measure.clock import order
from serve_bench.measure.scenarios import load
from serve_bench.measure.units import prompt
from serve_bench.tasks.language import require_evaluations
from tests.pico import make_blocks
from tests.serve_bench.measurable import bench_recipe
from tests.serve_bench.test_workers import torch_arm

pytestmark = pytest.mark.usefixtures("one_roofline", "forked_workers")

# Definitions --------------------------------------------------------------------------------------


def test_blocks_are_mirrored_and_every_arm_takes_every_place() -> None:
    arms = [torch_arm(Path(), name) for name in "ABCD"]
    first = set()
    for block in range(20):
        there = [arm.id for arm in order(arms, block)]
        assert there == there[::-1]
        assert sorted(there[:4]) == list("ABCD")
        first.add(there[0])
    assert first == set("ABCD")
    assert [a.id for a in order(arms, 3)] == [a.id for a in order(arms, 3)]


def test_prompts_are_heldout_text_of_the_length_asked() -> None:
    heldout = make_blocks()
    letters, numbers = prompt(heldout, 0, 40), prompt(heldout, 1, 40)
    text = np.concatenate(
        [
            r[:n]
            for r, n in zip(heldout["letters"].input_ids, heldout["letters"].lengths, strict=True)
        ]
    )
    assert letters == text[:40].tolist()
    assert len(letters) == len(numbers) == 40
    assert letters != numbers
    assert prompt(heldout, 2, 8) == text[8:16].tolist()
    assert prompt(heldout, 2, 8, then=5) == text[16:21].tolist()
    assert len(prompt(heldout, 0, 1000)) == 1000  # text read again from its start


# The whole stage ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(run: Path) -> Artifact:
    return measure(
        onnx=run / "onnx", student=run / "student", out=run / "bench", recipe=whole_recipe()
    )


def whole_recipe() -> Recipe:
    """Every scenario that needs no server, and GenAI beside ours."""
    grid = {"kind": "offline", "batches": [3], "prompts": [16], "outputs": [8], "blocks": 1}
    scenarios = ["single", grid, {"kind": "cold", "repeats": 1}]
    bench = bench_recipe().bench.model_dump(mode="json") | {
        "scenarios": scenarios,
        "runtimes": ["onnxruntime-genai"],
    }
    return bench_recipe(bench=bench)


def test_everything_is_measured(bench: Artifact, run: Path) -> None:
    result = bench.result
    assert list(result["arms"]) == [
        "teacher:wise",
        "student",
        "onnx:fp32",
        "onnx:int8-weight",
        "onnx:int8-weight:twin",
        "genai",
    ]
    for name, arm in result["arms"].items():
        assert arm["n"] == 2 * result["blocks"]
        assert arm["tpot_ms"]["value"] > 0
        assert arm["peak_rss_bytes"] > 20e6
        assert arm["bytes"] > 1000
        assert (arm["quality"] is None) == (name.endswith("twin") or name == "genai")
        assert arm["roofline"]["weight_bytes"] > 1000
        assert arm["energy"]["joules_per_token"] or arm["energy"]["why"]
    assert result["blocks"] >= 3
    assert result["verdict"] in ("pass", "fail")
    # No process held both runtimes: torch alone is 150 MB.
    assert (
        result["arms"]["onnx:int8-weight"]["peak_rss_bytes"]
        < result["arms"]["student"]["peak_rss_bytes"] / 1.5
    )
    assert not list(run.glob(".bench*"))


def test_quality_is_that_of_the_artifact(bench: Artifact, run: Path) -> None:
    scores = json.loads((bench.path / figures.QUALITY).read_text())
    torch_nll, graph_nll = (
        quality.summarise(scores, arm)["mean_nll"] for arm in ("student", "onnx:fp32")
    )
    assert graph_nll == pytest.approx(torch_nll, rel=1e-5)
    teacher = quality.summarise(scores, "teacher:wise")
    assert teacher["mean_kl"] == pytest.approx(0, abs=1e-6)  # of a mixture of one
    assert teacher["mean_top1"] == 1.0
    assert quality.summarise(scores, "student")["mean_kl"] > 0.01
    heldout = load_heldout(run / "student" / HELDOUT)
    assert scores["domains"]["letters"]["labels"] == (heldout["letters"].lengths - 1).tolist()
    assert all(scores["same_choice"]["onnx:fp32"].values())


def test_every_arm_answers_the_evaluations(bench: Artifact, run: Path) -> None:
    """Held to torch: the logits of each model on the same rows."""
    rows = load_heldout(run / "student" / EVALS)
    for arm, folder in (("teacher:wise", run / "teacher"), ("student", run / "student" / "model")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        nll, right = {}, {}
        for name, blocks in rows.items():
            ids, scored = (
                torch.from_numpy(part).long() for part in (blocks.input_ids, blocks.scored)
            )
            with torch.no_grad():
                logp = torch.log_softmax(model(input_ids=ids).logits[:, :-1], -1)
            chosen = logp.gather(2, ids[:, 1:, None])[..., 0]
            nll[name] = float(-(chosen * scored[:, 1:]).sum() / scored.sum())
            hits = (logp.argmax(-1) == ids[:, 1:]) | (scored[:, 1:] == 0)
            right[name] = float(hits.all(1).float().mean())
        found = bench.result["arms"][arm]["evals"]
        assert found["shares"]["facts"]["value"] == pytest.approx(right["facts"])
        assert arm != "teacher:wise" or right["facts"] == pytest.approx(2 / 3)
        assert found["losses"] == {"prose": pytest.approx(nll["prose"], rel=1e-5)}
        labels = int(rows["prose"].scored.sum())
        assert found["forgetting"]["value"] == pytest.approx(
            nll["prose"] * labels / 150 - 1, rel=1e-4
        )
    assert bench.result["base_evals"]["losses"] == {"prose": 150 / labels}
    assert bench.result["arms"]["genai"]["evals"] is None


@pytest.mark.parametrize(
    "gate", [{"max_task_loss": 0.1}, {"max_forgetting": 0.1}, {"min_task": {"facts": 0.1}}], ids=str
)
def test_a_gate_that_cannot_be_judged_is_refused(run: Path, gate: dict[str, Any]) -> None:
    """A gate that is passed over would let anything ship."""
    student, rows = open_artifact(run / "student"), load_heldout(run / "student" / EVALS)
    require_evaluations(Gates(**gate), rows, student, teachers=True)
    with pytest.raises(DataError, match=f"gates.{next(iter(gate))}"):
        require_evaluations(Gates(**gate), {}, student, teachers=True)
    with pytest.raises(DataError, match=r"gates\.max_task_loss"):
        require_evaluations(Gates(max_task_loss=0.1), rows, student, teachers=False)


def test_what_the_timed_generations_say(bench: Artifact) -> None:
    said = json.loads((bench.path / figures.QUALITY).read_text())["generation"]
    assert said["against"] == ["teacher:wise", "onnx:fp32"]
    assert (said["prompts"], said["tokens"]) == (bench.result["blocks"], 8)
    assert "onnx:int8-weight:twin" not in said["arms"]
    assert (
        said["arms"]["student"]["greedy_match"]["onnx:fp32"]["value"] == 1
    )  # one model in two runtimes
    assert said["arms"]["student"]["greedy_match"]["teacher:wise"]["value"] < 1
    assert 0 < said["arms"]["student"]["distinct_2"] <= 1


def test_samples_are_raw_and_the_same_work(bench: Artifact) -> None:
    rows = [json.loads(line) for line in (bench.path / figures.SAMPLES).read_text().splitlines()]
    timed = [row for row in rows if row["event"] == "sample"]
    assert {len(row["at"]) for row in timed} == {8}
    assert {row["prompt_tokens"] for row in timed} == {24}
    first = min(row["block"] for row in timed)  # of those that were not disturbed
    tokens = {row["arm"]: row["tokens"] for row in timed if row["block"] == first}
    assert tokens["onnx:int8-weight"] == tokens["onnx:int8-weight:twin"]
    assert tokens["student"] == tokens["onnx:fp32"]
    assert tokens["genai"] == tokens["onnx:int8-weight"]
    assert any(row["event"] == "warm-up" for row in rows)


def test_a_second_run_measures_nothing_and_clears_what_a_kill_left(
    bench: Artifact, run: Path
) -> None:
    left = run / ".bench.work"
    left.mkdir()
    (left / "0.log").touch()
    started = time.monotonic()
    again = measure(
        onnx=run / "onnx", student=run / "student", out=run / "bench", recipe=whole_recipe()
    )
    assert again.digest == bench.digest
    assert time.monotonic() - started < 1
    assert not left.exists()


def test_report_of_a_real_run(bench: Artifact, run: Path) -> None:
    report = write_report(run=run, recipe=whole_recipe())
    assert report.verdict.status == bench.result["verdict"]
    assert "wise" in report.html.read_text()
    assert json.loads(report.json.read_text())["arms"] == bench.result["arms"]


def test_a_student_without_a_base_has_a_report(bench: Artifact, run: Path, tmp_path: Path) -> None:
    """A fresh student forgets nothing."""
    for name in ("student", "onnx", "bench"):
        shutil.copytree(run / name, tmp_path / name)
    scores = json.loads((bench.path / figures.QUALITY).read_text())
    scores["evals"]["base"] = None
    (tmp_path / "bench" / figures.QUALITY).write_text(json.dumps(scores))
    manifest = json.loads((bench.path / MANIFEST).read_text())
    written = (tmp_path / "bench" / figures.QUALITY).read_bytes()
    manifest["files"][figures.QUALITY] = {
        "sha256": sha256(written).hexdigest(),
        "bytes": len(written),
    }
    (tmp_path / "bench" / MANIFEST).write_text(json.dumps(manifest))
    page = write_report(run=tmp_path, recipe=whole_recipe()).html.read_text()
    assert "Right answers, of" in page
    assert "the model that the student was made from" not in page


def test_the_certificate_is_replayed_without_student_and_text(
    bench: Artifact, run: Path, tmp_path: Path
) -> None:
    write_report(run=run, recipe=whole_recipe())
    for name in ("onnx", "bench"):
        shutil.copytree(run / name, tmp_path / name)
    shutil.copy(run / CERTIFICATE, tmp_path)
    found = {finding.figure: finding for finding in replay(run=tmp_path)}
    assert list(found) == [
        "certificate",
        "speed over fp32, TTFT",
        "TTFT ms",
        "speed over fp32, TPOT",
        "TPOT ms",
        "loss on letters, nats a token",
        "loss on numbers, nats a token",
        "mean loss, nats a token",
    ]
    for name in ("loss on letters", "loss on numbers", "mean loss"):
        assert found[f"{name}, nats a token"].says == "equal to the digit"
    assert found["certificate"].holds
    assert [f.figure for f in replay(run=tmp_path, quality=False, speed=False)] == ["certificate"]


def test_a_certificate_that_was_edited_or_belongs_elsewhere(
    bench: Artifact, run: Path, tmp_path: Path
) -> None:
    write_report(run=run, recipe=whole_recipe())
    for name in ("onnx", "bench"):
        shutil.copytree(run / name, tmp_path / name)
    certificate = json.loads((run / CERTIFICATE).read_text())
    certificate["figures"]["tpot_ms"]["value"] /= 2
    certificate["figures"]["quality"]["mean_nll"] -= 1e-9
    (tmp_path / CERTIFICATE).write_text(json.dumps(certificate))
    with pytest.raises(ArtifactError, match=r"figures\.tpot_ms\.value, figures\.quality\.mean_nll"):
        replay(run=tmp_path)
    (tmp_path / CERTIFICATE).write_text(json.dumps(certificate | {"bench": "0" * 64}))
    with pytest.raises(ArtifactError, match="is of another bench"):
        replay(run=tmp_path)
    (tmp_path / CERTIFICATE).write_text("{}")
    with pytest.raises(ArtifactError, match=r"not a certificate \('format'\); `limbeck report"):
        replay(run=tmp_path)


def test_batches_and_cold_starts_are_those_of_the_compared(bench: Artifact) -> None:
    compared = {"onnx:int8-weight", "onnx:fp32", "teacher:wise"}
    assert {cell["arm"] for cell in bench.result["offline"]} == compared
    for cell in bench.result["offline"]:
        assert (cell["batch"], cell["prompt_tokens"], cell["new_tokens"], cell["n"]) == (
            3,
            16,
            8,
            2,
        )
        assert cell["generated_tokens_s"]["value"] > 0
    assert set(bench.result["cold"]) == compared
    for starts in bench.result["cold"].values():
        assert starts["n"] == 1
        assert starts["total_s"]["value"] > starts["import_s"]["value"] > 0


def test_the_environment_says_what_was_measured_how(bench: Artifact) -> None:
    told = json.loads((bench.path / figures.ENVIRONMENT).read_text())
    assert told["fairness"]["threads"] == 1
    assert told["fairness"]["kv_cache"] is True
    assert told["roofline"]["bandwidth_bytes_s"] > 1e8
    assert told["sentinel"]["median_s"] > 0
    assert told["before"]["load_average"]
    assert told["after"]["load_average"]
    assert told["arms"]["student"]["facts"]["number_type"] == "float32"
    sizes = {name: arm["weight_bytes"] for name, arm in told["arms"].items()}
    assert sizes["onnx:int8-weight"] == sizes["genai"] < sizes["onnx:fp32"]
    assert sizes["onnx:fp32"] == pytest.approx(sizes["student"], rel=0.01)


@pytest.mark.slow
def test_our_own_server_is_started_asked_and_ended(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("serve_bench.serve.server")
    slo, raw = {"ttft_ms": 6e5, "tpot_ms": 6e5}, io.StringIO()
    asked = ServerScenario.model_validate(
        {
            "kind": "server",
            "slo": slo,
            "requests": 4,
            "first_rate": 5,
            "bisections": 0,
            "minutes": 0.001,
        }
    )
    sizes = load.Sizes(prompt_tokens=8, new_tokens=6)
    target = load.measure_server(
        asked,
        run / "onnx",
        lambda block, tokens: [block + 1] * tokens,
        sizes,
        raw,
        threads=1,
        folder=tmp_path,
    )
    assert target["kind"] == "artifact"
    rows = [json.loads(line) for line in raw.getvalue().splitlines()]
    assert [(row["error"], row["prompt_tokens"], row["output_tokens"]) for row in rows] == [
        (None, 8, 6)
    ] * 4
    assert all(row["at"] == sorted(row["at"]) for row in rows)


def test_prompt_and_answer_must_fit_the_context(run: Path) -> None:
    arms = list_arms(onnx=open_artifact(run / "onnx"), student=open_artifact(run / "student"))
    long = bench_recipe(bench={"prompt_tokens": 60, "new_tokens": 8})
    with pytest.raises(DataError, match=r"come to 68 tokens; the context of wise is 64"):
        require_context(arms, long.bench, run / "student/model")
    fits = bench_recipe(bench={"prompt_tokens": 56, "new_tokens": 8})
    require_context(arms, fits.bench, run / "student/model")


def test_inputs_that_do_not_belong_together(run: Path, tmp_path: Path) -> None:
    with write_artifact(tmp_path / "student", kind="student", key="other", parents={}) as draft:
        draft.result = {}
    with pytest.raises(ArtifactError, match="was not made from"):
        measure(
            onnx=run / "onnx",
            student=tmp_path / "student",
            out=tmp_path / "bench",
            recipe=bench_recipe(),
        )


def test_further_runtimes_run_the_shipped_form_or_the_student(run: Path) -> None:
    onnx, student = open_artifact(run / "onnx"), open_artifact(run / "student")
    asked = Bench(
        torch_dtype="bf16",
        runtimes=[
            {"kind": "onnxruntime-genai"},
            {"kind": "torch-compile"},
            {"kind": "openai", "url": "http://x/v1", "model": "m"},
        ],
    )
    arms = {arm.id: arm for arm in list_arms(onnx=onnx, student=student, bench=asked)}
    genai, compiled, server = (arms[name] for name in ("genai", "compiled", "openai"))
    assert (genai.label, genai.bytes) == ("int8-weight, genai", arms["onnx:int8-weight"].bytes)
    assert genai.spec == {"artifact": str(run / "onnx"), "device": "cpu"}
    assert (compiled.runtime, compiled.spec) == ("torch-compile", arms["student"].spec)
    assert compiled.bytes == (run / "student/model/model.safetensors").stat().st_size
    assert (server.label, server.bytes, server.spec["model"]) == ("http://x/v1", 0, "m")
    assert {a.spec["dtype"] for a in arms.values() if a.runtime.startswith("torch")} == {"bf16"}
    require_context([server], Bench(prompt_tokens=9999), run / "student/model")  # it is unknown
    with pytest.raises(DataError, match="context"):
        require_context([server, genai], Bench(prompt_tokens=9999), run / "student/model")


def test_a_teacher_that_is_gone_is_named(run: Path, tmp_path: Path) -> None:
    entry = {
        "name": "wise",
        "model": str(tmp_path / "gone"),
        "adapter": None,
        "quantize": "none",
        "dtype": "fp32",
    }
    with write_artifact(tmp_path / "student", kind="student", key="other", parents={}) as draft:
        (draft.folder / "teachers.json").write_text(json.dumps([entry]))
        draft.result = {}
    with pytest.raises(ArtifactError, match="teacher wise is gone"):
        list_arms(onnx=open_artifact(run / "onnx"), student=open_artifact(tmp_path / "student"))
