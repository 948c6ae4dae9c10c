"""How a language model is measured, judged and shown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import IO, Any

import numpy as np

from limbeck.contract.artifact import Artifact
from limbeck.contract.data.evals import EVALS, TEXTS
from limbeck.contract.data.heldout import HELDOUT, Blocks, load_heldout, mean_nll
from limbeck.contract.errors import ArtifactError, DataError
from limbeck.contract.machine import available_cores
from limbeck.contract.progress import task
from limbeck.contract.recipe import Bench, Gates, Recipe
from limbeck.contract.results.bench import Arm, Gate, LanguageResult, TaskName, Verdict
from limbeck.runtime.text import load_text
from serve_bench.judge import language as figures
from serve_bench.judge import scenarios
from serve_bench.judge.certificate import FP32
from serve_bench.judge.changes import Row, judge_change
from serve_bench.judge.figures import QUALITY, Cell, Reference, Sample, speed
from serve_bench.judge.gates import Evidence, language_gates
from serve_bench.judge.quality import summarise
from serve_bench.judge.scenario_changes import scenario_changes
from serve_bench.judge.stats import FEWEST_BLOCKS, Array, first_look, relative_rise
from serve_bench.judge.task import Judged, Measured
from serve_bench.measure import generation
from serve_bench.measure.arms import list_arms, require_context
from serve_bench.measure.host.roofline import graph_weight_bytes
from serve_bench.measure.live import Test
from serve_bench.measure.own_tokens import OwnTokens
from serve_bench.measure.quality import measure_evaluations, measure_quality
from serve_bench.measure.scenarios import cold, load, offline
from serve_bench.measure.units import Generation, prompt
from serve_bench.measure.workers import Workers
from serve_bench.tell import language_page
from serve_bench.tell.task import Page

_UNIT = ", nats a token"


class Language:
    """The task `causal-lm`: a `MeasuringTask` and a `TellingTask`.

    Without a recipe it only reads benches of targets.
    """

    name: TaskName = "causal-lm"
    version = 3
    metrics: Sequence[tuple[str, str, Cell | None]] = (
        ("TPOT ms", "tpot", None),
        ("TTFT ms", "ttft", None),
        ("ms in all", "e2el", None),
    )

    def __init__(self, recipe: Recipe | None, *, sizes: Mapping[str, int] | None = None) -> None:
        """``sizes`` are the fields `prompt_tokens` and `new_tokens` of a bench without a recipe."""
        self._recipe = recipe
        self.bench = recipe.bench if recipe else Bench(**(sizes or {}))
        self.gates_asked = recipe.gates if recipe else Gates()
        self.min_blocks = self.bench.min_blocks if recipe else FEWEST_BLOCKS
        self.minutes, self.threads = self.bench.minutes, self.bench.threads
        self._heldout: Mapping[str, Blocks] = {}

    @property
    def recipe(self) -> Recipe:
        """The recipe. A bench of targets has none, and is measured elsewhere."""
        assert self._recipe is not None
        return self._recipe

    # Measuring ------------------------------------------------------------------------------------

    def open(self, onnx: Artifact, student: Artifact) -> list[Arm]:
        recovery = onnx.result.get("recovery")
        if recovery is not None and "blocks" not in recovery:
            raise ArtifactError(
                f"{onnx.path}: was recovered by an older version; run the export stage again."
            )
        self._arms = list_arms(onnx=onnx, student=student, bench=self.bench)
        require_context(self._arms, self.bench, student.path / "model")
        if (server := self.bench.scenario("server")) is not None:
            load.require_server(server, onnx.path)
        self._onnx, self._student, self._shipped = onnx, student, str(onnx.result["shipped"])
        self._heldout = load_heldout(student.path / HELDOUT)
        evals = student.path / EVALS  # students of older versions have none
        self._evals = load_heldout(evals) if evals.is_file() else {}
        asked = any(arm.role == "teacher" for arm in self._arms)
        require_evaluations(self.gates_asked, self._evals, student, teachers=asked)
        return self._arms

    def open_data(self, folder: Path) -> None:
        self._heldout = load_heldout(folder / HELDOUT)

    def prompts(self, block: int, tokens: int) -> list[int]:
        """The prompt of a block."""
        return prompt(self._heldout, block, tokens)

    def units(self, block: int) -> list[Generation]:
        tokens = self.prompts(block, self.bench.prompt_tokens)
        return [Generation(tokens, self.bench.new_tokens)]

    def live(self, threads: int) -> tuple[str, list[Test]]:
        return "tokens/s", tests(self.bench)

    def decided(self, samples: Sequence[Sample], reference: Reference) -> bool:
        found = figures.timing_evidence(samples, reference)
        gates = language_gates(self.gates_asked, found, timing_only=True)
        return all(gate.status != "undecided" for gate in gates)

    def before_timing(
        self, workers: Workers, arms: Sequence[Arm], reference: Reference, out: Path, work: Path
    ) -> None:
        """Nothing: scoring ends an arm's use for generation, so it comes last."""

    def after_timing(
        self, workers: Workers, samples: Sequence[Sample], raw: IO[str], out: Path, work: Path
    ) -> None:
        """Time batches, then score held-out text."""
        self._compared = scenarios.compared(self.reference(self._shipped, self._arms), samples)
        if (grid := self.bench.scenario("offline")) is not None:
            offline.measure_offline(workers, self._compared, self.prompts, grid, raw)
        workers.stop(arm for arm in workers.running if not arm.scored)
        known = self._of_other_tokenizers
        others = [arm for arm in workers.running if arm.id in known]
        self._ask_others(workers, others, {sample.block for sample in samples})
        workers.stop(others)
        sizes = [int(workers[arm].opened["facts"]["vocabulary"]) for arm in workers.running]
        self.quality = measure_quality(
            workers, self._arms, self._heldout, vocabulary=min(sizes), folder=work, known=known
        )
        if self._evals:
            scored = [arm for arm in self._arms if arm.scored and arm.id not in known]
            answers = measure_evaluations(workers, scored, self._evals, vocabulary=min(sizes))
            answers["arms"] |= self._answered
            self.quality["evals"] = answers | {"base": self._student.result.get("base_evals")}

    def _ask_others(self, workers: Workers, others: Sequence[Arm], blocks: Set[int]) -> None:
        """What teachers with another tokenizer write after the prompts that the report shows, and
        what they answer in the short evaluations."""
        tokenizer, size = load_text(self._onnx.path).tokenizer, self.bench.prompt_tokens
        self._written: dict[int, dict[str, str]] = {
            b: {} for b in sorted(blocks)[: generation.SHOWN]
        }
        self._answered: dict[str, Any] = {}
        for arm in others:
            own = OwnTokens(arm, workers[arm], lambda ids: str(tokenizer.decode(ids)))
            for block, texts in self._written.items():
                text = own.written(self.prompts(block, size), self.bench.new_tokens)
                texts |= {} if text is None else {arm.id: text}
            answers = own.answers(self._evals)
            self._answered |= {} if answers is None else {arm.id: answers}

    @property
    def _of_other_tokenizers(self) -> dict[str, Mapping[str, list[float]]]:
        """Nats of each held-out block by domain, of teachers with another tokenizer, by arm.

        They were read before the training, from the teachers' own tokens of the same text.
        """
        teachers: Mapping[str, Any] = self._student.result.get("teachers", {})
        return {
            f"teacher:{name}": found["blocks"]
            for name, found in teachers.items()
            if found.get("coverage") and "blocks" in found
        }

    def alone(self, raw: IO[str], environment: dict[str, Any], work: Path) -> None:
        """Cold starts, and the server under load."""
        elsewhere(self.bench, self._compared, self._onnx.path, self.prompts, raw, environment, work)

    def finish(
        self, rows: Sequence[dict[str, Any]], environment: dict[str, Any], out: Path
    ) -> None:
        """Write quality.json and the held-out text, so that a replay needs no student."""
        for arm in self._arms:
            if arm.runtime.startswith("onnxruntime"):
                form = self._onnx.result["forms"][arm.spec.get("form") or self._shipped]
                weights = graph_weight_bytes(self._onnx.path / form["graph"])
                environment["arms"][arm.id]["weight_bytes"] = weights
        source = "held-out text, another window of another domain in every block"
        environment["prompt_source"] = source
        if (recovery := self._onnx.result.get("recovery")) is not None:
            # The student as it was distilled has no graph here. The manifest carries its losses on
            # the same blocks and those
            # of the shipped form, both over the whole vocabulary.
            self.quality["recovery"] = recovery["blocks"]
        ggufs: Mapping[str, Any] = self._onnx.result.get("ggufs") or {}
        self.quality["ggufs"] = {n: f["rise"] for n, f in ggufs.items() if f["rise"] is not None}
        teachers: Mapping[str, Any] = self._student.result.get("teachers", {})
        others = self._of_other_tokenizers
        if served := {
            name: found["blocks"]
            for name, found in teachers.items()
            if "blocks" in found and f"teacher:{name}" not in others
        }:
            self.quality["served"] = served  # they are not run here
        tokens, new = self.bench.prompt_tokens, self.bench.new_tokens
        self.quality["generation"] = generation.of_run(
            rows,
            # What others wrote while they were timed is no text.
            self.reference(self._shipped, [arm for arm in self._arms if arm.id not in others]),
            prompt=lambda block: self.prompts(block, tokens),
            continuation=lambda block: prompt(self._heldout, block, tokens, then=new),
            folder=self._onnx.path,
            others=self._written,
        )
        shutil.copyfile(self._student.path / HELDOUT, out / HELDOUT)
        (out / QUALITY).write_text(json.dumps(self.quality), encoding="utf-8")

    def replay_quality(
        self,
        workers: Workers,
        arm: Arm,
        certificate: Mapping[str, Any],
        bench: Artifact,
        work: Path,
    ) -> list[tuple[str, float, float]]:
        """Loss of the shipped form on the same blocks, by domain and in the mean."""
        promised, nll = certificate["figures"]["quality"], {}
        total = sum(len(blocks) for blocks in self._heldout.values())
        with task("quality again, held-out blocks", total) as progress:
            for name, blocks in self._heldout.items():
                whole = 0.0
                for row, length, scored in zip(
                    blocks.input_ids, blocks.lengths, blocks.scored, strict=True
                ):
                    whole += workers[arm].ask(
                        "score",
                        ids=row[:length].tolist(),
                        scored=scored[1:length].tolist(),
                        vocabulary=promised["vocabulary"],
                        mixture=None,
                    )["nll"]
                    progress.advance()
                nll[name] = whole / blocks.labels
        domains = promised["domains"]
        found = [
            (f"loss on {name}{_UNIT}", domains[name]["nll"], value) for name, value in nll.items()
        ]
        return [*found, (f"mean loss{_UNIT}", promised["mean_nll"], mean_nll(nll))]

    # Judging --------------------------------------------------------------------------------------

    def reference(self, shipped: str, arms: Sequence[Arm], judged: str = "") -> Reference:
        name, looks = self._recipe.name if self._recipe else "", first_look(self.min_blocks)
        random = self._recipe is not None and self._recipe.stand_in
        return Reference(name, shipped, tuple(arms), looks, judged, random)

    read_sample = staticmethod(Sample.of)

    def read_quality(self, bench: Artifact, reference: Reference) -> dict[str, Any] | None:
        path = bench.path / QUALITY
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    def evidence(self, measured: Measured) -> Evidence:
        return figures.evidence(measured.samples, measured.quality, measured.reference)

    def gates(self, measured: Measured, evidence: Evidence) -> list[Gate]:
        return language_gates(self.gates_asked, evidence)

    def result(self, measured: Measured, evidence: Evidence, verdict: Verdict) -> LanguageResult:
        arms, environment = measured.reference.arms, measured.environment
        return figures.result(
            measured.samples,
            environment,
            measured.reference,
            prompt_tokens=self.bench.prompt_tokens,
            quality=measured.quality,
            verdict=verdict,
            **scenarios.summary(measured.rows, environment, self.bench, arms),
        )

    def promises(self, judged: Judged) -> dict[str, Any]:
        measured, evidence = judged.measured, judged.evidence
        reference, quality = measured.reference, measured.quality
        fp32 = any(arm.id == FP32 for arm in reference.arms) and reference.shipped_arm.id != FP32
        rises = {name: rise for name, (_, rise) in evidence.rise_over_teachers.items()}
        if evidence.rise_over_fp32:
            rises["fp32"] = evidence.rise_over_fp32
        return {
            "ttft_ms": evidence.ttft_ms.as_json(),
            "tpot_ms": evidence.tpot_ms.as_json(),
            "speed_over": {name: over.as_json() for name, over in evidence.speedup.items()},
            # A replay can time fp32 beside it: a machine's good and bad minutes are the same for
            # both graphs.
            "speed_over_fp32": {
                metric: speed(measured.samples, reference, FP32, metric).as_json()
                for metric in ("ttft", "tpot")
            }
            if fp32
            else None,
            "loss_rise_over": {name: rise.as_json() for name, rise in rises.items()},
            "quality": {
                "vocabulary": quality["vocabulary"],
                **summarise(quality, reference.shipped_arm.id),
            },
        }

    replayed: Sequence[tuple[str, str, Cell | None]] = (
        ("TTFT", "ttft", None),
        ("TPOT", "tpot", None),
    )

    def tolerance(self, onnx: Artifact) -> float:
        """The parity tolerance of the shipped form, in nats a token."""
        limits = onnx.result["forms"][onnx.result["shipped"]]["parity"]["tolerance"]
        return float(limits.get("loss", limits["kl"]))  # older exports have one limit for both

    def data(self, bench: Artifact) -> dict[str, Any]:
        domains = json.loads((bench.path / QUALITY).read_text("utf-8"))["domains"]
        return {
            "heldout": bench.manifest["files"][HELDOUT]["sha256"],
            "domains": {
                name: {"blocks": len(sizes["labels"]), "labels": sum(sizes["labels"])}
                for name, sizes in domains.items()
            },
        }

    def protocol(self) -> dict[str, Any]:
        return {"prompt_tokens": self.bench.prompt_tokens, "new_tokens": self.bench.new_tokens}

    def losses(
        self, old: Measured, new: Measured, tolerance: float, *, same_text: bool
    ) -> Iterator[Row]:
        runs = [(run.quality, run.reference.shipped_arm.id) for run in (old, new)]
        then, now = (summarise(quality, arm) for quality, arm in runs)
        domains = [name for name in then["domains"] if name in now["domains"]]
        titles = [(f"mean loss{_UNIT}", domains)]
        titles += [(f"loss on {name}{_UNIT}", [name]) for name in domains if len(domains) > 1]
        for title, names in titles:
            mean = names is domains
            shown = [f["mean_nll"] if mean else f["domains"][names[0]]["nll"] for f in (then, now)]
            before, after = (f"{value:.4f}" for value in shown)
            if not same_text:
                yield Row(title, "quality", before, after, None, tolerance, "not compared")
                continue
            labels = [np.asarray(new.quality["domains"][n]["labels"], np.float64) for n in names]
            ours, theirs = (_nll(quality, arm, names) for quality, arm in reversed(runs))
            change = relative_rise(ours, theirs, labels)
            status = judge_change(change, tolerance, exact=True)
            yield Row(title, "quality", before, after, change, tolerance, status)

    scenarios = staticmethod(scenario_changes)

    # Telling --------------------------------------------------------------------------------------

    def heldout(self, judged: Judged) -> Mapping[str, Any]:
        domains: Mapping[str, Any] = judged.measured.quality["domains"]
        return domains

    names = language_page.NAMES

    table = staticmethod(language_page.table)

    def page(
        self,
        data: Mapping[str, Any],
        judged: Judged,
        student: Artifact,
        certificate: Mapping[str, Any],
    ) -> Page:
        return language_page.page(self.recipe, data, judged, student, certificate)


def _nll(quality: Mapping[str, Any], arm: str, domains: Sequence[str]) -> list[Array]:
    return [np.asarray(quality["arms"][arm][name]["nll"], np.float64) for name in domains]


def tests(bench: Bench) -> list[Test]:
    """Columns of the terminal's table for every arm."""
    prompt_tokens, new_tokens = bench.prompt_tokens, bench.new_tokens
    return [
        (f"prompt {prompt_tokens}", "ttft", None, prompt_tokens),
        (f"decode {new_tokens}", "tpot", None, 1),
    ]


def elsewhere(
    bench: Bench,
    compared: Sequence[Arm],
    exported: Path | None,
    prompts: Any,
    raw: IO[str],
    environment: dict[str, Any],
    folder: Path,
) -> None:
    """The scenarios that start processes of their own, once the arms' are gone."""
    threads = bench.threads or available_cores()
    if (starts := bench.scenario("cold")) is not None:
        tokens = prompts(0, bench.prompt_tokens)
        cold.measure_cold(compared, tokens, starts, raw, threads=threads, folder=folder)
    if (server := bench.scenario("server")) is not None:
        sizes = load.Sizes(bench.prompt_tokens, bench.new_tokens)
        environment["server"] = load.measure_server(
            server, exported, prompts, sizes, raw, threads=threads, folder=folder
        )


def require_evaluations(
    gates: Gates, rows: Mapping[str, Blocks], student: Artifact, *, teachers: bool
) -> None:
    """Raise `DataError` for a gate on an evaluation that cannot be made.

    ``teachers`` says whether a teacher answers the rows too.
    """
    known = {*rows} - {*TEXTS} | ({"next_line_tokens"} if "next_line" in rows else set())
    if missing := {*(gates.min_task or ())} - known:
        listed = ", ".join(sorted(known)) or "none: it was trained by an older version"
        raise DataError(
            f"gates.min_task: the student has no rows for {', '.join(sorted(missing))}; its "
            f"evaluations: {listed}."
        )
    if gates.max_task_loss is not None and not (known and teachers):
        raise DataError(
            "gates.max_task_loss: no teacher answers the evaluations here, or the student was "
            "trained by an older version; leave the gate out."
        )
    based = student.result.get("base_evals") is not None
    if gates.max_forgetting is not None and not (based and {*rows} & {*TEXTS}):
        raise DataError(
            "gates.max_forgetting: there are no figures of the student's base; leave the gate out "
            "for a student without a base, and train one of an older version again."
        )
