"""The stages of a tiny real job, to be killed: a random teacher and student, ten steps, two forms.

Each stage is a case of its own, whose folder already holds what the earlier stages made, so that a
kill is tried once.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from limbeck.contract.artifact import open_artifact
from limbeck.contract.recipe import Recipe, parse_recipe
from tests.faults.kills import Case

_TINY = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "max_position_embeddings": 128,
}  # fmt: skip


def recipe() -> Recipe:
    """The smallest recipe that goes through every stage."""
    return parse_recipe(
        {
            "name": "kills",
            "teachers": [
                {"name": "one", "model": {"kind": "random", "config": _TINY, "seed": 1}},
                {"name": "two", "model": {"kind": "random", "config": _TINY, "seed": 2}},
            ],
            "data": {
                "domains": [{"name": "code", "text": {"kind": "stdlib", "paths": ["json/*.py"]}}],
                "block": 32,
                "heldout": {"every": 4, "piece_chars": 512, "blocks": 2},
            },
            "student": {"kind": "lora", "base": {"kind": "random", "config": _TINY, "seed": 0}},
            "training": {
                "tokens": 256, "batch_tokens": 64, "micro_batch": 2, "evaluate_every": 2,
                "checkpoint_every": 2, "threads": 1,
            },
            "export": {"forms": [{"kind": "fp32"}, {"kind": "int8-weight"}]},
            "gates": {"max_quantization_loss": 1.0},
        }
    )  # fmt: skip


def warm() -> None:
    """Import what the stages import, so that a forked process need not; nothing is computed, so no
    thread is started.
    """
    import importlib

    for name in (
        "compress.loop", "compress.models.students", "export", "export.build.backend",
        "export.check.parity", "export.round.quantize", "onnxruntime", "onnxruntime_genai", "peft",
        "transformers.models.llama",
        "limbeck.runtime.decoder",
    ):  # fmt: skip
        importlib.import_module(name)


def run_stage(stage: str, folder: Path) -> None:
    """Run one stage in the run folder ``folder/run``, with the cache at ``folder/cache``."""
    from limbeck.app import run as pipeline

    os.environ["LIMBECK_CACHE"] = str(folder / "cache")
    pipeline.run_stage(stage, recipe(), out=folder / "run")


def _compress(folder: Path) -> None:
    run_stage("compress", folder)


def _export(folder: Path) -> None:
    run_stage("export", folder)


def digests(folder: Path) -> dict[str, Any]:
    """Digest of every artifact of the run, with the hash of each graph."""
    found: dict[str, Any] = {}
    for name in ("student", "onnx"):
        if (folder / "run" / name).exists():
            artifact = open_artifact(folder / "run" / name)
            graphs = {f: e["sha256"] for f, e in artifact.manifest["files"].items() if "onnx" in f}
            found[name] = (artifact.digest, graphs)
    return found


def cases(prepared: Path) -> tuple[Case, ...]:
    """Compress and export; ``prepared`` holds a finished compress stage for the second."""

    def copy(folder: Path) -> None:
        shutil.copytree(prepared, folder, symlinks=True, dirs_exist_ok=True)

    return (
        Case("job, compress", _compress, digests, look=digests),
        Case("job, export", _export, digests, prepare=copy, look=digests),
    )
