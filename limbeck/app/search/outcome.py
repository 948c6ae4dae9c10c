"""The result of a search for people: the missed bound, the nearest student, table and chart.

Knows candidates and a budget; runs nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.app.search.candidates import Candidate
from limbeck.contract.errors import DivergenceError, QualityError
from limbeck.contract.recipe import AnyBudget, Budget

PICTURE = "search.svg"
_HEADS = {"tpot_ms": "TPOT ms", "ttft_ms": "TTFT ms", "latency_ms": "ms a sequence"}
_IN_WORDS = {"tpot_ms": "TPOT {:.2f} ms", "latency_ms": "{:.2f} ms a sequence"}
UNTRAINED = (
    "planned to train in "  # how it begins why a student is out that this machine has no memory for
)
UNEXPORTED = "untrained, "  # how it begins why a form is out that no probe could be exported in


@dataclass(frozen=True)
class Found:
    """Result of a search."""

    folder: Path
    table: str  # Markdown
    sentence: str
    # 0: chosen. 1: no student keeps the budget. 3: the finalists' intervals do not decide, or the
    # hours were too few.
    exit_code: int


def nearest(candidates: Sequence[Candidate], budget: AnyBudget) -> Candidate:
    """The candidate whose worst bound is missed by the smallest ratio; if equal, the least loss.

    Measured candidates come first. If quality is bounded they come before all others, because the
    final loss of the others is unknown.
    """

    def order(c: Candidate) -> tuple[bool, float, bool, float]:
        unknown = budget.quality is not None and not c.measured
        return (
            unknown,
            excess(c, budget),
            not c.measured,
            float("inf") if c.loss is None else c.loss,
        )

    return min(candidates, key=order)


def excess(candidate: Candidate, budget: AnyBudget) -> float:
    """Largest ratio of a figure to its bound: measured, else predicted, else planned; at least 1.

    1 means inside all bounds. Only a measured loss counts: a student is judged after its training.
    """
    known = {"size": float(candidate.size), **candidate.predicted, **candidate.measured}
    bounds = {"size": 1e6 * budget.size_mb if budget.size_mb else None, **budget.times}
    ratios = [known[key] / bound for key, bound in bounds.items() if bound and key in known]
    if budget.quality and candidate.measured:
        best, most = candidate.measured["best_teacher"], budget.quality.max_loss
        if (found := candidate.known_metric) is None:
            ratios.append(candidate.measured["nll"] / (best * (1 + most)))
        else:
            ratios.append(best * (1 - most) / found[1] if found[1] > 0 else float("inf"))
    return max([1.0, *ratios])


def why_refused(error: QualityError) -> str:
    """Reason of a failed export: a wrong graph, or the training before it."""
    said = str(error).splitlines()[0].rstrip(":")
    return said if isinstance(error, DivergenceError) else f"not exported: {said}"


def out_of_time(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates for which the hours were too few."""
    return [c for c in candidates if c.late]


def missed_bound(candidates: Sequence[Candidate], budget: AnyBudget) -> str:
    """One sentence: the bound that cannot be met, or the bounds that stay undecided."""
    if undecided := [f"{c.name}: {c.out}" for c in candidates if c.verdict == "undecided"]:
        return (
            "Not decided: give bench.minutes more, and only the finalists are measured again "
            f"({' | '.join(undecided)})."
        )
    if left := out_of_time(candidates):
        return (
            f"Not decided: the {budget.hours:g} hours ran out before {len(left)} of the students "
            f"{'was' if len(left) == 1 else 'were'} measured; give budget.hours more."
        )
    if (
        budget.size_mb is not None
        and (least := min(c.size for c in candidates)) > 1e6 * budget.size_mb
    ):
        return (
            f"No student is small enough: size_mb {budget.size_mb:g} is asked for, the smallest "
            f"is planned at {megabytes(least)}."
        )
    fitting = [c for c in candidates if not (c.out or "").startswith(("planned", UNEXPORTED))]
    if not fitting:
        if refused := next((c for c in candidates if (c.out or "").startswith(UNEXPORTED)), None):
            return (
                f"No student that is small enough can be exported in {refused.form}: {refused.out}."
            )
        smallest = min(
            (c for c in candidates if (c.out or "").startswith(UNTRAINED)), key=lambda c: c.size
        )
        return (
            f"No student that is small enough can be trained here: {smallest.student} is "
            f"{smallest.out}."
        )
    for metric, bound in budget.times.items():
        times = [
            (c.measured.get(metric, c.predicted.get(metric, 0.0)), c.timed or bool(c.measured))
            for c in fitting
        ]
        fastest, timed = min(times, default=(0.0, False))
        if bound is not None and fastest > bound:
            takes = "takes" if timed else "is predicted to take"
            return (
                f"No student is fast enough: {metric} {bound:g} is asked for, the fastest {takes} "
                f"{fastest:.2f}."
            )
    missed = [f"{c.name}: {c.out}" for c in candidates if c.run]
    return (
        f"No finalist keeps every bound ({' | '.join(missed)})."
        if missed
        else "No student keeps every bound at once."
    )


def asked_for(budget: AnyBudget) -> str:
    """The budget in words."""
    bounds = {"size_mb": budget.size_mb, **budget.times}
    said = [f"{key} {bound:g}" for key, bound in bounds.items() if bound is not None]
    if budget.quality:
        whose = (
            "loss against the best"
            if isinstance(budget, Budget)
            else "loss of the metric against the better"
        )
        said.append(f"at most {budget.quality.max_loss:+.1%} {whose} teacher")
    return ", ".join(said)


def figures_of(candidate: Candidate) -> str:
    """Known figures of a candidate, in words."""
    m = candidate.measured or candidate.predicted
    how = "" if candidate.measured else " timed" if candidate.timed else " predicted"
    parts = [megabytes(m["size"]) if candidate.measured else f"{megabytes(candidate.size)} planned"]
    parts += [f"{words.format(m[key])}{how}" for key, words in _IN_WORDS.items() if key in m]
    if not candidate.measured:
        return ", ".join(parts)
    if "ttft_ms" in m:
        parts.append(f"TTFT {m['ttft_ms']:.0f} ms")
    found = candidate.known_metric
    quality = (
        f"{m['nll']:.4f} nats a token" if found is None else f"{_word(found[0])} {found[1]:.4f}"
    )
    return ", ".join([*parts, quality, "measured"])


def megabytes(size: float) -> str:
    """Bytes as MB."""
    return f"{size / 1e6:.1f} MB" if size >= 1e7 else f"{size / 1e6:.3f} MB"


def rows(candidates: Sequence[Candidate], best: Candidate, budget: AnyBudget) -> list[list[str]]:
    """The table with its head, the furthest candidates first; ** ** marks full measurements."""
    heads = [_HEADS[key] for key in budget.times]
    found = [["student", "form", "size", *heads, _quality(candidates, budget), "outcome"]]
    for c in sorted(
        candidates, key=lambda c: (c is not best, not c.measured, -c.tokens, c.nll or 0.0, c.size)
    ):
        m = c.measured
        size = f"**{megabytes(m['size'])}**" if m else megabytes(c.size)
        times = [
            f"**{m[k]:.2f}**"
            if k in m
            else (
                f"{c.predicted[k]:.2f}{'' if c.timed else ' (predicted)'}"
                if k in c.predicted
                else ""
            )
            for k in budget.times
        ]
        value = c.measured.get("nll", c.nll) if c.known_metric is None else c.known_metric[1]
        quality = (
            "" if value is None else f"**{value:.4f}**" if m else f"{value:.4f} after {c.tokens}"
        )
        fate = "chosen" if c is best and c.verdict == "pass" else c.out or c.verdict or ""
        found.append([c.student, c.form, size, *times, quality, fate])
    return found


def _quality(candidates: Sequence[Candidate], budget: AnyBudget) -> str:
    """Name of the quality figure."""
    if isinstance(budget, Budget):
        return "nats a token"
    return next(
        (_word(c.known_metric[0]) for c in candidates if c.known_metric is not None), "metric"
    )


def _word(metric: str) -> str:
    return metric.replace("_", " ")


def markdown(table: Sequence[Sequence[str]]) -> str:
    """The table as Markdown."""
    head, *rest = (f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in table)
    return "\n".join([head, "|---" * len(table[0]) + "|", *rest])


def show(found: Found) -> None:
    """Print the table and the outcome, for a terminal or as Markdown."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        head, _, *lines = (
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in found.table.splitlines()
        )
        table = Table(*head)
        for line in lines:
            # As texts: a message may hold brackets, which are markup otherwise.
            table.add_row(
                *(Text(cell.strip("*"), "bold" if cell.startswith("**") else "") for cell in line)
            )
        Console().print(table)
    else:
        print(found.table)
    print(f"\n{found.sentence}\npicture: {found.folder / PICTURE}", flush=True)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, loss) points that no other point beats or equals in both, by rising cost."""
    front: list[tuple[float, float]] = []
    for cost, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def draw(candidates: Sequence[Candidate], budget: AnyBudget, best: Candidate, path: Path) -> None:
    """Draw loss over size and over the first time of the budget.

    Filled points were measured in full; a line joins those that no other beats in both.
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    colours = {form: f"C{i}" for i, form in enumerate(dict.fromkeys(c.form for c in candidates))}
    time, most = next(iter(budget.times.items()))
    for axes, key, bound, label in (
        (left, "size", budget.size_mb, "size, MB"),
        (right, time, most, _HEADS[time]),
    ):
        _draw_panel(axes, key, candidates, best, colours)
        if bound is not None:
            axes.axvline(bound, color="0.5", linestyle=":")
        axes.set_xlabel(label)
    quality = _quality(candidates, budget)
    left.set_ylabel(
        f"held-out loss, {quality}" if isinstance(budget, Budget) else f"1 − {quality}, held out"
    )
    for form, colour in colours.items():
        left.plot([], [], marker="o", linestyle="none", color=colour, label=form)
    left.legend(fontsize=8)
    figure.savefig(path)


def _draw_panel(
    axes: Any,
    key: str,
    candidates: Sequence[Candidate],
    best: Candidate,
    colours: Mapping[str, str],
) -> None:
    """Draw loss over ``key``, the size or a time: one point a candidate, and the front."""
    points: dict[tuple[float, float], str] = {}
    for c in candidates:
        known = {"size": c.size / 1e6, **c.predicted}
        if c.measured:
            known = c.measured | {"size": c.measured["size"] / 1e6}
        loss = c.loss
        if loss is None or key not in known:
            continue
        axes.plot(
            known[key],
            loss,
            marker="*" if c is best else "o",
            markersize=13 if c is best else 7,
            linestyle="none",
            color=colours[c.form],
            fillstyle="full" if c.measured else "none",
        )
        points[known[key], loss] = c.student
    _name_students(axes, points)
    front = pareto_front(list(points))
    axes.step(
        [x for x, _ in front],
        [y for _, y in front],
        where="post",
        color="0.7",
        linewidth=1,
        zorder=0,
    )


def _name_students(axes: Any, points: Mapping[tuple[float, float], str]) -> None:
    """Write the name of a student beside its first point."""
    # Forms of a student that are not measured have the same loss: the first is named.
    named: set[tuple[str, float]] = set()
    for (x, loss), student in sorted(points.items()):
        if (student, loss) not in named:
            named.add((student, loss))
            beyond = x > (min(points)[0] + max(points)[0]) / 2
            axes.annotate(
                student,
                (x, loss),
                xytext=(-6 if beyond else 6, 4),
                ha="right" if beyond else "left",
                textcoords="offset points",
                fontsize=7,
            )
