"""Drawing for the page: the style, axes and labels of every picture, and its form as inline SVG.

Colours are the page's CSS variables, so that one picture serves light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
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
SCALE = 1.3  # of a drawing at its widest; drawings are small, so a phone shrinks them little
MARKS = ("o", "s", "^", "D", "v", "P")
STYLE: Any = {
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


def new_figure(width: int, height: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    FigureCanvasAgg(figure)  # measures text; the picture is written as SVG
    # labels lie outside and are taken in when it is saved
    return figure, figure.add_axes((0, 0, 1, 1))


def finish_axes(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9.5, labelpad=6)
    # The vertical axis is named above it, where it is read without turning the head.
    axes.set_title(y, loc="left", fontsize=9.5, color=MUTED, pad=9, x=0)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.tick_params(length=0, labelsize=9.5)
    axes.spines["left"].set_visible(False)


def write(axes: Any, text: str, place: tuple[float, float], *, right: int, **more: Any) -> Any:
    """Write ``text`` beside a place, ``right`` points to the right of it."""
    return axes.annotate(
        text,
        place,
        xytext=(right, 0),
        textcoords="offset points",
        va="center",
        fontsize=9.5,
        **more,
    )


# A place at an edge of the axes, and a height in them; what is written there lies outside.
EDGE: Any = {"xycoords": ("axes fraction", "data"), "annotation_clip": False}


def row_label(axes: Any, label: str, place: float) -> None:
    write(axes, label, (0, place), right=-8, ha="right", **EDGE)


def finish_rows(axes: Any, x: str, *, logarithmic: bool = True) -> None:
    """As `_finish_axes`, for a picture of labelled rows: a grid across, no axis up."""
    if logarithmic:
        axes.xaxis.set_major_locator(FixedLocator(ticks(*axes.get_xlim())))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    finish_axes(axes, x, "")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_yticks([])


def ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 at every power of ten between two bounds, or fewer where they would crowd."""
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**e for e in range(-6, 8) for m in steps if low <= m * 10.0**e <= high]
        if len(found) <= 7:
            return found
    return found


def thousands(value: float, _: object) -> str:
    return (
        f"{value / 1e6:g}M"
        if abs(value) >= 1e6
        else f"{value / 1e3:g}k"
        if abs(value) >= 1e3
        else f"{value:g}"
    )


def spread(values: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Places near ``values``, at least ``gap`` apart, within the bounds where there is room."""
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


def svg(figure: Figure, title: str, *, scale: float = SCALE) -> str:
    """The figure as inline SVG with an accessible name, page colours and ids of its own."""
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        bbox_inches="tight",
        pad_inches=0.04,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
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
    head = (
        f'<svg class="chart" viewBox="{view.group(1)}" style="max-width: {width:.0f}px" '
        f'role="img" aria-label="{name}">'
    )
    return head + text[text.index(">") + 1 :].strip()


def _font(match: re.Match[str]) -> str:
    """Size and weight stay, the family is the page's."""
    if not match.group(2):
        return ""
    return (
        f"{f'font-weight: {match.group(1)}; ' if match.group(1) else ''}font-size: {match.group(2)}"
    )
