"""The report's pictures over time and by arm. Knows numbers and labels; knows nothing of artifacts.

Series are labelled where they are, never in a legend by colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from serve_bench.tell.drawing import (
    EDGE,
    INK,
    MARKS,
    MUTED,
    ROLE,
    SERIES,
    STYLE,
    finish_axes,
    finish_rows,
    new_figure,
    row_label,
    spread,
    svg,
    thousands,
    ticks,
    write,
)
from serve_bench.tell.numbers import short


@dataclass(frozen=True)
class Values:
    """Values of an arm, and the median that its stroke shows: the one among the report's figures,
    which may be over blocks."""

    label: str
    role: str
    values: Sequence[float]
    median: float | None  # None where there are too few values for one


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x: str,
    y: str,
    dashed: Mapping[str, float] | None = None,
    limits: tuple[float, float] | None = None,
    marks: bool = False,
) -> str:
    """Lines labelled at their right end; ``dashed`` are horizontal references.

    ``title`` is the accessible name.
    """
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(250, 165)
        ends: list[tuple[float, str, str]] = []
        right = max((xs[-1] for xs, _ in series.values() if len(xs)), default=1.0)
        for index, (name, (xs, ys)) in enumerate(series.items()):
            colour = SERIES[index % len(SERIES)]
            mark = MARKS[index % len(MARKS)] if marks else None
            axes.plot(xs, ys, color=colour, linewidth=1.8, marker=mark, markersize=4, clip_on=False)
            if len(ys):
                ends.append((float(ys[-1]), name, colour))
        for name, value in (dashed or {}).items():
            axes.axhline(value, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
            ends.append((value, name, MUTED))
        if limits:
            axes.set_ylim(*limits)
        axes.set_xlim(left=0, right=right)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(thousands))
        finish_axes(axes, x, y)
        _name_ends(axes, ends)
        return svg(figure, title)


def ridges(rows: Sequence[Values], *, title: str, x: str) -> str:
    """A hill an arm: how often each value came, all of one height; a stroke at the median."""
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(235, 26 * len(rows))
        every = np.log(np.concatenate([np.asarray(row.values, np.float64) for row in rows]))
        low, high = float(np.quantile(every, 0.001)) - 0.2, float(np.quantile(every, 0.999)) + 0.2
        edges = np.linspace(low, high, 121)
        middle = np.exp((edges[:-1] + edges[1:]) / 2)
        for index, row in enumerate(rows):
            place, colour = len(rows) - 1 - index, ROLE[row.role]
            counts = np.histogram(np.clip(np.log(row.values), low, high), edges)[0].astype(
                np.float64
            )
            smooth = np.convolve(counts, [0.25, 0.5, 0.25], mode="same")
            height = 0.82 * smooth / max(float(smooth.max()), 1.0)
            axes.fill_between(middle, place, place + height, color=colour, alpha=0.35, linewidth=0)
            axes.plot(middle, place + height, color=colour, linewidth=1.2)
            if row.median is not None:
                axes.plot([row.median] * 2, [place, place + 0.9], color=colour, linewidth=2)
            row_label(axes, row.label, place + 0.3)
        axes.set_xscale("log")
        axes.set_xlim(np.exp(low), np.exp(high))
        axes.set_ylim(-0.1, len(rows) + 0.05)
        finish_rows(axes, x)
        return svg(figure, title)


def stacks(
    rows: Sequence[tuple[str, Sequence[float]]], parts: Sequence[str], *, title: str, x: str
) -> str:
    """A bar a (label, spans) of spans in a row, which are named above the first bar."""
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(250, 26 * len(rows) + 16)
        whole = max(sum(spans) for _, spans in rows)
        for index, (label, spans) in enumerate(rows):
            place, left = len(rows) - 1 - index, 0.0
            for part, span in enumerate(spans):
                axes.barh(
                    place,
                    span,
                    left=left,
                    height=0.56,
                    color=SERIES[part % len(SERIES)],
                    linewidth=0,
                )
                left += span
            row_label(axes, label, place)
            write(axes, short(left), (left, place), right=5, color=MUTED)
        axes.set_xlim(0, 1.12 * whole)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        finish_rows(axes, x, logarithmic=False)
        handles = [
            Patch(color=SERIES[part % len(SERIES)], label=name) for part, name in enumerate(parts)
        ]
        axes.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=4,
            frameon=False,
            fontsize=9.5,
            handlelength=0.9,
            handletextpad=0.4,
            columnspacing=0.9,
            borderaxespad=0.2,
            borderpad=0,
            labelcolor=INK,
        )
        return svg(figure, title)


def ranges(
    series: Mapping[str, Sequence[tuple[float, float, float, float]]],
    *,
    title: str,
    x: str,
    y: str,
    diagonal: str | None = None,
) -> str:
    """Lines of (x, value, low, high) with a bar from low to high, logarithmic in x; ``diagonal``
    names the line y = x."""
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(250, 165)
        ends: list[tuple[float, str, str]] = []
        xs_all = sorted({point[0] for points in series.values() for point in points})
        for index, (name, points) in enumerate(series.items()):
            colour = SERIES[index % len(SERIES)]
            xs, ys, lows, highs = (
                np.array(column, np.float64) for column in zip(*points, strict=True)
            )
            axes.plot(
                xs, ys, color=colour, linewidth=1.8, marker=MARKS[index % len(MARKS)], markersize=4
            )
            axes.vlines(xs, lows, highs, color=colour, linewidth=1.2, alpha=0.7)
            ends.append((float(ys[-1]), name, colour))
        axes.set_ylim(0, 1.08 * max(point[3] for points in series.values() for point in points))
        axes.set_xscale("log")
        axes.set_xlim(xs_all[0] / 1.15, xs_all[-1] * 1.15)
        if diagonal:
            grid = np.geomspace(xs_all[0], xs_all[-1], 50)
            axes.plot(grid, grid, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=0)
            ends.append((float(min(xs_all[-1], axes.get_ylim()[1])), diagonal, MUTED))
        axes.xaxis.set_major_locator(
            FixedLocator(xs_all if len(xs_all) <= 7 else ticks(*axes.get_xlim()))
        )
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        finish_axes(axes, x, y)
        _name_ends(axes, ends)
        return svg(figure, title)


def _name_ends(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write names beside the ends of lines, moved apart; ``ends``: (height, name, colour)."""
    bottom, top = axes.get_ylim()
    places = spread(
        [value for value, _, _ in ends], gap=0.062 * (top - bottom), low=bottom, high=top
    )
    for (_, name, colour), place in zip(ends, places, strict=True):
        write(axes, name, (1, place), right=7, color=colour, **EDGE)


def strip(rows: Sequence[Values], *, title: str, x: str) -> str:
    """One row of dots an arm, a stroke at its median; logarithmic."""
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(235, 22 * len(rows))
        draw = np.random.default_rng(0)
        for index, dots in enumerate(rows):
            place = len(rows) - 1 - index
            colour = ROLE[dots.role]
            axes.scatter(
                dots.values,
                place + draw.uniform(-0.17, 0.17, len(dots.values)),
                s=14,
                color=colour,
                alpha=0.55,
                linewidths=0,
            )
            if dots.median is not None:
                stroke = [place - 0.34, place + 0.34]
                axes.plot([dots.median] * 2, stroke, color=colour, linewidth=2)
            row_label(axes, dots.label, place)
        axes.set_xscale("log")
        every = [value for dots in rows for value in dots.values]
        axes.set_xlim(min(every) / 1.25, max(every) * 1.25)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        finish_rows(axes, x)
        return svg(figure, title)
