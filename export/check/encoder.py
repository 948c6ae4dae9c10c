"""Does an encoder's graph compute what the student computes? Cases, torch's answers, and the
differences by form.

Shape letters: B rows, L tokens, C classes, d width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from limbeck.contract.data.examples import Examples
from limbeck.runtime.encoder import GraphEncoder

# By name: input_ids and attention_mask [B, L], answers [B, C or d].
Cases = Mapping[str, Mapping[str, npt.NDArray[Any]]]

_BATCH = 8  # rows of the ragged case
# How far a form may be from torch: largest difference over the largest answer (of unit vectors:
# over 1), and the least share of like answers: the same class where torch's lead is at least
# `_LEAD`, or the mean cosine of the two vectors.
_TOLERANCES = {
    "fp32": (1e-4, 1.0),
    "int8-weight": (0.25, 0.97),
    "int8-dynamic": (0.25, 0.97),
    "int8-static": (0.25, 0.97),
}
_LEAD = 0.5
_ALIKE = 1e-6  # of a mean cosine that should be 1


def make_cases(
    heldout: Examples, model: Path, *, task: str
) -> dict[str, dict[str, npt.NDArray[Any]]]:
    """Batches for an encoder, and torch's answer to each row alone and without padding."""
    order = np.argsort(heldout.lengths, kind="stable")
    ragged = order[np.linspace(0, len(order) - 1, min(_BATCH, len(order))).round().astype(int)]
    longest = heldout.batch(order[-1:])
    one = longest[0][:, :1], longest[1][:, :1]
    wide = tuple(np.pad(a, ((0, 0), (0, 3))) for a in heldout.batch(order[:2]))
    inputs = {"ragged": heldout.batch(ragged), "longest": longest, "one_token": one, "padded": wide}
    import torch

    from export.build.encoder import load_student

    student = load_student(model, task=task)
    cases = {}
    with torch.inference_mode():
        for name, (ids, mask) in inputs.items():
            answers = [
                student(
                    torch.from_numpy(row[kept == 1][None]),
                    torch.ones(1, int(kept.sum()), dtype=torch.int64),
                )[-1][0]
                for row, kept in zip(ids, mask, strict=True)
            ]
            cases[name] = {
                "input_ids": ids,
                "attention_mask": mask,
                "answers": torch.stack(answers).numpy(),
            }
    return cases


def measure_encoder_parity(form: str, graph: Path, cases: Cases) -> dict[str, Any]:
    """Differences between the graph of ``form`` and torch's answers, by case and over all rows.

    `alike` is the share of rows with the same class where torch is sure (classification), or the
    mean cosine (embedding). The result names the tolerance and the ``failures``, empty when the
    form is good enough.
    """
    encoder = GraphEncoder(graph)
    relative, least = _TOLERANCES[form]
    scale = max(1.0, *(float(np.abs(case["answers"]).max()) for case in cases.values()))
    by_case, alike = {}, list[float]()
    for name, case in cases.items():
        expected, found = case["answers"], encoder.run(case["input_ids"], case["attention_mask"])
        likeness = list(_likeness(expected, found, task=encoder.task))
        alike += likeness
        by_case[name] = {
            "max_abs": float(np.abs(expected - found).max()),
            "mean_abs": float(np.abs(expected - found).mean()),
        }
    rows = sum(len(case["answers"]) for case in cases.values())
    limits = {"max_abs": relative * scale, "alike": least}
    summary = {
        "rows": rows,
        "max_abs": max(c["max_abs"] for c in by_case.values()),
        "alike": float(np.mean(alike)) if alike else 1.0,
    }
    failures = [
        f"{name}: max_abs is {c['max_abs']:.3g}, tolerance {limits['max_abs']:.3g}"
        for name, c in by_case.items()
        if not c["max_abs"] <= limits["max_abs"]  # NaN is past every tolerance
    ]
    if not summary["alike"] >= least - _ALIKE:
        failures.append(f"all cases: alike is {summary['alike']:.3g}, tolerance {least:.3g}")
    return {**summary, "tolerance": limits, "cases": by_case, "failures": failures}


def _likeness(expected: npt.NDArray[Any], found: npt.NDArray[Any], *, task: str) -> Iterable[float]:
    if task == "embedding":
        return (float(a @ b) for a, b in zip(expected, found, strict=True))
    ordered = np.sort(expected, axis=1)
    sure = ordered[:, -1] - ordered[:, -2] >= _LEAD
    return (float(same) for same in (expected.argmax(1) == found.argmax(1))[sure])
