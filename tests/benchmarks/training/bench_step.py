"""A distillation step against its unavoidable parts, on SmolLM2-135M with LoRA, interleaved.

`step_overhead`: two-teacher step over (two teacher forwards with logits + student step with plain
cross-entropy). `cached_overhead`: the step from the `hidden` teacher cache over the plain
cross-entropy step. Prints one JSON object.
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

ROUNDS, FEATURES = 5, 0.0


def main() -> None:
    """Build the four arms and time them in turn."""
    compress.quiet_libraries()
    from compress.head import chunks_of_labels
    from compress.loop import Run, State, _step, setup

    base = load_recipe("smollm2/135m-two-experts")
    work = Path(tempfile.mkdtemp())

    def run_of(name: str, **training: Any) -> Run:
        tree = base.resolved()
        model = tree["student"]["base"]
        tree["teachers"] = (
            [] if name == "plain" else [{"name": n, "model": model} for n in ("a", "b")]
        )
        tree["training"] |= {
            "tokens": 1024 * (ROUNDS + 1),
            "batch_tokens": 1024,
            "micro_batch": 4,
            **training,
        }
        tree["features"] |= {"weight": FEATURES}
        tree["gates"] = {}
        recipe = parse_recipe(tree)
        recipe._folder = base.folder
        return setup(recipe=recipe, products={}, work=work / name, key=name)

    runs = {
        "live": run_of("live"),
        "plain": run_of("plain"),
        "cached": run_of("cached", teacher_cache="hidden"),
    }
    prepared: dict[str, Any] = {}
    for name, run in runs.items():
        trained = [p for p in run.task.student.parameters() if p.requires_grad]
        student, optimizer = run.accelerator.prepare(
            run.task.student, torch.optim.AdamW(trained, lr=1e-3)
        )
        prepared[name] = (run, student, optimizer, trained)

    def step(name: str, index: int) -> None:
        run, student, optimizer, trained = prepared[name]
        taken = run.task.step(index, progress=0.5)
        _step(run, taken, student, optimizer, trained, state=State())

    def teacher_forwards(index: int) -> None:
        run = runs["live"]
        _, ids, labels = run.task.batch(index)
        with torch.no_grad(), run.accelerator.autocast():
            states, _ = run.task.teachers.states(ids)
            for state in states:
                for place in chunks_of_labels(labels, 256, whole_rows=False):
                    state.head.logits(state.hidden_RLd[place])

    seconds: dict[str, list[float]] = {"live": [], "plain": [], "cached": [], "teachers": []}
    for index in range(ROUNDS + 1):
        for name in seconds:
            started = time.perf_counter()
            teacher_forwards(index) if name == "teachers" else step(name, index)
            if index:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    rounds = list(
        zip(seconds["live"], seconds["plain"], seconds["teachers"], seconds["cached"], strict=True)
    )
    print(
        json.dumps(
            {
                "step_overhead": round(
                    statistics.median(
                        live / (plain + teachers) for live, plain, teachers, _ in rounds
                    ),
                    3,
                ),
                "cached_overhead": round(
                    statistics.median(cached / plain for _, plain, _, cached in rounds), 3
                ),
                "seconds": {
                    name: round(statistics.median(values), 2) for name, values in seconds.items()
                },
                "threads": torch.get_num_threads(),
                "precision": runs["live"].precision,
            }
        )
    )


if __name__ == "__main__":
    main()
