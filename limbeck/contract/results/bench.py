"""What a bench measures and what it finds. The JSON keys of the ``bench`` artifact and of
report.json are these field names.

Knows no file, no process and no statistics: `serve_bench` fills these in, the command line and the
search read them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal

TaskName = Literal["causal-lm", "classification", "embedding"]
Role = Literal["teacher", "student", "form", "twin", "extra"]
RuntimeName = Literal["torch", "torch-compile", "onnxruntime", "onnxruntime-genai", "openai"]
Status = Literal["pass", "fail", "undecided"]
EXIT_CODES: Mapping[Status, int] = {"pass": 0, "fail": 1, "undecided": 3}


@dataclass(frozen=True)
class Arm:
    """One thing that is measured.

    ``spec`` holds the options with which a worker process opens it.
    """

    id: str
    label: str  # in tables and pictures
    role: Role
    runtime: RuntimeName
    bytes: int  # on disk: weights, and the graph or the adapter
    spec: Mapping[str, Any] = field(default_factory=dict, repr=False)
    # Of a model with another tokenizer: its tokens for each token of the student's, in equal text.
    token_rate: float | None = None

    @property
    def scored(self) -> bool:
        """Whether its quality is measured. Twins and extra runtimes run a scored model again."""
        return self.role not in ("twin", "extra")


@dataclass(frozen=True)
class Interval:
    """A value and the 95 % interval around it, over ``n`` blocks (or examples)."""

    value: float
    low: float
    high: float
    n: int

    def map_exp(self) -> Interval:
        """From logarithms to ratios."""
        return Interval(math.exp(self.value), _exp(self.low), _exp(self.high), self.n)

    @property
    def bounded(self) -> bool:
        """Whether there were enough blocks for an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def as_json(self) -> dict[str, Any]:
        """The interval as JSON. Bounds that do not exist are null."""
        low, high = (self.low, self.high) if self.bounded else (None, None)
        return {"value": self.value, "low": low, "high": high, "n": self.n}


@dataclass(frozen=True)
class Gate:
    """One gate, judged."""

    name: str  # the recipe's key under `gates:`
    title: str
    status: Status
    value: float
    low: float | None  # of the interval; None for a number that is counted, not estimated
    high: float | None
    bound: float
    unit: str  # `×`, `ms`, `MB` or `%` (a value of 0.01 is 1 %)
    least: bool  # whether the bound is the least allowed value (else the greatest)
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """All gates, and the conclusion from them."""

    status: Status
    sentence: str
    gates: tuple[Gate, ...]

    @property
    def exit_code(self) -> int:
        """Exit code of the command line: 0 pass, 1 fail, 3 undecided."""
        return EXIT_CODES[self.status]

    def as_json(self) -> dict[str, Any]:
        """The keys `verdict`, `sentence` and `gates` of a result."""
        gates = [asdict(gate) for gate in self.gates]
        return {"verdict": self.status, "sentence": self.sentence, "gates": gates}


@dataclass(frozen=True)
class Evaluations:
    """What one model answered in the short evaluations."""

    shares: Mapping[str, Interval]  # of right answers, by evaluation
    losses: Mapping[str, float]  # nats a token, by text
    forgetting: Interval | None = None  # relative rise of the losses over the base's


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """Figures of one arm that every task has. Bytes are bytes, ``_s`` is seconds."""

    label: str
    role: Role
    runtime: RuntimeName
    bytes: int
    peak_rss_bytes: int | None
    device_bytes: int | None
    import_s: float | None
    load_s: float | None
    energy: Mapping[str, Any] | None
    steady: bool
    n: int  # timed samples
    token_rate: float | None = None  # see `Arm`


@dataclass(frozen=True, kw_only=True)
class LanguageArm(ArmResult):
    """An arm that generates text. Times are of one generation."""

    ttft_ms: Interval
    tpot_ms: Interval
    e2el_ms: Interval
    decode_tokens_s: Interval
    prompt_tokens_s: Interval
    itl_ms: Mapping[str, float | int | None]
    ttft_percentiles_ms: Mapping[str, float | None]
    roofline: Mapping[str, float] | None
    quality: Mapping[str, Any] | None
    evals: Evaluations | None = None


@dataclass(frozen=True)
class CellResult:
    """Throughput of one batch size and length."""

    batch: int
    length: int
    seconds: Interval
    sequences_s: Interval


@dataclass(frozen=True, kw_only=True)
class EncoderArm(ArmResult):
    """An arm that reads whole batches. ``metrics`` are the task's, by name."""

    grid: tuple[CellResult, ...]
    metrics: Mapping[str, float] | None


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """The result of a bench: figures by arm, ratios, gates, verdict.

    ``verdict`` is None without a recipe.
    """

    task: TaskName
    shipped: str
    judged: str  # id of the arm that is judged
    stand_in: bool  # whether the models have random weights, so that quality means nothing
    blocks: int | None
    void_blocks: int | None
    disturbed: bool | None
    stopped: str | None
    over_budget: str | None  # why timing took longer than its budget
    speed_of_shipped_over: Mapping[str, Mapping[str, Interval]]  # by arm and metric
    gates: tuple[Gate, ...] = ()
    verdict: Status | None = None
    sentence: str = ""

    def as_json(self) -> dict[str, Any]:
        """The result as JSON; optional fields (below) that are None are left out."""
        found: dict[str, Any] = _plain(self)
        for name in ("scenarios", "offline", "cold", "server", "targets", "against", "base_evals"):
            if name in found and found[name] is None:
                del found[name]
        return found


@dataclass(frozen=True, kw_only=True)
class LanguageResult(BenchResult):
    """The result for a language model. The last fields are None where they were not asked for."""

    arms: Mapping[str, LanguageArm]
    nll_rise_of_shipped_over: Mapping[str, Interval] = field(default_factory=dict)
    base_evals: Evaluations | None = None  # of the model that the student was made from
    scenarios: tuple[str, ...] | None = None
    offline: list[dict[str, Any]] | None = None
    cold: dict[str, Any] | None = None
    server: dict[str, Any] | None = None
    targets: tuple[str, ...] | None = None
    against: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class EncoderResult(BenchResult):
    """The result for an encoder; gates compare ``metric``."""

    arms: Mapping[str, EncoderArm]
    metric: str
    best_teacher: str | None
    metric_loss_of_shipped_against: Mapping[str, Interval]


def arms_of(result: Mapping[str, Any]) -> tuple[Arm, ...]:
    """The arms of a bench artifact's result, without the options that open them."""
    return tuple(
        Arm(
            name,
            arm["label"],
            arm["role"],
            arm["runtime"],
            arm["bytes"],
            token_rate=arm.get("token_rate"),
        )
        for name, arm in result["arms"].items()
    )


def _plain(value: Any) -> Any:
    """Dataclasses, mappings and sequences as JSON."""
    if isinstance(value, Interval):
        return value.as_json()
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
