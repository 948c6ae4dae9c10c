"""The same single-teacher job here and in TRL's GKDTrainer: time and memory of a step.

SmolLM2-135M, LoRA r = 16, 4 x 256 tokens per step, bf16 autocast, forward KL only. Memory is the
growth over the loaded models. Each side runs in a process and an environment of its own, in
mirrored order. Prints one JSON object. `make bench-peers` sets up .venvs/peers.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from limbeck.contract.environment import as_by_default

STEPS, ROOT = 7, Path(__file__).resolve().parents[3]


def ours(folder: str, ids_file: str, cached: bool) -> dict[str, float]:
    """Our side, in this process."""
    import numpy as np
    import torch

    import compress
    from limbeck.contract.recipe import parse_recipe
    from tests.benchmarks.memory import peak_growth

    compress.quiet_libraries()
    from compress.loop import State, _step, setup

    rows = np.load(ids_file)
    text = Path(ids_file).with_suffix(".jsonl")
    model = {"kind": "local", "path": folder}
    recipe = parse_recipe(
        {
            "name": "peer",
            "teachers": [{"name": "teacher", "model": model}],
            "data": {
                "domains": [
                    {
                        "name": "text",
                        "text": {
                            "kind": "files",
                            "paths": [str(text)],
                            "format": {"kind": "jsonl"},
                        },
                    }
                ],
                "block": rows.shape[1],
                "heldout": {"every": 2, "blocks": 1},
            },
            "student": {"kind": "lora", "base": model, "rank": 16, "alpha": 32},
            "fusion": {
                "weights": {"kind": "uniform"},
                "weight": 1.0,
                "cross_entropy": 0.0,
                "calibration": {"kind": "none"},
            },
            "features": {"weight": 0},
            "training": {
                "tokens": rows.size,
                "batch_tokens": rows.size // STEPS,
                "micro_batch": 2,
                "precision": "bf16",
                "teacher_cache": "hidden" if cached else "none",
            },
        }
    )
    run = setup(recipe=recipe, products={}, work=Path(tempfile.mkdtemp()), key="peer")
    trained = [p for p in run.task.student.parameters() if p.requires_grad]
    student, optimizer = run.accelerator.prepare(
        run.task.student, torch.optim.AdamW(trained, lr=1e-3)
    )
    seconds = []
    with peak_growth() as growth:
        for index in range(STEPS):
            started = time.perf_counter()
            step = run.task.step(index, progress=0.5)
            _step(run, step, student, optimizer, trained, state=State())
            seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds[1:]), "growth": growth.bytes}


def main() -> None:
    """Run every side twice, mirrored, and compare."""
    if len(sys.argv) > 1:
        print(json.dumps(ours(sys.argv[2], sys.argv[3], cached=sys.argv[1] == "cached")))
        return
    import numpy as np

    import compress
    from limbeck.contract.recipe import load_recipe

    compress.quiet_libraries()
    from compress.data.blocks import load_blocks
    from compress.models.language import model_folder
    from limbeck.contract.sources.tokenizer import load_tokenizer

    recipe = load_recipe("smollm2/expert-speeches")
    folder = model_folder(recipe.student.base, folder=recipe.folder)  # type: ignore[union-attr]
    tokenizer = load_tokenizer(folder)
    ids = load_blocks(recipe, tokenizer)[0].train_ids[: 4 * STEPS]
    work = Path(tempfile.mkdtemp())
    np.save(work / "ids.npy", ids)
    # Twice as many rows, since every second one is held out there.
    (work / "ids.jsonl").write_text(
        "\n".join(json.dumps({"text": tokenizer.decode(row)}) for row in np.repeat(ids, 3, axis=0))
    )
    commands = {
        "ours": [
            sys.executable,
            "-m",
            "tests.benchmarks.training.bench_peers",
            "live",
            str(folder),
            str(work / "ids.npy"),
        ],
        "cached": [
            sys.executable,
            "-m",
            "tests.benchmarks.training.bench_peers",
            "cached",
            str(folder),
            str(work / "ids.npy"),
        ],
        "trl": [
            str(ROOT / ".venvs/peers/bin/python"),
            str(ROOT / "tests/benchmarks/training/peer_trl.py"),
            str(folder),
            str(work / "ids.npy"),
            str(STEPS),
        ],
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for name in [*commands, *reversed(commands)]:
        done = subprocess.run(
            commands[name],
            cwd=ROOT,
            env=as_by_default(os.environ) if name == "trl" else None,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stderr[-3000:]}")
        found[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(name, found[name][-1], file=sys.stderr)
    seconds, growth = (
        {n: [run[key] for run in runs] for n, runs in found.items()}
        for key in ("seconds", "growth")
    )
    print(
        json.dumps(
            {
                "time_ratio": round(
                    statistics.mean(
                        a / b for a, b in zip(seconds["ours"], seconds["trl"], strict=True)
                    ),
                    3,
                ),
                "memory_ratio": round(max(growth["ours"]) / max(growth["trl"]), 3),
                "cached_time_ratio": round(
                    statistics.mean(
                        a / b for a, b in zip(seconds["cached"], seconds["trl"], strict=True)
                    ),
                    3,
                ),
                "seconds": {n: round(statistics.mean(v), 2) for n, v in seconds.items()},
                "megabytes": {n: round(max(v) / 1e6) for n, v in growth.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
