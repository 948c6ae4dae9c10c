"""A step with own text against its unavoidable parts, on SmolLM2-135M with LoRA, interleaved.

`overhead`: a step of whose rows the student writes half, over the sum of writing these rows, the
forward pass of the teachers over the same batch with their logits, and a plain cross-entropy step
on it.
Prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import compress
from limbeck.contract.recipe import load_recipe, parse_recipe

ROUNDS = 5


def main() -> None:
    """Build both trainings and time the arms in turn."""
    compress.quiet_libraries()
    from compress.head import chunks_of_labels
    from compress.loop import Run, State, _step, setup
    from compress.states import TeacherStates
    from compress.tasks.language import LanguageTask
    from compress.tasks.language_step import LanguageStep
    from compress.tasks.own_text import Batch

    base = load_recipe("smollm2/135m-two-experts")
    work = Path(tempfile.mkdtemp())

    def run_of(name: str, **training: Any) -> Run:
        tree = base.resolved()
        model = tree["student"]["base"]
        teachers = [] if name == "plain" else [{"name": n, "model": model} for n in ("a", "b")]
        tree |= {"teachers": teachers, "gates": {}}
        tree["student"]["init"] = "base"
        tree["training"] |= {"tokens": 1024 * (ROUNDS + 1), "batch_tokens": 1024, **training}
        tree["features"]["weight"] = 0.0
        recipe = parse_recipe(tree)
        recipe._folder = base.folder
        return setup(recipe=recipe, products={}, work=work / name, key=name)

    runs = {"own": run_of("own", on_policy={"new_tokens": 224}), "plain": run_of("plain")}
    prepared: dict[str, Any] = {}
    for name, run in runs.items():
        trained = [p for p in run.task.student.parameters() if p.requires_grad]
        made = run.accelerator.prepare(run.task.student, torch.optim.AdamW(trained, lr=1e-3))
        prepared[name] = (*made, trained)

    own, plain = (runs[name].task for name in ("own", "plain"))
    assert isinstance(own, LanguageTask)
    assert isinstance(plain, LanguageTask)
    written: dict[int, Batch] = {}

    def take(name: str, step: LanguageStep) -> None:
        student, optimizer, trained = prepared[name]
        _step(runs[name], step, student, optimizer, trained, state=State())

    def write(index: int) -> None:
        assert own.own is not None
        batch = own.batch(index)
        with own.accelerator.autocast():
            found = own.own.write(own.student.model, index, batch, rank=0, processes=1)
        written[index] = batch[0], found.ids_RL, found.labels_RL

    def teacher_forwards(index: int) -> None:
        _, ids, labels = written[index]
        micro = own.recipe.training.micro_batch
        for some_ids, some_labels in zip(ids.split(micro), labels.split(micro), strict=True):
            with torch.no_grad(), own.accelerator.autocast():
                states, _ = own.teachers.states(some_ids)
                for state in states:
                    assert isinstance(state, TeacherStates)
                    for place in chunks_of_labels(some_labels, 256, whole_rows=False):
                        state.head.logits(state.hidden_RLd[place])

    arms = {
        "generate": write,
        "teachers": teacher_forwards,
        "plain": lambda index: take("plain", LanguageStep(plain, index, written[index], 0.5)),
        "own": lambda index: take("own", own.step(index, progress=0.5)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for index in range(ROUNDS + 1):
        for name, arm in arms.items():
            started = time.perf_counter()
            arm(index)
            if index:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    rounds = zip(*seconds.values(), strict=True)
    print(
        json.dumps(
            {
                "overhead": round(statistics.median(o / (g + t + p) for g, t, p, o in rounds), 3),
                "seconds": {n: round(statistics.median(v), 2) for n, v in seconds.items()},
                "threads": torch.get_num_threads(),
                "precision": runs["own"].precision,
            }
        )
    )


if __name__ == "__main__":
    main()
