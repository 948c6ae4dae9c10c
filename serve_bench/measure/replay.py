"""Replay a certificate: measure its promises about the shipped form again, on this machine.

Needs only `onnx`, `bench` and the certificate, not the student: the held-out text is in `bench`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from limbeck.contract.artifact import Artifact, open_artifact, student_of
from limbeck.contract.errors import ArtifactError
from limbeck.contract.files import temporary_folder
from limbeck.contract.machine import host, versions
from limbeck.contract.printable import printable
from limbeck.contract.results.bench import Arm
from serve_bench.judge import figures
from serve_bench.judge.certificate import (
    CERTIFICATE,
    FP32,
    certify,
    read_certificate,
    require_computed,
)
from serve_bench.judge.compare import Chooser
from serve_bench.judge.findings import Finding, judge_loss, judge_speed
from serve_bench.judge.stats import FEWEST_BLOCKS, first_look
from serve_bench.judge.task import judge_bench, read_bench
from serve_bench.measure.arms import form_arm
from serve_bench.measure.clock import Limits, time_blocks
from serve_bench.measure.task import MeasuringTask
from serve_bench.measure.workers import Workers

_DIGITS = ("onnxruntime", "onnxruntime-gpu", "numpy")  # can change the last digits of a score
_BUSY = 0.5  # load average a core, above which a slower replay is put down to it


def replay(
    choose: Chooser[MeasuringTask], *, run: Path, quality: bool = True, speed: bool = True
) -> list[Finding]:
    """See `serve_bench.replay`."""
    certificate = read_certificate(run)
    onnx = open_artifact(run / "onnx", kind="onnx", verify=False)
    bench = open_artifact(run / "bench", kind="bench")
    student = open_artifact(student_of(onnx), verify=False) if student_of(onnx).is_dir() else None
    _require_ours(certificate, run, onnx=onnx, bench=bench, student=student)
    task = choose(bench)
    computed = certify(
        judged=judge_bench(read_bench(bench, task), task),
        task=task,
        bench=bench,
        onnx=onnx,
        parents=_parents(certificate, student),
        recipe=task.recipe,
    )
    require_computed(run, certificate, computed)
    says = "every field computed again from the artifacts and raw samples: the same"
    findings = [Finding("certificate", CERTIFICATE, "artifacts", says, True)]
    if not quality and not speed:
        return findings
    task.open_data(bench.path)
    arm = form_arm(onnx, str(certificate["artifact"]["shipped"]))
    threads = int(certificate["protocol"]["threads"])
    with temporary_folder() as work, Workers(work, threads=threads, task=task.name) as workers:
        facts = workers.start(arm).opened["facts"]
        differs = differences(certificate, facts.get("provider"))
        if speed:  # before scoring, which ends an arm's use for generation
            findings += replay_speed(workers, arm, certificate, task, onnx, differs)
        if quality:
            found = task.replay_quality(workers, arm, certificate, bench, work)
            tolerance, reasons = task.tolerance(onnx), _reasons(differs)
            findings += [
                judge_loss(name, then, now, tolerance=tolerance, reasons=reasons)
                for name, then, now in found
            ]
    return findings


def _reasons(differs: Mapping[str, str]) -> dict[str, str]:
    names = ("execution provider", "processor flags", *_DIGITS)
    return {name: differs[name] for name in names if name in differs}


def differences(certificate: Mapping[str, Any], provider: str | None) -> dict[str, str]:
    """Differences from the machine and versions of the certificate, by name: "then, now"."""
    then, now = certificate["machine"], host()
    pairs = {
        "execution provider": (then["provider"], provider),
        "processor": (then["host"]["processor"], now["processor"]),
        "processor flags": (" ".join(then["host"]["flags"]), " ".join(now["flags"])),
        "cores": (then["host"]["cores"], now["cores"]),
        "memory": (then["host"]["memory_bytes"], now["memory_bytes"]),
        "system": (then["host"]["system"], now["system"]),
    }
    for name in sorted(certificate["versions"].keys() | versions().keys()):
        pairs[name] = (certificate["versions"].get(name), versions().get(name))
    return {
        name: f"{a or 'none'} then, {b or 'none'} now" for name, (a, b) in pairs.items() if a != b
    }


def _require_ours(
    certificate: Mapping[str, Any],
    run: Path,
    *,
    onnx: Artifact,
    bench: Artifact,
    student: Artifact | None,
) -> None:
    """Raise `ArtifactError` if the certificate is of other artifacts."""
    made_from = {"onnx": (("artifact", "digest"), onnx), "bench": (("bench",), bench)}
    if student is not None:
        made_from["student"] = (("parents", "student"), student)
    for role, (path, artifact) in made_from.items():
        promised: Any = certificate
        for key in path:
            promised = promised.get(key) if isinstance(promised, Mapping) else None
        if isinstance(promised, str) and promised != artifact.digest:
            raise ArtifactError(
                f"{run / CERTIFICATE}: is of another {role} (found {artifact.digest[:12]}, "
                f"expected {printable(promised[:12])}); "
                f"run `limbeck report {run}`, which writes the certificate of what is there."
            )


def _parents(certificate: Mapping[str, Any], student: Artifact | None) -> Mapping[str, str]:
    """The student's parents. Without the student, nothing else knows them."""
    if student is not None:
        parents: Mapping[str, str] = student.manifest["parents"]
        return parents
    given = certificate.get("parents")
    roles = given if isinstance(given, Mapping) else {}
    return {role: digest for role, digest in roles.items() if role != "student"}


def replay_speed(
    workers: Workers,
    arm: Arm,
    certificate: Mapping[str, Any],
    task: MeasuringTask,
    onnx: Artifact,
    differs: Mapping[str, str],
) -> list[Finding]:
    """Time the shipped form shortly beside its copy and fp32, with the bench's block loop."""
    promised, shipped = certificate["figures"], str(certificate["artifact"]["shipped"])
    twin = replace(arm, id=f"{arm.id}:twin", role="twin")
    arms = [arm, twin] + ([form_arm(onnx, "fp32")] if promised["speed_over_fp32"] else [])
    for other in arms[1:]:
        workers.start(other)
    load, raw = os.getloadavg()[0], io.StringIO()
    for chosen in arms:
        for unit in task.units(0):
            unit.warm(workers[chosen], raw)
    limits = Limits(FEWEST_BLOCKS, 0.0, first_look(FEWEST_BLOCKS))
    timed = time_blocks(workers, arms, task.units, limits, raw, read=task.read_sample)
    workers.stop(arms[1:])
    reference = replace(task.reference(shipped, arms), first_look=limits.first_look)
    cores = host()["cores"]
    busy = {"load average": f"{load:.2f} on {cores} cores"} if load > _BUSY * cores else {}
    findings = []
    for title, metric, cell in task.replayed:
        then, over = promised[f"{metric}_ms"], promised["speed_over_fp32"]
        times = ratio = None
        if then is not None:
            now = figures.milliseconds(timed.samples, reference, metric, cell)
            times = judge_speed(f"{title} ms", then, now, differs=differs, busy=busy)
        if over:
            now = figures.speed(timed.samples, reference, FP32, metric)
            name, then = f"speed over fp32, {title}", over[metric]
            ratio = judge_speed(name, then, now, more_is_faster=True, differs=differs, busy=busy)
        findings += _one_may_move(ratio, times)
    return findings


def _one_may_move(ratio: Finding | None, times: Finding | None) -> list[Finding]:
    """One of the two may move with the machine: its clock moves the times, others who use its
    memory the ratio."""
    if ratio is not None and times is not None and ratio.holds != times.holds:
        if ratio.holds:
            note = "its speed over the fp32 graph is as certified"
            times = replace(times, says=f"{times.says}; {note}", holds=True)
        else:
            note = "its own times are as certified"
            ratio = replace(ratio, says=f"{ratio.says}; {note}", holds=True)
    return [finding for finding in (ratio, times) if finding is not None]
