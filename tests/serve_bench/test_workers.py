"""The processes that run arms: what they time and score, and what they say when they die."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.contract.errors import ArtifactError, DataError, EnvironmentalError, ModelError
from limbeck.contract.results.bench import Arm
from serve_bench.measure.workers import Worker, Workers
from serve_bench.worker import runtimes
from serve_bench.worker.runtimes import (
    OnnxRuntime,
    TorchCompiled,
    TorchEager,
    open_runtime,
    prepare,
)
from tests.factory import Factory
from tests.pico import make_model


def torch_arm(model: Path, name: str = "student") -> Arm:
    return Arm(name, name, "student", "torch", 1, {"model": str(model)})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m", seed=3)


@pytest.fixture(scope="module")
def worker(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Workers(tmp_path_factory.mktemp("logs"), threads=1) as workers:
        yield workers.start(torch_arm(model))


def test_worker_times_every_token_and_ignores_the_end_token(worker: Worker, model: Path) -> None:
    answer = worker.ask("generate", prompt=[1, 2, 3, 4], new_tokens=12)
    assert len(answer["at"]) == len(answer["tokens"]) == 12
    assert answer["started"] < answer["at"][0]
    assert all(b > a for a, b in zip(answer["at"], answer["at"][1:], strict=False))
    assert answer["peak_rss_bytes"] > 50e6
    assert worker.opened["load_s"] > 0
    assert worker.opened["facts"]["threads"] == 1
    assert worker.opened["facts"]["context"] == 64

    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model).eval()
    ids = [1, 2, 3, 4]
    with torch.inference_mode():
        for _ in range(12):
            ids.append(int(reference(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert answer["tokens"] == ids[4:]


def test_worker_scores_what_torch_says(worker: Worker, model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ids = [5, 9, 2, 77, 130, 4]
    found = worker.ask("score", ids=ids, scored=[1] * (len(ids) - 1), vocabulary=258, mixture=None)
    reference = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.inference_mode():
        logp = torch.log_softmax(reference(input_ids=torch.tensor([ids])).logits[0].double(), -1)
    labels_N = logp[torch.arange(5), torch.tensor(ids[1:])]
    assert found["labels"] == 5
    assert found["nll"] == pytest.approx(-float(labels_N.sum()), rel=1e-6)
    # A prompt, and an answer of which the second token is the first choice.
    ids[4] = int(logp[3].argmax())
    found = worker.ask("evaluate", ids=ids[:5], scored=[0, 0, 1, 1], vocabulary=258)
    assert found == {
        "nll": pytest.approx(-float(labels_N[2] + logp[3].max()), rel=1e-6),
        "right": 1,
    }


def test_idle_worker_uses_no_processor(worker: Worker) -> None:
    worker.ask("generate", prompt=[1, 2, 3], new_tokens=4)
    time.sleep(0.3)
    pid = worker._process.pid
    before = _cpu_ticks(pid)
    time.sleep(0.7)
    assert _cpu_ticks(pid) - before <= 2


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def test_the_users_mistake_comes_back_as_itself(tmp_path: Path) -> None:
    spec = {"artifact": str(tmp_path / "gone"), "form": "fp32"}
    with Workers(tmp_path, threads=1) as workers:
        with pytest.raises(ArtifactError, match=r"^fp32: .*gone"):
            workers.start(Arm("fp32", "fp32", "form", "onnxruntime", 1, spec))


def test_weights_that_are_missing_are_not_timed_as_random_ones(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModel

    folder = make_model(tmp_path / "model", tie_word_embeddings=False)
    AutoModel.from_pretrained(folder, dtype=torch.float32).save_pretrained(folder)
    with pytest.raises(
        ModelError, match=r"model: .*lacks 1 of its weights \(for example lm_head.weight\)"
    ):
        TorchEager(model=str(folder), threads=1)


def test_a_crash_shows_the_workers_last_words(tmp_path: Path) -> None:
    worker = Worker(torch_arm(tmp_path), threads=1, log=tmp_path / "log")
    with pytest.raises(
        EnvironmentalError,
        match=r"ended with status 1 during 'nonsense'(?s:.*)nonsense before open",
    ):
        worker.ask("nonsense")
    worker.kill()
    killed = Worker(torch_arm(tmp_path), threads=1, log=tmp_path / "log")
    killed._process.kill()
    with pytest.raises(EnvironmentalError, match=r"killed by signal 9(?s:.*)enough"):
        killed.ask("open")
    killed.kill()


def test_workers_end_with_their_owner(tmp_path: Path) -> None:
    started = []

    def interrupted() -> None:
        with Workers(tmp_path, threads=1) as workers:
            worker = Worker(torch_arm(tmp_path), threads=1, log=tmp_path / "log")
            workers._all["x"] = worker
            started.append(worker)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert started[0]._process.poll() is not None


def test_libraries_may_print_without_breaking_the_answers(tmp_path: Path) -> None:
    program = """
import os
from serve_bench.worker.language import Session
from serve_bench.worker.process import main
Session.open = lambda s, **k: (print("noise"), os.write(1, b"n"), {"facts": 1})[2]
main(Session())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        input='{"command": "open"}\n',
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == '{"facts": 1}\n'
    assert "noise" in done.stderr


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft asks for the old name
def test_an_adapter_is_merged_before_it_is_timed(model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    adapted.save_pretrained(tmp_path)
    ids = np.array([4, 8, 15, 16, 23, 42])
    with torch.inference_mode():
        expected = adapted(input_ids=torch.from_numpy(ids)[None]).logits[0].numpy()
    runtime = TorchEager(model=str(model), adapter=str(tmp_path), threads=1)
    assert runtime.score(ids) == pytest.approx(expected, abs=1e-4)
    assert not any("lora" in name for name, _ in runtime._model.named_parameters())


def test_a_batch_generates_what_its_rows_do_alone(worker: Worker) -> None:
    prompts = [[1, 2, 3, 4], [9, 8, 7, 6], [5, 5, 5, 5]]
    together = worker.batch(prompts, 6)
    assert together["tokens"] == [worker.generate(prompt, 6)["tokens"] for prompt in prompts]
    assert together["prompt_tokens"] == 4
    assert len(together["at"]) == 6


def test_a_static_cache_generates_what_a_growing_one_does(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.compile", lambda forward, **options: forward)
    generate_with_both(model)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # of inductor itself
def test_a_compiled_model_generates_what_the_plain_one_does(model: Path) -> None:
    generate_with_both(model)


def generate_with_both(model: Path) -> None:
    """Eager and compiled, each twice, the second time shorter and in a cache that was used."""
    found = []
    for kind in (TorchEager, TorchCompiled):
        runtime, told = kind(model=str(model), threads=1), []
        for length, new_tokens in ((6, 5), (4, 3)):
            columns = [
                runtime.begin(
                    np.random.default_rng(length).integers(0, 256, (2, length)), new_tokens
                )
            ]
            for _ in range(new_tokens - 1):
                columns.append(runtime.step(columns[-1]))
            told.append(np.stack(columns).tolist())
        found.append(told)
    assert found[0] == found[1]


def test_a_compiled_arm_says_so(model: Path) -> None:
    runtime = open_runtime("torch-compile", {"model": str(model)}, threads=1)
    assert isinstance(runtime, TorchCompiled)
    assert runtime.facts["library"] == f"torch {torch.__version__}, compiled"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_an_arm_for_a_card_is_refused_without_one(model: Path) -> None:
    with pytest.raises(EnvironmentalError, match=r"sees no NVIDIA card here; set bench.device"):
        TorchEager(model=str(model), threads=1, device="cuda")


def test_a_scored_arm_generates_no_more(tiny: Factory) -> None:
    folder = str(tiny.exported().path)
    runtime, fresh = (OnnxRuntime(artifact=folder, form="fp32", threads=1) for _ in range(2))
    ids = np.arange(5)
    assert runtime.score(ids)[-1].argmax() == fresh.begin(ids[None], 1)[0]
    with pytest.raises(DataError, match=r"was scored already, .* open it anew"):
        runtime.begin(ids[None], 1)


def test_genai_is_left_out_where_it_is_missing_or_cannot_run_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ArtifactError, match=r"no genai_config\.json, .*leave onnxruntime-genai"):
        open_runtime("onnxruntime-genai", {"artifact": str(tmp_path)}, threads=1)
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EnvironmentalError, match="genai is not installed; run: pip install 'limb"):
        prepare("onnxruntime-genai", {})
