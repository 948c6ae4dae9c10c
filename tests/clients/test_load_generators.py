"""The load generators of vLLM, NVIDIA and Red Hat against `limbeck serve` (`make test-clients`)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from limbeck.contract.artifact import Artifact
from limbeck.runtime.text import load_text
from serve_bench.serve.server import Listener
from tests.serve_bench.serve.asking import greedy, serving

HERE = Path(__file__).parent
ENVIRONMENT = HERE.parents[1] / ".venvs/load-generators"
PROMPTS = ["Who are you?", "My fellow Americans,", "Grüße"]
COUNT = 12  # new tokens
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
Generator = Callable[[str, str, Path, Path], dict[str, str]]  # answers by prompt

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(served: Artifact) -> Iterator[Listener]:
    if not (ENVIRONMENT / ".ready").is_file():
        pytest.skip(f"{ENVIRONMENT} is not set up; run: make test-clients")
    with serving(served.path) as listener:
        yield listener


def _vllm_bench(kind: str, address: str, tokenizer: Path, folder: Path) -> dict[str, str]:
    """Sends neutral values of samplers that OpenAI's interface does not have."""
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    backend = {"chat": "openai-chat", "completions": "openai"}[kind]
    neutral = ["--top-k", "-1", "--min-p", "0", "--repetition-penalty", "1.0"]
    _run(
        folder,
        *("python", HERE / "vllm_bench.py", "--backend", backend, "--base-url", address),
        *("--endpoint", PATHS[kind], "--model", "pico", "--tokenizer", tokenizer),
        *("--dataset-name", "custom", "--dataset-path", _written(folder, rows)),
        *("--skip-chat-template", "--disable-shuffle", "--custom-output-len", COUNT),
        *("--num-prompts", len(PROMPTS), "--temperature", "0", *neutral),
        *("--save-result", "--save-detailed", "--result-filename", "result.json"),
    )
    result = json.loads((folder / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (len(PROMPTS), 0)
    assert all(0 < count <= COUNT for count in result["output_lens"])
    return dict(zip(PROMPTS, result["generated_texts"], strict=True))


def _aiperf(kind: str, address: str, tokenizer: Path, folder: Path) -> dict[str, str]:
    rows = [{"text": prompt} for prompt in PROMPTS]
    _run(
        folder,
        *("aiperf", "profile", "--model", "pico", "--url", address, "--endpoint-type", kind),
        *("--streaming", "--input-file", _written(folder, rows), "--tokenizer", tokenizer),
        *("--custom-dataset-type", "single_turn", "--request-count", len(PROMPTS)),
        *("--concurrency", "1", "--extra-inputs", "temperature:0"),
        *("--extra-inputs", f"max_tokens:{COUNT}", "--ui", "none", "--artifact-dir", folder),
        *("--export-level", "raw", "--no-gpu-telemetry", "--no-server-metrics"),
        *("--workers-max", "1", "--record-processors", "1"),
    )
    answers = {}
    for line in (folder / "profile_export_raw.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["status"] == 200
        packets = [packet["value"] for part in row["responses"] for packet in part["packets"]]
        events = [json.loads(packet) for packet in packets if packet != "[DONE]"]
        choices = [choice for event in events for choice in event["choices"]]
        assert events[-1]["usage"]["completion_tokens"] <= COUNT
        if kind == "chat":
            prompt = row["payload"]["messages"][0]["content"]
            answers[prompt] = "".join(each["delta"].get("content") or "" for each in choices)
        else:
            answers[row["payload"]["prompt"]] = "".join(each["text"] for each in choices)
    return answers


def _guidellm(kind: str, address: str, tokenizer: Path, folder: Path) -> dict[str, str]:
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    server = f"kind=openai_http,target={address},model=pico,request_format={PATHS[kind]}"
    _run(
        folder,
        *("guidellm", "run", "--backend", f"{server},max_tokens={COUNT},extras.body.temperature=0"),
        *("--profile", "kind=synchronous", "--disable-console"),
        *("--constraint", f"kind=max_requests,count={len(PROMPTS)}"),
        *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
        *("--data", f"kind=json_file,path={_written(folder, rows)}"),
        *("--output", f"kind=json,path={folder / 'result.json'}"),
    )
    (benchmark,) = json.loads((folder / "result.json").read_text())["benchmarks"]
    assert not benchmark["requests"]["errored"]
    answers = {}
    for row in benchmark["requests"]["successful"]:
        body = json.loads(row["request_args"])["body"]
        prompt = body["messages"][0]["content"][0]["text"] if kind == "chat" else body["prompt"]
        answers[prompt] = row["output"]
    return answers


def _written(folder: Path, rows: list[dict[str, str]]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _run(folder: Path, program: str, *arguments: Any) -> None:
    done = subprocess.run(
        [str(part) for part in (ENVIRONMENT / "bin" / program, *arguments)],
        cwd=folder,
        # With an offline hub aiperf takes the tokenizer's path for a name of the hub.
        env=os.environ | {"PYTHONPATH": "", "HF_HUB_OFFLINE": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("generator", [_vllm_bench, _aiperf, _guidellm])
def test_answers_are_the_decoders(
    generator: Generator, kind: str, server: Listener, served: Artifact, tmp_path: Path
) -> None:
    text = load_text(served.path)
    found = generator(kind, server.address, served.path, tmp_path)
    for prompt in PROMPTS:
        asked = [{"role": "user", "content": prompt}]
        ids = text.chat(asked) if kind == "chat" else text.encode(prompt)
        assert found.pop(prompt) == greedy(served.path, ids, COUNT)
    assert not found
