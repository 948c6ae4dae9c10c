"""The certificate: what it promises, and which differences count against it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from limbeck.contract.artifact import open_artifact
from limbeck.contract.data.heldout import HELDOUT
from limbeck.contract.files import file_digest
from limbeck.contract.machine import host, versions
from limbeck.contract.results.bench import Arm, Interval
from serve_bench import write_report
from serve_bench.judge.certificate import CERTIFICATE
from serve_bench.judge.findings import judge_loss, judge_speed
from serve_bench.measure.arms import form_arm
from serve_bench.measure.replay import differences, replay_speed
from serve_bench.tasks import task_of
from tests.serve_bench.tell.runs import PARENTS, make_run, recipe

THEN = {"value": 8.0, "low": 7.5, "high": 8.5, "n": 6}
OTHER = {"processor": "A then, B now"}


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with its report and certificate; tests only read it."""
    folder, chosen = tmp_path_factory.mktemp("certified"), recipe()
    write_report(run=make_run(folder, chosen), recipe=chosen)
    return folder


def test_a_certificate_holds_digests_figures_and_the_machine(certified: Path) -> None:
    chosen, tmp_path = recipe(), certified
    found, data = (
        json.loads((tmp_path / CERTIFICATE).read_text()),
        json.loads((tmp_path / "report.json").read_text()),
    )
    onnx, bench, student = (open_artifact(tmp_path / name) for name in ("onnx", "bench", "student"))
    assert found["artifact"]["digest"] == onnx.digest
    assert found["artifact"]["files"] == {"model.onnx": file_digest(tmp_path / "onnx/model.onnx")}
    assert found["parents"] == {"student": student.digest, **PARENTS}
    assert (found["bench"], found["recipe"]["digest"]) == (bench.digest, chosen.digest)
    assert found["data"]["heldout"] == file_digest(tmp_path / "bench" / HELDOUT)
    assert found["data"]["domains"]["speeches"] == {"blocks": 12, "labels": 12 * 255}
    shipped = data["arms"]["onnx:int8-weight"]
    assert (
        found["figures"]["tpot_ms"] == shipped["tpot_ms"]
    )  # two copies agreed, so nothing was widened
    assert found["figures"]["bytes"] == shipped["bytes"]
    assert found["figures"]["quality"] == {"vocabulary": 49152} | shipped["quality"]
    assert (
        found["figures"]["speed_over"]["speeches"]
        == data["speed_of_shipped_over"]["teacher:speeches"]["tpot"]
    )
    assert (
        found["figures"]["speed_over_fp32"]["tpot"]
        == data["speed_of_shipped_over"]["onnx:fp32"]["tpot"]
    )
    assert (
        found["figures"]["loss_rise_over"]["fp32"] == data["nll_rise_of_shipped_over"]["onnx:fp32"]
    )
    assert (found["verdict"], found["machine"]["host"]["cores"]) == ("pass", 2)


@pytest.mark.parametrize(
    ("now", "differs", "holds", "says"),
    [
        (Interval(8.6, 8.4, 8.8, 6), {}, True, "intervals overlap"),
        (
            Interval(8.7, 8.55, 8.85, 6),
            {},
            True,
            "slower than certified, 1.09×, less than the 10 % that counts",
        ),
        (
            Interval(9.0, 8.6, 9.4, 6),
            {},
            False,
            "slower than certified, 1.12×, on the same machine",
        ),
        (Interval(6.0, 5.8, 6.2, 6), {}, True, "faster than certified, 0.75×, on the same machine"),
        (
            Interval(16.0, 15.0, 17.0, 6),
            OTHER,
            True,
            "slower than certified, 2.00×, on what is not the same: processor: A",
        ),
        (Interval(9.0, 0.0, float("inf"), 3), {}, True, "too few blocks"),
    ],
)
def test_speed_counts_on_the_same_machine_only(
    now: Interval, differs: dict[str, str], holds: bool, says: str
) -> None:
    finding = judge_speed("TPOT ms", THEN, now, differs=differs, busy={})
    assert finding.holds is holds
    assert says in finding.says


def test_a_busy_machine_is_named_and_still_counts() -> None:
    busy = {"load average": "3.10 on 2 cores"}
    finding = judge_speed("x", THEN, Interval(10.0, 9.0, 11.0, 6), differs={}, busy=busy)
    assert not finding.holds
    assert finding.says.endswith("; load average 3.10 on 2 cores before the replay")


@pytest.mark.parametrize(
    ("now", "reasons", "holds", "says"),
    [
        (2.5, {}, True, "equal to the digit"),
        (2.5 + 5e-16, {}, False, "although provider, processor flags and libraries are the same"),
        (
            2.51,
            {"numpy": "1 then, 2 now"},
            True,
            "within the parity tolerance of 0.03; numpy: 1 then, 2 now",
        ),
        (2.54, {"numpy": "1 then, 2 now"}, False, "past the parity tolerance"),
    ],
)
def test_loss_is_equal_to_the_digit_or_has_a_reason(
    now: float, reasons: dict[str, str], holds: bool, says: str
) -> None:
    finding = judge_loss("loss", 2.5, now, tolerance=0.03, reasons=reasons)
    assert finding.holds is holds
    assert says in finding.says


class FakeWorkers:
    """Generations of a made-up machine: seconds a token by arm, and a little noise by block."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.made = seconds, 0

    def start(self, arm: Arm) -> None:
        pass

    def stop(self, arms: list[Arm]) -> None:
        pass

    def __getitem__(self, arm: Arm) -> FakeWorkers:
        self.arm = arm
        return self

    def generate(self, tokens: list[int], count: int) -> dict[str, Any]:
        self.made += 1
        each = self.seconds[self.arm.id.removesuffix(":twin")] * (1 + 0.005 * (self.made % 3))
        at = [each * (10 + n) for n in range(count)]
        return {"at": at, "started": 0.0, "tokens": [0] * count, "device_s": None}


@pytest.mark.parametrize(
    ("int8", "fp32", "holds", "says"),
    [
        (8.0, 20.0, True, "intervals overlap"),
        (
            10.0,
            25.0,
            True,
            "its speed over the fp32 graph is as certified",
        ),  # the machine is slower
        # The graph is slower, by 1.25; a void block of a busy machine moves the noise, up to 1.26.
        (10.0, 20.0, False, "slower than certified, 1.2"),
        (8.4, 20.0, True, "less than the 10 % that counts"),
        (8.0, 16.0, True, "its own times are as certified"),
        (6.0, 12.0, True, "faster than certified"),
    ],
)
def test_a_slower_machine_is_not_a_slower_graph(
    certified: Path,
    int8: float,
    fp32: float,
    holds: bool,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    certificate = json.loads((certified / CERTIFICATE).read_text())
    around = {"low": 0.98, "value": 1.0, "high": 1.02}
    certificate["figures"] |= {
        f"{metric}_ms": {k: v * ms for k, v in around.items()}
        for metric, ms in (("tpot", 8.0), ("ttft", 80.0))
    }
    certificate["figures"]["speed_over_fp32"] = {
        key: {k: v * 2.5 for k, v in around.items()} for key in ("tpot", "ttft")
    }
    onnx = open_artifact(certified / "onnx", verify=False)
    task = task_of(recipe())
    task.open_data(certified / "bench")
    workers: Any = FakeWorkers({"onnx:int8-weight": int8 / 1e3, "onnx:fp32": fp32 / 1e3})
    arm = form_arm(onnx, "int8-weight")
    findings = replay_speed(workers, arm, certificate, task, onnx, {})
    assert len(findings) == 4
    assert all(finding.holds for finding in findings) is holds
    assert any(says in finding.says for finding in findings)


def test_differences_name_what_changed() -> None:
    machine: dict[str, Any] = {"host": host(), "provider": "CPUExecutionProvider"}
    certificate = {"machine": machine, "versions": versions()}
    assert differences(certificate, "CPUExecutionProvider") == {}
    older = {"machine": machine | {"host": host() | {"flags": ["another"], "cores": 64}}}
    older |= {"versions": versions() | {"onnxruntime": "1.2"}}
    found = differences(older, "CUDAExecutionProvider")
    assert list(found) == ["execution provider", "processor flags", "cores", "onnxruntime"]
    assert found["execution provider"] == "CPUExecutionProvider then, CUDAExecutionProvider now"
    assert found["onnxruntime"].startswith("1.2 then, ")
