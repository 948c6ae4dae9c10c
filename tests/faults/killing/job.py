"""The stages of a tiny real job, to be killed: a random teacher and student, ten steps, two forms.

Each stage is a case of its own, whose folder already holds what the earlier stages made, so that a
kill is tried once.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limbeck.contract.artifact import open_artifact
from limbeck.contract.recipe import Recipe, parse_recipe
from tests import forks
from tests.faults.killing.events import Case, record

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
            "bench": {
                "prompt_tokens": 8, "new_tokens": 4, "minutes": 0.02, "min_blocks": 3, "threads": 1,
            },
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
        "limbeck.runtime.decoder", "serve_bench", "serve_bench.tell.report",
    ):  # fmt: skip
        importlib.import_module(name)
    forks.start(time.sleep, 0).join()


def run_stage(stage: str, folder: Path) -> None:
    """Run one stage in the run folder ``folder/run``, with the cache at ``folder/cache``."""
    from limbeck.app import run as pipeline

    os.environ["LIMBECK_CACHE"] = str(folder / "cache")
    pipeline.run_stage(stage, recipe(), out=folder / "run")


def _compress(folder: Path) -> None:
    run_stage("compress", folder)


def _export(folder: Path) -> None:
    run_stage("export", folder)


def _bench(folder: Path) -> None:
    from serve_bench.measure import workers

    workers.launch = forks.launch
    forks.use_server_of_parent()
    run_stage("bench", folder)


def _measured(folder: Path) -> Any:
    """Times differ from run to run, so only what was measured is compared, not what came out."""
    bench, run = open_artifact(folder / "run" / "bench", verify=True), folder / "run"
    certificate = json.loads((run / "certificate.json").read_text())
    return digests(folder), bench.key, sorted(certificate), "</html>" in (
        run / "report.html"
    ).read_text()  # fmt: skip


def digests(folder: Path) -> dict[str, Any]:
    """Digest of every artifact of the run, with the hash of each graph."""
    found: dict[str, Any] = {}
    for name in ("student", "onnx"):
        if (folder / "run" / name).exists():
            artifact = open_artifact(folder / "run" / name)
            graphs = {f: e["sha256"] for f, e in artifact.manifest["files"].items() if "onnx" in f}
            found[name] = (artifact.digest, graphs)
    return found


def prepare(folder: Path) -> None:
    """Make ``folder/compress`` and ``folder/export``, which hold what these stages made."""
    before = None
    for stage, work in (("compress", _compress), ("export", _export)):
        if before is not None:
            shutil.copytree(folder / before, folder / stage, symlinks=True)
        (folder / stage).mkdir(parents=True, exist_ok=True)
        record(work, folder / stage)
        before = stage


def cases(prepared: Path) -> tuple[Case, ...]:
    """The three stages; ``prepared`` is a folder that `prepare` has filled."""

    def copy(stage: str) -> Callable[[Path], None]:
        return lambda folder: shutil.copytree(
            prepared / stage, folder, symlinks=True, dirs_exist_ok=True
        )  # fmt: skip

    return (
        Case("job, compress", _compress, digests, look=digests),
        Case("job, export", _export, digests, prepare=copy("compress"), look=digests),
        Case("job, bench", _bench, _measured, prepare=copy("export"), look=digests),
    )
