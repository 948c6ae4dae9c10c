"""Numbers as a person reads them, in every table and on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def significant(value: float | None, digits: int = 3) -> str:
    """A number in three significant digits, with an exponent only where a person writes one."""
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    text = (
        f"{value:.{places}f}"
        if 0 <= places <= 6
        else f"{round(value, places):.0f}"
        if places < 0
        else f"{value:.1e}"
    )
    return text.replace("-", "−")


def short(value: float) -> str:
    """A number for axes and labels: three digits, or all of them from 1000 on."""
    return f"{value:.0f}" if round(abs(value)) >= 1000 else f"{value:.3g}"


def interval(estimate: Mapping[str, Any]) -> str:
    """A value with its 95 % interval, where there is one."""
    if estimate["low"] is None:
        return significant(estimate["value"])
    return (
        f"{significant(estimate['value'])} "
        f"({significant(estimate['low'])}–{significant(estimate['high'])})"
    )
