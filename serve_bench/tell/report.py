"""The report of a run: report.html, report.json, certificate.json and a table for the terminal, for
every task.

Nothing is measured here, so a report can be drawn again at any time. The artifacts are read once
and judged once.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from tabulate import tabulate

from limbeck import __version__
from limbeck.contract.artifact import Artifact, open_artifact, student_of
from limbeck.contract.errors import ArtifactError
from limbeck.contract.files import write_atomically
from limbeck.contract.machine import OtherWork
from limbeck.contract.recipe import BaseRecipe
from limbeck.contract.results.bench import Verdict
from serve_bench.judge.certificate import CERTIFICATE, certify, write_certificate
from serve_bench.judge.gates import show
from serve_bench.judge.task import judge_bench, read_bench
from serve_bench.tell.numbers import interval, significant
from serve_bench.tell.task import TellingTask

HTML, JSON = "report.html", "report.json"


@dataclass(frozen=True)
class Report:
    """The files that were written, and the verdict."""

    html: Path
    json: Path
    verdict: Verdict
    table: str  # Markdown

    @property
    def exit_code(self) -> int:
        """Exit code of the command line: 0 pass, 1 fail, 3 undecided."""
        return self.verdict.exit_code


def write_report(*, run: Path, recipe: BaseRecipe, task: TellingTask) -> Report:
    """See `serve_bench.write_report`."""
    bench = open_artifact(run / "bench", kind="bench")
    onnx = open_artifact(run / "onnx", kind="onnx", verify=False)
    student = open_artifact(student_of(onnx), kind="student", verify=False)
    for role, artifact in (("student", student), ("onnx", onnx)):
        if bench.manifest["parents"][role] != artifact.digest:
            raise ArtifactError(
                f"{bench.path} did not measure {artifact.path}; run the bench stage again."
            )
    judged = judge_bench(read_bench(bench, task), task)
    parents = student.manifest["parents"].items()
    data = {
        "recipe": {"name": recipe.name, "description": recipe.description, "digest": recipe.digest},
        "limbeck": __version__,
        "measured": bench.manifest["created"],
        "exit_code": judged.verdict.exit_code,
        **judged.result.as_json(),
        "student": student.result,
        "onnx": onnx.result,
        "heldout": task.heldout(judged),
        "environment": judged.measured.environment,
        "digests": {"student": student.digest, "onnx": onnx.digest, "bench": bench.digest}
        | {f"{role} (of the student)": digest for role, digest in parents},
    }
    certificate = certify(
        judged=judged, task=task, bench=bench, onnx=onnx, parents=dict(parents), recipe=recipe
    )
    sections = task.page(data, judged, student, certificate)
    page = (
        templates()
        .get_template("report.html.j2")
        .render(
            data=data,
            verdict=judged.verdict,
            recipe=recipe,
            recipe_text=_recipe_text(recipe, bench, student),
            resolved=json.dumps(recipe.resolved(), indent=2),
            shipped=data["arms"][data["judged"]],
            shipped_id=data["judged"],
            threads=threads(data["environment"]),
            warnings=warnings(data),
            created=datetime.fromisoformat(bench.manifest["created"]).strftime(
                "%-d %B %Y, %H:%M UTC"
            ),
            certificate=certificate,
            version=__version__,
            sections=sections.sections,
            inputs=sections.inputs,
            **sections.context,
        )
    )
    write_atomically(run / CERTIFICATE, write_certificate(certificate))
    write_atomically(run / JSON, json.dumps(data, indent=1))
    write_atomically(run / HTML, page)
    table = markdown(judged.verdict, task.table(data), warnings(data), names=task.names)
    return Report(run / HTML, run / JSON, judged.verdict, table)


def markdown(
    verdict: Verdict, rows: Sequence[Sequence[str]], notes: Sequence[str] = (), *, names: str = ""
) -> str:
    """Verdict, gates, notes and a Markdown table of ``rows``, the first its head: two columns of
    words, then numbers. ``names`` says below it what its short names mean."""
    lines = [f"**{verdict.status}**: {verdict.sentence}", ""]
    lines += [f"- {gate.status}: {gate.sentence}" for gate in verdict.gates]
    lines += [f"- note: {note}" for note in notes]
    align = ["left" if column < 2 else "right" for column in range(len(rows[0]))]
    table = tabulate(rows[1:], rows[0], tablefmt="pipe", colalign=align, disable_numparse=True)
    return "\n".join([*lines, "", table, *(["", names] if names else [])])


@functools.cache
def templates() -> Environment:
    """The page's templates, with the filters that write numbers."""
    environment = Environment(
        loader=PackageLoader("serve_bench.tell"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "sig": significant,
        "mb": lambda value: significant(None if value is None else value / 1e6),
        "span": interval,
    }
    environment.globals |= {"show": show}
    return environment


def arm_title(data: Mapping[str, Any], name: str) -> str:
    """Name of an arm in the terminal's table: a random stand-in and what ships are marked."""
    marks = ["random stand-in"] * data["stand_in"] + ["shipped"] * (
        name == f"onnx:{data['shipped']}"
    )
    label = str(data["arms"][name]["label"])
    return f"{label} ({', '.join(marks)})" if marks else label


def threads(environment: Mapping[str, Any]) -> str:
    """The number of threads, in words."""
    return "1 thread" if environment["threads"] == 1 else f"{environment['threads']} threads"


def warnings(data: Mapping[str, Any]) -> list[str]:
    """Notes that belong beside the verdict: a busy machine, a budget that was exceeded."""
    environment, found = data["environment"], []
    other = environment["before"].get("other_work")  # older benches have none
    if other is not None and (work := OtherWork(**other)).is_busy:
        found.append(
            f"The machine was busy before the measurement began ({work}): times are longer, and "
            "intervals wider, than on an idle one."
        )
    if data["disturbed"]:
        found.append(
            "Other work disturbed more blocks than are timed again, so disturbed ones count."
        )
    if data["over_budget"]:
        found.append(f"Over the time budget: {data['over_budget']}.")
    return found


def _recipe_text(recipe: BaseRecipe, *artifacts: Artifact) -> str:
    """The recipe as it was written; a recipe read back from an artifact has no text."""
    texts = [(artifact.manifest.get("recipe") or {}).get("text") for artifact in artifacts]
    return next((text.strip() for text in (recipe.text, *texts) if text), "")
