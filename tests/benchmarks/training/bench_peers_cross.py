"""The same teacher of another tokenizer here and in TRL's GOLD (`bayesian` mode).

Gemma 3 270M, fine-tuned on scripture, teaches SmolLM2-135M with LoRA r = 16: the same rows of text,
0.7 of distillation and 0.3 of cross-entropy, number type, learning rate and threads. Each side runs
in a process and an environment of its own, ours once before and once after TRL's.

`time_ratio` is our median second a step over theirs, the mean of both runs. `bits_ratio` is our
held-out bits a byte over theirs, on the same rows and in the student's tokens. `trl_aligns` is
whether GOLD aligned the bytes. It does so for byte-level tokenizers only; with others, such as
Gemma's, it compares position by position. Prints one JSON object.

`--teacher FOLDER` and `--student FOLDER` take other models. `make bench-peers-cross` sets up
.venvs/peers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from limbeck.contract.environment import as_by_default
from limbeck.contract.machine import host

ROOT = Path(__file__).resolve().parents[3]
BATCH, MICRO_BATCH, WARMUP = 2, 2, 0.1  # blocks of 256 tokens


def recipe_of(given: argparse.Namespace) -> tuple[Any, Path]:
    """The recipe of our side, from that of two families; and the teacher's folder."""
    from limbeck.app.run import make_products
    from limbeck.contract.recipe import load_recipe, parse_recipe

    shipped = load_recipe("smollm2/135m-gemma-and-smollm")
    tree = shipped.resolved()
    if given.student:
        tree["student"]["base"] = {"kind": "local", "path": str(given.student.resolve())}
    teacher = given.teacher or make_products(shipped)["scripture"] / "model"
    source = {"kind": "local", "path": str(teacher.resolve())}
    tree["teachers"] = [{"name": "other", "model": source}]
    tree["data"]["domains"] = [d for d in tree["data"]["domains"] if d["name"] == "scripture"]
    block = tree["data"]["block"]
    tree["training"] |= {
        "tokens": given.steps * BATCH * block,
        "batch_tokens": BATCH * block,
        "micro_batch": MICRO_BATCH,
        "warmup": WARMUP,
        "evaluate_every": 1 << 30,
        "checkpoint_every": 1 << 30,
    }
    tree["fusion"] |= {"calibration": {"kind": "none"}}
    tree["features"]["weight"] = 0.0
    tree["gates"], tree["seed"] = {}, given.seed
    recipe = parse_recipe(tree)
    recipe._folder = shipped.folder
    return recipe, teacher


def ours(given: argparse.Namespace) -> dict[str, Any]:
    """Train here, and leave the text and the job of the other side in the work folder."""
    import torch

    import compress
    from limbeck.contract.files import write_atomically
    from tests.benchmarks.memory import peak_growth

    compress.quiet_libraries()
    from compress.loop import fit, setup
    from limbeck.contract.sources.tokenizer import load_tokenizer

    recipe, teacher = recipe_of(given)
    run = setup(recipe=recipe, products={}, work=given.work / "ours", key=str(given.seed))
    task: Any = run.task
    with peak_growth() as growth:
        fit(run)
    assert run.log is not None
    ends = [step["seconds"] for step in run.log.read("step")]
    losses, _ = task.losses("the student")
    (domain,) = task.blocks
    heldout, decode = domain.heldout, load_tokenizer(task.folder).decode
    if not (given.work / "peer.json").exists():
        batches = [task.batch(step)[1:] for step in range(given.steps)]
        rows = [
            row[: n + 1]
            for ids, labels in batches
            for row, n in zip(ids, ends_of(labels), strict=True)
        ]
        read = zip(heldout.input_ids.tolist(), heldout.lengths, strict=True)
        scored = [ids[:length] for ids, length in read]
        write_atomically(given.work / "heldout.json", json.dumps(scored))
        # GOLD wants a prompt: the first token, which is no label here either.
        lines = [
            json.dumps({"prompt": decode(row[:1]), "completion": decode(row[1:])}) for row in rows
        ]
        write_atomically(given.work / "rows.jsonl", "\n".join(lines))
        job = {
            "student": str(task.folder),
            "teacher": str(teacher),
            "batch": BATCH,
            "micro_batch": MICRO_BATCH,
            "precision": run.precision,
            "learning_rate": recipe.training.learning_rate,
            "warmup_steps": round(WARMUP * given.steps),
            "cross_entropy": recipe.fusion.cross_entropy,
            "fusion": recipe.fusion.weight,
        }
        write_atomically(given.work / "peer.json", json.dumps(job))
    return {
        "seconds": [b - a for a, b in itertools.pairwise(ends)],
        "growth": growth.bytes,
        "nats": sum(losses[domain.name]),
        "bytes": int(heldout.utf8_bytes.sum()),
        "precision": run.precision,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Run both sides in turn, and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--student", type=Path)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        print(json.dumps(ours(given)))
        return
    work = Path(tempfile.mkdtemp())
    here = [sys.executable, "-m", "tests.benchmarks.training.bench_peers_cross", *sys.argv[1:]]
    gold = str(ROOT / "tests/benchmarks/training/peer_gold.py")
    commands = {
        "ours": [*here, "--work", str(work)],
        "trl": [str(ROOT / ".venvs/peers/bin/python"), gold, str(work)],
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for name in ("ours", "trl", "ours"):
        shutil.rmtree(work / "ours", ignore_errors=True)
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
        shown = found[name][-1] | {"seconds": statistics.median(found[name][-1]["seconds"])}
        print(name, shown, file=sys.stderr)
    first, trl = found["ours"][0], found["trl"][0]
    seconds = {n: [statistics.median(run["seconds"]) for run in runs] for n, runs in found.items()}
    print(
        json.dumps(
            {
                "time_ratio": round(statistics.mean(seconds["ours"]) / seconds["trl"][0], 3),
                "bits_ratio": round(first["nats"] / trl["nats"], 4),
                "memory_ratio": round(first["growth"] / trl["growth"], 3),
                "bits_per_byte": {
                    name: round(runs[0]["nats"] / math.log(2) / first["bytes"], 4)
                    for name, runs in found.items()
                },
                "seconds": {n: [round(x, 2) for x in v] for n, v in seconds.items()},
                "mb": {n: round(runs[0]["growth"] / 1e6) for n, runs in found.items()},
                "trl_aligns": trl["aligned"],
                "steps": given.steps,
                "precision": first["precision"],
                "threads": first["threads"],
                "processor": host()["processor"],
            }
        )
    )


def ends_of(labels: Any) -> list[int]:
    """Index of the last token of each row, from its next-token labels [R, L]."""
    return [int((row >= 0).nonzero().max()) + 1 for row in labels]


if __name__ == "__main__":
    main()
