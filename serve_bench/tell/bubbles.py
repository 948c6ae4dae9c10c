"""The picture of quality against speed: one bubble an arm, each label nearest to its own bubble."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from serve_bench.tell.drawing import (
    INK,
    MUTED,
    ROLE,
    SCALE,
    STYLE,
    finish_axes,
    new_figure,
    svg,
    ticks,
    write,
)
from serve_bench.tell.numbers import short


@dataclass(frozen=True)
class Bubble:
    """One arm in the picture of quality against speed."""

    label: str
    role: str
    speed: float  # tokens or sequences a second
    loss: float  # less is better
    megabytes: float
    shipped: bool


def quality_against_speed(bubbles: Sequence[Bubble], *, title: str, x: str, y: str) -> str:
    """Speed to the right, held-out quality upwards, size on disk as the area.

    ``x`` and ``y`` name the figures.
    """
    with mpl.rc_context(STYLE):
        figure, axes, corners = _trade(bubbles, x, y)
        _label_bubbles(figure, axes, bubbles, corners)
        return svg(figure, title, scale=1.2 * SCALE)


def _trade(
    bubbles: Sequence[Bubble], x: str, y: str
) -> tuple[Figure, Any, list[tuple[float, float]]]:
    """The picture without labels: figure, axes, and the corners of the line of the best."""
    figure, axes = new_figure(310, 215)
    speeds, losses = [b.speed for b in bubbles], [b.loss for b in bubbles]
    largest = max(b.megabytes for b in bubbles)
    span = max(max(losses) - min(losses), 1e-3)
    axes.set_xscale("log")
    axes.set_xlim(min(speeds) / 1.9, max(speeds) * 2.1)
    axes.set_ylim(max(losses) + 0.35 * span, min(losses) - 0.35 * span)  # less loss is up
    corners = [
        (bubbles[i].speed, bubbles[i].loss) for i in pareto([(b.speed, b.loss) for b in bubbles])
    ]
    if len(corners) > 1:
        axes.plot(
            *zip(*corners, strict=True), color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=0
        )
    for bubble in sorted(bubbles, key=lambda b: -b.megabytes):
        colour = ROLE[bubble.role]
        axes.scatter(
            [bubble.speed],
            [bubble.loss],
            s=_AREA * bubble.megabytes / largest,
            color=colour,
            alpha=0.85 if bubble.shipped else 0.28,
            linewidths=0,
        )
        axes.scatter(
            [bubble.speed],
            [bubble.loss],
            s=_AREA * bubble.megabytes / largest,
            facecolors="none",
            edgecolors=colour,
            linewidths=1.6,
        )
    axes.xaxis.set_major_locator(FixedLocator(ticks(*axes.get_xlim())))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    finish_axes(axes, f"{x} (logarithmic)", f"{y} (less is better)")
    axes.text(
        0.995,
        0.985,
        "better ↗",
        transform=axes.transAxes,
        ha="right",
        va="top",
        color=MUTED,
        fontsize=9.5,
    )
    return figure, axes, corners


def pareto(points: Sequence[tuple[float, float]], *, same: float = 1e-3) -> list[int]:
    """Indices of the points that no other beats in both speed (more is better) and loss (less is
    better), slowest first.

    A loss that is less by a share below ``same`` is no better: two graphs of one model differ in
    their last digits.
    """
    best, front = float("inf"), []
    for index in sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1])):
        if points[index][1] < best * (1 - same):
            best = points[index][1]
            front.append(index)
    return front[::-1]


Box = tuple[float, float, float, float]  # left, bottom, right, top, in points
_DISTANCES = (4, 14, 26, 40, 56, 74, 94)  # points from the edge of a bubble to its label
_STRAIGHT = ((1, 0), (-1, 0), (0, 1), (0, -1))
_SIDES = (
    *_STRAIGHT,
    *itertools.product((0.8, -0.8), repeat=2),
    *itertools.product((1, -1), (0.4, -0.4)),
)
_AREA = 1300  # of the largest bubble, in square points


@dataclass(frozen=True)
class Label:
    """A placed label: its centre, and its distance in points to the edge of every bubble."""

    own: int  # index of its bubble
    centre: tuple[float, float]
    distances: tuple[float, ...]

    @property
    def needs_line(self) -> bool:
        """Whether a line joins it to its bubble: it is far, or another bubble is nearer."""
        own = self.distances[self.own]
        return own > 10 or own > min(self.distances)


def _label_bubbles(
    figure: Figure, axes: Any, bubbles: Sequence[Bubble], line: Sequence[tuple[float, float]]
) -> list[Label]:
    """Put each label near its bubble: nearer to it than to any other, and clear of labels, bubbles,
    edges, the ``line`` and the texts on ``axes``."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    figure.canvas.draw()
    frame, largest = axes.get_window_extent(renderer), max(b.megabytes for b in bubbles)
    centres = [axes.transData.transform((b.speed, b.loss)) for b in bubbles]
    radii = [float(np.sqrt(_AREA * b.megabytes / largest / np.pi)) for b in bubbles]
    taken: list[Box] = [
        (x - r, y - r, x + r, y + r) for (x, y), r in zip(centres, radii, strict=True)
    ]
    taken += [text.get_window_extent(renderer).extents for text in axes.texts]
    corners = [axes.transData.transform(corner) for corner in line]
    steps = np.linspace(0, 1, 40)
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        for x, y in zip(x0 + steps * (x1 - x0), y0 + steps * (y1 - y0), strict=True):
            taken.append((x - 2, y - 2, x + 2, y + 2))
    placed = []
    for index, bubble in enumerate(bubbles):
        text = write(
            axes,
            f"{bubble.label}, {short(bubble.megabytes)} MB",
            (bubble.speed, bubble.loss),
            right=0,
            fontweight="bold" if bubble.shipped else "normal",
            color=INK,
            ha="center",
        )
        extent = text.get_window_extent(renderer)
        size = (extent.width + 6, extent.height)  # room to the next label
        others = [box for other, box in enumerate(taken) if other != index]
        label, box = _best_place(index, size, centres, radii, others, frame.extents)
        taken.append(box)
        placed.append(label)
        (x, y), (cx, cy) = centres[index], label.centre
        text.set_position((cx - x, cy - y))
        if label.needs_line:
            edge = (np.clip(x, box[0], box[2]), np.clip(y, box[1], box[3]))
            (x0, y0), (x1, y1) = axes.transData.inverted().transform([(x, y), edge])
            axes.plot([x0, x1], [y0, y1], color=MUTED, linewidth=0.8, zorder=1)
    return placed


def _best_place(
    own: int,
    size: tuple[float, float],
    centres: Sequence[Any],
    radii: Sequence[float],
    others: Sequence[Box],
    frame: Any,
) -> tuple[Label, Box]:
    """The cheapest place around bubble ``own``.

    A place nearer to another bubble costs most, so it is the last resort.
    """
    (x, y), (width, height) = centres[own], size
    best: tuple[float, Label, Box] | None = None
    for distance, (across, up) in itertools.product(_DISTANCES, _SIDES):
        reach = radii[own] + distance
        cx, cy = x + across * (reach + width / 2), y + up * (reach + height / 2)
        box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
        gaps = tuple(float(_gap(box, centre)) - r for centre, r in zip(centres, radii, strict=True))
        strange = max(gaps[own] - min(gaps), 0.0)
        cost = sum(_overlap(box, other) for other in others) + 3 * _outside(box, frame)
        cost += 0.5 * distance + (1e6 + strange if strange else 0.0)
        if best is None or cost < best[0] - 1e-9:
            best = (cost, Label(own, (cx, cy), gaps), box)
    assert best is not None
    return best[1], best[2]


def _gap(box: Box, point: Any) -> float:
    """Distance from a point to a box; 0 inside."""
    across = max(box[0] - point[0], 0.0, point[0] - box[2])
    return float(np.hypot(across, max(box[1] - point[1], 0.0, point[1] - box[3])))


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height + 20 if width > 0 and height > 0 else 0.0


def _outside(box: tuple[float, ...], frame: Any) -> float:
    sides = (frame[0] - box[0], frame[1] - box[1], box[2] - frame[2], box[3] - frame[3])
    return float(sum(max(side, 0.0) * 30 for side in sides))
