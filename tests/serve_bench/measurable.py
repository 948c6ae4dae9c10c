"""A tiny run that can be measured: a student with one teacher, held-out text, evaluations, and its
export.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from export import export_student
from limbeck.contract.artifact import write_artifact
from limbeck.contract.data.evals import EVALS
from limbeck.contract.data.heldout import (
    CALIBRATION,
    HELDOUT,
    Blocks,
    save_calibration,
    save_heldout,
)
from limbeck.contract.recipe import Recipe
from tests.pico import make_blocks, make_model, pico_recipe


def bench_recipe(**over: Any) -> Recipe:
    teacher = {"name": "wise", "model": {"kind": "random", "config": {"model_type": "llama"}}}
    bench = {"prompt_tokens": 24, "new_tokens": 8, "minutes": 0.02, "min_blocks": 3, "threads": 1}
    return pico_recipe(
        **({"teachers": [teacher], "bench": bench, "gates": {"max_quantization_loss": 0.2}} | over)
    )


def make_measurable(folder: Path) -> Path:
    """Student and export in ``folder``; the teacher is larger than the student."""
    make_model(folder / "teacher", seed=1, hidden_size=64)
    with write_artifact(folder / "student", kind="student", key="s", parents={}) as draft:
        make_model(draft.folder / "model", seed=2)
        save_heldout(draft.folder / HELDOUT, make_blocks())
        evals = evaluations(folder / "teacher")
        save_heldout(draft.folder / EVALS, evals)
        save_calibration(
            draft.folder / CALIBRATION, [b.input_ids[0] for b in make_blocks(seed=1).values()]
        )
        entry = {
            "name": "wise",
            "model": str(folder / "teacher"),
            "adapter": None,
            "quantize": "none",
        }
        entry |= {"dtype": "fp32", "temperature": 1.0, "digest": "0" * 64}
        (draft.folder / "teachers.json").write_text(json.dumps([entry]))
        (draft.folder / "log.jsonl").write_text("")
        base = {"nll": [50.0] * 3, "right": [0] * 3}
        draft.result = {"nll": {"letters": 5.0, "numbers": 5.1}, "mean_nll": 5.05, "teachers": {}}
        draft.result["base_evals"] = dict.fromkeys(evals, base)
    export_student(student=folder / "student", out=folder / "onnx", recipe=bench_recipe())
    return folder


def evaluations(teacher: Path) -> dict[str, Blocks]:
    """A whole text, and rows whose last two tokens the teacher chooses in all but the last row."""
    text = make_blocks(seed=3)["letters"]
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    prompts = torch.from_numpy(text.input_ids[:, :10]).long()
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = model.generate(prompts, max_new_tokens=2, **options).numpy().astype(np.int32)
    ids[-1, -1] = (ids[-1, -1] + 1) % 256
    scored = np.tile(np.array([0] * 10 + [1] * 2, np.uint8), (len(ids), 1))
    sizes = np.full(len(ids), 12, np.int32)
    return {"facts": Blocks(ids, sizes, sizes, scored), "prose": text}
