"""Making a teacher cache on Ray: two workers against one, and one worker against our own loop.

`scaling`: shards a second of two one-thread workers over those of one. `overhead`: seconds of one
worker on Ray over those of `limbeck cache` in this process, for the same shard. Both are median
ratios with 95 % intervals over rounds; in each round every arm takes its turn. Text and teachers
are loaded before the first round, and the shards of a round are deleted after it. A fresh cache
folder is used, so the model is made once more. Prints one JSON object last.

    make bench-cache
    make bench-cache ARGS="--recipe pico --shards 4"

Without --recipe it is SmolLM2-135M as the only teacher, with blocks of 64 tokens, so that a shard
(64 blocks) takes some 15 s on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import compress
from limbeck.contract.machine import host, versions
from limbeck.contract.recipe import Recipe, load_recipe, parse_recipe
from serve_bench.judge.stats import paired_ratio
from tests.benchmarks.smollm2 import RECIPE

ROWS = 64  # of a shard


def recipe_of(given: argparse.Namespace) -> Recipe:
    """One teacher, one thread, and a cache of as many shards as a round takes."""
    base = load_recipe(given.recipe)
    tree = base.resolved()
    model = tree["student"]["base"] if given.recipe == RECIPE else tree["teachers"][0]["model"]
    block = 64 if given.recipe == RECIPE else tree["data"]["block"]
    tree["teachers"] = [{"name": "teacher", "model": model}]
    tree["data"]["block"] = block
    tree["fusion"] = {"weights": {"kind": "uniform"}}
    tree["features"] = {"weight": 0}
    tree["training"] |= {
        "tokens": block * ROWS * 2 * given.shards,
        "batch_tokens": block * 4,
        "micro_batch": 4,
        "threads": 1,
        "teacher_cache": {"kind": "hidden"},
        "on_policy": None,
    }
    tree |= {"gates": {}, "budget": None}
    recipe = parse_recipe(tree)
    recipe._folder = base.folder
    return recipe


def main() -> None:
    """Start two workers, and time the three arms in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shards", type=int, default=1, help="of one worker in a round")
    given = parser.parse_args()
    if given.rounds < 6:
        parser.error("--rounds: at least 6, which an interval needs")
    compress.quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIMBECK_CACHE"] = folder
        print(json.dumps(measure(recipe_of(given), given, Path(folder) / "teachers")))


def measure(recipe: Recipe, given: argparse.Namespace, rows: Path) -> dict[str, Any]:
    """The result as it is printed."""
    from compress.caching.filling import TeacherCache
    from compress.caching.ray_pool import actors_of, make_shards

    cache = TeacherCache(recipe, {})
    jobs = cache.jobs
    if len(jobs) < 2 * given.shards:
        raise SystemExit(f"the text has {len(jobs)} shards only; give fewer --shards")
    few, many = jobs[: given.shards], jobs[: 2 * given.shards]

    def clear() -> None:
        for shard in rows.glob("rows-*"):
            shutil.rmtree(shard)

    def own() -> None:
        for job in few:
            cache.make(*job)

    with actors_of(recipe, {}, address="local", workers=2) as actors:
        arms: dict[str, Callable[[], object]] = {
            "own": own,
            "one": lambda: make_shards(actors[:1], few),
            "two": lambda: make_shards(actors, many),
        }
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for index in range(given.rounds + 1):
            for name, arm in arms.items():
                clear()
                started = time.perf_counter()
                arm()
                if index:  # the first round loads the teachers
                    seconds[name].append(time.perf_counter() - started)
        from ray import __version__ as ray_version
    times = {name: np.array(values) for name, values in seconds.items()}
    ratios = {
        "scaling": paired_ratio(2 * times["one"], times["two"], first=given.rounds),
        "overhead": paired_ratio(times["one"], times["own"], first=given.rounds),
    }
    found: dict[str, Any] = {name: round(ratio.value, 3) for name, ratio in ratios.items()}
    return found | {
        "intervals": {n: [round(r.low, 3), round(r.high, 3)] for n, r in ratios.items()},
        "seconds": {name: round(float(np.median(values)), 2) for name, values in times.items()},
        "rounds": given.rounds,
        "tokens_a_shard": ROWS * recipe.data.block,
        "recipe": recipe.name,
        "processor": host()["processor"],
        "cores": host()["cores"],
        "versions": versions() | {"ray": ray_version},
    }


if __name__ == "__main__":
    main()
