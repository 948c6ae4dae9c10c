"""LangChain's and LiteLLM's clients against `limbeck serve` (`make test-clients`)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from limbeck.contract.artifact import Artifact
from limbeck.runtime.decoder import Decoder
from limbeck.runtime.text import load_text
from tests.serve_bench.serve.asking import CHAT, serving

HERE = Path(__file__).parent
ENVIRONMENT = HERE.parents[1] / ".venvs/openai-clients"
COUNT = 12

pytestmark = pytest.mark.slow


def test_answers_are_the_decoders(served: Artifact) -> None:
    if not (ENVIRONMENT / ".ready").is_file():
        pytest.skip(f"{ENVIRONMENT} is not set up; run: make test-clients")
    text, decoder = load_text(served.path), Decoder(served.path, form="fp32", threads=1)

    def greedy(ids: list[int]) -> str:
        return "".join(text.stream(decoder.generate(ids, COUNT, stop_ids=text.stop_ids)))

    with serving(served.path) as server:
        done = subprocess.run(
            [ENVIRONMENT / "bin/python", HERE / "openai_clients.py", f"{server.address}/v1"],
            capture_output=True,
            text=True,
            timeout=300,
            # LiteLLM asks GitHub for a list of prices otherwise.
            env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONPATH": ""},
        )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    chat, plain = greedy(text.chat(CHAT)), greedy(text.encode("Who are you?"))
    logprobs, usage = found["langchain"].pop("logprobs"), found["langchain"].pop("usage")
    structured = [found[client].pop("structured") for client in ("langchain", "litellm")]
    assert structured[0] == structured[1]
    assert structured[0] in ({"colour": "red"}, {"colour": "green"})
    assert found["langchain"] == {"chat": chat, "stream": chat, "text": plain, "batch": plain}
    assert found["litellm"] == {"chat": chat, "stream": chat, "text": plain}
    assert 0 < logprobs <= COUNT
    assert 0 < usage <= COUNT
