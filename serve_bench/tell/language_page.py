"""The page of a language model's report, from report.json and the samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.contract.artifact import Artifact
from limbeck.contract.data.evals import TITLES
from limbeck.contract.recipe import Recipe
from serve_bench.judge.figures import Sample
from serve_bench.judge.gates import Evidence, best_teacher, show
from serve_bench.judge.language import rise, served_teachers, with_served
from serve_bench.judge.quality import summarise
from serve_bench.judge.task import Judged
from serve_bench.tell import charts, sections
from serve_bench.tell.bubbles import Bubble, quality_against_speed
from serve_bench.tell.numbers import interval, significant
from serve_bench.tell.own_text import own_text, read_samples
from serve_bench.tell.report import arm_title, threads
from serve_bench.tell.task import Page

NAMES = (
    "TTFT: time to the first token. TPOT: time per output token after it. Loss: mean negative "
    "log-likelihood of held-out text."
)


def table(data: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the table in the terminal."""
    rows = [
        [
            "arm",
            "runtime",
            "MB",
            "memory MB",
            "TTFT ms",
            "TPOT ms",
            "tokens/s",
            "loss, nats a token",
            "speed of the shipped",
        ]
    ]
    for name, arm in data["arms"].items():
        over = data["speed_of_shipped_over"].get(name)
        rows.append(
            [
                arm_title(data, name),
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
    return rows


def page(
    recipe: Recipe,
    data: Mapping[str, Any],
    judged: Judged,
    student: Artifact,
    certificate: Mapping[str, Any],
) -> Page:
    """See `TellingTask`."""
    quality, log = judged.measured.quality, _read_log(student.path / "log.jsonl")
    served = _served(judged)
    domains = _domains(recipe, data)
    choices = [same for arms in quality["same_choice"].values() for same in arms.values()]
    promised = certificate["figures"]
    blocks = sum(domain["blocks"] for domain in domains)
    return Page(
        "language.html.j2",
        "language_inputs.html.j2",
        {
            "headline": _headline(data, judged.evidence),
            "teachers": _teachers(recipe, student),
            "domains": domains,
            "best": _best(data, served),
            "served": served,
            "pictures": _pictures(data, judged, log),
            "trade_note": "",
            "noise": _noise(data),
            "checks": choices,
            "promises": [
                ("TPOT", sections.promised(promised["tpot_ms"], "ms")),
                ("TTFT", sections.promised(promised["ttft_ms"], "ms")),
                (
                    "Held-out loss",
                    f"{promised['quality']['mean_nll']} nats a token, over {blocks} blocks",
                ),
            ],
            "parity": sections.parity(
                {**data["onnx"]["forms"], **data["onnx"].get("ggufs", {})}, _PARITY
            ),
            "parity_note": ": prompts, token by token, in chunks, and ragged batches",
            "rows": sections.rows(data),
            "loss_steps": sections.loss_steps(data, list(served.values())),
            "coverage": _coverage(student),
            "evals": _evaluations(data),
            "against_memory": sections.against_memory(data),
            "energy": sections.energy(data),
            "generation": quality.get("generation"),
            "own": own_text(log, read_samples(student.path / "samples.jsonl")),
            "parameters": _parameters(student.result.get("parameters")),
        },
    )


_PARITY = (
    ("Largest logit difference", "max_abs", significant),
    ("KL from torch, nats", "kl", significant),
    ("Same first choice", "top1", lambda value: f"{100 * value:.2f} %"),
    ("Positions", "positions", str),
)


def _evaluations(data: Mapping[str, Any]) -> dict[str, Any]:
    """Columns and rows of the table of short evaluations; a row has no arm if it is the base's."""
    answered = [
        (name, arm["label"], arm["evals"]) for name, arm in data["arms"].items() if arm.get("evals")
    ]
    if (base := data.get("base_evals")) is not None:
        answered.insert(0, (None, "the student’s base", base))
    _, _, first = answered[0] if answered else (None, None, {"shares": {}, "losses": {}})
    return {
        "rows": answered,
        "columns": [(name, TITLES[name]) for name in first["shares"]],
        "texts": [(name, TITLES[name]) for name in first["losses"]],
    }


def _coverage(student: Artifact) -> list[tuple[str, str, Mapping[str, float]]]:
    """Teacher, domain and coverage, of every teacher with another tokenizer."""
    teachers: Mapping[str, Any] = student.result.get("teachers", {})
    return [
        (name, domain, found)
        for name, teacher in teachers.items()
        for domain, found in (teacher.get("coverage") or {}).items()
    ]


def _read_log(path: Path) -> list[dict[str, Any]]:
    return (
        [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        if path.is_file()
        else []
    )


def _headline(data: Mapping[str, Any], evidence: Evidence) -> list[dict[str, str]]:
    """Four numbers for a reader in a hurry."""
    shipped = data["arms"][f"onnx:{data['shipped']}"]
    teachers = {name: arm for name, arm in data["arms"].items() if arm["role"] == "teacher"}
    speed = sections.number(
        significant(shipped["decode_tokens_s"]["value"]),
        "tokens/s",
        f"decode speed on {threads(data['environment'])}",
    )
    first = f", first token after {significant(shipped['ttft_ms']['value'])} ms"
    size, memory = sections.size_and_memory(shipped, first)
    nll = f"{shipped['quality']['mean_nll']:.3f}"
    loss = sections.number(nll, "nats", "held-out loss a token")
    if teachers:
        fastest = min(
            teachers, key=lambda name: data["speed_of_shipped_over"][name]["tpot"]["value"]
        )
        over = data["speed_of_shipped_over"][fastest]["tpot"]
        speed["note"] = f"{interval(over)}× the fastest teacher, {teachers[fastest]['label']}"
        size["note"] = (
            f"{significant(teachers[fastest]['bytes'] / shipped['bytes'])}× smaller than that "
            "teacher"
        )
    if (best := best_teacher(evidence)) is not None:  # it may be behind a server, and no arm
        percent = show(evidence.rise_over_teachers[best][1].value, "%")
        unit = " in bits a byte" if best in evidence.by_byte else ""
        loss["note"] = f"{percent}{unit} against the best teacher, {best}"
    return [speed, size, loss, memory]


def _teachers(recipe: Recipe, student: Artifact) -> list[dict[str, Any]]:
    entries = json.loads((student.path / "teachers.json").read_text("utf-8"))
    sources = {teacher.name: teacher.model for teacher in recipe.teachers}
    return [
        {
            **entry,
            "adapter": entry.get("adapter"),  # a served teacher's entry has none
            "source": sections.source_text(sources[entry["name"]].model_dump(mode="json"))
            if entry["name"] in sources
            else entry["model"],
            "form": "behind a server"
            if "server" in entry
            else entry.get("dtype") or "fp32"
            if entry.get("quantize") in (None, "none")
            else entry["quantize"],
        }
        for entry in entries
    ]


def _domains(recipe: Recipe, data: Mapping[str, Any]) -> list[dict[str, Any]]:
    named = {domain.name: domain for domain in recipe.data.domains}
    rows = []
    for name, sizes in data["heldout"].items():
        domain = named.get(name)
        rows.append(
            {
                "name": name,
                "source": sections.source_text(domain.text.model_dump(mode="json"))
                if domain
                else "",
                "weight": domain.weight if domain else None,
                "blocks": len(sizes["labels"]),
                "labels": sum(sizes["labels"]),
                "bytes": sum(sizes["utf8_bytes"]),
            }
        )
    return rows


def _served(judged: Judged) -> dict[str, dict[str, Any]]:
    """Label, quality and the shipped form's rise over it, of each teacher behind a server."""
    reference, quality = judged.measured.reference, with_served(judged.measured.quality)
    return {
        arm: {
            "label": name,
            "quality": summarise(quality, arm),
            "rise": rise(quality, reference.shipped_arm.id, arm).as_json(),
        }
        for name, arm in served_teachers(quality, reference).items()
    }


def _best(data: Mapping[str, Any], served: Mapping[str, Any]) -> dict[str, str]:
    """Which row is best in each column of the quality table."""
    rows = {**data["arms"], **served}
    arms = {name: arm["quality"] for name, arm in rows.items() if arm["quality"]}
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


def _parameters(found: Any) -> int | None:
    if isinstance(found, Mapping):
        found = found.get("total")
    return int(found) if found else None


def _pictures(
    data: Mapping[str, Any], judged: Judged, log: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    arms, samples = data["arms"], judged.measured.samples
    bubbles = [
        Bubble(
            arm["label"],
            arm["role"],
            arm["decode_tokens_s"]["value"] / (arm.get("token_rate") or 1),
            arm["quality"]["mean_nll"],
            arm["bytes"] / 1e6,
            name == f"onnx:{data['shipped']}",
        )
        for name, arm in arms.items()
        if arm["quality"]
    ]
    hills = [
        charts.Values(
            arm["label"],
            arm["role"],
            [1e3 * float(gap) for sample in samples if sample.arm == name for gap in sample.itl],
            arm["itl_ms"]["p50"],
        )
        for name, arm in arms.items()
    ]
    pictures = {
        "gaps": charts.ridges(
            hills,
            title="Distribution of the gaps between tokens, by arm",
            x="ms between tokens (logarithmic)",
        ),
        "firsts": _strip(data, samples, "ttft"),
        "offline": sections.offline(data),
        "server": sections.server(data),
        "cold": sections.cold(data),
        "trade": quality_against_speed(
            bubbles,
            title="Held-out loss against decode speed, size on disk as the area",
            x="decode speed, tokens a second",
            y="held-out loss, nats a token",
        ),
        "strip": _strip(data, samples, "tpot"),
    }
    losses = [nll for nll, _ in judged.evidence.rise_over_teachers.values()]
    return pictures | _training_pictures(log, min(losses, default=None))


def _training_pictures(log: Sequence[Mapping[str, Any]], best: float | None) -> dict[str, Any]:
    """Pictures of the training; None where the log has too few points for one."""
    pictures: dict[str, Any] = {"terms": None, "heldout": None, "weights": {}}
    steps = [row for row in log if row["event"] == "step"]
    if len(steps) > 1:
        pictures["terms"] = _terms(steps)
        for domain in dict.fromkeys(name for row in steps for name in row.get("weights") or {}):
            pictures["weights"][domain] = _weights(steps, domain)
    evaluations = [row for row in log if row["event"] == "evaluate"]
    if len(evaluations) > 1:
        pictures["heldout"] = _heldout(evaluations, best)
    return pictures


def _strip(data: Mapping[str, Any], samples: Sequence[Sample], metric: str) -> str:
    """One dot a generation, and the median of the table, which is over blocks."""
    dots = [
        charts.Values(
            arm["label"],
            arm["role"],
            [1e3 * float(getattr(s, metric)) for s in samples if s.arm == name],
            arm[f"{metric}_ms"]["value"],
        )
        for name, arm in data["arms"].items()
    ]
    name = metric.upper()
    return charts.strip(
        dots, title=f"{name} of every generation, by arm", x=f"{name}, ms (logarithmic)"
    )


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


def _heldout(evaluations: Sequence[Mapping[str, Any]], best: float | None) -> str:
    """``best`` is the loss of the best teacher, or None where there is no teacher."""
    tokens = [row["tokens"] for row in evaluations]
    series = {
        name: (tokens, [row["nll"][name] for row in evaluations]) for name in evaluations[0]["nll"]
    }
    if len(series) > 1:
        series["mean"] = (tokens, [row["mean_nll"] for row in evaluations])
    dashed = {} if best is None else {"best teacher": best}
    return charts.lines(
        series,
        dashed=dashed,
        marks=True,
        title="Held-out loss of the student by domain over training tokens",
        x="training tokens",
        y="held-out loss, nats a token",
    )


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
        series,
        limits=(0, 1),
        title=f"Weight of each teacher on {domain} over training tokens",
        x="training tokens",
        y=f"weight on {domain}",
    )
