"""The model card: YAML header, what the student is, its ingredients, its measurements."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from limbeck import __version__
from limbeck.contract.artifact import Artifact
from limbeck.contract.machine import versions
from limbeck.contract.recipe import AnyRecipe, HubModel, fingerprint
from limbeck.contract.results.onnx import OnnxResult
from limbeck.contract.sources.licences import UNKNOWN, hub_fields, of_student

_LICENCES = """\
Each licence is what the source says of itself, or `unknown` where it says nothing. The licence in
the header combines those of the base model and the teachers: theirs where they agree, `other` where
they differ, `unknown` where one is unknown."""
_BEFORE_LICENCES = """\
An older version distilled this student and recorded no licences. The licences of what went in
still apply."""


@dataclass(frozen=True)
class Card:
    """The parts of a model card that depend on the task."""

    pipeline: str  # the hub's name of the task
    made: str  # one sentence: what was exported, and how
    measured: Mapping[str, Mapping[str, float]]  # by held-out text and metric
    metrics: Mapping[str, str] = field(default_factory=dict)  # full names of metrics
    sections: Sequence[str] = ()  # Markdown, after the table of what went in


def write_card(
    folder: Path, recipe: AnyRecipe, student: Artifact, result: OnnxResult, card: Card
) -> None:
    """Write ``README.md`` of the deployable ``folder``."""
    teachers = _teachers(student.path)
    licences = (
        "Licences of the base model, the teachers and the texts apply; "
        "look them up before you pass it on."
    )
    failed = [
        f"The form `{name}` was not kept: {plain(why.splitlines()[0])}"
        for name, why in result.failed.items()
    ]
    parts = [
        _header(recipe, student, teachers, card, shipped=result.shipped),
        f"# {plain(recipe.name)}",
        plain(recipe.description),
        f"Made by Limbeck: {card.made} {licences}",
        *failed,
        *_what_went_in(recipe, student.result, teachers),
        *card.sections,
        *_digests(recipe, student),
    ]
    (folder / "README.md").write_text(
        "\n\n".join(part for part in parts if part) + "\n", encoding="utf-8"
    )


def in_torch(shipped: str) -> str:
    """Whose figures the student's artifact holds, for a reader who has the ``shipped`` form."""
    rounded = "" if shipped == "fp32" else f", before it was rounded to {shipped}"
    return f"the student in torch{rounded}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def plain(text: str) -> str:
    """``text`` from a recipe or a source as one line of Markdown: no HTML, no heading, no table
    cell, no control characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = html.escape(line, quote=False).replace("|", "\\|")
    return f"\\{line}" if line[:1] in ("#", "-", "+", "*", "=", "~", "`") else line


def graph_metadata(recipe: AnyRecipe, *, student: str) -> dict[str, str]:
    """What every graph says of its origin: digests of the distillation, the `export:` part and the
    student; versions."""
    return {
        "limbeck.version": __version__,
        "limbeck.versions": json.dumps(versions()),
        "limbeck.recipe": recipe.digest,
        "limbeck.export": fingerprint(recipe.export.model_dump(mode="json")),
        "limbeck.student": student,
    }


def _header(
    recipe: AnyRecipe,
    student: Artifact,
    teachers: Sequence[Mapping[str, Any]],
    card: Card,
    *,
    shipped: str,
) -> str:
    """The hub's YAML header.

    `base_model` and `datasets` name only what lies on the hub; `teachers` and `digests` are our own
    fields.
    """
    texts = student.result.get("sources", {}).get("texts", {})
    hub = {name: text["dataset"] for name, text in texts.items() if text["dataset"]}
    header: dict[str, Any] = {
        "library_name": "onnx",
        "pipeline_tag": card.pipeline,
        "tags": ["limbeck", "onnx", "distillation", shipped],
        **hub_fields(of_student(student.result, teachers)),
    }
    if isinstance(recipe.base, HubModel):
        header["base_model"] = recipe.base.id
    if teachers:
        header["teachers"] = [
            {"name": t["name"], "model": _teacher(recipe, t), "license": t.get("license", UNKNOWN)}
            for t in teachers
        ]
    if hub:
        header["datasets"] = sorted(set(hub.values()))
    if card.measured:
        results = [
            {
                "task": {"type": card.pipeline},
                "dataset": {"name": f"{name}, held out", "type": hub.get(name, name)},
                "metrics": [
                    {
                        "type": metric,
                        "name": card.metrics.get(metric, metric),
                        "value": round(value, 6),
                    }
                    for metric, value in metrics.items()
                ],
            }
            for name, metrics in card.measured.items()
        ]
        header["model-index"] = [{"name": recipe.name, "results": results}]
    header["digests"] = {"recipe": recipe.digest, "student": student.digest}
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---"


def _what_went_in(
    recipe: AnyRecipe, student: Mapping[str, Any], teachers: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Base model, teachers and texts, with licences known at the distillation."""
    known = student.get("sources", {})
    note = _LICENCES if "sources" in student else _BEFORE_LICENCES
    base = recipe.base
    rows = [["base model", _source(base), *_licence(known.get("base"))]] if base else []
    rows += [["teacher " + t["name"], _teacher(recipe, t), *_licence(t)] for t in teachers]
    rows += [
        ["text " + name, _source(text), *_licence(known.get("texts", {}).get(name))]
        for _, name, text in recipe.groups()
    ]
    cells = [[plain(cell) for cell in row] for row in rows]
    return ["## What went in", markdown_table(["what", "from", "licence", "said by"], cells), note]


def _digests(recipe: AnyRecipe, student: Artifact) -> list[str]:
    rows = [["recipe", f"`{recipe.digest}`"], ["student", f"`{student.digest}`"]]
    parents: Mapping[str, str] = student.manifest["parents"]
    rows += [[plain(f"made of {name}"), f"`{digest}`"] for name, digest in parents.items()]
    return ["## Digests", markdown_table(["of", "sha256"], rows)]


def _licence(known: Mapping[str, Any] | None) -> list[str]:
    return [known.get("license", UNKNOWN), known.get("said_by", "")] if known else [UNKNOWN, ""]


def _teachers(student: Path) -> list[dict[str, Any]]:
    path = student / "teachers.json"
    found: list[dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.is_file() else []
    return found


def _teacher(recipe: AnyRecipe, teacher: Mapping[str, Any]) -> str:
    """Where a teacher came from: as the recipe names it, else the folder it was loaded from."""
    for named in recipe.teachers:
        if named.name == teacher["name"]:
            # As the recipe writes it: the same run has the same card in any folder.
            adapter = getattr(named, "adapter", None)
            return _source(named.model) + (f" with adapter {adapter}" if adapter else "")
    return str(teacher["model"])


# Of a teacher behind a server: how it is asked, and not what it is.
_HOW_ASKED = ("url", "key_variable", "concurrency", "timeout", "retries")


def _source(source: Any) -> str:
    fields = source.model_dump(mode="json", exclude_none=True, exclude={"format", *_HOW_ASKED})
    return f"{fields.pop('kind')}: " + ", ".join(
        f"{name} {value}" for name, value in fields.items()
    )
