"""Language models of real weights through the whole chain: every form, parity, loss, clients, GGUF.

SmolLM2-135M and Gemma-3-270M, each as a LoRA student and as a cut one. `make test-real` says how
long it takes. A package that is not installed skips its model, with the command that installs it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from export import export_student, verify_parity
from export.check.verdict import TOLERANCES
from export.heldout import heldout_nll, relative_rise
from limbeck.app.run import bench_targets
from limbeck.contract.artifact import Artifact, open_artifact
from limbeck.contract.data.heldout import HELDOUT, load_heldout
from limbeck.contract.results.onnx import OnnxResult
from limbeck.runtime.decoder import Decoder
from limbeck.runtime.text import load_text
from tests.architectures import greedy
from tests.clients.programs import PROGRAMS, Job, ask, require_program, until_end
from tests.real.students import make_student, recipe_of, skip_if_missing
from tests.serve_bench.serve.asking import connect, serving

GRAPHS = ["fp32", "int8-dynamic", "int8-static", "int4-weight", "int8-weight"]
# llama.cpp takes every sixth layer of Gemma 3 to read the whole text: no layer may be missing.
# Rounding to 4 bits makes another model of it (docs/experiments/forms.md).
GGUFS = {
    "smollm2-lora": ["gguf-q8_0", "gguf-q4_0"],
    "smollm2-shrink": ["gguf-q8_0", "gguf-q4_0"],
    "gemma3-lora": ["gguf-q8_0"],
    "gemma3-shrink": [],
}
# Relative rise of held-out loss over fp32 that a sound form stays below on these short texts. The
# figures measured are in docs/experiments/forms.md.
RISES = {"int8-weight": 0.01, "int8-dynamic": 0.03, "int8-static": 0.03, "int4-weight": 0.06}
GGUF_RISES = {"gguf-q8_0": 0.01, "gguf-q4_0": 0.1}
COUNT = 12  # tokens of an answer

pytestmark = [
    pytest.mark.slow,
    # Of transformers' reader of GGUF files.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module", params=GGUFS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    model, _, kind = request.param.partition("-")
    forms = ["fp32", *GGUFS[request.param], *GRAPHS[1:]]
    folder = tmp_path_factory.mktemp(request.param)
    with skip_if_missing():
        student = make_student(model, kind, folder / "student", forms)
    return export_student(
        student=student.path, out=folder / "onnx", recipe=recipe_of(model, kind, forms)
    )


@pytest.fixture
def result(exported: Artifact) -> OnnxResult:
    return OnnxResult.of(exported)


def prompt_of(exported: Artifact) -> list[int]:
    """The beginning of a held-out text."""
    blocks = next(iter(load_heldout(student_of(exported) / HELDOUT).values()))
    return [int(token) for token in blocks.input_ids[0, :24]]


def student_of(exported: Artifact) -> Path:
    return exported.path.parent / "student"


def test_every_form_is_kept_and_loses_little(exported: Artifact, result: OnnxResult) -> None:
    assert not result.failed
    assert list(result.forms) == GRAPHS
    assert list(result.ggufs) == GGUFS[exported.path.parent.name.rstrip("0")]
    heldout = load_heldout(student_of(exported) / HELDOUT)
    losses = {
        name: heldout_nll(exported.path / form.all_logits_graph, heldout)
        for name, form in result.forms.items()
    }
    rises = {name: relative_rise(losses[name], losses["fp32"]) for name in RISES}
    for name, form in result.forms.items():
        kl, top1 = form.parity["kl"], form.parity["top1_sure"]
        rise = f"{100 * rises.get(name, 0):+.2f} %"
        print(f"{exported.path.parent.name} {name}: KL {kl:.2g}, top1 {top1:.3f}, loss {rise}")
    assert {name: rise for name, rise in rises.items() if rise > RISES[name]} == {}


def test_parity_holds_again_on_what_travels_with_the_folder(
    exported: Artifact, result: OnnxResult
) -> None:
    if "lora" in exported.path.parent.name:
        pytest.skip("takes minutes; the cut student of the same model shows it")
    assert verify_parity(exported.path).keys() == result.forms.keys()


def test_fp32_answers_as_torch_alone_and_through_the_server(exported: Artifact) -> None:
    prompt = prompt_of(exported)
    expected, _ = greedy(student_of(exported) / "model", prompt, COUNT)
    assert list(Decoder(exported.path, form="fp32").generate(prompt, COUNT)) == expected
    text = load_text(exported.path)
    written = "".join(text.stream(expected))
    with serving(exported.path) as server, connect(server) as client:
        name = client.models.list().data[0].id
        asked: dict[str, Any] = {"prompt": prompt, "max_tokens": COUNT, "temperature": 0}
        answer = client.completions.create(model=name, **asked).choices[0].text
    assert answer == written[: len(answer)]
    assert answer


def test_gguf_files_compute_what_torch_computes(exported: Artifact, result: OnnxResult) -> None:
    for name, file in result.ggufs.items():
        assert file.rise is not None
        print(f"{exported.path.parent.name} {name}: KL {file.parity['kl']:.2g}, {file.rise:+.2%}")
        assert file.rise < GGUF_RISES[name], name


def test_the_bench_times_the_folder_beside_torch_and_the_server(exported: Artifact) -> None:
    out = exported.path.parent / "bench"
    sizes = ["prompt_tokens=16", "new_tokens=4", "minutes=0.05", "min_blocks=3", "threads=1"]
    with serving(exported.path) as server:
        bench_targets(
            [str(exported.path)],
            against=[str(student_of(exported) / "model"), server.address],
            out=out,
            overrides=[f"bench.{size}" for size in sizes],
        )
    arms = open_artifact(out, kind="bench").result["arms"].values()
    assert [arm["runtime"] for arm in arms][:3] == ["onnxruntime", "torch", "openai"]
    for arm in arms:
        assert arm["tpot_ms"]["value"] > 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_other_programs_answer_as_torch(exported: Artifact, program: str) -> None:
    """A ragged batch, padded as the program pads, and texts through the program's tokenizer."""
    require_program(program)
    if program == "genai" and not (exported.path / "genai_config.json").is_file():
        pytest.skip("GenAI runs graphs of the backend genai only")
    text, model = load_text(exported.path), student_of(exported) / "model"
    prompt, texts = prompt_of(exported), ["In the beginning", "naïve 世界 🙂\n"]
    chat = [{"role": "user", "content": "Who made the world?"}] if text.template else []
    prompts = [prompt, prompt[:5]]
    settings = json.loads((exported.path / "generation_config.json").read_text())
    pad = settings.get("pad_token_id", min(text.stop_ids))  # GenAI attends to every other token
    job = Job(exported, ["fp32", "int8-weight"], prompts, prompt, COUNT, pad, texts, chat)
    found = ask(program, job)
    assert found["ids"] == [*map(text.encode, texts), *([text.chat(chat)] if chat else [])]
    expected = [greedy(model, row, COUNT)[0] for row in prompts]
    end = text.stop_ids
    assert [until_end(row, end) for row in found["tokens"]["fp32"]] == [
        until_end(row, end) for row in expected
    ]
    decoder = Decoder(exported.path, form="int8-weight")
    for row, tokens in zip(prompts, found["tokens"]["int8-weight"], strict=True):
        theirs, ours = until_end(tokens, end), list(decoder.generate(row, COUNT, stop_ids=end))
        if (at := first_difference(theirs, ours)) is not None:
            # Rounding to 8 bits depends on the rows beside, and may turn what is a tie for torch.
            logits_V = torch_logits(model, [*row, *ours[:at]])
            gap = abs(float(logits_V[theirs[at]] - logits_V[ours[at]]))
            assert gap < TOLERANCES["int8-weight"].lead  # parity's own rule


def first_difference(theirs: list[int], ours: list[int]) -> int | None:
    """Where two answers part; None if they do not."""
    if theirs == ours:
        return None
    return next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b)


@torch.inference_mode()
def torch_logits(model: Path, ids: list[int]) -> torch.Tensor:
    """torch's logits ``[V]`` after ``ids``."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    logits_V: torch.Tensor = loaded(torch.tensor([ids])).logits[0, -1]
    return logits_V
