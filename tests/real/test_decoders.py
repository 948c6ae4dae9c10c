"""Language models of real weights through the whole chain: every form, parity, loss, clients, GGUF.

SmolLM2-135M and Gemma-3-270M, each as a LoRA student and as a cut one. `make test-real` says how
long it takes. A package that is not installed skips its model, with the command that installs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from limbeck.contract.heldout import HELDOUT, load_heldout

from export import export_student, verify_parity
from export.heldout import heldout_nll, relative_rise
from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import UserError
from limbeck.contract.results.onnx import OnnxResult
from limbeck.runtime.decoder import Decoder
from limbeck.runtime.text import load_text
from tests.architectures import greedy
from tests.real.students import make_student, recipe_of
from tests.serve_bench.serve.asking import connect, serving

GRAPHS = ["fp32", "int8-dynamic", "int8-static", "int4-weight", "int8-weight"]
GGUFS = ["gguf-q8_0", "gguf-q4_0"]
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


@pytest.fixture(
    scope="module", params=["smollm2-lora", "smollm2-shrink", "gemma3-lora", "gemma3-shrink"]
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    model, _, kind = request.param.partition("-")
    # llama.cpp takes every sixth layer of Gemma 3 to read the whole text: no layer may be missing.
    forms = GRAPHS if request.param == "gemma3-shrink" else ["fp32", *GGUFS, *GRAPHS[1:]]
    folder = tmp_path_factory.mktemp(request.param)
    try:
        student = make_student(model, kind, folder / "student", forms)
    except UserError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(str(error))
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
    assert verify_parity(exported.path).keys() == result.forms.keys()


def test_fp32_answers_as_torch_alone_and_through_the_server(exported: Artifact) -> None:
    prompt = prompt_of(exported)
    expected, _ = greedy(student_of(exported) / "model", prompt, COUNT)
    assert list(Decoder(exported.path, form="fp32").generate(prompt, COUNT)) == expected
    text = load_text(exported.path)
    written = "".join(text.stream(expected))
    with serving(exported.path) as server, connect(server) as client:
        asked: dict[str, Any] = {"model": "any", "prompt": prompt, "max_tokens": COUNT}
        answer = client.completions.create(temperature=0, **asked).choices[0].text
    assert answer == written[: len(answer)]
    assert answer


def test_gguf_files_compute_what_torch_computes(exported: Artifact, result: OnnxResult) -> None:
    if not result.ggufs:
        pytest.skip("llama.cpp does not know the layers of a cut Gemma 3")
    assert list(result.ggufs) == GGUFS
    for name, file in result.ggufs.items():
        assert file.rise is not None
        print(f"{exported.path.parent.name} {name}: KL {file.parity['kl']:.2g}, {file.rise:+.2%}")
        assert file.rise < GGUF_RISES[name], name


def test_other_programs_load_the_folder(exported: Artifact, result: OnnxResult) -> None:
    """transformers' tokenizer and configuration; onnxruntime, or onnxruntime-genai, by itself."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported.path)
    config = transformers.AutoConfig.from_pretrained(exported.path)
    assert config.vocab_size >= len(tokenizer)
    prompt = prompt_of(exported)
    assert (
        load_text(exported.path).encode("In the beginning")
        == tokenizer("In the beginning")["input_ids"]
    )
    expected = list(Decoder(exported.path, form="fp32").generate(prompt, COUNT))
    client = genai_tokens if result.backend.name == "genai" else onnxruntime_tokens
    assert client(exported.path, prompt) == expected


def genai_tokens(folder: Path, prompt: list[int]) -> list[int]:
    """What onnxruntime-genai puts after ``prompt`` with the fp32 graph."""
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    config.overlay('{"model": {"decoder": {"filename": "onnx/model.onnx"}}}')
    model = genai.Model(config)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + COUNT, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


def onnxruntime_tokens(folder: Path, prompt: list[int]) -> list[int]:
    """What bare onnxruntime puts after ``prompt`` with the fp32 graph, which reads all of it again
    for every token."""
    import onnxruntime

    graph = str(folder / "onnx/model.onnx")
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    ids = list(prompt)
    for _ in range(COUNT):
        feeds: dict[str, Any] = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, len(ids)), np.int64),
        }
        for value in session.get_inputs():
            if value.name.startswith("past_key_values."):
                feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
            elif value.name == "position_ids":
                feeds[value.name] = np.arange(len(ids))[None]
        ids.append(int(session.run(["logits"], feeds)[0][0, -1].argmax()))
    return ids[len(prompt) :]
