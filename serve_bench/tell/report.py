"""The report of a run: report.html, report.json, certificate.json and a table for the terminal, from the artifacts and
their raw samples.

Nothing is measured here, so that a report can be drawn again at any time. Knows what to say; `charts` draws, the template
lays out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck import __version__
from limbeck.contract.artifact import Artifact, open_artifact, student_of
from limbeck.contract.errors import ArtifactError
from limbeck.contract.files import write_atomically
from limbeck.contract.recipe import Recipe
from serve_bench.judge import figures
from serve_bench.judge.certificate import CERTIFICATE, certify
from serve_bench.judge.figures import ENVIRONMENT, QUALITY, SAMPLES, Sample
from serve_bench.judge.gates import EXIT_CODES, Verdict, judge, show
from serve_bench.measure.arms import Arm
from serve_bench.measure.scenarios import figures as scenarios
from serve_bench.tell import charts, sections

if TYPE_CHECKING:
    from jinja2 import Environment

HTML, JSON = "report.html", "report.json"
_BUSY = 0.5  # load average a core, before anything was timed, above which the report says so


@dataclass(frozen=True)
class Report:
    """What was written, and what it says."""

    html: Path
    json: Path
    verdict: Verdict
    table: str  # Markdown

    @property
    def exit_code(self) -> int:
        """What the command line returns: 0 pass, 1 fail, 3 undecided."""
        return self.verdict.exit_code


def write_report(*, run: Path, recipe: Recipe) -> Report:
    """See `serve_bench.write_report`."""
    bench = open_artifact(run / "bench", kind="bench")
    onnx = open_artifact(run / "onnx", kind="onnx", verify=False)
    student = open_artifact(student_of(onnx), kind="student", verify=False)
    for role, artifact in (("student", student), ("onnx", onnx)):
        if bench.manifest["parents"][role] != artifact.digest:
            raise ArtifactError(
                f"{bench.path} did not measure {artifact.path}; run the bench stage again."
            )
    samples = figures.read_samples(bench.path / SAMPLES)
    quality = json.loads((bench.path / QUALITY).read_text())
    environment = json.loads((bench.path / ENVIRONMENT).read_text())
    arms = [
        Arm(name, arm["label"], arm["role"], arm["runtime"], arm["bytes"], {})
        for name, arm in bench.result["arms"].items()
    ]
    reference = figures.reference_of(recipe, str(bench.result["shipped"]), arms)
    verdict = judge(recipe.gates, figures.evidence(samples, quality, reference))
    result = figures.summary(samples, quality, environment, reference, recipe)
    rows = figures.read_rows(bench.path / SAMPLES)
    result |= scenarios.summary(rows, environment, recipe.bench, arms)
    log = _read_log(student.path / "log.jsonl")
    data = {
        "recipe": {"name": recipe.name, "description": recipe.description, "digest": recipe.digest},
        "limbeck": __version__,
        "measured": bench.manifest["created"],
        "exit_code": EXIT_CODES[verdict.status],
        **result,
        "student": student.result,
        "onnx": onnx.result,
        "heldout": quality["domains"],
        "environment": environment,
        "digests": {"student": student.digest, "onnx": onnx.digest, "bench": bench.digest}
        | {
            f"{role} (of the student)": digest
            for role, digest in student.manifest["parents"].items()
        },
    }
    certificate = certify(bench=bench, onnx=onnx, student=student, recipe=recipe, verdict=verdict)
    page = _render(data, verdict, recipe, samples, quality, log, student, bench, certificate)
    write_atomically(run / CERTIFICATE, json.dumps(certificate, indent=1))
    write_atomically(run / JSON, json.dumps(data, indent=1))
    write_atomically(run / HTML, page)
    return Report(run / HTML, run / JSON, verdict, markdown(data, verdict))


def markdown(data: Mapping[str, Any], verdict: Verdict) -> str:
    """Verdict, gates and the main table, as Markdown that also reads well in a terminal."""
    head = [
        "arm",
        "runtime",
        "MB",
        "memory MB",
        "TTFT ms",
        "TPOT ms",
        "tokens/s",
        "NLL",
        "speed of the shipped",
    ]
    rows = []
    for name, arm in data["arms"].items():
        over = data["speed_of_shipped_over"].get(name)
        rows.append(
            [
                f"{arm['label']} (shipped)" if name == f"onnx:{data['shipped']}" else arm["label"],
                arm["runtime"],
                f"{arm['bytes'] / 1e6:.1f}",
                "" if arm["peak_rss_bytes"] is None else f"{arm['peak_rss_bytes'] / 1e6:.0f}",
                interval(arm["ttft_ms"]),
                interval(arm["tpot_ms"]),
                significant(arm["decode_tokens_s"]["value"]),
                f"{arm['quality']['mean_nll']:.4f}" if arm["quality"] else "",
                f"{interval(over['tpot'])}×" if over else "",
            ]
        )
    return verdict_and_table(verdict, [head, *rows])


def verdict_and_table(verdict: Verdict, rows: Sequence[Sequence[str]]) -> str:
    """Verdict, gates, and a Markdown table of ``rows``, the first its head: two columns of words, then figures."""
    lines = [f"**{verdict.status}**: {verdict.sentence}", ""]
    lines += [f"- {gate.status}: {gate.sentence}" for gate in verdict.gates]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = [
        " | ".join(
            c.ljust(w) if i < 2 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    rule = " | ".join("-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(widths))
    return "\n".join([*lines, "", *(f"| {row} |" for row in [text[0], rule, *text[1:]])])


def significant(value: float | None, digits: int = 3) -> str:
    """A number in three significant digits, without an exponent where a person would not write one."""
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


def interval(estimate: Mapping[str, Any]) -> str:
    """A value with its 95 % interval, where there is one."""
    if estimate["low"] is None:
        return significant(estimate["value"])
    return f"{significant(estimate['value'])} ({significant(estimate['low'])}–{significant(estimate['high'])})"


def _read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


# The page --------------------------------------------------------------------------------------------------------


def templates() -> Environment:
    """The pages' templates, with the filters that both reports write numbers by."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

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
    }
    environment.filters |= {"span": interval}
    environment.globals |= {"show": show}
    return environment


def _render(
    data: Mapping[str, Any],
    verdict: Verdict,
    recipe: Recipe,
    samples: Sequence[Sample],
    quality: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    student: Artifact,
    bench: Artifact,
    certificate: Mapping[str, Any],
) -> str:
    template = templates().get_template("report.html.j2")
    shipped = data["arms"][f"onnx:{data['shipped']}"]
    return template.render(
        data=data,
        verdict=verdict,
        recipe=recipe,
        recipe_text=_recipe_text(recipe, bench, student),
        resolved=json.dumps(recipe.resolved(), indent=2),
        shipped=shipped,
        shipped_id=f"onnx:{data['shipped']}",
        headline=_headline(data, recipe),
        teachers=_teachers(recipe, student),
        domains=_domains(recipe, data, student),
        best=_best(data),
        pictures=_pictures(data, samples, log),
        noise=_noise(data),
        threads=_threads(data["environment"]),
        busy=_busy(data["environment"]),
        created=datetime.fromisoformat(bench.manifest["created"]).strftime("%-d %B %Y, %H:%M UTC"),
        checks=[same for choices in quality["same_choice"].values() for same in choices.values()],
        certificate=certificate,
        rows=sections.rows(data),
        loss_steps=sections.loss_steps(data),
        against_memory=sections.against_memory(data),
        energy=sections.energy(data),
        generation=quality.get("generation"),
        parameters=_parameters(student.result.get("parameters")),
        version=__version__,
    )


def _threads(environment: Mapping[str, Any]) -> str:
    return "1 thread" if environment["threads"] == 1 else f"{environment['threads']} threads"


def _recipe_text(recipe: Recipe, *artifacts: Artifact) -> str:
    """The recipe as it was written; one that was read back from an artifact has no text of its own."""
    texts = [(artifact.manifest.get("recipe") or {}).get("text") for artifact in artifacts]
    return next((text.strip() for text in (recipe.text, *texts) if text), "")


def _headline(data: Mapping[str, Any], recipe: Recipe) -> list[dict[str, str]]:
    """Four numbers for who reads nothing else."""
    shipped = data["arms"][f"onnx:{data['shipped']}"]
    teachers = {name: arm for name, arm in data["arms"].items() if arm["role"] == "teacher"}
    items = [
        {
            "value": significant(shipped["decode_tokens_s"]["value"]),
            "unit": "tokens/s",
            "label": f"decode speed on {_threads(data['environment'])}",
            "note": "",
        },
        {
            "value": significant(shipped["bytes"] / 1e6),
            "unit": "MB",
            "label": "on disk, graph and weights",
            "note": "",
        },
        {
            "value": f"{shipped['quality']['mean_nll']:.3f}",
            "unit": "nats",
            "label": "held-out loss a token",
            "note": "",
        },
    ]
    if teachers:
        fastest = min(
            teachers, key=lambda name: data["speed_of_shipped_over"][name]["tpot"]["value"]
        )
        best = min(teachers, key=lambda name: teachers[name]["quality"]["mean_nll"])
        over, rise = (
            data["speed_of_shipped_over"][fastest]["tpot"],
            data["nll_rise_of_shipped_over"][best],
        )
        items[0]["note"] = f"{interval(over)}× the fastest teacher, {teachers[fastest]['label']}"
        items[1]["note"] = (
            f"{significant(teachers[fastest]['bytes'] / shipped['bytes'])}× smaller than that teacher"
        )
        percent = show(rise["value"], "%")
        items[2]["note"] = f"{percent} against the best teacher, {teachers[best]['label']}"
    memory = {
        "value": significant(shipped["peak_rss_bytes"] / 1e6),
        "unit": "MB",
        "label": "peak memory of the process",
    }
    memory["note"] = (
        f"ready {significant(shipped['load_s'])} s after opening, first token after {significant(shipped['ttft_ms']['value'])} ms"
    )
    return [*items, memory]


def _teachers(recipe: Recipe, student: Artifact) -> list[dict[str, Any]]:
    entries = json.loads((student.path / "teachers.json").read_text())
    sources = {teacher.name: teacher.model for teacher in recipe.teachers}
    return [
        {
            **entry,
            "source": _source(sources[entry["name"]].model_dump(mode="json"))
            if entry["name"] in sources
            else entry["model"],
            "form": entry.get("dtype") or "fp32"
            if entry.get("quantize") in (None, "none")
            else entry["quantize"],
        }
        for entry in entries
    ]


def _source(source: Mapping[str, Any]) -> str:
    match source["kind"]:
        case "hub":
            return f"{source['id']} @ {source['revision']}"
        case "package":
            place = source.get("path") or ", ".join(source["paths"])
            return f"{source['package']} {source['version'] or ''}: {place}".replace(" :", ":")
        case "recipe":
            return f"student of {source['recipe']}"
        case "random":
            return f"random {source['config'].get('model_type', 'model')}, seed {source['seed']}"
        case "stdlib":
            return f"Python standard library: {', '.join(source['paths'])}"
        case "files":
            return ", ".join(source["paths"])
        case _:
            return str(source.get("path", source["kind"]))


def _domains(recipe: Recipe, data: Mapping[str, Any], student: Artifact) -> list[dict[str, Any]]:
    named = {domain.name: domain for domain in recipe.data.domains}
    rows = []
    for name, sizes in data["heldout"].items():
        domain = named.get(name)
        rows.append(
            {
                "name": name,
                "source": _source(domain.text.model_dump(mode="json")) if domain else "",
                "weight": domain.weight if domain else None,
                "blocks": len(sizes["labels"]),
                "labels": sum(sizes["labels"]),
                "bytes": sum(sizes["utf8_bytes"]),
            }
        )
    return rows


def _best(data: Mapping[str, Any]) -> dict[str, str]:
    """Which arm is best in each column of the quality table."""
    arms = {name: arm["quality"] for name, arm in data["arms"].items() if arm["quality"]}
    columns = {"mean": {name: quality["mean_nll"] for name, quality in arms.items()}}
    for domain in data["heldout"]:
        columns[domain] = {
            name: quality["domains"][domain]["nll"] for name, quality in arms.items()
        }
    return {
        column: min(values, key=lambda name: values[name]) for column, values in columns.items()
    }


def _noise(data: Mapping[str, Any]) -> dict[str, Any]:
    twin = next(name for name, arm in data["arms"].items() if arm["role"] == "twin")
    ratio = data["speed_of_shipped_over"][twin]["tpot"]
    return {**ratio, "quiet": ratio["low"] is None or ratio["low"] <= 1 <= ratio["high"]}


def _busy(environment: Mapping[str, Any]) -> bool:
    return bool(environment["before"]["load_average"][0] > _BUSY * environment["host"]["cores"])


def _parameters(found: Any) -> int | None:
    if isinstance(found, Mapping):
        found = found.get("total")
    return int(found) if found else None


def _pictures(
    data: Mapping[str, Any], samples: Sequence[Sample], log: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    arms = data["arms"]
    bubbles = [
        charts.Bubble(
            arm["label"], arm["role"], arm["decode_tokens_s"]["value"], arm["quality"]["mean_nll"],
            arm["bytes"] / 1e6, name == f"onnx:{data['shipped']}",
        )
        for name, arm in arms.items() if arm["quality"]
    ]  # fmt: skip
    gaps = [
        (arm["label"], arm["role"], [1e3 * s.tpot for s in samples if s.arm == name])
        for name, arm in arms.items()
    ]
    hills = [(arm["label"], arm["role"], _gaps(samples, name)) for name, arm in arms.items()]
    firsts = [
        (arm["label"], arm["role"], [1e3 * s.ttft for s in samples if s.arm == name])
        for name, arm in arms.items()
    ]
    pictures: dict[str, Any] = {
        "gaps": charts.ridges(hills, title="Distribution of the gaps between tokens, by arm", x="ms between tokens (logarithmic)"),
        "firsts": charts.strip(firsts, title="Time to the first token of every generation, by arm", x="ms to the first token (logarithmic)"),
        "offline": sections.offline(data),
        "server": sections.server(data),
        "cold": sections.cold(data),
        "trade": charts.quality_against_speed(
            bubbles, title="Held-out loss against decode speed, size on disk as the area",
            x="decode speed, tokens a second", y="held-out loss, nats a token",
        ),
        "strip": charts.strip(gaps, title="Time per output token of every generation, by arm", x="ms per output token (logarithmic)"),
        "terms": None, "heldout": None, "weights": {},
    }  # fmt: skip
    steps = [row for row in log if row["event"] == "step"]
    if len(steps) > 1:
        pictures["terms"] = _terms(steps)
        for domain in dict.fromkeys(name for row in steps for name in row.get("weights") or {}):
            pictures["weights"][domain] = _weights(steps, domain)
    evaluations = [row for row in log if row["event"] == "evaluate"]
    if len(evaluations) > 1:
        pictures["heldout"] = _heldout(evaluations, data)
    return pictures


def _gaps(samples: Sequence[Sample], arm: str) -> list[float]:
    return [1e3 * float(gap) for sample in samples if sample.arm == arm for gap in sample.itl]


def _terms(steps: Sequence[Mapping[str, Any]]) -> str:
    names = {
        "loss": "total",
        "cross_entropy": "cross-entropy",
        "fusion": "fusion",
        "features": "features",
    }
    series = {}
    for key, name in names.items():
        points = [(row["tokens"], row[key]) for row in steps if row.get(key) is not None]
        if points:
            series[name] = ([x for x, _ in points], [y for _, y in points])
    return charts.lines(
        series,
        title="Training loss and its terms over training tokens",
        x="training tokens",
        y="nats a token",
    )


def _heldout(evaluations: Sequence[Mapping[str, Any]], data: Mapping[str, Any]) -> str:
    tokens = [row["tokens"] for row in evaluations]
    series = {
        name: (tokens, [row["nll"][name] for row in evaluations]) for name in evaluations[0]["nll"]
    }
    if len(series) > 1:
        series["mean"] = (tokens, [row["mean_nll"] for row in evaluations])
    teachers = [
        arm["quality"]["mean_nll"] for arm in data["arms"].values() if arm["role"] == "teacher"
    ]
    dashed = {"best teacher": min(teachers)} if teachers else {}
    return charts.lines(
        series, dashed=dashed, marks=True, title="Held-out loss of the student by domain over training tokens",
        x="training tokens", y="held-out loss, nats a token",
    )  # fmt: skip


def _weights(steps: Sequence[Mapping[str, Any]], domain: str) -> str:
    rows = [row for row in steps if domain in (row.get("weights") or {})]
    series = {
        teacher: (
            [row["tokens"] for row in rows],
            [row["weights"][domain][teacher] for row in rows],
        )
        for teacher in rows[0]["weights"][domain]
    }
    return charts.lines(
        series, limits=(0, 1), title=f"Weight of each teacher on {domain} over training tokens",
        x="training tokens", y=f"weight on {domain}",
    )  # fmt: skip
