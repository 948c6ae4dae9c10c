"""On a card only: forms for CUDA compute what torch computes. See docs/gpu.md."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from export import export_student, verify_parity
from limbeck.contract.artifact import Artifact
from limbeck.runtime.decoder import Decoder
from limbeck.runtime.session import providers
from tests.architectures import SIZES
from tests.pico import make_model, make_student, pico_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in providers(), reason="onnxruntime has no CUDA here"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA card"),
]
FORMS = [
    "fp32",
    "fp16",
    {"kind": "int4-weight", "block_size": 16},
    {"kind": "int8-weight", "block_size": 16},
]
PROMPT = list(range(40, 52))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    root = tmp_path_factory.mktemp(request.param)
    make_student(
        root / "student",
        make_model(root / "model", model_type=request.param, **SIZES[request.param]),
    )
    recipe = pico_recipe(export={"forms": FORMS, "provider": "cuda"})
    return export_student(student=root / "student", out=root / "onnx", recipe=recipe)


def test_parity_is_measured_on_the_card(exported: Artifact) -> None:
    for name, parity in verify_parity(exported.path).items():
        assert parity["failures"] == []
        assert parity["provider"] == ("cpu" if name == "fp32" else "cuda")


@pytest.mark.parametrize("form", ["fp16", "int8-weight", "int4-weight"])
def test_the_decoder_keeps_its_cache_on_the_card(exported: Artifact, form: str) -> None:
    decoder = Decoder(exported.path, form=form)
    exact = Decoder(exported.path, form="fp32")
    found, expected = decoder.prefill([PROMPT], room=4), exact.prefill([PROMPT], room=4)
    assert np.abs(found - expected).max() < (0.05 if form == "fp16" else 5)
    for token in (7, 8, 9):
        found, expected = decoder.step([token]), exact.step([token])
    assert np.abs(found - expected).max() < (0.05 if form == "fp16" else 5)
    assert decoder.cache_device == "cuda"
    assert exact.cache_device == "cpu"
    assert (decoder.provider, exact.provider) == ("CUDAExecutionProvider", "CPUExecutionProvider")


def test_genai_generates_the_same_tokens(exported: Artifact) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    if exported.result["backend"]["name"] != "genai":
        pytest.skip("no genai_config.json")
    parameters = genai.GeneratorParams(model := genai.Model(str(exported.path)))
    parameters.set_search_options(max_length=20, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(PROMPT, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    theirs = [int(token) for token in generator.get_sequence(0)[len(PROMPT) :] if token != 256]
    assert theirs == list(Decoder(exported.path).generate(PROMPT, 20 - len(PROMPT), stop_ids={256}))
