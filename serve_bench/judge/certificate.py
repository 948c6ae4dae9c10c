"""certificate.json: the promises about the shipped form of a run.

Everything in it is computed from the artifacts, and it decides nothing. So it can be computed
again and compared, field by field. `serve_bench.measure.replay` does this.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import ArtifactError
from limbeck.contract.files import read_json
from limbeck.contract.printable import printable
from limbeck.contract.recipe import BaseRecipe
from serve_bench.judge.task import Judged, JudgingTask

CERTIFICATE = "certificate.json"
FORMAT = 3
FP32 = "onnx:fp32"  # id of the arm
_NAMED, _LONGEST = 5, 80  # fields that a message names, and characters of each


def certify(
    *,
    judged: Judged,
    task: JudgingTask,
    bench: Artifact,
    onnx: Artifact,
    parents: Mapping[str, str],
    recipe: BaseRecipe,
) -> dict[str, Any]:
    """Content of certificate.json: digests, figures with intervals, and the measuring machine.

    ``parents`` are those of the student, by role.
    """
    shipped, environment = judged.result.shipped, judged.measured.environment
    files = onnx.manifest["files"]
    return {
        "format": FORMAT,
        "task": task.name,
        "recipe": {"name": recipe.name, "digest": recipe.digest},
        **judged.verdict.as_json(),
        "artifact": {
            "shipped": shipped,
            "digest": onnx.digest,
            "files": {
                name: files[name]["sha256"]
                for name in sorted(onnx.result["forms"][shipped]["files"])
            },
        },
        # A recovered student has a student as its parent: rename that one to keep both.
        "parents": {
            "student before recovery" if role == "student" else role: digest
            for role, digest in parents.items()
        }
        | {"student": onnx.manifest["parents"]["student"]},
        "bench": bench.digest,
        "data": task.data(bench),
        "figures": promises(judged, task),
        "protocol": task.protocol()
        | {"threads": environment["threads"], "blocks": environment["blocks"]},
        "measured": bench.manifest["created"],
        "machine": _machine(environment, shipped),
        "versions": environment["versions"],
    }


def write_certificate(content: Mapping[str, Any]) -> str:
    """The text of the file."""
    return json.dumps(content, indent=1)


def promises(judged: Judged, task: JudgingTask) -> dict[str, Any]:
    """Figures of the shipped form from the raw samples, with the intervals of the gates."""
    arm = judged.result.as_json()["arms"][judged.result.judged]
    sizes = {key: arm[key] for key in ("bytes", "peak_rss_bytes")}
    return task.promises(judged) | sizes


def _machine(environment: Mapping[str, Any], shipped: str) -> dict[str, Any]:
    return {
        "host": environment["host"],
        "governor": environment.get("governor"),
        "limits": environment.get("limits"),
        "load_average": environment["before"]["load_average"],
        "provider": environment["arms"][f"onnx:{shipped}"].get("facts", {}).get("provider"),
    }


def read_certificate(run: Path) -> dict[str, Any]:
    """The certificate of a run folder.

    Raises `ArtifactError` if it is not one, or has another format.
    """
    path = run / CERTIFICATE
    again = f"`limbeck report {run}` writes it again."
    try:
        found: dict[str, Any] = read_json(path)
    except ArtifactError as error:
        raise ArtifactError(f"{str(error).rstrip('.')}, so not a certificate; {again}") from None
    try:
        if found["format"] != FORMAT:
            raise ArtifactError(
                f"{path}: found a certificate of format {found['format']}, expected {FORMAT}; "
                f"{again}"
            )
        for key in ("artifact", "bench", "data", "figures", "machine", "protocol", "versions"):
            found[key]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not a certificate ({error}); {again}") from None
    return found


def require_computed(run: Path, given: Mapping[str, Any], computed: Mapping[str, Any]) -> None:
    """Raise `ArtifactError` unless the certificate of ``run`` is, word for word, as it was computed
    again.

    ``given`` is its content; the message names fields that differ. Only blanks between words may
    differ.
    """
    then, now = dict(_leaves(given)), dict(_leaves(computed))
    wrong = [path for path in then | now if then.get(path) != now.get(path)]
    text, again = (run / CERTIFICATE).read_bytes(), write_certificate(computed).encode()
    if not wrong and b"".join(text.split()) != b"".join(again.split()):
        wrong = [("the order, number or spelling of its keys",)]
    if not wrong:
        return
    names = [printable(".".join(path))[:_LONGEST] for path in wrong[:_NAMED]]
    more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
    raise ArtifactError(
        f"{run / CERTIFICATE}: not what the artifacts and raw samples say: {', '.join(names)}"
        f"{more}. It was edited, or written by another version of Limbeck; "
        f"`limbeck report {run}` writes it again."
    )


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every value of a tree as JSON, by its path; an empty branch is a value too."""
    if not isinstance(value, Mapping | list | tuple) or not value:
        yield path, json.dumps(value)
        return
    for key, branch in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from _leaves(branch, (*path, str(key)))
