"""certificate.json: the promises about the shipped form of a run.

Everything in it is computed from the artifacts, and it decides nothing.
`serve_bench.measure.replay` checks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import ArtifactError
from limbeck.contract.files import read_json
from limbeck.contract.recipe import BaseRecipe
from serve_bench.judge.task import Judged, JudgingTask

CERTIFICATE = "certificate.json"
FORMAT = 3
FP32 = "onnx:fp32"  # id of the arm


def certify(
    *,
    judged: Judged,
    task: JudgingTask,
    bench: Artifact,
    onnx: Artifact,
    student: Artifact,
    recipe: BaseRecipe,
) -> dict[str, Any]:
    """Content of certificate.json: digests, figures with intervals, and the measuring machine."""
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
            for role, digest in student.manifest["parents"].items()
        }
        | {"student": student.digest},
        "bench": bench.digest,
        "data": task.data(bench),
        "figures": promises(judged, task),
        "protocol": task.protocol()
        | {"threads": environment["threads"], "blocks": environment["blocks"]},
        "measured": bench.manifest["created"],
        "machine": _machine(environment, shipped),
        "versions": environment["versions"],
    }


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
                f"`limbeck report {run}` writes it again."
            )
        for key in ("artifact", "bench", "data", "figures", "machine", "protocol", "versions"):
            found[key]
    except (ValueError, KeyError, TypeError):
        raise ArtifactError(
            f"{path}: not a certificate; `limbeck report {run}` writes it again."
        ) from None
    return found
