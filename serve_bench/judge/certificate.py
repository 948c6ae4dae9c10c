"""The deployment certificate of a run: certificate.json, what was promised of the shipped form, and the replay that checks it.

Everything in it is computed from the artifacts. The replay needs `onnx`, `bench` and the certificate only, not the student
nor the text: the held-out blocks travel in `bench`. Nothing here decides what is good enough; gates did that.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from limbeck.contract.artifact import Artifact, open_artifact, student_of
from limbeck.contract.errors import ArtifactError
from limbeck.contract.files import file_digest, read_json
from limbeck.contract.heldout import HELDOUT, Blocks, load_heldout, mean_nll
from limbeck.contract.machine import host, versions
from limbeck.contract.progress import task
from limbeck.contract.recipe import Recipe, parse_recipe
from serve_bench.judge import figures
from serve_bench.judge.figures import ENVIRONMENT, QUALITY, SAMPLES, Reference, Sample
from serve_bench.judge.gates import Verdict
from serve_bench.judge.quality import summarise
from serve_bench.judge.stats import FEWEST_BLOCKS, Interval, first_look
from serve_bench.measure.arms import Arm, Workers
from serve_bench.measure.clock import order, prompt

CERTIFICATE = "certificate.json"
FORMAT = 2
_FP32 = "onnx:fp32"  # the arm
_DIGITS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
)  # libraries that can change the last digits of a score
_BUSY = 0.5  # load average a core, above which a slower replay is put down to it
_NEAR = 1.1  # slower by less is what one machine's own processes and minutes differ by: up to 8 % was seen, past intervals
_WARM = 2  # generations before the replay's clock counts
_BLOCKS = FEWEST_BLOCKS


@dataclass(frozen=True)
class Finding:
    """One promise of the certificate beside what was found; ``holds`` is false where the difference has no explanation."""

    figure: str
    promised: str
    found: str
    says: str
    holds: bool


# Writing ---------------------------------------------------------------------------------------------------------


def certify(
    *, bench: Artifact, onnx: Artifact, student: Artifact, recipe: Recipe, verdict: Verdict
) -> dict[str, Any]:
    """The content of certificate.json: digests, figures with intervals, and the machine they were measured on."""
    shipped = str(bench.result["shipped"])
    environment = json.loads((bench.path / ENVIRONMENT).read_text())
    form = onnx.result["forms"][shipped]
    return {
        "format": FORMAT,
        "recipe": {"name": recipe.name, "digest": recipe.digest},
        "verdict": verdict.status,
        "sentence": verdict.sentence,
        "gates": [vars(gate) for gate in verdict.gates],
        "artifact": {
            "shipped": shipped,
            "digest": onnx.digest,
            "files": {
                name: onnx.manifest["files"][name]["sha256"] for name in sorted(form["files"])
            },
        },
        # A recovered student is made from a student, which must not stand in its place.
        "parents": {
            "student before recovery" if role == "student" else role: digest
            for role, digest in student.manifest["parents"].items()
        }
        | {"student": student.digest},
        "bench": bench.digest,
        "data": {
            "heldout": heldout_file(bench, student)[1],
            "domains": {
                name: {"blocks": len(sizes["labels"]), "labels": sum(sizes["labels"])}
                for name, sizes in json.loads((bench.path / QUALITY).read_text())["domains"].items()
            },
        },
        "figures": promises(bench, recipe),
        "protocol": {
            "prompt_tokens": recipe.bench.prompt_tokens,
            "new_tokens": recipe.bench.new_tokens,
            "threads": environment["threads"],
            "blocks": environment["blocks"],
        },
        "measured": bench.manifest["created"],
        "machine": {
            "host": environment["host"],
            "governor": environment.get("governor"),
            "limits": environment.get("limits"),
            "load_average": environment["before"]["load_average"],
            "provider": environment["arms"][f"onnx:{shipped}"].get("facts", {}).get("provider"),
        },
        "versions": environment["versions"],
    }


def promises(bench: Artifact, recipe: Recipe) -> dict[str, Any]:
    """Figures of the shipped form from the raw samples, with the intervals that the gates were judged by."""
    samples = figures.read_samples(bench.path / SAMPLES)
    quality = json.loads((bench.path / QUALITY).read_text())
    arms = bench.result["arms"]
    reference = figures.reference_of(
        recipe,
        str(bench.result["shipped"]),
        [
            Arm(name, arm["label"], arm["role"], arm["runtime"], arm["bytes"], {})
            for name, arm in arms.items()
        ],
    )
    shipped = reference.shipped_arm.id
    evidence = figures.evidence(samples, quality, reference)
    assert evidence.ttft_ms is not None
    assert evidence.tpot_ms is not None
    return {
        "ttft_ms": figures.asdict(evidence.ttft_ms),
        "tpot_ms": figures.asdict(evidence.tpot_ms),
        "speed_over": {
            name: figures.asdict(interval) for name, interval in evidence.speedup.items()
        },
        # What a replay can time beside it: a machine's good and bad minutes are the same for both graphs.
        "speed_over_fp32": {
            metric: figures.asdict(figures.speed(samples, reference, _FP32, metric))
            for metric in ("ttft", "tpot")
        }
        if _FP32 in arms and shipped != _FP32
        else None,
        "loss_rise_over": {
            name: figures.asdict(rise) for name, (_, rise) in evidence.rise_over_teachers.items()
        }
        | ({"fp32": figures.asdict(evidence.rise_over_fp32)} if evidence.rise_over_fp32 else {}),
        "bytes": evidence.size,
        "peak_rss_bytes": arms[shipped]["peak_rss_bytes"],
        "quality": {"vocabulary": quality["vocabulary"], **summarise(quality, shipped)},
    }


def heldout_file(bench: Artifact, student: Artifact | None) -> tuple[Path, str]:
    """The held-out blocks that ``bench`` scored, and their digest. Benches of older versions left them with the student."""
    for artifact in (bench, student):
        if artifact is not None and HELDOUT in artifact.manifest["files"]:
            return artifact.path / HELDOUT, str(artifact.manifest["files"][HELDOUT]["sha256"])
    raise ArtifactError(
        f"{bench.path}: {HELDOUT} is neither here nor in the student; run the bench stage again."
    )


def read_certificate(run: Path) -> dict[str, Any]:
    """The certificate of a run folder. Raises `ArtifactError` when it is not what `certify` writes."""
    path = run / CERTIFICATE
    again = f"`limbeck report {run}` writes it again."
    try:
        found: dict[str, Any] = read_json(path)
    except ArtifactError as error:
        raise ArtifactError(f"{str(error).rstrip('.')}, so not a certificate; {again}") from None
    try:
        if found["format"] != FORMAT:
            raise ArtifactError(
                f"{path}: found a certificate of format {found['format']}, expected {FORMAT}; `limbeck report {run}` writes it again."
            )
        for key in ("artifact", "bench", "data", "figures", "machine", "protocol", "versions"):
            found[key]
    except (ValueError, KeyError, TypeError):
        raise ArtifactError(
            f"{path}: not a certificate; `limbeck report {run}` writes it again."
        ) from None
    return found


# Replaying -------------------------------------------------------------------------------------------------------


def replay(*, run: Path, quality: bool = True, speed: bool = True) -> list[Finding]:
    """Measure on this machine what the certificate of ``run`` promises; see `serve_bench.replay`."""
    certificate = read_certificate(run)
    onnx, bench = (
        open_artifact(run / "onnx", kind="onnx", verify=False),
        open_artifact(run / "bench", kind="bench"),
    )
    student = open_artifact(student_of(onnx), verify=False) if student_of(onnx).is_dir() else None
    recipe = parse_recipe(bench.manifest["recipe"]["resolved"], where=str(bench.path))
    blocks = _require_ours(certificate, run, onnx=onnx, bench=bench, student=student)
    findings = [_recomputed(certificate, promises(bench, recipe))]
    if not quality and not speed:
        return findings
    threads = int(certificate["protocol"]["threads"])
    arm = _arm(onnx, str(certificate["artifact"]["shipped"]))
    work = Path(tempfile.mkdtemp(prefix="limbeck-verify-"))
    try:
        with Workers(work, threads=threads) as workers:
            facts = workers.start(arm).opened["facts"]
            differs = differences(certificate, facts.get("provider"))
            if speed:  # before scoring, which ends an arm's use for generation
                findings += _replay_speed(workers, arm, certificate, recipe, onnx, blocks, differs)
            if quality:
                findings += _replay_quality(workers, arm, certificate, onnx, blocks, differs)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return findings


def differences(certificate: Mapping[str, Any], provider: str | None) -> dict[str, str]:
    """What is not as it was when the certificate was made, by name: "then, now"."""
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
) -> dict[str, Blocks]:
    """The certificate is of these artifacts; the held-out blocks it was scored on. Raises `ArtifactError`."""
    digests = {
        "onnx": (certificate["artifact"]["digest"], onnx),
        "bench": (certificate["bench"], bench),
    }
    if student is not None:
        digests["student"] = (certificate["parents"]["student"], student)
    for role, (promised, artifact) in digests.items():
        if promised != artifact.digest:
            raise ArtifactError(
                f"{run / CERTIFICATE}: is of another {role} (found {artifact.digest[:12]}, expected {promised[:12]}); "
                f"run `limbeck report {run}`, which writes the certificate of what is there."
            )
    path, _ = heldout_file(bench, student)
    if file_digest(path) != certificate["data"]["heldout"]:
        raise ArtifactError(
            f"{path}: is not the text of the certificate; put back the file that the run made."
        )
    return load_heldout(path)


def _arm(onnx: Artifact, shipped: str, role: Any = "form") -> Arm:
    size = int(onnx.result["forms"][shipped]["bytes"])
    name = f"onnx:{shipped}" + (":twin" if role == "twin" else "")
    return Arm(
        name, shipped, role, "onnxruntime", size, {"artifact": str(onnx.path), "form": shipped}
    )


def _recomputed(certificate: Mapping[str, Any], found: Mapping[str, Any]) -> Finding:
    """Whether the figures follow from the samples that lie in the bench."""
    wrong = [
        name
        for name, value in found.items()
        if json.loads(json.dumps(value)) != certificate["figures"].get(name)
    ]
    if wrong:
        says = f"NOT what the raw samples say: {', '.join(wrong)}. The certificate was edited, or written by another version."
        return Finding("figures", "certificate.json", "raw samples", says, False)
    return Finding(
        "figures",
        "certificate.json",
        "raw samples",
        "computed again from the raw samples: the same",
        True,
    )


def _replay_quality(
    workers: Workers,
    arm: Arm,
    certificate: Mapping[str, Any],
    onnx: Artifact,
    heldout: Mapping[str, Blocks],
    differs: Mapping[str, str],
) -> list[Finding]:
    """Score the shipped form on the same blocks again: the same digits, or a difference that has a reason and stays small."""
    promised = certificate["figures"]["quality"]
    tolerance = float(
        onnx.result["forms"][certificate["artifact"]["shipped"]]["parity"]["tolerance"]["kl"]
    )
    reasons = {
        n: differs[n] for n in ("execution provider", "processor flags", *_DIGITS) if n in differs
    }
    nll = {}
    with task(
        "quality again, held-out blocks", sum(len(blocks) for blocks in heldout.values())
    ) as progress:
        for name, blocks in heldout.items():
            total = 0.0
            for row, length, scored in zip(
                blocks.input_ids, blocks.lengths, blocks.scored, strict=True
            ):
                total += workers[arm].ask(
                    "score", ids=row[:length].tolist(), scored=scored[1:length].tolist(),
                    vocabulary=promised["vocabulary"], mixture=None,
                )["nll"]  # fmt: skip
                progress.advance()
            nll[name] = total / blocks.labels
    pairs = {
        f"loss, {name}": (promised["domains"][name]["nll"], value) for name, value in nll.items()
    }
    pairs["loss, mean"] = (promised["mean_nll"], mean_nll(nll))
    return [
        judge_loss(name, then, now, tolerance=tolerance, reasons=reasons)
        for name, (then, now) in pairs.items()
    ]


def judge_loss(
    figure: str, then: float, now: float, *, tolerance: float, reasons: Mapping[str, str]
) -> Finding:
    """Equal to the digit, or no further apart than the parity ``tolerance`` (nats a token) for one of ``reasons``."""
    gap = abs(now - then)
    if gap == 0:
        return Finding(figure, repr(then), repr(now), "equal to the digit", True)
    if not reasons:
        says = f"differs by {gap:.2g} nats although provider, processor flags and libraries are the same"
        return Finding(figure, repr(then), repr(now), says, False)
    why = "; ".join(f"{name}: {pair}" for name, pair in reasons.items())
    if gap <= tolerance:
        says = f"differs by {gap:.2g} nats, within the parity tolerance of {tolerance:g}; {why}"
        return Finding(figure, repr(then), repr(now), says, True)
    says = f"differs by {gap:.2g} nats, past the parity tolerance of {tolerance:g}; {why}"
    return Finding(figure, repr(then), repr(now), says, False)


def _replay_speed(
    workers: Workers,
    arm: Arm,
    certificate: Mapping[str, Any],
    recipe: Recipe,
    onnx: Artifact,
    heldout: Mapping[str, Blocks],
    differs: Mapping[str, str],
) -> list[Finding]:
    """A short run of the shipped form beside its own copy and the fp32 graph, as in the bench: mirrored blocks, widened by the noise floor."""
    protocol, promised = certificate["protocol"], certificate["figures"]
    twin = Arm(f"{arm.id}:twin", arm.label, "twin", arm.runtime, arm.bytes, arm.spec)
    arms = [arm, twin] + ([_arm(onnx, "fp32")] if promised["speed_over_fp32"] else [])
    for other in arms[1:]:
        workers.start(other)
    load = os.getloadavg()[0]
    samples: list[Sample] = []
    with task("speed again, generations", 2 * len(arms) * _BLOCKS) as progress:
        for block in range(-_WARM, _BLOCKS):
            tokens = prompt(heldout, max(block, 0), protocol["prompt_tokens"])
            for position, chosen in enumerate(order(arms, max(block, 0))):
                time.sleep(0.02)  # for the other's threads to stop spinning
                answer = workers[chosen].generate(tokens, protocol["new_tokens"])
                if block >= 0:
                    samples.append(Sample(chosen.id, block, position, tuple(answer["at"])))
                    progress.advance()
    workers.stop(arms[1:])
    shipped = str(certificate["artifact"]["shipped"])
    reference = Reference(recipe.name, shipped, tuple(arms), first_look(_BLOCKS))
    evidence = figures.timing_evidence(samples, reference)
    busy = (
        {"load average": f"{load:.2f} on {host()['cores']} cores"}
        if load > _BUSY * host()["cores"]
        else {}
    )
    findings = []
    for what, metric, now in (
        ("to first token", "ttft", evidence.ttft_ms),
        ("per output token", "tpot", evidence.tpot_ms),
    ):
        assert now is not None
        times = judge_speed(f"ms {what}", promised[f"{metric}_ms"], now, differs=differs, busy=busy)
        if promised["speed_over_fp32"]:
            then, ratio_now = (
                promised["speed_over_fp32"][metric],
                figures.speed(samples, reference, _FP32, metric),
            )
            ratio = judge_ratio(
                f"speed over fp32, {what}", then, ratio_now, differs=differs, busy=busy
            )
            # One of the two may move with the machine: its clock moves the times, who else uses its memory the ratio.
            if ratio.holds and not times.holds:
                times = replace(
                    times,
                    says=f"{times.says}; its speed over the fp32 graph is as certified",
                    holds=True,
                )
            elif times.holds and not ratio.holds:
                ratio = replace(
                    ratio, says=f"{ratio.says}; its own times are as certified", holds=True
                )
            findings.append(ratio)
        findings.append(times)
    return findings


def judge_speed(
    figure: str,
    then: Mapping[str, Any],
    now: Interval,
    *,
    differs: Mapping[str, str],
    busy: Mapping[str, str],
) -> Finding:
    """Of times in ms. Overlapping intervals hold, and so does a faster run: it keeps what was certified. A slower one holds where it is
    so by less than a tenth, or where this machine is not the one of the certificate.
    """
    return _judge(figure, then, now, slower=now.value > then["value"], differs=differs, busy=busy)


def judge_ratio(
    figure: str,
    then: Mapping[str, Any],
    now: Interval,
    *,
    differs: Mapping[str, str],
    busy: Mapping[str, str],
) -> Finding:
    """The same of how many times as fast as another graph."""
    return _judge(figure, then, now, slower=now.value < then["value"], differs=differs, busy=busy)


def _judge(
    figure: str,
    then: Mapping[str, Any],
    now: Interval,
    *,
    slower: bool,
    differs: Mapping[str, str],
    busy: Mapping[str, str],
) -> Finding:
    promised, found = (
        _interval(then["value"], then["low"], then["high"]),
        _interval(now.value, now.low, now.high),
    )
    if then["low"] is None or not now.bounded:
        return Finding(
            figure,
            promised,
            found,
            "too few blocks for intervals, so nothing to hold against each other",
            True,
        )
    if now.low <= then["high"] and then["low"] <= now.high:
        return Finding(figure, promised, found, "intervals overlap", True)
    near = max(now.value / then["value"], then["value"] / now.value) <= _NEAR
    apart = f"{'slower' if slower else 'faster'} than certified, {now.value / then['value']:.2f}×"
    if differs:
        why = "; ".join(f"{name}: {pair}" for name, pair in differs.items())
        return Finding(figure, promised, found, f"{apart}, on what is not the same: {why}", True)
    if slower and near:
        return Finding(
            figure, promised, found, f"{apart}, less than the 10 % that counts on one machine", True
        )
    also = "".join(f"; {name} {value} before the replay" for name, value in busy.items())
    return Finding(
        figure,
        promised,
        found,
        f"{apart}, on the same machine with the same versions{also}",
        not slower,
    )


def _interval(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.3g}" + ("" if low is None or high is None else f" ({low:.3g} to {high:.3g})")
