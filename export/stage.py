"""The export stage, for every task: build the fp32 graph, make each form of it, check each against
torch, write the folder.

`export.tasks.base.Task` holds the differences between language models and encoders.
"""

from __future__ import annotations

from pathlib import Path

import torch

from export.folder.card import graph_metadata, write_card
from export.folder.clients import write_client_files
from export.forms import Job, make_form, release_memory
from export.round.scheme import Scheme
from export.tasks import task_of
from limbeck.contract.artifact import Artifact, write_artifact
from limbeck.contract.errors import ParityError, QualityError
from limbeck.contract.machine import available_cores
from limbeck.contract.progress import say
from limbeck.contract.recipe import AnyRecipe
from limbeck.contract.results.onnx import ExportedForm, OnnxResult
from limbeck.runtime.session import import_onnxruntime


def write(source: Artifact, out: Path, recipe: AnyRecipe, key: str) -> None:
    """Make the ``onnx`` artifact of the student ``source``; see `export.export_student`."""
    import_onnxruntime()  # before any work: it may be missing, or two builds may share a folder
    # Sums depend on the number of threads, and a training in this process has set its own. The same
    # folder must come out of an export that is started alone, as after an interruption.
    torch.set_num_threads(available_cores())
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
        ggufs, not_kept = task.ggufs()
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
                failed=failed | not_kept,
                ggufs=ggufs,
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
    for form in recipe.export.graphs:
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
