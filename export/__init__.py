"""Student to ONNX: one decoder or encoder graph, quantised forms, parity with torch, a folder that
clients load.

Importing this package is cheap; torch, onnx and onnxruntime are imported when a function is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limbeck.contract.artifact import Artifact
from limbeck.contract.recipe import AnyRecipe

__all__ = ["export_student", "require_shipped", "verify_parity"]


def export_student(*, student: Path, out: Path, recipe: AnyRecipe) -> Artifact:
    """Write the ``onnx`` artifact of ``student`` to ``out``. See `export.stage.export_student`."""
    from export.stage import export_student as work

    return work(student=student, out=out, recipe=recipe)


def require_shipped(onnx: Artifact, recipe: AnyRecipe) -> None:
    """Raise `ParityError` when the form to ship failed its checks; see `export.stage`."""
    from export.stage import require_shipped as work

    work(onnx, recipe)


def verify_parity(folder: Path) -> dict[str, Any]:
    """Measure every form of the artifact at ``folder`` again. See `export.stage.verify_parity`."""
    from export.stage import verify_parity as work

    return work(folder)
