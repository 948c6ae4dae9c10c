"""The export stage, for every task: build the fp32 graph, make each form of it, check each against
torch, write the folder.

What differs between language models and encoders stands behind `export.tasks.base.Task`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.folder.card import graph_metadata, write_card
from export.folder.clients import write_client_files
from export.forms import Job, make_form, release_memory
from export.round.scheme import Scheme
from export.tasks import task_of
from limbeck.contract.artifact import Artifact, find_artifact, open_artifact, write_artifact
from limbeck.contract.errors import ParityError, QualityError
from limbeck.contract.machine import sums_overflow
from limbeck.contract.progress import say
from limbeck.contract.recipe import AnyRecipe, fingerprint
from limbeck.contract.results.onnx import ExportedForm, OnnxResult
from limbeck.runtime.session import import_onnxruntime

_STAGE = 9  # raise it when the same student and recipe would give other files


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
        import_onnxruntime()  # before any work: it may be missing, or two builds may share a folder
        _write(source, out, recipe, key)
        found = open_artifact(out, kind="onnx", verify=False)
    require_shipped(found, recipe)
    return found


def require_shipped(onnx: Artifact, recipe: AnyRecipe) -> None:
    """Raise `ParityError` when the form that ``recipe`` ships failed its checks in ``onnx``."""
    result, wanted = OnnxResult.of(onnx), recipe.export.forms[-1].kind
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
    artifact = open_artifact(folder, kind="onnx")
    result = OnnxResult.of(artifact)
    return task_of(result.task).verify(folder, result)


def _key(recipe: AnyRecipe, source: Artifact) -> str:
    asked = recipe.export.model_dump(mode="json") | task_of(recipe.task).reads(recipe)
    # Codes of 7 or 8 bits, where that is the machine's choice: another kind of machine makes the
    # forms again.
    if any(getattr(form, "reduce_range", False) is None for form in recipe.export.forms):
        asked["sums_overflow"] = sums_overflow()
    return fingerprint({"stage": _STAGE, "export": asked, "student": source.digest})


def _write(source: Artifact, out: Path, recipe: AnyRecipe, key: str) -> None:
    parents = {"student": source.digest}
    with write_artifact(out, kind="onnx", key=key, parents=parents, recipe=recipe) as draft:
        folder, model = draft.folder, source.path / "model"
        metadata = graph_metadata(recipe, student=source.digest)
        task = task_of(recipe.task)(recipe, source, folder, metadata)
        say("export: building the fp32 graph")
        built = task.build()
        say(f"export: built by {built.backend} ({built.why})")
        release_memory()
        task.answer(built)
        release_memory()
        forms, schemes, failed = _make_forms(recipe, Job(task, source, folder, built))
        shipped = list(forms)[-1]
        write_client_files(
            model,
            folder,
            graphs=[task.files(name) for name in forms],
            shipped=task.files(shipped),
            genai=built.genai,
            provider=task.provider,
        )
        result = task.finish(
            OnnxResult(
                task=recipe.task,
                shipped=shipped,
                backend=built.named(),
                shapes=recipe.export.shapes.model_dump(mode="json"),
                forms=forms,
                failed=failed,
            ),
            built,
            schemes[shipped],
        )
        write_card(folder, recipe, source, result, task.card(result))
        draft.result = result.to_json()


def _make_forms(
    recipe: AnyRecipe, job: Job
) -> tuple[dict[str, ExportedForm], dict[str, Scheme | None], dict[str, str]]:
    """Every form of the recipe that passes, how it was rounded, and why the others did not pass."""
    forms: dict[str, ExportedForm] = {}
    schemes: dict[str, Scheme | None] = {}
    failed: dict[str, str] = {}
    for form in recipe.export.forms:
        try:
            forms[form.kind], schemes[form.kind] = make_form(form, job)
        except (ParityError, QualityError) as error:
            if form.kind == "fp32":  # every other form is made from it
                raise
            failed[form.kind] = str(error)
            say(f"export: {form.kind} is not kept: {error}")
            for path in job.task.files(form.kind).files:
                path.unlink(missing_ok=True)
        release_memory()
    return forms, schemes, failed
