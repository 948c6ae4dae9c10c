"""Bench without a recipe: compare artifacts, plain model folders and URLs.

Knows the kinds of targets and their arms; `serve_bench.measure.clock` has the order of the
measurement. Prompts are random tokens that every target knows: speed does not depend on the
tokens, and no tokenizer is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from limbeck.contract.artifact import MANIFEST, Artifact, open_artifact, write_artifact
from limbeck.contract.errors import ArtifactError, ModelError
from limbeck.contract.files import unwritable_is_a_user_error
from limbeck.contract.machine import available_cores, host
from limbeck.contract.recipe import Bench, ServerScenario, UrlTarget, fingerprint
from limbeck.contract.results.bench import Arm
from limbeck.contract.sources.hub import hub_snapshot
from limbeck.contract.sources.models import context_of
from limbeck.contract.sources.weights import check_weights
from limbeck.runtime.endpoint import require_address
from serve_bench.judge import figures, language, scenarios
from serve_bench.judge.figures import ENVIRONMENT, SAMPLES, Reference, Sample
from serve_bench.judge.stats import first_look
from serve_bench.measure.arms import form_arm, weights_on_disk
from serve_bench.measure.bench import before, scratch, single
from serve_bench.measure.clock import Limits, Timed
from serve_bench.measure.host import machine
from serve_bench.measure.host.roofline import graph_weight_bytes
from serve_bench.measure.live import live_table
from serve_bench.measure.scenarios import load, offline
from serve_bench.measure.units import Generation
from serve_bench.measure.workers import Workers
from serve_bench.tasks.language import elsewhere, tests

_FEW = 1000  # tokens in every vocabulary, used if the vocabulary is unknown


def measure_targets(
    targets: Sequence[str], *, against: Sequence[str] = (), out: Path, bench: Bench
) -> Artifact:
    """Time ``targets`` and those to compare with, without a recipe; ratios are of the first target.

    A target is a run or an exported folder (``#FORM`` picks a form), a model folder,
    ``hub:ID[@REVISION]``, or the URL of an OpenAI-compatible server. Writes a ``bench`` artifact
    without quality and verdict to ``out``. Raises `ModelError` if a target is none of these,
    `ArtifactError` if ``out`` holds something else, `DataError` if arms cannot be compared.
    """
    _require_free(out)
    plan = _plan(targets, against, bench)
    bench, arms, artifacts = plan.bench, plan.arms, plan.artifacts
    parents = {name: a.digest for name, a in artifacts.items() if name != arms[-1].id}
    asked = {
        "targets": list(targets),
        "against": list(against),
        "bench": bench.model_dump(mode="json"),
    }
    key = fingerprint({"stage": "bench", "asked": asked, "parents": parents, "host": host()})
    first = arms[0]
    reference = Reference(
        first.label, first.label, tuple(arms), first_look(bench.min_blocks), first.id
    )
    with (
        unwritable_is_a_user_error(out),
        scratch(out) as work,
        write_artifact(out, kind="bench", key=key, parents=parents) as draft,
    ):
        with (draft.folder / SAMPLES).open("w", encoding="utf-8") as raw:
            timed, environment = _measure(plan, reference, raw, work)
        (draft.folder / ENVIRONMENT).write_text(json.dumps(environment, indent=1), encoding="utf-8")
        rows = figures.read_rows(draft.folder / SAMPLES)
        draft.result = language.result(
            timed.samples,
            environment,
            reference,
            prompt_tokens=bench.prompt_tokens,
            targets=tuple(targets),
            against=tuple(against),
            **scenarios.summary(rows, environment, bench, arms),
        ).as_json()
    return open_artifact(out, kind="bench", verify=False)


@dataclass(frozen=True)
class _Plan:
    bench: Bench
    arms: Sequence[Arm]  # the targets, then a twin of the first
    artifacts: Mapping[str, Artifact]  # of arms that are exported folders, by arm
    vocabulary: int  # tokens that every arm knows

    @property
    def exported(self) -> Path | None:
        """The exported folder that is the first target, if it is one."""
        first = self.artifacts.get(self.arms[0].id)
        return first.path if first else None

    def prompt(self, block: int, tokens: int) -> list[int]:
        """Random tokens, others in every block."""
        numbers = np.random.default_rng((3, block)).integers(0, self.vocabulary, tokens)
        return [int(token) for token in numbers]

    def units(self, block: int) -> list[Generation]:
        """What every arm does in a block."""
        return [Generation(self.prompt(block, self.bench.prompt_tokens), self.bench.new_tokens)]


def _plan(targets: Sequence[str], against: Sequence[str], bench: Bench) -> _Plan:
    """Find the arms. Raises as `measure_targets` does."""
    bench = _at(bench, targets[0])
    arms = _named([find_arm(target, bench) for target in (*targets, *against)])
    for arm in arms:
        if (model := _folder(arm)) is not None:
            bench.require_context(context_of(model), arm.label)
    vocabulary = min((v for arm in arms if (v := _vocabulary(arm)) is not None), default=_FEW)
    artifacts = {
        arm.id: open_artifact(Path(arm.spec["artifact"]), kind="onnx")
        for arm in arms
        if "artifact" in arm.spec
    }
    first = arms[0]
    twin = replace(first, id=f"{first.id}:twin", label=f"{first.label} (copy)", role="twin")
    if first.id in artifacts:
        artifacts[twin.id] = artifacts[first.id]
    plan = _Plan(bench, [*arms, twin], artifacts, vocabulary)
    if (server := bench.scenario("server")) is not None:
        load.require_server(server, plan.exported)
    return plan


def _measure(
    plan: _Plan, reference: Reference, raw: IO[str], work: Path
) -> tuple[Timed, dict[str, Any]]:
    """Time the arms and the scenarios; returns the samples and what they were taken in."""
    bench, threads = plan.bench, plan.bench.threads or available_cores()
    local = [arm for arm in plan.arms if arm.runtime != "openai" and arm.role != "twin"]
    with Workers(work, threads=threads) as workers:
        environment = before(workers, plan.arms, plan.units(0), threads=threads)
        timed = single(
            workers,
            plan.arms,
            plan.units,
            Limits(bench.min_blocks, bench.minutes, reference.first_look),
            raw,
            environment,
            asked={"prompt_tokens": bench.prompt_tokens, "new_tokens": bench.new_tokens},
            read=Sample.of,
            decided=None,
            live=live_table(reference, "tokens/s", tests(bench), threads=threads),
        )
        if (grid := bench.scenario("offline")) is not None:
            offline.measure_offline(workers, local, plan.prompt, grid, raw)
        environment["after"] = machine.load()
    elsewhere(bench, local, plan.exported, plan.prompt, raw, environment, work)
    for arm in plan.arms:
        if (artifact := plan.artifacts.get(arm.id)) is not None:
            graph = artifact.path / artifact.result["forms"][arm.spec["form"]]["graph"]
            environment["arms"][arm.id]["weight_bytes"] = graph_weight_bytes(graph)
    environment["prompt_source"] = f"random tokens below {plan.vocabulary}, others in every block"
    return timed, environment


def find_arm(target: str, bench: Bench) -> Arm:
    """The arm of a target.

    A target is a URL, ``hub:ID[@REVISION]``, a run or ``onnx`` folder (``#FORM`` picks a form), or
    a model folder.

    Raises `ModelError` with the value found and the kinds accepted, `ArtifactError` for a missing
    form.
    """
    device, number = bench.device or "cpu", bench.torch_dtype or "fp32"
    if target.startswith(("http://", "https://")):
        return Arm(target, target, "extra", "openai", 0, {"url": target})
    if target.startswith("hub:"):
        repository, _, revision = target.removeprefix("hub:").partition("@")
        name, folder = target, hub_snapshot(repository, revision or None)
    else:
        path, _, form = target.partition("#")
        folder = Path(path).expanduser()
        name = folder.resolve().name
        if (folder / "onnx" / MANIFEST).is_file():
            folder = folder / "onnx"
        if (folder / MANIFEST).is_file():
            artifact = open_artifact(folder, verify=False)
            if artifact.kind == "onnx":
                form = form or str(artifact.result["shipped"])
                if form not in artifact.result["forms"]:
                    raise ArtifactError(
                        f"{folder}: no form {form!r}; it has {', '.join(artifact.result['forms'])}."
                    )
                return replace(form_arm(artifact, form), label=f"{name} {form}")
            if artifact.kind == "student":
                folder = folder / "model"
        if form:
            raise ModelError(f"{target}: only an exported folder has forms; leave #{form} out.")
        if not folder.is_dir():
            raise ModelError(
                f"{target}: no such folder; expected a run, an exported folder, a model folder, "
                "hub:OWNER/NAME, or the URL of a server."
            )
    check_weights(folder)
    spec = {"model": str(folder.resolve()), "dtype": number, "device": device}
    return Arm(name, name, "extra", "torch", weights_on_disk(folder), spec)


def _named(arms: Sequence[Arm]) -> list[Arm]:
    """Give every arm its own id, so that a target may be listed twice."""
    names = [f"{arm.label} [{arm.runtime}]" for arm in arms]
    return [
        replace(arm, id=name if names.count(name) == 1 else f"{name} {index + 1}")
        for index, (arm, name) in enumerate(zip(arms, names, strict=True))
    ]


def _folder(arm: Arm) -> Path | None:
    found = arm.spec.get("artifact") or arm.spec.get("model")
    return Path(found) if found and arm.runtime != "openai" else None


def _vocabulary(arm: Arm) -> int | None:
    folder = _folder(arm)
    if folder is None:
        return None
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    found = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return int(found) if found else None


def _at(bench: Bench, target: str) -> Bench:
    """The bench whose server scenario asks ``target``: a URL itself, an exported folder behind a
    server of ours. Raises `EnvironmentalError` for what is no address."""
    if not target.startswith(("http://", "https://")):
        return bench
    require_address(target)
    url = UrlTarget(kind="url", url=target)
    asked = tuple(
        s.model_copy(update={"target": url}) if isinstance(s, ServerScenario) else s
        for s in bench.scenarios
    )
    return bench.model_copy(update={"scenarios": asked})


def _require_free(out: Path) -> None:
    """Raise `ArtifactError` unless ``out`` is empty or an earlier bench of targets."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if (out / MANIFEST).is_file():
        earlier = open_artifact(out, verify=False)
        if earlier.kind == "bench" and "targets" in earlier.result:
            return
    raise ArtifactError(f"{out}: holds something else; name a new or empty folder with --out.")
