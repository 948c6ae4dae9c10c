"""The page of an encoder's report: its numbers, pictures and tables, from report.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import geometric_mean
from typing import Any

from limbeck.contract.artifact import Artifact
from limbeck.contract.recipe import EncoderRecipe
from serve_bench.judge.gates import show
from serve_bench.tell import sections
from serve_bench.tell.bubbles import Bubble, quality_against_speed
from serve_bench.tell.numbers import interval, significant
from serve_bench.tell.report import arm_title, threads
from serve_bench.tell.task import Page

_PARITY = (
    ("Largest difference", "max_abs", significant),
    ("Alike", "alike", lambda value: f"{value:.4f}"),
    ("Rows", "rows", str),
)


def table(data: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the table in the terminal."""
    columns = [
        (cell["batch"], cell["length"]) for cell in next(iter(data["arms"].values()))["grid"]
    ]
    names = list(data["arms"][f"onnx:{data['shipped']}"]["metrics"])
    rows = [["arm", "runtime", "MB", "memory MB", *(n.replace("_", " ") for n in names)]]
    rows[0] += [
        *(f"{batch} × {length} sequences/s" for batch, length in columns),
        "speed of the shipped",
    ]
    for name, arm in data["arms"].items():
        over = data["speed_of_shipped_over"].get(name)
        row = [
            arm_title(data, name),
            arm["runtime"],
            f"{arm['bytes'] / 1e6:.1f}",
            f"{arm['peak_rss_bytes'] / 1e6:.0f}",
        ]
        row += [f"{arm['metrics'][n]:.4f}" if arm["metrics"] else "" for n in names]
        row += [significant(cell["sequences_s"]["value"]) for cell in arm["grid"]]
        rows.append([*row, f"{interval(over['throughput'])}×" if over else ""])
    return rows


def page(
    recipe: EncoderRecipe,
    data: Mapping[str, Any],
    student: Artifact,
    certificate: Mapping[str, Any],
) -> Page:
    """See `TellingTask`."""
    shipped, first = data["arms"][data["judged"]], next(iter(data["arms"].values()))
    promised, titles = certificate["figures"], list(shipped["metrics"])
    promises = [(name.replace("_", " "), str(promised["quality"][name])) for name in titles]
    if promised["e2el_ms"] is not None:
        promises.append(("One sequence", sections.promised(promised["e2el_ms"], "ms")))
    return Page(
        "encoder.html.j2",
        "encoder_inputs.html.j2",
        {
            "metrics": titles,
            "cells": [(cell["batch"], cell["length"]) for cell in first["grid"]],
            "headline": _headline(data),
            "pictures": {"trade": _trade(data)},
            "trade_note": ": the geometric mean over batches and lengths",
            "promises": promises,
            "parity": sections.parity(data["onnx"]["forms"], _PARITY),
            "parity_note": " on held-out examples",
            "teachers": [
                {
                    "name": teacher.name,
                    "source": sections.source_text(teacher.model.model_dump(mode="json")),
                }
                for teacher in recipe.teachers
            ],
            "checks": [],
            "rows": sections.named_rows(_rows(data)),
        },
    )


def _headline(data: Mapping[str, Any]) -> list[dict[str, str]]:
    """Four numbers for a reader in a hurry."""
    shipped, metric = data["arms"][data["judged"]], str(data["metric"])
    running = threads(data["environment"])
    cell = shipped["grid"][-1]
    speed = sections.number(
        significant(cell["sequences_s"]["value"]),
        "sequences/s",
        f"batches of {cell['batch']} × {cell['length']} tokens, {running}",
    )
    size, memory = sections.size_and_memory(shipped)
    value, unit = f"{shipped['metrics'][metric]:.4f}", metric.replace("_", " ")
    quality = sections.number(value, unit, "on held-out examples")
    if (best := data["best_teacher"]) is not None:
        teacher = data["arms"][best]
        over = data["speed_of_shipped_over"][best]["throughput"]
        loss = data["metric_loss_of_shipped_against"][best]["value"]
        speed["note"] = f"{interval(over)}× the better teacher, {teacher['label']}"
        size["note"] = (
            f"{significant(teacher['bytes'] / shipped['bytes'])}× smaller than that teacher"
        )
        quality["note"] = f"a loss of {show(loss, '%')} against the better teacher"
    return [speed, size, quality, memory]


def _rows(data: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Every figure: arm, quantity, unit, value, interval, n."""
    for name, arm in data["arms"].items():
        label = arm["label"]
        for cell in arm["grid"]:
            found, where = cell["sequences_s"], f"batch {cell['batch']} × {cell['length']}"
            yield (label, f"throughput, {where}", "sequences/s", *sections.estimate(found))
        for metric, value in (arm["metrics"] or {}).items():
            yield label, metric.replace("_", " "), "", value, None, None, None
        for what, value in (("size on disk", arm["bytes"]), ("peak memory", arm["peak_rss_bytes"])):
            yield label, what, "MB", None if value is None else value / 1e6, None, None, 1
        for what, key in (("load", "load_s"), ("import of libraries", "import_s")):
            yield label, what, "s", arm[key], None, None, 1
        if over := data["speed_of_shipped_over"].get(name):
            what = f"throughput of {data['shipped']} over it"
            yield (label, what, "×", *sections.estimate(over["throughput"]))


def _trade(data: Mapping[str, Any]) -> str:
    """Error (1 - metric) of every arm over its throughput, the geometric mean over the grid."""
    metric = str(data["metric"])
    bubbles = [
        Bubble(
            arm["label"],
            arm["role"],
            geometric_mean([cell["sequences_s"]["value"] for cell in arm["grid"]]),
            1 - arm["metrics"][metric],
            arm["bytes"] / 1e6,
            name == f"onnx:{data['shipped']}",
        )
        for name, arm in data["arms"].items()
        if arm["metrics"]
    ]
    return quality_against_speed(
        bubbles,
        title=f"One less {metric.replace('_', ' ')} against throughput, size on disk as the area",
        x="throughput, sequences a second",
        y=f"1 − {metric.replace('_', ' ')}",
    )
