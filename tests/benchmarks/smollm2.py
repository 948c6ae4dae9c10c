"""SmolLM2-135M as a student artifact that was never trained: where export benchmarks start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import compress
from limbeck.contract.artifact import Artifact, open_artifact, write_artifact
from limbeck.contract.data.heldout import CALIBRATION, HELDOUT, save_calibration, save_heldout
from limbeck.contract.recipe import LoraStudent, Recipe, load_recipe

RECIPE = "smollm2/135m-two-experts"


def demo_recipe(*overrides: str) -> Recipe:
    """The demo's recipe, with ``key=value`` overrides."""
    return load_recipe(RECIPE, overrides=overrides)


def untrained_student(path: Path) -> Artifact:
    """Write the base model of the demo as a student artifact at ``path``."""
    compress.quiet_libraries()
    from compress.data.blocks import load_blocks
    from compress.data.general import general_rows
    from compress.models.language import model_folder
    from limbeck.contract.sources.tokenizer import load_tokenizer

    recipe = demo_recipe()
    assert isinstance(recipe.student, LoraStudent)
    base = model_folder(recipe.student.base, folder=recipe.folder)
    tokenizer = load_tokenizer(base)
    blocks = load_blocks(recipe, tokenizer)
    with write_artifact(path, kind="student", key="untrained", parents={}, recipe=recipe) as draft:
        shutil.copytree(
            base, draft.folder / "model", ignore=shutil.ignore_patterns("manifest.json")
        )
        save_heldout(draft.folder / HELDOUT, {b.name: b.heldout for b in blocks})
        rows = [b.train_ids[row, : b.train_lengths[row]] for b in blocks for row in range(12)]
        rows += general_rows(tokenizer, width=recipe.data.block, vocabulary=len(tokenizer))
        save_calibration(draft.folder / CALIBRATION, rows)
        (draft.folder / "teachers.json").write_text(json.dumps([]))
        draft.result = {"nll": {}, "teachers": {}}
    return open_artifact(path, verify=False)
