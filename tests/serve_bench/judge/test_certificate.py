"""The certificate: what it promises, and which differences count against it."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from limbeck.contract.artifact import open_artifact
from limbeck.contract.data.heldout import HELDOUT
from limbeck.contract.errors import ArtifactError
from limbeck.contract.files import file_digest
from limbeck.contract.machine import host, versions
from limbeck.contract.results.bench import Arm, Interval
from serve_bench import replay, write_report
from serve_bench.judge.certificate import CERTIFICATE, require_computed
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


Place = tuple[str | int, ...]
CHANGES = ("value", "type", "delete", "add")


def leaves(tree: Any, path: Place = ()) -> Iterator[Place]:
    """Paths of every value in a certificate."""
    if isinstance(tree, dict | list) and tree:
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield from leaves(tree[key], (*path, key))
    else:
        yield path


def changed(tree: Any, path: Place, change: str) -> Any:
    """A copy of ``tree`` with another value at ``path``, or a key less or more there."""
    tree = copy.deepcopy(tree)
    *above, last = path
    place = tree
    for key in above:
        place = place[key]
    value = place[last]
    if change == "delete":
        del place[last]
    elif change == "add":
        place.append(value) if isinstance(place, list) else place.update({f"{last}2": value})
    elif isinstance(value, str):
        place[last] = [value] if change == "type" else f"{value[:-1]}{chr(ord(value[-1]) ^ 1)}"
    elif isinstance(value, bool) or value is None:
        place[last] = int(value or 0) if change == "type" else not value
    elif isinstance(value, float):
        place[last] = str(value) if change == "type" else math.nextafter(value, math.inf)
    else:
        place[last] = float(value) if change == "type" else value + 1
    return tree


def all_changes(certificate: Any) -> Iterator[tuple[str, Any]]:
    """Every field changed in every way: what a message must name, and the new certificate."""
    for path in leaves(certificate):
        # An item more in a list moves the others, so the list is named.
        inner = path[:-1] if isinstance(path[-1], int) else path
        for change in CHANGES:
            yield ".".join(map(str, inner)), changed(certificate, path, change)


def test_every_field_of_a_certificate_is_compared(certified: Path) -> None:
    certificate = json.loads((certified / CERTIFICATE).read_text())
    changes = [*all_changes(certificate)]
    assert len(changes) == 4 * 137
    for name, other in changes[::7]:  # the ways take turns; the slow test below tries all
        with pytest.raises(ArtifactError, match=re.escape(name)):
            require_computed(certified, other, certificate)


@pytest.mark.slow
def test_every_change_of_a_certificate_is_refused(certified: Path, tmp_path: Path) -> None:
    for name in ("student", "onnx", "bench"):
        (tmp_path / name).symlink_to(certified / name)
    text = (certified / CERTIFICATE).read_text()
    for name, other in all_changes(json.loads(text)):
        (tmp_path / CERTIFICATE).write_text(json.dumps(other))
        with pytest.raises(ArtifactError, match=r"certificate\.json: ") as refused:
            replay(run=tmp_path, quality=False, speed=False)
        role = {"artifact.digest": "onnx", "parents.student": "student"}.get(name, name)
        named = (name, f"is of another {role}", f"'{name}'", "certificate of format")
        assert any(words in str(refused.value) for words in named), (name, str(refused.value))
    (tmp_path / CERTIFICATE).write_text(json.dumps(json.loads(text)))  # other blanks: no change
    assert replay(run=tmp_path, quality=False, speed=False)[0].holds


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"verdict": "fail"}, "artifacts and raw samples say: verdict. It was edited"),
        ({"figures": {}}, r"figures, figures.ttft_ms.value, .* and \d+ more. It was edited"),
        ({"bench": "0" * 64}, "is of another bench"),
        ({"bench": 7}, "raw samples say: bench. It"),
        ({"artifact": []}, "artifact, artifact.shipped"),
        ({"parents": "x"}, "parents"),
        ({"format": 2}, "a certificate of format 2"),
        ({"\x1b[2J": 1}, r"say: \\x1b\[2J. It"),
    ],
    ids=str,
)
def test_an_edited_certificate_is_not_replayed(
    certified: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    for name in ("student", "onnx", "bench"):
        (tmp_path / name).symlink_to(certified / name)
    certificate = json.loads((certified / CERTIFICATE).read_text())
    (tmp_path / CERTIFICATE).write_text(json.dumps(certificate | change))
    with pytest.raises(ArtifactError, match=says):
        replay(run=tmp_path)


def test_a_key_that_is_written_twice_and_one_in_another_order_are_refused(
    certified: Path, tmp_path: Path
) -> None:
    for name in ("student", "onnx", "bench"):
        (tmp_path / name).symlink_to(certified / name)
    text = (certified / CERTIFICATE).read_text()
    twice = text.replace('"verdict": "pass"', '"verdict": "fail",\n "verdict": "pass"', 1)
    backwards = json.dumps(dict(reversed(json.loads(text).items())))
    for other in (twice, backwards):
        (tmp_path / CERTIFICATE).write_text(other)
        with pytest.raises(ArtifactError, match="order, number or spelling of its keys"):
            replay(run=tmp_path, quality=False, speed=False)


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
