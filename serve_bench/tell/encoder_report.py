"""The report of an encoder's run: report.html, report.json and a table for the terminal, from its raw samples and answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from safetensors.numpy import load_file

from limbeck import __version__
from limbeck.contract.artifact import open_artifact
from limbeck.contract.errors import ArtifactError
from limbeck.contract.examples import EXAMPLES, load_examples
from limbeck.contract.files import write_atomically
from limbeck.contract.recipe import EncoderRecipe
from serve_bench.judge import encoder_figures as figures
from serve_bench.judge.figures import ENVIRONMENT, SAMPLES
from serve_bench.judge.gates import EXIT_CODES, Verdict
from serve_bench.measure.arms import Arm
from serve_bench.tell import charts
from serve_bench.tell.report import (
    HTML,
    JSON,
    Report,
    interval,
    significant,
    templates,
    verdict_and_table,
)


def write_encoder_report(*, run: Path, recipe: EncoderRecipe) -> Report:
    """See `serve_bench.write_report`."""
    bench = open_artifact(run / "bench", kind="bench")
    student = open_artifact(run / "student", kind="student", verify=False)
    onnx = open_artifact(run / "onnx", kind="onnx", verify=False)
    for role, artifact in (("student", student), ("onnx", onnx)):
        if bench.manifest["parents"][role] != artifact.digest:
            raise ArtifactError(
                f"{bench.path} did not measure {artifact.path}; run the bench stage again."
            )
    samples = figures.read_samples(bench.path / SAMPLES)
    heldout = load_examples(student.path / EXAMPLES)
    arms = [
        Arm(name, a["label"], a["role"], a["runtime"], a["bytes"], {})
        for name, a in bench.result["arms"].items()
    ]
    quality = figures.Quality(recipe, load_file(bench.path / figures.ANSWERS), heldout.groups, arms)
    environment = json.loads((bench.path / ENVIRONMENT).read_text())
    shipped = str(bench.result["shipped"])
    verdict = figures.judge(samples, quality, shipped, arms, recipe)
    data = {
        "recipe": {"name": recipe.name, "description": recipe.description, "digest": recipe.digest},
        "limbeck": __version__,
        "measured": bench.manifest["created"],
        "exit_code": EXIT_CODES[verdict.status],
        **figures.summary(samples, quality, environment, shipped, arms, recipe),
        "student": student.result,
        "onnx": onnx.result,
        "heldout": {
            name: int((heldout.groups == g).sum()) for g, (_, name, _) in enumerate(recipe.groups())
        },
        "environment": environment,
        "digests": {"student": student.digest, "onnx": onnx.digest, "bench": bench.digest},
    }
    text = (
        recipe.text
        or (student.manifest["recipe"] or {}).get("text")
        or json.dumps(recipe.resolved(), indent=2)
    )
    page = _render(data, verdict, text, datetime.fromisoformat(bench.manifest["created"]))
    write_atomically(run / JSON, json.dumps(data, indent=1))
    write_atomically(run / HTML, page)
    return Report(run / HTML, run / JSON, verdict, markdown(data, verdict))


def markdown(data: Mapping[str, Any], verdict: Verdict) -> str:
    """Verdict, gates and the main table, as Markdown that also reads well in a terminal."""
    columns = [
        (cell["batch"], cell["length"]) for cell in next(iter(data["arms"].values()))["grid"]
    ]
    names = list(data["arms"][f"onnx:{data['shipped']}"]["metrics"])
    rows = [["arm", "runtime", "MB", "memory MB", *(n.replace("_", " ") for n in names)]]
    rows[0] += [
        *(f"{batch} × {length} seq/s" for batch, length in columns),
        "throughput of the shipped",
    ]
    for name, arm in data["arms"].items():
        over = data["throughput_of_shipped_over"].get(name)
        shipped = " (shipped)" if name == f"onnx:{data['shipped']}" else ""
        row = [
            f"{arm['label']}{shipped}",
            arm["runtime"],
            f"{arm['bytes'] / 1e6:.1f}",
            f"{arm['peak_rss_bytes'] / 1e6:.0f}",
        ]
        row += [f"{arm['metrics'][n]:.4f}" if arm["metrics"] else "" for n in names]
        row += [significant(cell["sequences_s"]["value"]) for cell in arm["grid"]]
        rows.append([*row, f"{interval(over)}×" if over else ""])
    return verdict_and_table(verdict, rows)


def _render(data: Mapping[str, Any], verdict: Verdict, recipe_text: str, measured: datetime) -> str:
    from markupsafe import Markup

    template = templates().get_template("encoder.html.j2")
    # One look for both reports: the style is written in the other one.
    style = (
        (files("serve_bench.tell") / "templates" / "report.html.j2")
        .read_text()
        .partition("<style>")[2]
        .partition("</style>")[0]
    )
    return template.render(
        style=Markup(style),
        data=data,
        verdict=verdict,
        shipped=f"onnx:{data['shipped']}",
        metrics=list(data["arms"][f"onnx:{data['shipped']}"]["metrics"]),
        cells=[
            (cell["batch"], cell["length"]) for cell in next(iter(data["arms"].values()))["grid"]
        ],
        trade=Markup(_trade(data)),
        recipe_text=recipe_text.strip(),
        created=measured.strftime("%-d %B %Y, %H:%M UTC"),
        version=__version__,
    )


def _trade(data: Mapping[str, Any]) -> str:
    """What every arm gets wrong against its throughput, the geometric mean over the grid."""
    metric = str(data["metric"])
    bubbles = [
        charts.Bubble(
            arm["label"], arm["role"], geometric_mean([cell["sequences_s"]["value"] for cell in arm["grid"]]),
            1 - arm["metrics"][metric], arm["bytes"] / 1e6, name == f"onnx:{data['shipped']}",
        )
        for name, arm in data["arms"].items() if arm["metrics"]
    ]  # fmt: skip
    return charts.quality_against_speed(
        bubbles,
        title=f"One less {metric.replace('_', ' ')} against throughput, size on disk as the area",
        x="throughput, sequences a second",
        y=f"1 − {metric.replace('_', ' ')}",
    )
