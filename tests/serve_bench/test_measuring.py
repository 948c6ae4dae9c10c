"""Honest measuring: the sentinel, the machine, memory, energy, the roofline, fairness, and figures
of batches and cold starts.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from limbeck.contract.errors import DataError
from limbeck.contract.recipe import Bench, OfflineScenario
from limbeck.contract.results.bench import Arm
from serve_bench.judge import figures, scenarios
from serve_bench.judge.figures import Reference, Sample
from serve_bench.judge.language import against
from serve_bench.measure import clock, fairness, memory, units
from serve_bench.measure.clock import Limits, time_blocks
from serve_bench.measure.host import machine
from serve_bench.measure.host.roofline import graph_weight_bytes, run_kernels
from serve_bench.measure.host.sentinel import Sentinel
from serve_bench.measure.memory import Energy, Package, Watch, tree_rss
from serve_bench.measure.scenarios import offline
from serve_bench.measure.units import Generation, warm
from serve_bench.measure.workers import Workers
from tests.pico import pico_recipe


def arm(name: str, role: Any = "form", runtime: Any = "onnxruntime") -> Arm:
    return Arm(name, name, role, runtime, 1, {})


class Paced:
    """A worker whose generations take what it is told: seconds a token, one entry a call, the last
    for ever.
    """

    def __init__(self, name: str, paces: list[float]) -> None:
        self.arm, self._paces, self.calls = arm(name), paces, 0

    def generate(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        pace = self._paces[min(self.calls, len(self._paces) - 1)]
        self.calls += 1
        at = [0.01 + pace * index for index in range(new_tokens)]
        return {"started": 0.0, "at": at, "tokens": [1] * new_tokens, "device_s": None}


# Blocks that were disturbed -----------------------------------------------------------------------


class Readings(Sentinel):
    """A sentinel that reads what it is told, then 1."""

    def __init__(self, *readings: float) -> None:
        self.readings, self._next, self.threads = [1.0] * 9, list(readings), 1

    def _reading(self) -> float:
        return self._next.pop(0) if self._next else 1.0


def blocks(sentinel: Sentinel, min_blocks: int = 3) -> tuple[clock.Timed, list[dict[str, Any]]]:
    arms = (arm("onnx:int8"), arm("onnx:int8:twin", "twin"))
    recipe = pico_recipe(bench={"min_blocks": min_blocks, "minutes": 1e-6, "new_tokens": 3})
    reference, raw = Reference("x", "int8", arms, 6), io.StringIO()
    workers: Any = _ByArm(arms)
    timed = time_blocks(
        workers,
        arms,
        lambda block: [Generation([block] * recipe.bench.prompt_tokens, recipe.bench.new_tokens)],
        Limits(min_blocks, 1e-8, reference.first_look),
        raw,
        read=Sample.of,
        sentinel=sentinel,
    )
    return timed, [json.loads(line) for line in raw.getvalue().splitlines()]


class _ByArm:
    def __init__(self, arms: tuple[Arm, ...]) -> None:
        self._workers = {a.id: Paced(a.id, [0.001]) for a in arms}

    def __getitem__(self, wanted: Arm) -> Paced:
        return self._workers[wanted.id]


def test_a_disturbed_block_is_void_kept_raw_and_timed_again() -> None:
    timed, rows = blocks(
        Readings(1.0, 1.0, 1.5, 1.0, 1.0, 1.0)
    )  # slow between the second block and the third
    assert (timed.void, timed.disturbed) == (2, False)
    assert sorted({s.block for s in timed.samples}) == [0, 3, 4]
    void = [row for row in rows if row["event"] == "void"]
    assert {row["block"] for row in void} == {1, 2}
    assert {row["of"] for row in void} == {"sample"}
    assert {row["why"].split()[-3] for row in void} == {"after", "before"}
    assert "1.50 times its median" in void[0]["why"]
    assert len([row for row in rows if row["event"] == "sentinel"]) == 5


def test_a_machine_that_is_always_disturbed_is_named_so_and_measured_all_the_same() -> None:
    timed, _ = blocks(Readings(*[1.0, 9.0] * 20))
    assert timed.disturbed
    assert timed.void == 2  # half of the fewest blocks wanted, because the time was spent already
    assert timed.over_budget
    assert len({s.block for s in timed.samples}) == 3
    assert figures.by_block(timed.samples, "onnx:int8", "tpot") == pytest.approx([0.001] * 3)


def test_the_sentinel_does_the_same_work_on_every_thread_and_leaves_nothing_running() -> None:
    before = threading.active_count()
    sentinel = Sentinel(2)
    assert sentinel.read() > 0
    assert sentinel.median > 0
    assert sentinel.complaint(sentinel.median, 1.3 * sentinel.median)
    assert sentinel.complaint(sentinel.median, 1.2 * sentinel.median) is None
    sentinel.close()
    assert threading.active_count() == before


# Warming up ---------------------------------------------------------------------------------------


def test_warming_up_ends_when_three_in_a_row_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "_WARM_SECONDS", 0)
    worker: Any = Paced("a", [9.0, 5.0, 2.0, 1.0, 1.05, 1.02])
    raw = io.StringIO()
    found = warm(worker, [1], 4, raw)
    assert found["steady"]
    assert found["warm_up_runs"] == 6
    assert [json.loads(line)["event"] for line in raw.getvalue().splitlines()] == ["warm-up"] * 6


def test_warming_up_lasts_its_least_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(np.arange(0, 100, 0.1))
    monkeypatch.setattr(units.time, "monotonic", lambda: float(next(clock)))
    worker: Any = Paced("a", [1.0])
    found = warm(worker, [1], 4, io.StringIO())
    assert found["steady"]
    assert found["warm_up_s"] >= 0.5 > 0.1 * 3


def test_what_never_settles_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "_WARM_PATIENCE", 0)
    worker: Any = Paced("a", [1.0, 2.0] * 30)
    found = warm(worker, [1], 4, io.StringIO())
    assert not found["steady"]
    assert found["warm_up_runs"] == 11


# The same work ------------------------------------------------------------------------------------


def facts(**over: Any) -> dict[str, Any]:
    return {"threads": 2, "kv_cache": True, "vocabulary": 100} | over


def test_the_manifest_says_what_all_have_in_common() -> None:
    told = {
        "a": facts(),
        "b": facts(vocabulary=120),
        "url": facts(threads=None, kv_cache=None, vocabulary=None),
    }
    found = fairness.manifest(told, prompt_tokens=2, new_tokens=3, prompts=[[1, 2], [3, 4]])
    digest = found.pop("prompts_sha256")
    assert found == {"prompt_tokens": 2, "new_tokens": 3, "threads": 2, "kv_cache": True}
    again = fairness.manifest(told, prompt_tokens=2, new_tokens=3, prompts=[[1, 2], [3, 5]])
    assert again["prompts_sha256"] != digest


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"threads": 1}, r"differ in threads \(a 2, b 1\); bench.threads sets it"),
        ({"kv_cache": False}, "differ in kv_cache"),
        ({"vocabulary": 4}, "b knows 4 tokens, the prompts hold token 4"),
    ],
)
def test_other_conditions_are_refused(other: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        fairness.manifest(
            {"a": facts(), "b": facts(**other)}, prompt_tokens=1, new_tokens=2, prompts=[[4]]
        )


def test_other_work_is_refused() -> None:
    answer = {"rows": [[1, 2]], "at": [0.1, 0.2], "prompt_tokens": 3}
    fairness.require_same_work("a", answer, rows=1, prompt_tokens=3, new_tokens=2)
    with pytest.raises(DataError, match="a: counted 3 prompt tokens where 4 were given"):
        fairness.require_same_work("a", answer, rows=1, prompt_tokens=4, new_tokens=2)
    with pytest.raises(
        DataError, match=r"a: generated 1 rows of \[2\] tokens where 1 of 5 were asked"
    ):
        fairness.require_same_work("a", answer, rows=1, prompt_tokens=3, new_tokens=5)


# The machine --------------------------------------------------------------------------------------


def test_limits_of_a_container_in_both_versions_of_cgroups(tmp_path: Path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    (two / "pod/box").mkdir(parents=True)
    (two / "cgroup.controllers").write_text("cpu memory")
    (two / "pod/cpu.max").write_text("150000 100000\n")
    (two / "pod/box/cpu.max").write_text("max 100000\n")
    (two / "pod/box/memory.max").write_text("4000000000\n")
    (two / "member").write_text("0::/pod/box\n")
    assert machine.limits(two, two / "member") == {"cpus": 1.5, "memory_bytes": 4_000_000_000}
    for controller in ("cpu", "memory"):
        (one / controller / "box").mkdir(parents=True)
    (one / "cpu/box/cpu.cfs_quota_us").write_text("200000")
    (one / "cpu/box/cpu.cfs_period_us").write_text("100000")
    (one / "memory/box/memory.limit_in_bytes").write_text(str(2**63 - 4096))
    (one / "member").write_text("5:cpu,cpuacct:/box\n3:memory:/box\n")
    assert machine.limits(one, one / "member") == {"cpus": 2.0, "memory_bytes": None}
    assert machine.limits(tmp_path / "none", tmp_path / "member") == {
        "cpus": None,
        "memory_bytes": None,
    }


def test_the_fingerprint_says_what_bears_on_speed() -> None:
    found = machine.fingerprint(threads=3, device="cpu")
    assert found["threads"] == 3
    assert found["host"]["cores"] >= 1
    assert set(found["limits"]) == {"cpus", "memory_bytes"}
    assert "numpy" in found["versions"]
    assert isinstance(found["gpus"], list)
    json.dumps(found)


def test_memory_is_that_of_the_whole_process_tree() -> None:
    child = "x = bytearray(80_000_000); print('up', flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    with machine.Nvml() as nvml, Watch(process.pid, nvml) as watch:
        process.stdout.readline()
        while watch.peak_rss < 80e6:
            time.sleep(0.01)
        assert tree_rss(process.pid) > 80e6
        process.stdin.write("\n")
        process.stdin.close()
        process.wait()
    process.stdout.close()
    assert tree_rss(process.pid) == 0


def test_energy_is_read_where_it_can_be_and_said_to_be_missing_elsewhere(tmp_path: Path) -> None:
    with machine.Nvml() as nvml:
        nvml.cards = []
        nothing = Energy(nvml, tmp_path)
        assert nothing.over(lambda: pytest.fail("no reason to run")) is None
        assert f"no RAPL package in {tmp_path}" in nothing.per_token(None, 1)["why"]
        for name in ("intel-rapl:0", "intel-rapl:0:0"):  # the second is a part of the first
            (tmp_path / name).mkdir()
            (tmp_path / name / "energy_uj").write_text("1000000")
            (tmp_path / name / "max_energy_range_uj").write_text("5000000")
        energy = Energy(nvml, tmp_path)
        joules = energy.over(lambda: (tmp_path / "intel-rapl:0/energy_uj").write_text("3000000"))
        assert joules == pytest.approx(2)
        assert energy.per_token(joules, 4) == {"joules_per_token": 0.5, "source": "RAPL"}
    package = Package(tmp_path / "intel-rapl:0")
    assert package.joules() == 3
    (tmp_path / "intel-rapl:0/energy_uj").write_text("500000")  # it went round
    assert package.joules() == 5.5


class Cards:
    """NVML with one card, whose memory in use and energy are those of ``generations``."""

    lib, why = None, ""

    def __init__(self, worker: Paced | None = None) -> None:
        self.cards, self._worker = ["card"] if worker else [], worker

    def __enter__(self) -> Cards:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def used_bytes(self) -> int:
        return 1000 + (500 if self._worker and self._worker.calls else 0)

    def joules(self) -> float:
        return 6.0 * self._worker.calls if self._worker else 0.0


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_memory_and_energy_of_a_card(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    class Slow(Paced):
        pid = os.getpid()

        def generate(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
            answer = super().generate(prompt, new_tokens) | {"peak_rss_bytes": 10**15}
            time.sleep(0.05)  # memory is looked at every 10 ms
            return answer

    worker = Slow("a", [0.001])
    chosen = Arm("a", "a", "form", "onnxruntime", 1, {"device": device})
    workers: Any = SimpleNamespace(create=lambda _: worker, open=lambda _: None)
    monkeypatch.setattr(memory, "Nvml", lambda: Cards(worker))
    found = memory.measure_memory(workers, [chosen], Generation([1, 2], 4))["a"]
    assert found["device_bytes"] == (500 if device == "cuda" else None)
    assert found["peak_rss_bytes"] == 10**15  # the kernel's mark of the process
    assert worker.calls == 1 + 3
    # Three generations of four tokens, 6 J each.
    assert found["energy"]["joules_per_token"] >= 1.5
    assert "NVML" in found["energy"]["source"]


def test_a_machine_that_gives_no_reason_has_no_energy(tmp_path: Path) -> None:
    cards: Any = Cards()
    assert Energy(cards, tmp_path).per_token(None, 4) == {
        "joules_per_token": None,
        "why": f"no RAPL package in {tmp_path}",
    }


def test_kernels_and_where_decoding_stands() -> None:
    found = run_kernels(1, "cpu", array_bytes=1 << 20, seconds=0.01)
    assert found["bandwidth_bytes_s"] == max(found["triad_bytes_s"], found["read_bytes_s"]) > 0
    assert found["flops_s"] > 0
    stands = against({"bandwidth_bytes_s": 1e10}, 10**8, 20.0)
    assert stands == {
        "weight_bytes": 10**8,
        "bandwidth_fraction": pytest.approx(0.5),
        "limit_tokens_s": 100.0,
    }
    assert against({"bandwidth_bytes_s": 1e10}, None, 20.0) is None


def test_weights_that_a_token_reads(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    def matrix(name: str, *dims: int, kind: int = TensorProto.FLOAT) -> Any:
        size = (
            int(np.prod(dims))
            // (2 if kind == TensorProto.UINT4 else 1)
            * (4 if kind == TensorProto.FLOAT else 1)
        )
        return helper.make_tensor(name, kind, dims, bytes(size), raw=True)

    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["a"]),  # one row a token
        helper.make_node("Gather", ["tied", "ids"], ["b"]),
        helper.make_node("MatMul", ["a", "tied"], ["c"]),  # read in full, once
        helper.make_node("MatMulNBits", ["c", "packed"], ["d"], domain="com.microsoft"),
    ]
    tensors = [
        matrix("table", 100, 8),
        matrix("tied", 8, 8),
        matrix("packed", 6, 4, kind=TensorProto.UINT4),
        matrix("unused", 9),
    ]
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "g", [], [], tensors)), tmp_path / "g.onnx"
    )
    assert graph_weight_bytes(tmp_path / "g.onnx") == 8 * 8 * 4 + 6 * 4 // 2


# Batches and cold starts --------------------------------------------------------------------------


def test_throughput_never_mixes_prompt_and_generated_tokens() -> None:
    rows = [
        {
            "event": "offline",
            "arm": "a",
            "batch": 4,
            "prompt_tokens": 10,
            "new_tokens": 6,
            "block": block,
            "at": [s, s, s, s, s, s + 1],
        }
        for block in range(6)
        for s in (1.0, 4.0)
    ]
    (cell,) = scenarios.offline([*rows, {"event": "sample"}])
    assert cell["n"] == 12
    assert cell["prompt_tokens_s"]["value"] == pytest.approx(
        4 * 10 / 2
    )  # geometric mean of 1 and 4 seconds
    assert cell["generated_tokens_s"]["value"] == pytest.approx(4 * 5 / 1)
    assert cell["requests_s"]["value"] == pytest.approx(4 / np.sqrt(2 * 5))
    assert cell["prompt_tokens_s"]["low"] is not None


def test_the_grid_is_gone_round_and_every_arm_does_the_same(tmp_path: Path) -> None:
    asked: list[tuple[str, list[list[int]], int]] = []

    class Batches:
        def __init__(self, name: str) -> None:
            self.name = name

        def batch(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
            asked.append((self.name, prompts, new_tokens))
            return {"at": [0.1] * (new_tokens - 1) + [0.2]}

    arms = [arm("a"), arm("b")]
    workers: Any = type("W", (), {"__getitem__": lambda self, which: Batches(which.id)})()
    grid = OfflineScenario.model_validate(
        {"kind": "offline", "batches": [2, 1], "prompts": [3], "outputs": [4], "blocks": 2}
    )
    raw = io.StringIO()
    offline.measure_offline(workers, arms, lambda block, tokens: [block] * tokens, grid, raw)
    rows = [json.loads(line) for line in raw.getvalue().splitlines()]
    assert [(row["batch"], row["block"]) for row in rows[::4]] == [(1, 0), (2, 0), (1, 1), (2, 1)]
    assert [row["arm"] for row in rows[:8]] == ["a", "b", "b", "a", "b", "a", "a", "b"]
    timed = [entry for entry in asked if entry[2] == 4]
    assert {str(prompts) for name, prompts, _ in timed if name == "a"} == {
        str(p) for name, p, _ in timed if name == "b"
    }
    assert all(len(prompts[0]) == 3 for _, prompts, _ in timed)


def test_cold_starts_are_summed_to_the_first_token() -> None:
    row = {
        "start_s": 1.0,
        "import_s": 2.0,
        "load_s": 3.0,
        "first_token_s": 4.0,
        "second_token_s": 5.0,
    }
    found = scenarios.cold([{"event": "cold", "arm": "a", **row}] * 3, {"a": "A"})
    assert found["a"]["total_s"]["value"] == 10
    assert found["a"]["second_token_s"]["value"] == 5
    assert (found["a"]["label"], found["a"]["n"]) == ("A", 3)


def test_the_fastest_teacher_is_compared() -> None:
    arms = (
        arm("teacher:slow", "teacher"),
        arm("teacher:fast", "teacher"),
        arm("student", "student"),
    )
    arms += (arm("onnx:fp32"), arm("onnx:int8"))
    samples = [
        Sample(a.id, 0, 0, (1.0, 1.0 + seconds))
        for a, seconds in zip(arms, (3, 2, 1, 1, 1), strict=True)
    ]
    reference = Reference("x", "int8", arms, 6)
    assert [a.id for a in scenarios.compared(reference, samples)] == [
        "onnx:int8",
        "onnx:fp32",
        "teacher:fast",
    ]
    alone = Reference("x", "fp32", arms[2:4], 6)
    assert [a.id for a in scenarios.compared(alone, samples)] == ["onnx:fp32", "student"]


def test_scenarios_that_were_not_asked_have_no_key() -> None:
    assert scenarios.summary([], {}, Bench(), []) == {"scenarios": ["single"]}


# On a card ----------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_card_is_fingerprinted_watched_and_waited_for(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA card")
    from serve_bench.measure.memory import measure_memory
    from tests.pico import make_model

    cards = machine.gpus()
    assert cards[0]["memory_bytes"] > 1e9
    spec = {"model": str(make_model(tmp_path / "model", seed=3)), "device": "cuda"}
    chosen = Arm("student", "student", "student", "torch", 1, spec)
    with Workers(tmp_path, threads=1) as workers:
        found = measure_memory(workers, [chosen], Generation([1, 2, 3], 4))["student"]
        answer = workers[chosen].generate([1, 2, 3], 4)
    assert found["device_bytes"] > 10e6  # a CUDA context alone is more
    assert len(answer["device_s"]) == 4
    assert sum(answer["device_s"]) <= answer["at"][-1]
    assert run_kernels(1, "cuda", array_bytes=1 << 26, seconds=0.05)["bandwidth_bytes_s"] > 1e10
