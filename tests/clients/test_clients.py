"""The deployable folder in clients of others (`make test-clients`).

Each client but onnxruntime-genai has an environment of its own.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import pytest

from export import export_student
from limbeck.contract.artifact import Artifact
from limbeck.runtime.decoder import Decoder
from limbeck.runtime.text import load_text
from tests.architectures import SIZES, WEIGHT4, WEIGHT8, greedy
from tests.clients.programs import PROGRAMS, Job, ask, require_program, until_end
from tests.pico import make_model, make_student, pico_recipe

IN_RECIPE = ["fp32", WEIGHT8, "int8-dynamic", WEIGHT4]
FORMS = ("fp32", "int8-weight", "int8-dynamic", "int4-weight")
COUNT, PAD = 16, 257
PROMPTS = [
    [10, 200, 33, 47, 5, 91],
    [72, 3],
    [150, 151, 152, 9],
    [7 * i % 256 for i in range(45)],
]  # ragged; one past a block of 32
ENDS = [150, 151, 152, 9]  # the prompt whose answer meets the stop token
TEXTS = ["My fellow Americans,", "naïve 世界 🙂\n"]
MESSAGES = [{"role": "user", "content": "Grüße, 世界 🙂"}]
ANSWER = "Ça, 世界 🙂"  # of more tokens than characters

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    root = tmp_path_factory.mktemp(request.param)
    # optimum-onnx assumes heads of hidden_size / num_attention_heads and ignores head_dim.
    sizes = SIZES[request.param] | ({"num_attention_heads": 2} if request.param == "llama" else {})
    model = make_model(root / "model", model_type=request.param, scale=0.1, **sizes)
    teach(model)
    answer = greedy(model, ENDS, COUNT)[0]
    stop = next(token for at, token in enumerate(answer) if at >= 3 and token not in answer[:at])
    config = model / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [256, stop]}))
    make_student(root / "student", model)
    return export_student(
        student=root / "student", out=root / "onnx", recipe=pico_recipe(export={"forms": IN_RECIPE})
    )


def teach(folder: Path) -> None:
    """Train the model until `ANSWER` follows each of `TEXTS` and `MESSAGES`.

    A random model gives bytes that are not text, and each client decodes those in its own way.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    chat = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    rows = [torch.tensor([tokenizer.encode(text + ANSWER)]) for text in (*TEXTS, chat)]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        for row in rows:
            model(row, labels=row).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)


def test_greedy_tokens_text_and_chat_are_the_same(exported: Artifact, client: str) -> None:
    """Ragged batch, stop token, text and chat: fp32 equals torch, other forms our own loop."""
    if client == "genai" and not (exported.path / "genai_config.json").is_file():
        pytest.skip("GenAI runs graphs of the backend genai only")
    found = ask(client, Job(exported, FORMS, PROMPTS, ENDS, COUNT, PAD, TEXTS, MESSAGES))
    model, text = exported.path.parent / "student/model", load_text(exported.path)
    prompts = [*map(text.encode, TEXTS), text.chat(MESSAGES)]
    for form in FORMS:
        decoder = Decoder(exported.path, form=form)
        for prompt, tokens in zip(PROMPTS, found["tokens"][form], strict=True):
            expected = (
                greedy(model, prompt, COUNT)[0]
                if form == "fp32"
                else list(decoder.generate(prompt, COUNT))
            )
            end = text.stop_ids | {PAD}
            assert until_end(tokens, end) == until_end(expected, end), f"{form} after {prompt}"
        ended = _with_end(decoder, ENDS, text.stop_ids)
        told = (
            until_end(ended, text.stop_ids) if client == "genai" else ended
        )  # GenAI too leaves the stop token out
        assert found["alone"][form] == told, f"{form} stops"
        if form == "fp32":
            assert 3 < len(ended) <= COUNT
            assert ended[-1] in text.stop_ids
        for prompt, answer in zip(prompts, found["written"][form], strict=True):
            expected = list(decoder.generate(prompt, COUNT, stop_ids=text.stop_ids))
            assert answer == "".join(text.stream(expected)), (
                f"{form} after {text.tokenizer.decode(prompt)}"
            )
            if form == "fp32":
                assert answer.startswith(ANSWER)
    assert found["ids"] == prompts


@pytest.mark.parametrize(("model_type", "loads"), [("gemma3_text", True), ("qwen3", False)])
def test_the_card_knows_what_optimum_loads(tmp_path: Path, model_type: str, loads: bool) -> None:
    """Heads are not hidden_size / num_attention_heads wide; optimum-onnx reads few of those."""
    require_program("optimum")
    model = make_model(
        tmp_path / "model",
        model_type=model_type,
        scale=0.1,
        **SIZES[model_type] | {"hidden_size": 32},
    )
    teach(model)
    make_student(tmp_path / "student", model)
    recipe = pico_recipe(export={"forms": ["fp32"]})
    exported = export_student(student=tmp_path / "student", out=tmp_path / "onnx", recipe=recipe)
    assert ("optimum-onnx" in (exported.path / "README.md").read_text()) == loads
    job = Job(exported, ["fp32"], PROMPTS, ENDS, COUNT, PAD, TEXTS, MESSAGES)
    if loads:
        expected = [greedy(tmp_path / "student/model", prompt, COUNT)[0] for prompt in PROMPTS]
        found = ask("optimum", job)["tokens"]["fp32"]
        assert [until_end(row, {256}) for row in found] == [
            until_end(row, {256}) for row in expected
        ]
    else:
        with pytest.raises(AssertionError, match=r"Got: 8 Expected: 16"):
            ask("optimum", job)


@pytest.fixture(params=PROGRAMS)
def client(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    require_program(name)
    return name


def _with_end(decoder: Decoder, prompt: list[int], end: Collection[int]) -> list[int]:
    """Our answer as clients give it: with its stop token, which our loop leaves out."""
    whole = list(decoder.generate(prompt, COUNT))
    kept = until_end(whole, end)
    assert list(decoder.generate(prompt, COUNT, stop_ids=end)) == kept
    return whole[: len(kept) + 1]
