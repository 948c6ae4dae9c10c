"""What own text is worth: the demo's experts into one LoRA student, off-policy and with own text.

    make bench-own-text ARGS="--minutes 90 --out own-text.json"

All arms see equal tokens. `off-policy` and `own` have the same divergence; `own` writes half of
its rows. On prompts of held-out text each arm continues the same prompts with the same numbers and
is measured by KL(student || fused teachers) in nats a token, repetition (share of 4-grams that the
same text had before) and held-out loss. ``--out`` keeps the figures of every seed and arm: a second
start goes on from them. Begins no training when ``--minutes`` are up. The last line is one JSON
object: means over the seeds that are complete, and the change from off-policy in percent.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

import compress
from limbeck.app.run import make_products
from limbeck.contract.data.heldout import Blocks
from limbeck.contract.recipe import OnPolicy, Recipe, load_recipe, parse_recipe

BASE = "smollm2/135m-two-experts"
LOSS_BLOCKS = 12  # at least, of each domain
ARMS: dict[str, dict[str, Any] | None] = {"off-policy": None, "own": {"share": 0.5}}


def recipe_of(arm: str, seed: int, asked: argparse.Namespace) -> Recipe:
    """The demo's recipe with one arm's training, measured once, at its end."""
    base = load_recipe(BASE)
    tree = base.resolved()
    tree |= {"seed": seed, "name": f"own-text-{arm}-{seed}", "gates": {}}
    tree["student"]["init"] = "base"
    tree["fusion"]["divergence"] = {"kind": asked.divergence}
    tree["data"]["heldout"]["blocks"] = -(-asked.prompts // len(tree["data"]["domains"]))
    tree["training"] |= {"tokens": asked.tokens, "on_policy": ARMS[arm], "teacher_cache": "none"}
    tree["training"] |= {"evaluate_every": 10**6, "checkpoint_every": 10**6, "patience": None}
    recipe = parse_recipe(tree)
    recipe._folder = base.folder
    return recipe


def measure(recipe: Recipe, products: dict[str, Path], prompts: int) -> dict[str, float]:
    """Train one arm and measure its last weights."""
    from compress.loop import fit, measure_teachers, setup
    from compress.tasks.language import LanguageTask
    from compress.tasks.own_text import OwnText, Prompt
    from limbeck.contract.sources.tokenizer import load_tokenizer
    from tests.compress.tasks.own_measure import measure_own_text

    with tempfile.TemporaryDirectory() as folder:
        run = setup(recipe=recipe, products=products, work=Path(folder), key="own-text")
        assert isinstance(run.task, LanguageTask)
        held = [(d, row) for d, b in enumerate(run.task.blocks) for row in b.heldout.input_ids]
        # All blocks begin prompts; a part of them, from all over the corpus, measures the loss.
        run.task.blocks = [replace(b, heldout=_some(b.heldout)) for b in run.task.blocks]
        measure_teachers(run)
        started = time.monotonic()
        fit(run)
        seconds = time.monotonic() - started
    task, sampling = run.task, OnPolicy()
    own = OwnText(recipe, sampling, load_tokenizer(task.folder), vocabulary=task.vocabulary)
    # One seed for all arms and seeds of training: the same numbers continue the same prompts.
    asked = [
        Prompt(index, domain, (0, 0, index), row[: sampling.prompts.tokens].tolist())
        for index, (domain, row) in enumerate(held[:prompts])
    ]
    found = measure_own_text(task, own, asked)
    sums, counts = task.losses("student")
    loss = np.mean([sum(sums[name]) / sum(counts[name]) for name in sums])
    return {
        "reverse_kl": found.reverse_kl,
        "repetition": found.repetition,
        "length": found.length,
        "heldout": float(loss),
        "seconds": seconds,
        "prompts": len(asked),
    }


def _some(blocks: Blocks) -> Blocks:
    step = max(1, len(blocks) // LOSS_BLOCKS)
    return Blocks(*(getattr(blocks, each.name)[::step] for each in fields(blocks)))


def main() -> None:
    """Train and measure what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=12288)
    parser.add_argument("--divergence", default="reverse_kl")
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--out", type=Path, default=Path("own-text.json"))
    asked = parser.parse_args()
    compress.quiet_libraries()
    started = time.monotonic()
    # Figures of other settings have other keys.
    settings = f"{asked.divergence}, {asked.tokens} tokens, {asked.prompts} prompts"
    kept = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    runs: dict[str, dict[str, float]] = kept.setdefault(settings, {})
    products = make_products(load_recipe(BASE))
    for seed in range(asked.seeds):
        for arm in ARMS:
            name = f"{arm}/{seed}"
            if name in runs:
                continue
            if time.monotonic() - started > 60 * asked.minutes:
                print(f"{asked.minutes:g} minutes are up before {name}; start again to go on")
                break
            recipe = recipe_of(arm, seed, asked)
            runs[name] = measure(recipe, products, asked.prompts)
            asked.out.write_text(json.dumps(kept, indent=1))
            print(name, {key: round(value, 4) for key, value in runs[name].items()})
    whole = [s for s in range(asked.seeds) if all(f"{arm}/{s}" in runs for arm in ARMS)]
    if whole:
        print(json.dumps(summary(runs, whole) | {"settings": settings}))


def summary(runs: dict[str, dict[str, float]], seeds: list[int]) -> dict[str, Any]:
    """Means over seeds of each arm, and the change of each figure from off-policy in percent."""
    means = {
        arm: {
            figure: float(np.mean([runs[f"{arm}/{seed}"][figure] for seed in seeds]))
            for figure in ("reverse_kl", "repetition", "length", "heldout", "seconds")
        }
        for arm in ARMS
    }
    before = means["off-policy"]
    changes = {
        arm: {
            figure: round(100 * (value / before[figure] - 1), 2) if before[figure] else None
            for figure, value in found.items()
        }
        for arm, found in means.items()
        if arm != "off-policy"
    }
    return {"seeds": len(seeds), "means": means, "change_percent": changes}


if __name__ == "__main__":
    main()
