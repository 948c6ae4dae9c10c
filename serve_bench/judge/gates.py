"""Gates and the verdict of the shipped form.

Knows intervals and bounds, not how they were measured. Timing gates are decided by the whole
interval. Quality and size are decided by the number itself: another run on the same text and files
gives the same digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from limbeck.contract.data.evals import TITLES
from limbeck.contract.recipe import Gates
from limbeck.contract.results.bench import Evaluations, Gate, Interval, Status, Verdict

SHARE = "of 100"  # a value of 0.05 is 5 of 100
_MOST_DIGITS = 10  # behind the point


@dataclass(frozen=True)
class Evidence:
    """Figures that gates are judged on.

    Times in ms, sizes in bytes. A figure that was not measured is None or empty.
    """

    name: str  # of the recipe
    shipped: str  # form
    # decode speed of the shipped form over each teacher's, by teacher
    speedup: Mapping[str, Interval]
    tpot_ms: Interval | None
    ttft_ms: Interval | None
    size: int
    fp32_size: int | None
    # relative rise of mean NLL over the student as it was distilled
    rise_over_fp32: Interval | None
    # by teacher: its mean NLL, and our relative rise over it
    rise_over_teachers: Mapping[str, tuple[float, Interval]]
    # whether `rise_over_fp32` is over another student, the one that recovery began with
    recovered: bool = False
    rise_of_ggufs: Mapping[str, float] = field(default_factory=dict)  # by form, over torch
    by_byte: frozenset[str] = frozenset()  # teachers with another tokenizer
    evaluations: Evaluations | None = None  # of the shipped form
    teachers: Mapping[str, Evaluations] = field(default_factory=dict)  # of each teacher


def language_gates(gates: Gates, evidence: Evidence, *, timing_only: bool = False) -> list[Gate]:
    """Judge every gate of the recipe. ``timing_only`` leaves out quality and size."""
    judged = timing_gates(gates, evidence)
    return judged if timing_only else judged + _others(gates, evidence)


def conclude(judged: Sequence[Gate], *, name: str, shipped: str, stand_in: bool = False) -> Verdict:
    """The verdict from judged gates; ``name`` is the recipe's, ``shipped`` the form's.

    Models with random weights (``stand_in``) are never called fit to ship, even if all gates hold.
    """
    statuses = {gate.status for gate in judged}
    status: Status = (
        "fail" if "fail" in statuses else "undecided" if "undecided" in statuses else "pass"
    )
    subject = f"{name}, as {shipped},"
    if stand_in:
        missed = [gate.title.lower() for gate in judged if gate.status != "pass"]
        note = f" Not met or undecided: {_list(missed)}." if missed else ""
        says = (
            f"{subject} has random stand-ins for models: it runs here; this says nothing of "
            "quality."
        )
        return Verdict(status, says + note, tuple(judged))
    return Verdict(status, _sentence(status, judged, subject), tuple(judged))


def fastest_teacher(evidence: Evidence) -> str | None:
    """The teacher over which the shipped form has the smallest lead in speed."""
    return _least({name: over.value for name, over in evidence.speedup.items()})


def best_teacher(evidence: Evidence) -> str | None:
    """The teacher with the least NLL, averaged over the domains."""
    return _least({name: nll for name, (nll, _) in evidence.rise_over_teachers.items()})


def _least(values: Mapping[str, float]) -> str | None:
    """The name of the least value. One that is no number comes first, so that a gate sees it."""
    return min(values, key=lambda name: (not math.isnan(values[name]), values[name]), default=None)


def timing_gates(gates: Gates, evidence: Evidence) -> list[Gate]:
    judged = []
    teacher = fastest_teacher(evidence)
    if gates.min_decode_speedup is not None and teacher is not None:
        judged.append(
            estimated(
                "min_decode_speedup",
                "Decode speed over the fastest teacher",
                evidence.speedup[teacher],
                gates.min_decode_speedup,
                unit="×",
                least=True,
                found=f"{{}} the decode speed of {teacher}, the fastest teacher, in torch",
            )
        )
    for name, title, interval, bound in (
        ("max_tpot_ms", "TPOT", evidence.tpot_ms, gates.max_tpot_ms),
        ("max_ttft_ms", "TTFT", evidence.ttft_ms, gates.max_ttft_ms),
    ):
        if bound is not None and interval is not None:
            judged.append(
                estimated(
                    name, title, interval, bound, unit="ms", least=False, found=f"{title} {{}}"
                )
            )
    return judged


def _others(gates: Gates, evidence: Evidence) -> list[Gate]:
    judged = []
    teacher = best_teacher(evidence)
    if gates.max_loss_vs_best_teacher is not None and teacher is not None:
        judged.append(
            exact(
                "max_loss_vs_best_teacher",
                "Loss against the best single teacher",
                evidence.rise_over_teachers[teacher][1],
                gates.max_loss_vs_best_teacher,
                unit="%",
                found=f"held-out loss {{}} that of {teacher}, the best single teacher"
                + (", in bits a byte" if teacher in evidence.by_byte else ""),
            )
        )
    if gates.max_quantization_loss is not None and evidence.rise_over_fp32 is not None:
        judged.append(
            exact(
                "max_quantization_loss",
                "Loss from quantising",
                evidence.rise_over_fp32,
                gates.max_quantization_loss,
                unit="%",
                found=(
                    f"held-out loss {{}} that of the fp32 "
                    f"graph{' of the student before recovery' if evidence.recovered else ''}"
                ),
            )
        )
    if (most := gates.max_quantization_loss) is not None:
        for form, rise in evidence.rise_of_ggufs.items():
            title = f"Loss from quantising in {form}"
            found = f"held-out loss of {form} {{}} that of the student in torch"
            judged.append(exact("max_quantization_loss", title, rise, most, unit="%", found=found))
    if evidence.evaluations is not None:
        judged += _of_evaluations(gates, evidence.evaluations, evidence.teachers)
    judged += size_gates(gates, evidence.size, evidence.fp32_size)
    return judged


def _of_evaluations(
    gates: Gates, found: Evaluations, teachers: Mapping[str, Evaluations]
) -> Iterator[Gate]:
    if gates.max_forgetting is not None and found.forgetting is not None:
        yield exact(
            "max_forgetting",
            "Loss on other text against the base",
            found.forgetting,
            gates.max_forgetting,
            unit="%",
            found="loss on other text {} that of the base",
        )
    for asked, bound in (gates.min_task or {}).items():
        yield exact(
            "min_task",
            f"Right answers, {TITLES[asked]}",
            found.shares[asked],
            bound,
            unit=SHARE,
            found=f"{TITLES[asked]}: {{}} right",
            least=True,
        )
    if gates.max_task_loss is not None and teachers:
        falls = {}
        for name, share in found.shares.items():
            right = {who: theirs.shares[name].value for who, theirs in teachers.items()}
            best = max(right, key=right.__getitem__)
            falls[right[best] - share.value] = (name, best)
        fall, (name, teacher) = max(falls.items())
        yield exact(
            "max_task_loss",
            "Right answers against the best teacher",
            fall,
            gates.max_task_loss,
            unit=SHARE,
            found=f"{TITLES[name]}: {{}} fewer right answers than {teacher}",
        )


class SizeBounds(Protocol):
    """Bounds on the size that the gates of every task have."""

    @property
    def max_size_ratio(self) -> float | None: ...

    @property
    def max_size_mb(self) -> float | None: ...


def size_gates(asked: SizeBounds, size: int, fp32_size: int | None) -> list[Gate]:
    """The gates on the size on disk, in bytes."""
    judged, ratio, megabytes = [], asked.max_size_ratio, asked.max_size_mb
    if ratio is not None and fp32_size:
        title, found = "Size over the fp32 graph", "{} the size of the fp32 graph"
        judged.append(
            exact("max_size_ratio", title, size / fp32_size, ratio, unit="×", found=found)
        )
    if megabytes is not None:
        found = "{} on disk"
        judged.append(
            exact("max_size_mb", "Size on disk", size / 1e6, megabytes, unit="MB", found=found)
        )
    return judged


def estimated(
    name: str, title: str, interval: Interval, bound: float, *, unit: str, least: bool, found: str
) -> Gate:
    """Pass or fail if the whole interval lies on one side of the bound, else undecided."""
    above, below = interval.low >= bound, interval.high < bound
    if not least:
        above, below = interval.high <= bound, interval.low > bound
    status: Status = "pass" if above else "fail" if below else "undecided"
    if not math.isfinite(interval.value):
        return _no_number(name, title, interval.value, bound, unit, least)
    if interval.bounded:
        least_shown = _plain(interval.low, unit, bound)
        span = f"95 % interval {least_shown} to {show(interval.high, unit, bound)}"
    else:
        span = f"{interval.n} blocks are too few for an interval"
    value, asked = show(interval.value, unit, bound), _limit(bound, unit, least)
    sentence = f"{_capital(found.format(value))} ({span}); {asked} was asked."
    low, high = (interval.low, interval.high) if interval.bounded else (None, None)
    return Gate(name, title, status, interval.value, low, high, bound, unit, least, sentence)


def exact(
    name: str,
    title: str,
    value: Interval | float,
    bound: float,
    *,
    unit: str,
    found: str,
    least: bool = False,
) -> Gate:
    """The number itself decides; the interval of a quality figure only speaks of other text."""
    number = value.value if isinstance(value, Interval) else value
    status: Status = "pass" if (number >= bound if least else number <= bound) else "fail"
    if not math.isfinite(number):
        return _no_number(name, title, number, bound, unit, least)
    low, high, span = None, None, ""
    if isinstance(value, Interval) and not value.bounded:
        span = f" ({value.n} of such text are too few for an interval)"
    elif isinstance(value, Interval):
        low, high = value.low, value.high
        span = f" (interval for such text {_plain(low, unit)} to {show(high, unit)})"
    shown = _rise(number, bound) if unit == "%" else show(number, unit, bound)
    sentence = f"{_capital(found.format(shown))}{span}; {_limit(bound, unit, least)} was asked."
    return Gate(name, title, status, number, low, high, bound, unit, least, sentence)


def _no_number(name: str, title: str, value: float, bound: float, unit: str, least: bool) -> Gate:
    """A gate whose figure is infinite or no number: no bound is met by it."""
    sentence = f"{title}: the figure is {value:g}, not a number that can be held against a bound; "
    sentence += f"{_limit(bound, unit, least)} was asked."
    return Gate(name, title, "fail", value, None, None, bound, unit, least, sentence)


def show(value: float, unit: str, bound: float | None = None) -> str:
    """A value with its unit, in significant digits; in more of them where fewer would show the
    value on another side of ``bound``.
    """
    number = _plain(value, unit, bound)
    return f"{number}{unit}" if unit == "×" else f"{number} {unit}"


def _plain(value: float, unit: str, bound: float | None = None) -> str:
    sign, scale = ("+", 100) if unit == "%" else ("", 100 if unit == SHARE else 1)
    exact = round(scale * value, _MOST_DIGITS)  # without the tail of binary fractions
    digits = 2 if unit == "%" else 1
    if unit not in ("%", SHARE) and math.isfinite(value):
        digits = 0 if value == int(value) or value >= 100 else 1 if value >= 10 else 2
    text = f"{exact:{sign}.{digits}f}"
    if bound is not None:
        limit = round(scale * bound, _MOST_DIGITS)
        while digits < _MOST_DIGITS and np.sign(float(text) - limit) != np.sign(exact - limit):
            digits += 1
            text = f"{exact:{sign}.{digits}f}"
    return text.replace("-", "−")


def _rise(value: float, bound: float) -> str:
    if value == 0:
        return "equal to"
    return f"{_plain(value, '%', bound)[1:]} % {'above' if value > 0 else 'below'}"


def _limit(bound: float, unit: str, least: bool) -> str:
    if unit != "%":
        return f"at {'least' if least else 'most'} {show(bound, unit, bound)}"
    if bound == 0:
        return "no rise"
    return (
        f"a rise of at most {100 * bound:g} %"
        if bound > 0
        else f"a fall of at least {-100 * bound:g} %"
    )


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _sentence(status: Status, gates: Sequence[Gate], subject: str) -> str:
    if not gates:
        return f"{subject} was measured; the recipe sets no gates, so nothing was asked of it."
    many = "its only gate" if len(gates) == 1 else f"all {len(gates)} gates"
    if status == "pass":
        return f"{subject} is fit to ship: it meets {many} on this machine."
    failed = [gate.title.lower() for gate in gates if gate.status == "fail"]
    if status == "fail":
        return (
            f"{subject} is not fit to ship: {_list(failed)} "
            f"{'misses its bound' if len(failed) == 1 else 'miss their bounds'}."
        )
    open_ = [gate.title.lower() for gate in gates if gate.status == "undecided"]
    return (
        f"{subject} is undecided: the measured interval of {_list(open_)} still contains the "
        "bound, and the time for "
        "measuring is spent. Give bench.minutes more, or measure on a quieter machine."
    )


def _list(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
