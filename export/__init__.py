"""Student to ONNX: one decoder or encoder graph, quantised forms, parity with torch, a folder that
clients load.

Importing this package is cheap, and so is finding a complete artifact: torch, onnx and onnxruntime
are imported when there is something to make or to measure.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limbeck.contract.artifact import Artifact, find_artifact, open_artifact
from limbeck.contract.errors import ParityError
from limbeck.contract.machine import sums_overflow
from limbeck.contract.recipe import AnyRecipe, fingerprint
from limbeck.contract.results.onnx import OnnxResult

_VERSION = 10  # of the stage: raise it when the same student and recipe would give other files

__all__ = ["export_student", "require_shipped", "verify_parity"]


def export_student(*, student: Path, out: Path, recipe: AnyRecipe) -> Artifact:
    """Write the ``onnx`` artifact of the ``student`` artifact to ``out``: the deployable folder of
    docs/artifacts.md.

    An artifact that is there already is returned when it was made from the same student and the
    same `export:` part of the recipe. A form that fails its checks is not kept; the forms that pass
    are.

    Raises: ArtifactError: ``student`` is no student artifact. ModelError: no graph builder knows
    the architecture. ParityError: the fp32 graph differs from the student, and nothing is kept; or
    the form that should ship does not compute what the student computes, and the other forms are
    kept.
    """
    source = open_artifact(student, kind="student")
    key = _key(recipe, source)
    found = find_artifact(out, kind="onnx", key=key)
    if found is None:
        from export.stage import write

        write(source, out, recipe, key)
        found = open_artifact(out, kind="onnx", verify=False)
    require_shipped(found, recipe)
    return found


def require_shipped(onnx: Artifact, recipe: AnyRecipe) -> None:
    """Raise `ParityError` when the form that ``recipe`` ships failed its checks in ``onnx``."""
    result, wanted = OnnxResult.of(onnx), recipe.export.graphs[-1].kind
    if why := result.failed.get(wanted):
        raise ParityError(
            f"{why}\nKept in {onnx.path}: {', '.join(result.forms)}. Choose another form to ship, "
            "or a smaller block_size, in the recipe; or report the model."
        )


def verify_parity(folder: Path) -> dict[str, Any]:
    """Measure every form of the ``onnx`` artifact at ``folder`` again, on this machine, without
    torch.

    Returns the parity result by form name, on the positions that travel with the artifact. Raises
    `ArtifactError` for a changed folder and `ParityError` past tolerance.
    """
    from export.tasks import task_of

    artifact = open_artifact(folder, kind="onnx")
    result = OnnxResult.of(artifact)
    return task_of(result.task).verify(folder, result)


def _key(recipe: AnyRecipe, source: Artifact) -> str:
    asked = recipe.exporting()
    # Codes of 7 or 8 bits, where that is the machine's choice: another kind of machine makes the
    # forms again.
    if any(getattr(form, "reduce_range", False) is None for form in recipe.export.graphs):
        asked["sums_overflow"] = sums_overflow()
    return fingerprint({"stage": _VERSION, "export": asked, "student": source.digest})
