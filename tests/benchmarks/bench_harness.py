"""What the statistics of the bench promise, against what they keep on simulated machines.

The product's own loop runs (order, pauses, sentinel, looks, gates, budget) with the product's own
figures. Only the clock, the workers and the sentinel's kernel are simulated. A machine drifts (a
random walk and a slow wave), is busy with other work at random times (bursts), and every generation
has noise with heavy tails (Student's t, 3 degrees).

    false_alarm_rate   share of comparisons of equal arms whose interval excludes 1, stopping where
                       a gate says so
    coverage           share of intervals that contain the true ratio, wherever the run stopped
    power              share of true regressions of 5 % that the gate finds within the default
                       bench.minutes
    overhead           harness over a bare loop on the same runtime; see harness_overhead.py

Prints one JSON object. ``--no-overhead`` leaves out the part that needs a quiet machine.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from limbeck.contract.recipe import Recipe
from limbeck.contract.results.bench import Arm, Gate
from serve_bench.judge import figures, language
from serve_bench.judge.changes import time_change
from serve_bench.judge.figures import Reference, Sample
from serve_bench.judge.gates import language_gates
from serve_bench.judge.stats import first_look
from serve_bench.measure import clock as timing
from serve_bench.measure.clock import Limits
from serve_bench.measure.host.sentinel import Sentinel
from serve_bench.measure.units import Generation
from tests.benchmarks.harness_overhead import overhead
from tests.pico import pico_recipe

TRIALS = 200
TTFT, TPOT = 0.12, 0.010  # of a simulated generation: 128 tokens of prompt, then 64 at 10 ms
TOKENS = 8  # simulated time stamps a generation; each stands for eight tokens
GAP = 64 * TPOT / (TOKENS - 1)


class Drawn(io.StringIO):
    """Raw samples are of no use here."""

    def write(self, _: str) -> int:
        """Forget it."""
        return 0


@dataclass
class Machine:
    """A clock and how slow the machine is at any moment, as the logarithm of a factor."""

    draw: np.random.Generator
    noise: float = 0.015  # of one generation
    walk: float = 0.004  # a second, standard deviation of a step
    burst_every: float = 45.0  # seconds between bursts, mean
    burst_lasts: float = 2.0
    now: float = 0.0
    _drift: float = 0.0
    _phase: float = 0.0
    _bursts: list[tuple[float, float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Draw the bursts of an hour."""
        self._phase = float(self.draw.uniform(0, 2 * math.pi))
        at = 0.0
        while at < 3600:
            at += float(self.draw.exponential(self.burst_every))
            self._bursts.append(
                (at, at + self.draw.exponential(self.burst_lasts), self.draw.uniform(0.1, 0.5))
            )

    def pass_(self, seconds: float) -> None:
        """Let time pass, and the drift go on."""
        self.now += seconds
        self._drift += float(self.draw.normal(0, self.walk)) * math.sqrt(seconds)

    def slowness(self) -> float:
        """Now."""
        self._bursts = [burst for burst in self._bursts if burst[1] > self.now]
        burst = sum(size for start, _, size in self._bursts if start <= self.now)
        return self._drift + 0.05 * math.sin(self.now / 40 + self._phase) + burst

    def sleep(self, seconds: float) -> None:
        """As `time.sleep`."""
        self.pass_(seconds)

    def monotonic(self) -> float:
        """As `time.monotonic`."""
        return self.now


class SimulatedWorker:
    """Answers `generate` after simulated time."""

    def __init__(self, arm: Arm, machine: Machine, slower: float, process: float) -> None:
        self.arm, self._machine, self._slower = arm, machine, slower * math.exp(process)

    def generate(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        """One generation of ``new_tokens`` time stamps."""
        machine, at, passed = self._machine, [], 0.0
        noise = machine.noise * float(machine.draw.standard_t(3))
        for index in range(new_tokens):
            step = (GAP if index else TTFT) * self._slower * math.exp(machine.slowness() + noise)
            machine.pass_(step)
            passed += step
            at.append(passed)
        return {"started": 0.0, "at": at, "tokens": [0] * new_tokens, "device_s": None}


@dataclass(frozen=True)
class SimulatedWorkers:
    """As `arms.Workers`, by arm."""

    by_id: dict[str, SimulatedWorker]

    def __getitem__(self, arm: Arm) -> SimulatedWorker:
        return self.by_id[arm.id]


class SimulatedSentinel(Sentinel):
    """The product's rule on readings of the simulated machine."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.threads = 1
        self.readings = [self._reading()]

    def _reading(self) -> float:
        seconds = 0.01 * math.exp(
            self._machine.slowness() + 0.01 * float(self._machine.draw.standard_t(3))
        )
        self._machine.pass_(3 * seconds)
        return seconds


@dataclass(frozen=True)
class Outcome:
    """One simulated bench."""

    samples: list[Sample]
    reference: Reference
    blocks: int
    gate: str  # status

    def ratio(self, metric: str = "tpot") -> Any:
        """Speed of the shipped form over the other arm."""
        return figures.speed(self.samples, self.reference, "teacher:other", metric)


def bench(
    draw: np.random.Generator,
    *,
    slower: float,
    bound: float,
    process: float = 0.0,
    machine: Machine | None = None,
) -> Outcome:
    """Time a shipped form that is ``slower`` times as slow as the other arm, under gate ``bound``.

    ``process`` is the standard deviation of what is fixed for the life of each process.
    """
    machine = machine or Machine(draw)
    recipe: Recipe = pico_recipe(
        teachers=[
            {"name": "other", "model": {"kind": "random", "config": {"model_type": "llama"}}}
        ],
        bench={"new_tokens": TOKENS, "prompt_tokens": 1},
        gates={"min_decode_speedup": bound},
    )
    arms = (
        Arm("teacher:other", "other", "teacher", "torch", 1, {}),
        Arm("onnx:fp32", "fp32", "form", "onnxruntime", 1, {}),
        Arm("onnx:fp32:twin", "fp32 (copy)", "twin", "onnxruntime", 1, {}),
    )
    reference = Reference("simulated", "fp32", arms, first_look(recipe.bench.min_blocks))
    factors = {"teacher:other": 1.0, "onnx:fp32": slower, "onnx:fp32:twin": slower}
    workers: Any = SimulatedWorkers(
        {
            arm.id: SimulatedWorker(arm, machine, factors[arm.id], process * float(draw.normal()))
            for arm in arms
        }
    )
    clock = SimpleNamespace(sleep=machine.sleep, monotonic=machine.monotonic)

    def timing_gates(samples: Sequence[Sample]) -> list[Gate]:
        found = language.timing_evidence(samples, reference)
        return language_gates(recipe.gates, found, timing_only=True)

    work = Generation([0] * recipe.bench.prompt_tokens, recipe.bench.new_tokens)
    limits = Limits(recipe.bench.min_blocks, recipe.bench.minutes, reference.first_look)
    with mock.patch.object(timing, "time", clock):
        timed = timing.time_blocks(
            workers,
            reference.arms,
            lambda block: [work],
            limits,
            Drawn(),
            read=Sample.of,
            sentinel=SimulatedSentinel(machine),
            decided=lambda samples: all(g.status != "undecided" for g in timing_gates(samples)),
        )
    gate = timing_gates(timed.samples)[0]
    return Outcome(timed.samples, reference, timed.samples[-1].block + 1, gate.status)


def false_alarms(trials: int, *, process: float = 0.0, seed: int = 0) -> float:
    """Equal arms, and a gate at exactly 1: every look is tempted to stop at a wrong answer."""
    draw, alarms = np.random.default_rng(seed), 0
    for _ in range(trials):
        found = bench(draw, slower=1.0, bound=1.0, process=process).ratio()
        alarms += not found.low <= 1 <= found.high
    return alarms / trials


def coverage(trials: int, *, seed: int = 1) -> dict[str, float]:
    """Arms of any ratio, a gate anywhere near it."""
    draw, covered = np.random.default_rng(seed), {"tpot": 0, "ttft": 0}
    for _ in range(trials):
        slower = float(np.exp(draw.normal(0, 0.1)))
        outcome = bench(draw, slower=slower, bound=float(np.exp(draw.normal(0, 0.05))) / slower)
        for metric in covered:
            found = outcome.ratio(metric)
            covered[metric] += found.low <= 1 / slower <= found.high
    return {metric: count / trials for metric, count in covered.items()}


def power(trials: int, *, regression: float = 1.05, seed: int = 2) -> dict[str, float]:
    """A shipped form 5 % slower than the arm that it must not be slower than."""
    draw, outcomes = np.random.default_rng(seed), []
    for _ in range(trials):
        outcomes.append(bench(draw, slower=regression, bound=1.0))
    return {
        "power": sum(outcome.gate == "fail" for outcome in outcomes) / trials,
        "blocks": float(np.median([outcome.blocks for outcome in outcomes])),
        "most_blocks": float(max(outcome.blocks for outcome in outcomes)),
    }


def between_runs(
    trials: int, *, slower: float, anchors: list[str], seed: int = 3
) -> dict[str, float]:
    """Two benches in a row on a machine that drifts, as `limbeck compare` sees them."""
    draw, covered, worse = np.random.default_rng(seed), 0, 0
    for _ in range(trials):
        machine = Machine(draw)
        outcomes = [bench(draw, slower=s, bound=1.0, machine=machine) for s in (1.0, slower)]
        old, new = ((outcome.samples, outcome.reference) for outcome in outcomes)
        change = time_change(old, new, metric="tpot", anchors=anchors)
        covered += change.low <= slower <= change.high
        worse += change.low > 1
    return {"coverage": covered / trials, "found_worse": worse / trials}


def main() -> None:
    """Run every simulation, then the overhead."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument(
        "--no-overhead", action="store_true", help="simulations only; they need no quiet machine"
    )
    asked = parser.parse_args()
    costs = {"overhead": None} if asked.no_overhead else overhead()
    tell = power(asked.trials)
    covers = coverage(asked.trials)
    result = {
        "overhead": costs["overhead"],
        "false_alarm_rate": false_alarms(asked.trials),
        "coverage": covers["tpot"],
        "power": tell["power"],
        "coverage_ttft": covers["ttft"],
        "blocks_to_decide": tell["blocks"],
        "false_alarm_rate_processes_differ_1_percent": false_alarms(
            asked.trials, process=0.01, seed=5
        ),
        "compare_equal": between_runs(
            max(asked.trials // 4, 1), slower=1.0, anchors=["teacher:other"]
        ),
        "compare_5_percent_slower": between_runs(
            max(asked.trials // 4, 1), slower=1.05, anchors=["teacher:other"]
        ),
        "compare_equal_without_a_common_arm": between_runs(
            max(asked.trials // 4, 1), slower=1.0, anchors=[]
        ),
        "trials": asked.trials,
        **{key: value for key, value in costs.items() if key != "overhead"},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
