"""The report's pictures, as inline SVG whose colours are the page's CSS variables, so that one
picture serves light and dark.

Knows numbers and labels; knows nothing of artifacts. Series are labelled where they are, never in a
legend by colour alone.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

# matplotlib wants colours, the page wants variables: these stand in for them and are replaced at
# the end.
_VARIABLES = {"#010203": "ink", "#010204": "muted", "#010205": "line", "#010206": "paper"}
_VARIABLES |= {f"#0102a{index}": f"s{index}" for index in range(1, 7)}
INK, MUTED, LINE, PAPER = "#010203", "#010204", "#010205", "#010206"
SERIES = tuple(f"#0102a{index}" for index in range(1, 7))
ROLE = {
    "teacher": SERIES[1],
    "student": SERIES[3],
    "form": SERIES[0],
    "twin": MUTED,
    "extra": SERIES[2],
}
_SCALE = (
    1.3  # of a drawing at its widest; drawings are small so that a phone need not shrink them much
)
_MARKS = ("o", "s", "^", "D", "v", "P")
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "limbeck",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 1,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Bubble:
    """One arm in the picture of quality against speed."""

    label: str
    role: str
    speed: float  # tokens or sequences a second
    loss: float  # less is better
    megabytes: float
    shipped: bool


@dataclass(frozen=True)
class Dots:
    """A row of dots, and the median that its stroke shows: that of the table, which is over blocks."""

    label: str
    role: str
    values: Sequence[float]
    median: float


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
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(250, 165)
        ends: list[tuple[float, str, str]] = []
        right = max((xs[-1] for xs, _ in series.values() if len(xs)), default=1.0)
        for index, (name, (xs, ys)) in enumerate(series.items()):
            colour = SERIES[index % len(SERIES)]
            mark = _MARKS[index % len(_MARKS)] if marks else None
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
        axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
        _finish_axes(axes, x, y)
        bottom, top = axes.get_ylim()
        places = _spread(
            [value for value, _, _ in ends], gap=0.062 * (top - bottom), low=bottom, high=top
        )
        for (_, name, colour), place in zip(ends, places, strict=True):
            axes.annotate(
                name, (1, place), xycoords=("axes fraction", "data"), xytext=(7, 0), textcoords="offset points",
                color=colour, va="center", fontsize=9.5, annotation_clip=False,
            )  # fmt: skip
        return _svg(figure, title)


def quality_against_speed(bubbles: Sequence[Bubble], *, title: str, x: str, y: str) -> str:
    """Speed to the right, held-out quality upwards, size on disk as the area.

    ``x`` and ``y`` name the figures.
    """
    with mpl.rc_context(_STYLE):
        figure, axes, corners = _trade(bubbles, x, y)
        _label_bubbles(figure, axes, bubbles, corners)
        return _svg(figure, title, scale=1.2 * _SCALE)


def _trade(
    bubbles: Sequence[Bubble], x: str, y: str
) -> tuple[Figure, Any, list[tuple[float, float]]]:
    """The picture without labels: figure, axes, and the corners of the line of the best."""
    figure, axes = _figure(310, 215)
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
            [bubble.speed], [bubble.loss], s=_AREA * bubble.megabytes / largest, color=colour,
            alpha=0.85 if bubble.shipped else 0.28, linewidths=0,
        )  # fmt: skip
        axes.scatter(
            [bubble.speed], [bubble.loss], s=_AREA * bubble.megabytes / largest, facecolors="none",
            edgecolors=colour, linewidths=1.6,
        )  # fmt: skip
    axes.xaxis.set_major_locator(FixedLocator(_ticks(*axes.get_xlim())))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    _finish_axes(axes, f"{x} (logarithmic)", f"{y} (less is better)")
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


def ridges(rows: Sequence[tuple[str, str, Sequence[float]]], *, title: str, x: str) -> str:
    """One hill a (label, role, values): how often each value came, all hills of one height; a
    stroke at the median.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(235, 26 * len(rows))
        every = np.log(np.concatenate([np.asarray(values, np.float64) for _, _, values in rows]))
        low, high = float(np.quantile(every, 0.001)) - 0.2, float(np.quantile(every, 0.999)) + 0.2
        edges = np.linspace(low, high, 121)
        middle = np.exp((edges[:-1] + edges[1:]) / 2)
        for index, (label, role, values) in enumerate(rows):
            place, colour = len(rows) - 1 - index, ROLE[role]
            counts = np.histogram(np.clip(np.log(values), low, high), edges)[0].astype(np.float64)
            smooth = np.convolve(counts, [0.25, 0.5, 0.25], mode="same")
            height = 0.82 * smooth / max(float(smooth.max()), 1.0)
            axes.fill_between(middle, place, place + height, color=colour, alpha=0.35, linewidth=0)
            axes.plot(middle, place + height, color=colour, linewidth=1.2)
            axes.plot([np.median(values)] * 2, [place, place + 0.9], color=colour, linewidth=2)
            _row_label(axes, label, place + 0.3)
        axes.set_xscale("log")
        axes.set_xlim(np.exp(low), np.exp(high))
        axes.set_ylim(-0.1, len(rows) + 0.05)
        _finish_rows(axes, x)
        return _svg(figure, title)


def stacks(
    rows: Sequence[tuple[str, Sequence[float]]], parts: Sequence[str], *, title: str, x: str
) -> str:
    """One bar a (label, spans), its spans one after the other; the spans are named above the first
    bar.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(250, 26 * len(rows) + 16)
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
            _row_label(axes, label, place)
            axes.annotate(
                f"{left:.3g}", (left, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9.5, color=MUTED
            )  # fmt: skip
        axes.set_xlim(0, 1.12 * whole)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        _finish_rows(axes, x, logarithmic=False)
        handles = [
            Patch(color=SERIES[part % len(SERIES)], label=name) for part, name in enumerate(parts)
        ]
        axes.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=9.5,
            handlelength=0.9, handletextpad=0.4, columnspacing=0.9, borderaxespad=0.2, borderpad=0, labelcolor=INK,
        )  # fmt: skip
        return _svg(figure, title)


def ranges(
    series: Mapping[str, Sequence[tuple[float, float, float, float]]],
    *,
    title: str,
    x: str,
    y: str,
    diagonal: str | None = None,
) -> str:
    """Lines of (x, value, low, high) with a bar from low to high, logarithmic in x; ``diagonal``
    names the line y = x.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(250, 165)
        ends: list[tuple[float, str, str]] = []
        xs_all = sorted({point[0] for points in series.values() for point in points})
        for index, (name, points) in enumerate(series.items()):
            colour = SERIES[index % len(SERIES)]
            xs, ys, lows, highs = (
                np.array(column, np.float64) for column in zip(*points, strict=True)
            )
            axes.plot(
                xs,
                ys,
                color=colour,
                linewidth=1.8,
                marker=_MARKS[index % len(_MARKS)],
                markersize=4,
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
            FixedLocator(xs_all if len(xs_all) <= 7 else _ticks(*axes.get_xlim()))
        )
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        _finish_axes(axes, x, y)
        bottom, top = axes.get_ylim()
        places = _spread(
            [value for value, _, _ in ends], gap=0.062 * (top - bottom), low=bottom, high=top
        )
        for (_, name, colour), place in zip(ends, places, strict=True):
            axes.annotate(
                name, (1, place), xycoords=("axes fraction", "data"), xytext=(7, 0), textcoords="offset points",
                color=colour, va="center", fontsize=9.5, annotation_clip=False,
            )  # fmt: skip
        return _svg(figure, title)


def strip(rows: Sequence[Dots], *, title: str, x: str) -> str:
    """One row of dots an arm, a stroke at its median; logarithmic."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(235, 22 * len(rows))
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
            axes.plot([dots.median] * 2, [place - 0.34, place + 0.34], color=colour, linewidth=2)
            _row_label(axes, dots.label, place)
        axes.set_xscale("log")
        every = [value for dots in rows for value in dots.values]
        axes.set_xlim(min(every) / 1.25, max(every) * 1.25)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        _finish_rows(axes, x)
        return _svg(figure, title)


def _figure(width: int, height: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    FigureCanvasAgg(figure)  # measures text; the picture is written as SVG
    return figure, figure.add_axes(
        (0, 0, 1, 1)
    )  # labels lie outside and are taken in when it is saved


def _finish_axes(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9.5, labelpad=6)
    # The vertical axis is named above it, where it is read without turning the head.
    axes.set_title(y, loc="left", fontsize=9.5, color=MUTED, pad=9, x=0)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.tick_params(length=0, labelsize=9.5)
    axes.spines["left"].set_visible(False)


def _row_label(axes: Any, label: str, place: float) -> None:
    axes.annotate(
        label, (0, place), xycoords=("axes fraction", "data"), xytext=(-8, 0), textcoords="offset points",
        ha="right", va="center", fontsize=9.5, annotation_clip=False,
    )  # fmt: skip


def _finish_rows(axes: Any, x: str, *, logarithmic: bool = True) -> None:
    """As `_finish_axes`, for a picture of labelled rows: a grid across, no axis up."""
    if logarithmic:
        axes.xaxis.set_major_locator(FixedLocator(_ticks(*axes.get_xlim())))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    _finish_axes(axes, x, "")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_yticks([])


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 at every power of ten between two bounds, or fewer where they would crowd."""
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**e for e in range(-6, 8) for m in steps if low <= m * 10.0**e <= high]
        if len(found) <= 7:
            return found
    return found


def _thousands(value: float, _: object) -> str:
    return (
        f"{value / 1e6:g}M"
        if abs(value) >= 1e6
        else f"{value / 1e3:g}k"
        if abs(value) >= 1e3
        else f"{value:g}"
    )


def _spread(values: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Places near ``values``, at least ``gap`` apart and, where there is room, within the bounds."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    places = [values[i] for i in order]
    for _ in range(100):
        moved = False
        for below in range(len(places) - 1):
            lack = gap - (places[below + 1] - places[below])
            if lack > 1e-9:
                places[below] -= lack / 2
                places[below + 1] += lack / 2
                moved = True
        if (
            places
            and (shift := max(low - places[0], 0) - max(places[-1] - high, 0))
            and len(places) * gap < high - low
        ):
            places = [p + shift for p in places]
            moved = True
        if not moved:
            break
    result = [0.0] * len(values)
    for place, index in zip(places, order, strict=True):
        result[index] = place
    return result


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
        """Whether a line joins it to its bubble: it is far, or (where bubbles overlap) another one
        is nearer.
        """
        own = self.distances[self.own]
        return own > 10 or own > min(self.distances)


def place_labels(bubbles: Sequence[Bubble]) -> list[Label]:
    """The labels of a picture of ``bubbles``, where `quality_against_speed` puts them."""
    with mpl.rc_context(_STYLE):
        figure, axes, corners = _trade(bubbles, "x", "y")
        return _label_bubbles(figure, axes, bubbles, corners)


def _label_bubbles(
    figure: Figure, axes: Any, bubbles: Sequence[Bubble], line: Sequence[tuple[float, float]]
) -> list[Label]:
    """Put each label near its bubble: nearer to it than to any other, and clear of labels, bubbles,
    edges and the ``line``.
    """
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    figure.canvas.draw()
    frame, largest = axes.get_window_extent(renderer), max(b.megabytes for b in bubbles)
    centres = [axes.transData.transform((b.speed, b.loss)) for b in bubbles]
    radii = [float(np.sqrt(_AREA * b.megabytes / largest / np.pi)) for b in bubbles]
    taken: list[Box] = [
        (x - r, y - r, x + r, y + r) for (x, y), r in zip(centres, radii, strict=True)
    ]
    corners = [axes.transData.transform(corner) for corner in line]
    steps = np.linspace(0, 1, 40)
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        for x, y in zip(x0 + steps * (x1 - x0), y0 + steps * (y1 - y0), strict=True):
            taken.append((x - 2, y - 2, x + 2, y + 2))
    placed = []
    for index, bubble in enumerate(bubbles):
        text = axes.annotate(
            f"{bubble.label}, {bubble.megabytes:.3g} MB",
            (bubble.speed, bubble.loss),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=9.5,
            fontweight="bold" if bubble.shipped else "normal",
            color=INK,
            ha="center",
            va="center",
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


def _svg(figure: Figure, title: str, *, scale: float = _SCALE) -> str:
    """The figure as inline SVG: an accessible name, page colours and fonts, ids of its own, nothing
    from outside.
    """
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.04,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )  # fmt: skip
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    for sentinel, variable in _VARIABLES.items():
        text = text.replace(sentinel, f"var(--{variable})")
    prefix = "c" + re.sub(r"\W+", "-", title.lower())[:60] + "-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r"url\(#", f"url(#{prefix}", text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{prefix}', text)
    text = re.sub(
        r"font: (\w+ )?([\d.]+px) [^;\"]*|font-family: [^;\"]*; ?| transform=\"rotate\(-0 [^\"]*\"",
        _font,
        text,
    )
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.S)
    view = re.search(r'viewBox="([^"]+)"', text)
    assert view is not None
    width = float(view.group(1).split()[2]) * scale
    name = escape(title, quote=True)
    head = f'<svg class="chart" viewBox="{view.group(1)}" style="max-width: {width:.0f}px" role="img" aria-label="{name}">'
    return head + text[text.index(">") + 1 :].strip()


def _font(match: re.Match[str]) -> str:
    """Size and weight stay, the family is the page's."""
    if not match.group(2):
        return ""
    return (
        f"{f'font-weight: {match.group(1)}; ' if match.group(1) else ''}font-size: {match.group(2)}"
    )
