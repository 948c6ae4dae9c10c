"""Is a form near enough to torch? Limits by form, and the verdict on the differences of every case.

These limits are for graphs that are broken: padding, positions, a kernel that overflows. Such a
graph is wrong at most positions of some case. Rounding can be far off at a single odd position of a
sound graph, such as a token that the model never reads alone. So a rounded form is judged without
its few worst positions, and cases of few positions are judged together.

Two things are judged elsewhere. `export.check.weights` compares the weights of a rounded form, and
sees a fault in one matrix, which may be smaller in the logits than sound rounding of all. Held-out
loss, which `gates.max_quantization_loss` bounds, says what rounding costs on text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# [5, P] by position: largest and mean logit difference, KL(torch || form), same first choice,
# torch's lead.
Differences = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Tolerance:
    """How far a form may be from torch.

    Limits of rounded forms are about twice what sound graphs of real and random models came to;
    docs/experiments/forms.md has the table (`make bench-parity`).
    """

    relative: float  # largest logit difference over the largest reference logit (at least 1)
    kl: float  # mean KL(torch || form) in nats
    top1: (
        float  # share of positions with the same first choice where torch's lead is at least `lead`
    )
    # logit difference between torch's first and second choice that makes a position count
    lead: float
    # nats a token that the loss of one graph may differ by between two machines
    replay: float


# A single case may reach so many times the mean KL, and the share of other first choices, of all
# cases; so may all cases together if they are few positions, as in what travels with a folder.
_WORST = 2.5
_MANY = 100  # positions from which their mean is held to the limit itself
_ROUNDED = (
    "int8-weight",
    "int8-dynamic",
    "int8-static",
    "int8-trt",
    "int4-weight",
    "gguf-q8_0",
    "gguf-q4_0",
)
_ODD = 0.05  # share of the positions of a rounded form that may be anything but not a number
_FEW = 20  # positions below which a case is judged together with the other short ones
_LEAST = 5  # positions below which even those are judged with all cases only
TOLERANCES = {
    "fp32": Tolerance(relative=1e-4, kl=1e-6, top1=1.0, lead=1e-2, replay=1e-6),
    "fp16": Tolerance(relative=0.03, kl=1e-4, top1=0.99, lead=0.1, replay=1e-4),
    "int8-weight": Tolerance(relative=0.4, kl=0.1, top1=0.9, lead=0.5, replay=0.03),
    "int8-dynamic": Tolerance(relative=0.6, kl=0.25, top1=0.8, lead=0.5, replay=0.1),
    "int8-static": Tolerance(relative=0.6, kl=0.25, top1=0.8, lead=0.5, replay=0.1),
    "int8-trt": Tolerance(relative=0.6, kl=0.25, top1=0.8, lead=0.5, replay=0.1),
    "int4-weight": Tolerance(relative=0.8, kl=0.6, top1=0.65, lead=0.5, replay=0.3),
    "gguf-f16": Tolerance(relative=0.03, kl=1e-4, top1=0.99, lead=0.1, replay=1e-4),
    "gguf-q8_0": Tolerance(relative=0.4, kl=0.1, top1=0.9, lead=0.5, replay=0.03),
    "gguf-q4_0": Tolerance(relative=1.5, kl=1.5, top1=0.2, lead=0.5, replay=0.3),
}


@dataclass(frozen=True)
class Verdict:
    """The limits that a form was held to, and every case past them."""

    limits: Mapping[str, float]
    failures: list[str]


def judge(form: str, cases: Mapping[str, Differences], *, largest: float) -> Verdict:
    """Hold the differences of every case, and of all together, to the limits of ``form``.

    ``largest`` is torch's largest logit, in size. A difference that is not a number fails whatever
    the form.
    """
    tolerance = TOLERANCES[form]
    limits = {
        "max_abs": tolerance.relative * max(1.0, largest),
        "kl": tolerance.kl,
        "top1_sure": tolerance.top1,
        "loss": tolerance.replay,
    }
    failures = [
        f"{name}: {int(np.isnan(found).any(axis=0).sum())} positions are not a number"
        for name, found in cases.items()
        if np.isnan(found).any()
    ]
    judged = _judged(form, cases)
    for name, found in judged.items():
        values = summary(found, tolerance.lead)
        for metric, limit in (("max_abs", limits["max_abs"]), ("kl", _WORST * limits["kl"])):
            if values[metric] > limit:
                failures.append(f"{name}: {metric} is {values[metric]:.3g}, tolerance {limit:.3g}")
    for name, found in cases.items():
        values = summary(found, tolerance.lead)
        missed = round(values["sure"] * (1 - values["top1_sure"]))
        may = math.ceil(round(_WORST * (1 - tolerance.top1) * values["sure"], 6))
        if missed > may:
            failures.append(
                f"{name}: {missed} of {values['sure']} first choices that torch is sure of differ, "
                f"{may} may"
            )
    everything = np.concatenate(list(cases.values()), axis=1)
    kept = everything if form not in _ROUNDED else _without_odd(everything)
    whole = summary(kept, tolerance.lead)
    times = 1 if everything.shape[1] >= _MANY else _WORST
    if whole["kl"] > times * limits["kl"]:
        failures.append(f"all cases: kl is {whole['kl']:.3g}, tolerance {times * limits['kl']:.3g}")
    least = 1 - times * (1 - limits["top1_sure"])
    if whole["top1_sure"] < least:
        failures.append(f"all cases: top1_sure is {whole['top1_sure']:.3g}, tolerance {least:.3g}")
    return Verdict(limits, failures)


def _judged(form: str, cases: Mapping[str, Differences]) -> dict[str, Differences]:
    """The positions that each case is judged by; see the top of this file."""
    if form not in _ROUNDED:
        return dict(cases)
    judged = {name: found for name, found in cases.items() if found.shape[1] >= _FEW}
    short = [found for found in cases.values() if found.shape[1] < _FEW]
    together = np.concatenate(short, axis=1) if short else np.zeros((5, 0))
    if together.shape[1] >= _LEAST:
        judged["short cases"] = together
    return {name: _without_odd(found) for name, found in judged.items()}


def _without_odd(found: Differences) -> Differences:
    """Without the positions of the largest KL, `_ODD` of them."""
    count = found.shape[1]
    order = np.argsort(found[2])[: count - math.ceil(_ODD * count)]
    return found[:, np.sort(order)]


def summary(differences: Differences, lead: float) -> dict[str, float]:
    """Means and extremes over positions; ``sure`` counts those where torch leads by ``lead``."""
    largest, mean, kl, same, margin = differences
    sure = margin >= lead
    return {
        "positions": len(largest),
        "max_abs": float(largest.max()),
        "mean_abs": float(mean.mean()),
        "kl": max(float(kl.mean()), 0.0) if np.isfinite(kl).all() else float("nan"),
        "top1": float(same.mean()),
        "top1_sure": float(same[sure].mean()) if sure.any() else 1.0,
        "sure": int(sure.sum()),
    }
