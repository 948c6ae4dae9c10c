"""The deployable folder in clients that nobody here wrote, each in an environment of its own (`make test-clients`)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from export import export_student
from limbeck.artifact import Artifact
from limbeck.runtime import Decoder, load_text
from tests.architectures import SIZES, WEIGHT4, WEIGHT8, greedy
from tests.pico import make_model, make_student, pico_recipe

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent / ".venvs"
CLIENTS = {
    "transformers-js": ["node", str(HERE / "clients/transformers_js.mjs")],
    "optimum": [str(ENVIRONMENTS / "optimum/bin/python"), str(HERE / "clients/optimum_onnx.py")],
}
IN_RECIPE = ["fp32", WEIGHT8, "int8-dynamic", WEIGHT4]
FORMS = ("fp32", "int8-weight", "int8-dynamic", "int4-weight")
COUNT = 12
PROMPTS = [
    [10, 200, 33, 47, 5, 91],
    [72, 3],
    [150, 151, 152, 9],
    [7 * i % 256 for i in range(45)],
]  # ragged; one past a block of 32
ENDS = [150, 151, 152, 9]  # the prompt whose answer meets the stop token
PROMPT = "My fellow Americans,"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    root = tmp_path_factory.mktemp(request.param)
    # optimum-onnx takes heads to be hidden_size / num_attention_heads wide, whatever head_dim says; so they are here.
    sizes = SIZES[request.param] | ({"num_attention_heads": 2} if request.param == "llama" else {})
    model = make_model(root / "model", model_type=request.param, **sizes)
    answer = greedy(model, ENDS, COUNT)[0]
    stop = next(token for at, token in enumerate(answer) if at >= 3 and token not in answer[:at])
    config = model / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [256, stop]}))
    make_student(root / "student", model)
    return export_student(
        student=root / "student",
        out=root / "onnx",
        recipe=pico_recipe(export={"forms": IN_RECIPE}),
    )


def test_greedy_tokens_text_and_chat_are_the_same(exported: Artifact, client: str) -> None:
    """A ragged batch padded on the left, and one prompt that meets a stop token, and text; fp32 equals torch, the other forms equal our own loop."""
    width = max(len(prompt) for prompt in PROMPTS)
    messages = [{"role": "user", "content": "Grüße, 世界 🙂"}]
    found = _ask(
        client,
        {
            "folder": str(exported.path),
            "forms": FORMS,
            "files": {form: Path(exported.result["forms"][form]["graph"]).name for form in FORMS},
            "ids": [[257] * (width - len(prompt)) + prompt for prompt in PROMPTS],
            "mask": [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS],
            "alone": ENDS,
            "count": COUNT,
            "prompt": PROMPT,
            "text": "naïve 世界 🙂\n",
            "messages": messages,
        },
    )
    model, text = exported.path.parent / "student/model", load_text(exported.path)
    for form in FORMS:
        decoder = Decoder(exported.path, form=form)
        for prompt, tokens in zip(PROMPTS, found["tokens"][form], strict=True):
            expected = greedy(model, prompt, COUNT)[0] if form == "fp32" else list(decoder.generate(prompt, COUNT))
            end = text.stop_ids | {257}
            assert _until_end(tokens, end) == _until_end(expected, end), f"{form} after {prompt}"
        ended = _with_end(decoder, ENDS, text.stop_ids)
        assert found["alone"][form] == ended, f"{form} stops"
        if form == "fp32":
            assert 3 < len(ended) <= COUNT
            assert ended[-1] in text.stop_ids
        if client == "transformers-js":  # by its pipeline, text in and text out
            answer = _with_end(decoder, text.encode(PROMPT), text.stop_ids)
            assert found["written"][form] == PROMPT + "".join(text.stream(answer)), f"{form} by pipeline"
    assert found["text"] == text.encode("naïve 世界 🙂\n")
    assert found["chat"] == text.chat(messages)


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if not (ENVIRONMENTS / name / ".ready").is_file():
        pytest.skip(f"{ENVIRONMENTS / name} is not set up; run: make test-clients")
    return name


def _ask(client: str, job: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        CLIENTS[client], input=json.dumps(job), capture_output=True, text=True, cwd=ENVIRONMENTS / client, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _with_end(decoder: Decoder, prompt: list[int], end: Collection[int]) -> list[int]:
    """Our own answer as clients give it: with the stop token that ends it, which our loop leaves out."""
    whole = list(decoder.generate(prompt, COUNT))
    kept = _until_end(whole, end)
    assert list(decoder.generate(prompt, COUNT, stop_ids=end)) == kept
    return whole[: len(kept) + 1]


def _until_end(tokens: list[int], end: Collection[int]) -> list[int]:
    return tokens[: next((at for at, token in enumerate(tokens) if token in end), len(tokens))]
