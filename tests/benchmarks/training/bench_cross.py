"""A step with a teacher of another tokenizer against its unavoidable parts, interleaved.

Gemma 3 270M (V = 262,144) teaches SmolLM2-135M (V = 49,152) with LoRA.
`time_ratio`: a step over the sum of the teacher's forward pass on its own tokens of the same text,
with the logits of all of them, and a plain cross-entropy step.
`memory_ratio`: peak memory of a step over that of a plain one, by the bytes of a dense projection
V_T x V_S in the number type of the heads.
Prints one JSON object. `--student FOLDER --teacher FOLDER` takes other models.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import compress
from limbeck.contract.recipe import load_recipe, parse_recipe
from tests.benchmarks.memory import peak_growth

ROUNDS = 5
TOKENS = 1024  # a step, in micro-batches of 4 blocks of 256


def main() -> None:
    """Build both trainings, time the arms in turn, and measure the memory of a step of each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--student", type=Path)
    parser.add_argument("--teacher", type=Path)
    given = parser.parse_args()
    compress.quiet_libraries()
    from compress.head import IGNORED, chunks_of_labels
    from compress.host import give_memory_back
    from compress.loop import Run, State, _step, setup
    from compress.models.language import DTYPES
    from compress.tasks.language import LanguageTask
    from compress.teachers.live import Teachers

    base = load_recipe("smollm2/135m-gemma-and-smollm")
    expert = load_recipe("gemma3/expert-scripture").resolved()
    work = Path(tempfile.mkdtemp())

    def run_of(name: str) -> Run:
        tree = base.resolved()
        teacher = expert["student"]["base"]
        if given.teacher:
            teacher = {"kind": "local", "path": str(given.teacher.resolve())}
        if given.student:
            tree["student"]["base"] = {"kind": "local", "path": str(given.student.resolve())}
        tree["teachers"] = [{"name": "other", "model": teacher}] if name == "cross" else []
        tree["training"] |= {
            "tokens": TOKENS * (ROUNDS + 2), "batch_tokens": TOKENS, "micro_batch": 4,
        }  # fmt: skip
        tree["features"]["weight"] = 0.0
        tree["fusion"]["calibration"] = {"kind": "none"}
        tree["gates"] = {}
        recipe = parse_recipe(tree)
        recipe._folder = base.folder
        return setup(recipe=recipe, products={}, work=work / name, key=name)

    runs = {name: run_of(name) for name in ("cross", "plain")}
    prepared: dict[str, Any] = {}
    for name, run in runs.items():
        trained = [p for p in run.task.student.parameters() if p.requires_grad]
        made = run.accelerator.prepare(run.task.student, torch.optim.AdamW(trained, lr=1e-3))
        prepared[name] = (*made, trained)
    task = runs["cross"].task
    assert isinstance(task, LanguageTask)
    assert isinstance(task.teachers, Teachers)
    pair, body, head = task.pairs[0], task.teachers.bodies[0], task.teachers.heads[0]
    assert pair is not None, "the teacher has the student's tokenizer"

    def step(name: str, index: int) -> None:
        student, optimizer, trained = prepared[name]
        _step(
            runs[name], runs[name].task.step(index, progress=0.5), student, optimizer, trained,
            state=State(),
        )  # fmt: skip

    def teacher_forward(index: int) -> None:
        for ids in aligned[index]:
            labels = torch.where(ids > 0, ids, IGNORED)
            with torch.no_grad(), task.accelerator.autocast():
                hidden = body.states(ids)[0].to(head.weight_Vd.dtype)
                for place in chunks_of_labels(labels, 256, whole_rows=False):
                    head.logits(hidden[place])

    batches = [task.batch(index)[1:] for index in range(ROUNDS + 2)]
    aligned = [  # the alignment itself belongs to the step alone
        [pair.align(i, w).ids_RM for i, w in zip(ids.split(4), labels.split(4), strict=True)]
        for ids, labels in batches
    ]
    arms: dict[str, Callable[[int], None]] = {
        "teacher": teacher_forward,
        "plain": lambda index: step("plain", index),
        "cross": lambda index: step("cross", index),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for index in range(ROUNDS + 1):
        for name, arm in arms.items():
            started = time.perf_counter()
            arm(index)
            if index:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    growth = {}
    for name in ("plain", "cross"):
        give_memory_back()
        with peak_growth() as grown:
            arms[name](ROUNDS + 1)
        growth[name] = grown.bytes
    kind = DTYPES[runs["cross"].precision]
    dense = len(pair.target_V) * task.vocabulary * kind.itemsize
    rounds = zip(*seconds.values(), strict=True)
    print(
        json.dumps(
            {
                "time_ratio": round(statistics.median(c / (t + p) for t, p, c in rounds), 3),
                "memory_ratio": round((growth["cross"] - growth["plain"]) / dense, 4),
                "seconds": {n: round(statistics.median(v), 3) for n, v in seconds.items()},
                "mb": {n: round(b / 1e6) for n, b in growth.items()} | {"dense": dense // 10**6},
                "threads": torch.get_num_threads(),
                "precision": runs["cross"].precision,
            }
        )
    )


if __name__ == "__main__":
    main()
