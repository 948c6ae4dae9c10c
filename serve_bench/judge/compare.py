"""Two runs beside each other, for continuous integration: what the shipped form got better or worse at, and a verdict.

Knows bench artifacts; measures nothing. Between runs there are no pairs of blocks, so times are compared by ranks and widened
by what each run's two copies of one artifact differ in; where both runs timed the same teachers, relative to them, so that
what the machine did between the runs falls out. Quality is paired by held-out block, where the text is the same. The further
scenarios are compared where both runs have them, a server by its answers to the same arrivals.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from limbeck.contract.artifact import MANIFEST, Artifact, open_artifact
from limbeck.contract.errors import ArtifactError, UserError
from limbeck.contract.recipe import parse_recipe
from serve_bench.judge import figures
from serve_bench.judge.certificate import CERTIFICATE, heldout_file, read_certificate
from serve_bench.judge.figures import ENVIRONMENT, QUALITY, SAMPLES, Reference, Sample
from serve_bench.judge.gates import show
from serve_bench.judge.quality import summarise
from serve_bench.judge.stats import (
    CONFIDENCE,
    FEWEST_BLOCKS,
    Array,
    Interval,
    first_look,
    median_interval,
    relative_rise,
    unpaired_ratio,
    widened,
)
from serve_bench.measure.arms import Arm
from serve_bench.measure.scenarios import figures as scenarios

Status = Literal[
    "worse",
    "undecided",
    "better",
    "no difference shown",
    "within tolerance",
    "ratio only",
    "not compared",
]
TOLERANCES: Mapping[str, float] = {"speed": 0.05, "quality": 0.01, "size": 0.01, "memory": 0.05}
Timed = tuple[Sequence[Sample], Reference]
_BATCHES = 8  # of successive requests, whose means are taken to be independent
_MACHINE = ("processor", "flags", "cores", "memory_bytes")  # what makes another machine


@dataclass(frozen=True)
class Row:
    """One metric of both runs. ``change`` is relative, above zero is worse; it has bounds where it was estimated.

    "ratio only": there are no samples, or too few, for bounds; such a row decides nothing.
    """

    metric: str
    kind: str  # of its tolerance
    before: str
    after: str
    change: Interval | None
    tolerance: float
    status: Status


@dataclass(frozen=True)
class Comparison:
    """Every metric, what else differs between the runs, and what it comes to."""

    before: str
    after: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """1 when something is worse, else 3 when something is undecided, else 0."""
        statuses = {row.status for row in self.rows}
        return 1 if "worse" in statuses else 3 if "undecided" in statuses else 0


@dataclass(frozen=True)
class _Run:
    path: Path
    bench: Artifact
    rows: list[dict[str, Any]]
    samples: list[Sample]
    quality: dict[str, Any] | None
    environment: dict[str, Any]
    reference: Reference

    @property
    def timed(self) -> Timed:
        return self.samples, self.reference

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
    *,
    tolerances: Mapping[str, float] | None = None,
    across_machines: bool = False,
) -> Comparison:
    """See `serve_bench.compare_runs`."""
    allowed = {**TOLERANCES, **(tolerances or {})}
    old, new = _open(before), _open(after)
    _require_same_work(old, new)
    notes = list(_differences(old, new))
    machines = [
        name for name in _MACHINE if old.environment["host"][name] != new.environment["host"][name]
    ]
    if machines:
        found = "; ".join(
            f"{n}: {_shown(old.environment['host'][n])} and {_shown(new.environment['host'][n])}"
            for n in machines
        )
        if not across_machines:
            raise UserError(
                f"{before} and {after} were measured on different machines ({found}), so a difference of speed says nothing of the "
                "models. Measure both on one machine (limbeck bench), or give --across-machines to see them beside each other."
            )
        notes.insert(
            0,
            f"**Different machines**: {found}. Times and memory compare the machines as well as the models.",
        )
    anchors = _anchors(old, new)
    if anchors:
        names = ", ".join(new.bench.result["arms"][anchor]["label"] for anchor in anchors)
        notes.append(
            f"Changes of time are relative to {names}, timed in both runs: a slower machine is not a slower model."
        )
    else:
        notes.append(
            "No arm is the same in both runs, so a change of time holds what the machine did between them, too."
        )
    rows = [
        *_times(old, new, allowed["speed"], anchors),
        *_sizes(old, new, allowed),
        *_losses(old, new, allowed["quality"], notes),
        *_batches(old, new, allowed["speed"], anchors),
        *_starts(old, new, allowed["speed"], anchors),
        *_served(old, new, allowed["speed"], notes),
    ]
    if any(row.status == "ratio only" for row in rows):
        notes.append(
            "Ratio only: no samples, or too few, for an interval, so nothing is decided by it."
        )
    return Comparison(str(before), str(after), tuple(rows), tuple(notes))


def time_change(old: Timed, new: Timed, *, metric: str, anchors: Sequence[str] = ()) -> Interval:
    """Ratio of the shipped forms' times, new over old, widened by what two copies differ in within either run.

    ``anchors`` are arms that are the same in both runs: times are then taken relative to theirs, block by block, so that what
    the machine did between the runs falls out. Without them it is part of the change.
    """
    sides = (new, old)
    ours = [
        figures.by_block(samples, reference.shipped_arm.id, metric) for samples, reference in sides
    ]
    beside = [
        [figures.by_block(samples, anchor, metric) for samples, _ in sides] for anchor in anchors
    ]
    return _widened(_ratio(ours, beside), old, new, metric)


def _ratio(ours: Sequence[Array], beside: Sequence[Sequence[Array]]) -> Interval:
    """New over old of ``ours`` (new, old), seconds by block, relative to the anchors ``beside`` in the same blocks."""
    relative = [
        np.exp(np.log(mine) - sum(np.log(anchor[side]) for anchor in beside) / max(len(beside), 1))
        for side, mine in enumerate(ours)
    ]
    return unpaired_ratio(*relative)


def _widened(ratio: Interval, old: Timed, new: Timed, metric: str) -> Interval:
    for samples, reference in (old, new):
        ratio = widened(ratio, figures.noise_floor(samples, reference, metric))
    return ratio


def judge_change(change: Interval, tolerance: float, *, exact: bool = False) -> Status:
    """Status of a relative change, above zero is worse. An estimate is worse when its whole interval is past the tolerance,
    an exact number when it is."""
    low, high = (change.value, change.value) if exact else (change.low, change.high)
    if low > tolerance:
        return "worse"
    if high > tolerance:
        return "undecided"
    if change.high < 0:
        return "better"
    return "no difference shown" if change.low <= 0 else "within tolerance"


def markdown(comparison: Comparison) -> str:
    """The table of a pull request."""
    lines = [f"**{headline(comparison)}**", "", f"`{comparison.before}` → `{comparison.after}`", ""]
    lines += ["| metric | before | after | change | tolerance | |", "|---|---:|---:|---:|---:|---|"]
    for row in comparison.rows:
        status = (
            f"**{row.status}**" if row.status in ("worse", "better", "undecided") else row.status
        )
        lines.append(
            f"| {row.metric} | {row.before} | {row.after} | {_change(row)} | {100 * row.tolerance:g} % | {status} |"
        )
    lines += [
        "",
        "Change: above zero is worse, of tokens/s as of the time they take. In brackets the 95 % interval: of times over blocks, of losses "
        "over other text of the kind.",
    ]
    lines += [f"- {note}" for note in comparison.notes]
    return "\n".join(lines)


def headline(comparison: Comparison) -> str:
    """The verdict in one sentence."""
    named = {
        status: ", ".join(row.metric for row in comparison.rows if row.status == status)
        for status in ("worse", "undecided", "better")
    }
    if named["worse"]:
        return f"Regression: {named['worse']}."
    if named["undecided"]:
        return f"Undecided: {named['undecided']}; the interval reaches past the tolerance. Give bench.minutes more, in both runs."
    return f"No regression; better: {named['better']}." if named["better"] else "No regression."


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The same for programs."""
    return {
        "before": comparison.before,
        "after": comparison.after,
        "exit_code": comparison.exit_code,
        "headline": headline(comparison),
        "rows": [
            {**vars(row), "change": figures.asdict(row.change) if row.change else None}
            for row in comparison.rows
        ],
        "notes": list(comparison.notes),
    }


# Reading ---------------------------------------------------------------------------------------------------------


def _open(path: Path) -> _Run:
    folder = path / "bench" if (path / "bench" / MANIFEST).exists() else path
    if not (folder / MANIFEST).exists():
        raise ArtifactError(
            f"{path}: no measured run here; expected a run folder with a complete bench, or a bench artifact."
        )
    bench = open_artifact(folder, kind="bench")
    arms = [
        Arm(n, a["label"], a["role"], a["runtime"], a["bytes"], {})
        for n, a in bench.result["arms"].items()
    ]
    recipe, quality = bench.manifest["recipe"], folder / QUALITY
    rows = figures.read_rows(folder / SAMPLES)
    # Targets that were timed without a recipe have neither gates nor quality, and the first of them is judged.
    least = (
        parse_recipe(recipe["resolved"], where=str(folder)).bench.min_blocks
        if recipe
        else FEWEST_BLOCKS
    )
    shipped, judged = str(bench.result["shipped"]), str(bench.result.get("judged", ""))
    return _Run(
        path,
        bench,
        rows,
        [Sample.of(row) for row in rows if row["event"] == "sample"],
        json.loads(quality.read_text()) if quality.exists() else None,
        json.loads((folder / ENVIRONMENT).read_text()),
        Reference(path.name, shipped, tuple(arms), first_look(least), judged),
    )


def _require_same_work(old: _Run, new: _Run) -> None:
    for what, then, now in (
        *(
            (f"bench.{name}", _asked(old)[name], _asked(new)[name])
            for name in ("prompt_tokens", "new_tokens")
        ),
        ("bench.threads", old.environment["threads"], new.environment["threads"]),
    ):
        if then != now:
            raise UserError(
                f"{what}: found {then} in {old.path} and {now} in {new.path}; times of different work cannot be compared. "
                f"Measure one of them again, for example with --set {what}={then}."
            )


def _asked(run: _Run) -> dict[str, Any]:
    recipe = run.bench.manifest["recipe"]
    return dict(run.environment.get("fairness") or recipe["resolved"]["bench"])


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


# Metrics ---------------------------------------------------------------------------------------------------------


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
    """What the measured student was made from; nothing where neither student nor certificate lies beside the bench."""
    student = run.path / "student"
    if (student / MANIFEST).exists():
        return dict(open_artifact(student, verify=False).manifest["parents"])
    return dict(read_certificate(run.path)["parents"]) if (run.path / CERTIFICATE).exists() else {}


def _times(old: _Run, new: _Run, tolerance: float, anchors: Sequence[str]) -> Iterator[Row]:
    for metric, title in (
        ("tpot", "ms per output token"),
        ("ttft", "ms to first token"),
        ("e2el", "ms in all"),
    ):
        then, now = (figures.by_block(run.samples, run.shipped, metric) for run in (old, new))
        change = _relative(time_change(old.timed, new.timed, metric=metric, anchors=anchors))
        shown = tuple(f"{1e3 * np.median(values):.4g}" for values in (then, now))
        yield Row(
            title, "speed", shown[0], shown[1], change, tolerance, judge_change(change, tolerance)
        )


def _sizes(old: _Run, new: _Run, allowed: Mapping[str, float]) -> Iterator[Row]:
    for key, title, kind in (
        ("bytes", "MB on disk", "size"),
        ("peak_rss_bytes", "MB of memory at most", "memory"),
    ):
        then, now = old.arm[key], new.arm[key]
        if not then or now is None:  # a server elsewhere
            continue
        change = now / then - 1
        exact = Interval(change, change, change, 1)
        shown = tuple(f"{value / 1e6:.4g}" for value in (then, now))
        yield Row(
            title,
            kind,
            shown[0],
            shown[1],
            exact,
            allowed[kind],
            judge_change(exact, allowed[kind], exact=True),
        )


def _losses(old: _Run, new: _Run, tolerance: float, notes: list[str]) -> Iterator[Row]:
    if old.quality is None or new.quality is None:
        return
    then, now = summarise(old.quality, old.shipped), summarise(new.quality, new.shipped)
    same = _text(old) == _text(new)
    if not same:
        notes.append("The held-out text differs, so losses are shown and not compared.")
    domains = [name for name in then["domains"] if name in now["domains"]]
    for title, names in [
        ("loss, mean of domains", domains),
        *((f"loss, {n}", [n]) for n in domains if len(domains) > 1),
    ]:
        mean = title == "loss, mean of domains"
        values = [(f["mean_nll"] if mean else f["domains"][names[0]]["nll"]) for f in (then, now)]
        shown = tuple(f"{value:.4f}" for value in values)
        if not same:
            yield Row(title, "quality", shown[0], shown[1], None, tolerance, "not compared")
            continue
        labels = [np.asarray(new.quality["domains"][n]["labels"], np.float64) for n in names]
        change = relative_rise(_nll(new, names), _nll(old, names), labels)
        yield Row(
            title,
            "quality",
            shown[0],
            shown[1],
            change,
            tolerance,
            judge_change(change, tolerance, exact=True),
        )


def _nll(run: _Run, domains: Sequence[str]) -> list[Array]:
    assert run.quality is not None
    return [
        np.asarray(run.quality["arms"][run.shipped][name]["nll"], np.float64) for name in domains
    ]


def _text(run: _Run) -> str:
    student = run.path / "student"
    return heldout_file(
        run.bench, open_artifact(student, verify=False) if (student / MANIFEST).exists() else None
    )[1]


# Scenarios -------------------------------------------------------------------------------------------------------


def _batches(old: _Run, new: _Run, tolerance: float, anchors: Sequence[str]) -> Iterator[Row]:
    """Throughput of every cell of `offline` that both runs timed."""
    then, now = scenarios.batches(old.rows), scenarios.batches(new.rows)
    for cell in (cell for cell in then if cell in now):
        arms, others = then[cell], now[cell]
        if old.shipped not in arms or new.shipped not in others:
            continue
        batch, prompt, made = cell
        there = [anchor for anchor in anchors if anchor in arms and anchor in others]
        for what, metric, seconds, tokens in (
            ("generated", "tpot", scenarios.decoding, batch * (made - 1)),
            ("of prompts", "ttft", scenarios.ttft, batch * prompt),
        ):
            ours = [
                scenarios.by_block(others[new.shipped], seconds),
                scenarios.by_block(arms[old.shipped], seconds),
            ]
            beside = [
                [scenarios.by_block(side[anchor], seconds) for side in (others, arms)]
                for anchor in there
            ]
            ratio = _widened(_ratio(ours, beside), old.timed, new.timed, metric)
            title = f"tokens/s {what}, batch {batch}, prompt {prompt}, new {made}"
            yield _speed(
                title, tokens / np.median(ours[1]), tokens / np.median(ours[0]), ratio, tolerance
            )


def _starts(old: _Run, new: _Run, tolerance: float, anchors: Sequence[str]) -> Iterator[Row]:
    """Seconds of a cold start; every one is a process of its own, so there is no noise of a process to widen by."""
    then, now = (
        {
            arm: np.array([scenarios.until_first_token(row) for row in rows])
            for arm, rows in scenarios.starts(run.rows).items()
        }
        for run in (old, new)
    )
    if old.shipped in then and new.shipped in now:
        ours = [now[new.shipped], then[old.shipped]]
        ratio = _ratio(ours, [[now[a], then[a]] for a in anchors if a in then and a in now])
        title = "s from a cold start to the first token"
        yield _speed(title, np.median(ours[1]), np.median(ours[0]), ratio, tolerance)


def _served(old: _Run, new: _Run, tolerance: float, notes: list[str]) -> Iterator[Row]:
    """The highest rate of the server, and its answers to the same arrivals at one rate that both runs tried."""
    then, now = old.bench.result.get("server"), new.bench.result.get("server")
    if not then or not now:
        return
    if then["target"]["kind"] != now["target"]["kind"]:
        notes.append(
            "One run asked a server of its own and the other a URL, so they are not compared under load."
        )
        return
    if then["slo"] == now["slo"]:
        yield from _highest(then["highest_rate"]["value"], now["highest_rate"]["value"], tolerance)
    else:
        notes.append(
            "The promises (slo) of the server differ, so the highest rates that keep them are not compared."
        )
    held = {rate["rate"] for rate in then["rates"] if rate["meets"]}
    before, after = scenarios.requests(old.rows), scenarios.requests(new.rows)
    common = {
        rate
        for rate in before
        if rate in after and _arrivals(before[rate]) == _arrivals(after[rate])
    }
    if not common:
        notes.append(
            "No rate of the server was tried in both runs; give the scenario a first_rate to have its latencies compared."
        )
        return
    rate = max(common & held, default=min(common))
    notes.append(
        f"Latencies of the server are paired by request, of the same arrivals at {rate:g} requests/s; what the machine did between the "
        "runs is in them."
    )
    yield from _answers(before[rate], after[rate], f"at {rate:g} requests/s", tolerance)


def _highest(then: float | None, now: float | None, tolerance: float) -> Iterator[Row]:
    """The rates themselves: each is the outcome of one search, without samples."""
    title = "highest requests/s that keep the SLO"
    if then and now:
        yield _speed(title, then, now, Interval(then / now, -np.inf, np.inf, 1), tolerance)
    elif then or now:
        before, after = (f"{rate:.4g}" if rate else "none" for rate in (then, now))
        yield Row(title, "speed", before, after, None, tolerance, "worse" if then else "better")


def _answers(
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    where: str,
    tolerance: float,
) -> Iterator[Row]:
    """Latencies of the requests that both runs answered, and how many were not.

    Requests that wait for each other are not independent: their log-ratios are averaged over batches of successive ones, and the
    interval is of those means (the method of batch means; Law, Simulation Modeling and Analysis, chapter 9).
    """
    pairs = list(zip(before, after, strict=True))
    answered = [pair for pair in pairs if all(row["error"] is None for row in pair)]
    for title, seconds in (
        ("ms to first token", scenarios.ttft),
        ("ms per output token", scenarios.tpot),
    ):
        timed = [
            found for pair in answered if None not in (found := tuple(seconds(row) for row in pair))
        ]
        if timed:
            then, now = np.array(timed, np.float64).T
            means = [
                part.mean()
                for part in np.array_split(np.log(now / then), min(_BATCHES, len(timed)))
            ]
            ratio = median_interval(means, error=1 - CONFIDENCE).map_exp()
            yield _speed(
                f"{title}, {where}", 1e3 * np.median(then), 1e3 * np.median(now), ratio, tolerance
            )
    failed = [sum(row["error"] is not None for row in rows) for rows in (before, after)]
    if any(failed):
        more = (failed[1] - failed[0]) / len(pairs)
        change = Interval(more, more, more, len(pairs))
        title, (lost, lose) = (
            f"requests that failed, {where}",
            (f"{count} of {len(pairs)}" for count in failed),
        )
        yield Row(
            title,
            "speed",
            lost,
            lose,
            change,
            tolerance,
            judge_change(change, tolerance, exact=True),
        )


def _arrivals(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [row["scheduled"] for row in rows]


def _speed(title: str, before: float, after: float, ratio: Interval, tolerance: float) -> Row:
    """A row of ``ratio``, time over time; one without bounds decides nothing."""
    change = _relative(ratio)
    status = judge_change(change, tolerance) if change.bounded else "ratio only"
    return Row(title, "speed", f"{before:.4g}", f"{after:.4g}", change, tolerance, status)


def _relative(ratio: Interval) -> Interval:
    return Interval(ratio.value - 1, ratio.low - 1, ratio.high - 1, ratio.n)


def _change(row: Row) -> str:
    if row.change is None:
        return ""
    if row.change.low == row.change.high:
        return show(row.change.value, "%")
    if not row.change.bounded:
        return f"{show(row.change.value, '%')} (no interval)"
    return f"{show(row.change.value, '%')} ({show(row.change.low, '%')[:-2]} to {show(row.change.high, '%')})"


def _shown(value: Any) -> str:
    return " ".join(value) or "none" if isinstance(value, list) else str(value)
