"""The comparison of two runs in words: Markdown for a pull request, JSON for programs."""

from __future__ import annotations

from typing import Any

from serve_bench.judge.changes import Comparison, Row
from serve_bench.judge.gates import show


def markdown(comparison: Comparison) -> str:
    """The table of a pull request."""
    lines = [f"**{headline(comparison)}**", "", f"`{comparison.before}` → `{comparison.after}`", ""]
    lines += ["| metric | before | after | change | tolerance | |", "|---|---:|---:|---:|---:|---|"]
    for row in comparison.rows:
        status = (
            f"**{row.status}**" if row.status in ("worse", "better", "undecided") else row.status
        )
        lines.append(
            f"| {row.metric} | {row.before} | {row.after} | {_change(row)} | "
            f"{100 * row.tolerance:g} % | {status} |"
        )
    lines += [
        "",
        "Change: above zero is worse, of tokens/s as of the time they take. In brackets the 95 % "
        "interval: of times over blocks, of losses over other text of the kind.",
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
        return (
            f"Undecided: {named['undecided']}; the interval reaches past the tolerance. Give "
            "bench.minutes more, in both runs."
        )
    return f"No regression; better: {named['better']}." if named["better"] else "No regression."


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The same for programs."""
    return {
        "before": comparison.before,
        "after": comparison.after,
        "exit_code": comparison.exit_code,
        "headline": headline(comparison),
        "rows": [
            {**vars(row), "change": row.change.as_json() if row.change else None}
            for row in comparison.rows
        ],
        "notes": list(comparison.notes),
    }


def _change(row: Row) -> str:
    if row.change is None:
        return ""
    if row.change.low == row.change.high:
        return show(row.change.value, "%")
    if not row.change.bounded:
        return f"{show(row.change.value, '%')} (no interval)"
    return (
        f"{show(row.change.value, '%')} ({show(row.change.low, '%')[:-2]} to "
        f"{show(row.change.high, '%')})"
    )
