"""Compare two runs, for continuous integration: each metric of the shipped form, and a verdict.

Measures nothing. Two runs share no blocks, so times are compared by ranks and widened by the noise
floor of each run. If both runs timed the same teachers, times are relative to theirs, which removes
changes of the machine between the runs. Quality is paired by held-out block or example if the text
is the same. Other scenarios are compared if both runs have them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from limbeck.contract.artifact import MANIFEST, Artifact, open_artifact
from limbeck.contract.errors import ArtifactError, UserError
from serve_bench.judge import figures
from serve_bench.judge.certificate import CERTIFICATE, read_certificate
from serve_bench.judge.changes import (
    TOLERANCES,
    Comparison,
    Row,
    exact_row,
    judge_change,
    relative,
    time_change,
)
from serve_bench.judge.figures import Reference
from serve_bench.judge.task import JudgingTask, Measured, read_bench

# a machine differs when one of these does
_MACHINE = ("processor", "flags", "cores", "memory_bytes")

T = TypeVar("T", covariant=True)


class Chooser(Protocol[T]):
    """Chooses the task of a bench artifact."""

    def __call__(self, bench: Artifact, /) -> T: ...


@dataclass(frozen=True)
class _Run:
    path: Path
    bench: Artifact
    task: JudgingTask
    measured: Measured

    @property
    def reference(self) -> Reference:
        return self.measured.reference

    @property
    def environment(self) -> Mapping[str, Any]:
        return self.measured.environment

    @property
    def shipped(self) -> str:
        return self.reference.shipped_arm.id

    @property
    def arm(self) -> dict[str, Any]:
        found: dict[str, Any] = self.bench.result["arms"][self.shipped]
        return found


def compare_runs(
    before: Path,
    after: Path,
    choose: Chooser[JudgingTask],
    *,
    tolerances: Mapping[str, float] | None = None,
    across_machines: bool = False,
) -> Comparison:
    """See `serve_bench.compare_runs`."""
    allowed = {**TOLERANCES, **(tolerances or {})}
    old, new = _open(before, choose), _open(after, choose)
    _require_same_work(old, new)
    notes = list(_differences(old, new))
    if (machines := _machines(old, new)) is not None:
        if not across_machines:
            raise UserError(
                f"{before} and {after} were measured on different machines ({machines}), so a "
                "difference of speed says nothing of the models. Measure both on one machine "
                "(limbeck bench), or give --across-machines to see them beside each other."
            )
        notes.insert(
            0,
            f"**Different machines**: {machines}. Times and memory compare the machines as well "
            "as the models.",
        )
    anchors = _anchors(old, new)
    notes.append(_note_of(anchors, new))
    more, remarks = new.task.scenarios(old.measured, new.measured, allowed["speed"], anchors)
    same_text = _text(old) == _text(new)
    if old.measured.quality is not None and new.measured.quality is not None and not same_text:
        notes.append("The held-out text differs, so quality is shown and not compared.")
    rows = [
        *_times(old, new, allowed["speed"], anchors),
        *_sizes(old, new, allowed),
        *_losses(old, new, allowed["quality"], same_text=same_text),
        *more,
    ]
    notes += remarks
    if any(row.status == "ratio only" for row in rows):
        notes.append(
            "Ratio only: no samples, or too few, for an interval, so nothing is decided by it."
        )
    return Comparison(str(before), str(after), tuple(rows), tuple(notes))


def _machines(old: _Run, new: _Run) -> str | None:
    """How the machines of both runs differ, or None for the same kind of machine."""
    then, now = old.environment["host"], new.environment["host"]
    differ = [name for name in _MACHINE if then[name] != now[name]]
    return "; ".join(f"{n}: {_shown(then[n])} and {_shown(now[n])}" for n in differ) or None


def _note_of(anchors: Sequence[str], new: _Run) -> str:
    """What changes of time are relative to."""
    if not anchors:
        return (
            "No arm is the same in both runs, so a change of time holds what the machine did "
            "between them, too."
        )
    names = ", ".join(new.bench.result["arms"][anchor]["label"] for anchor in anchors)
    return (
        f"Changes of time are relative to {names}, timed in both runs: a slower machine is not "
        "a slower model."
    )


def _open(path: Path, choose: Chooser[JudgingTask]) -> _Run:
    folder = path / "bench" if (path / "bench" / MANIFEST).exists() else path
    if not (folder / MANIFEST).exists():
        raise ArtifactError(
            f"{path}: no measured run here; expected a run folder with a complete bench, or a "
            "bench artifact."
        )
    bench = open_artifact(folder, kind="bench")
    task = choose(bench)
    return _Run(path, bench, task, read_bench(bench, task))


def _require_same_work(old: _Run, new: _Run) -> None:
    if old.task.name != new.task.name:
        raise UserError(
            f"{old.path} is of task {old.task.name} and {new.path} of {new.task.name}; compare "
            "runs of one task."
        )
    for what, then, now in (
        *(
            (f"bench.{name}", asked, new.task.protocol().get(name))
            for name, asked in old.task.protocol().items()
        ),
        ("bench.threads", old.environment["threads"], new.environment["threads"]),
    ):
        if then != now:
            raise UserError(
                f"{what}: found {then} in {old.path} and {now} in {new.path}; times of different "
                "work cannot be compared. "
                f"Measure one of them again, for example with --set {what}={then}."
            )


def _differences(old: _Run, new: _Run) -> Iterator[str]:
    then, now = old.environment["versions"], new.environment["versions"]
    changed = [
        f"{n} {then.get(n, 'none')} → {now.get(n, 'none')}"
        for n in sorted(then.keys() | now.keys())
        if then.get(n) != now.get(n)
    ]
    if changed:
        yield f"Versions: {', '.join(changed)}."
    if old.shipped != new.shipped:
        yield f"Shipped form: {old.reference.shipped} → {new.reference.shipped}."
    for run in (old, new):
        if not run.arm["steady"]:
            yield f"{run.path}: the shipped form had not settled when it was timed."


# Metrics ------------------------------------------------------------------------------------------


def _anchors(old: _Run, new: _Run) -> list[str]:
    """Teachers that both runs timed: the same weights in the same libraries."""
    versions = [
        {name: run.environment["versions"].get(name) for name in ("torch", "transformers")}
        for run in (old, new)
    ]
    if versions[0] != versions[1]:
        return []
    parents = [_parents(run) for run in (old, new)]
    return [
        arm.id
        for arm in new.reference.with_role("teacher")
        if arm.id in old.bench.result["arms"]
        and (digest := parents[1].get(f"teacher {arm.label}")) is not None
        and digest == parents[0].get(f"teacher {arm.label}")
    ]


def _parents(run: _Run) -> dict[str, str]:
    """Digests of the parents of the measured student; empty without student and certificate."""
    student = run.path / "student"
    if (student / MANIFEST).exists():
        return dict(open_artifact(student, verify=False).manifest["parents"])
    return dict(read_certificate(run.path)["parents"]) if (run.path / CERTIFICATE).exists() else {}


def _times(old: _Run, new: _Run, tolerance: float, anchors: Sequence[str]) -> Iterator[Row]:
    for title, metric, cell in new.task.metrics:
        sides = [figures.by_block(r.measured.samples, r.shipped, metric, cell) for r in (old, new)]
        ratio = time_change(
            old.measured.timed, new.measured.timed, metric=metric, anchors=anchors, cell=cell
        )
        change = relative(ratio)
        then, now = (f"{1e3 * np.median(values):.4g}" for values in sides)
        status = judge_change(change, tolerance)
        yield Row(title, "speed", then, now, change, tolerance, status)


def _sizes(old: _Run, new: _Run, allowed: Mapping[str, float]) -> Iterator[Row]:
    for key, title, kind in (
        ("bytes", "MB on disk", "size"),
        ("peak_rss_bytes", "MB of memory at most", "memory"),
    ):
        then, now = old.arm[key], new.arm[key]
        if not then or now is None:  # a server elsewhere
            continue
        before, after = (f"{value / 1e6:.4g}" for value in (then, now))
        yield exact_row(title, kind, before, after, now / then - 1, allowed[kind])


def _losses(old: _Run, new: _Run, tolerance: float, *, same_text: bool) -> Iterator[Row]:
    if old.measured.quality is not None and new.measured.quality is not None:
        yield from new.task.losses(old.measured, new.measured, tolerance, same_text=same_text)


def _text(run: _Run) -> str | None:
    """Hash of the held-out text; None for a bench without a recipe."""
    return run.task.data(run.bench).get("heldout") if run.measured.quality is not None else None


def _shown(value: Any) -> str:
    return " ".join(value) or "none" if isinstance(value, list) else str(value)
