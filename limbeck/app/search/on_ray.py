"""A search by workers on a Ray cluster. Each is a search of its own, and all share one storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limbeck.app.search import default_folder, search
from limbeck.app.search.outcome import Found
from limbeck.app.search.state import digest_of
from limbeck.app.search.storage import masked
from limbeck.contract.progress import say
from limbeck.contract.ray_cluster import connected
from limbeck.contract.recipe import AnyRecipe, parse_any_recipe


def search_on_ray(
    recipe: AnyRecipe, *, out: Path | None, storage: str | None, address: str, workers: int
) -> Found:
    """Search with ``workers`` processes of a Ray cluster, and write the outcome here too.

    ``storage`` defaults to a journal in the folder of the search, which all nodes must share then.
    A worker takes as many cores as `training.threads`, or one. Ray starts a worker again that died.
    Raises as `search` and `limbeck.contract.ray_cluster.connected`.
    """
    threads = recipe.training.threads or 1
    tree = recipe.resolved()
    tree["training"]["threads"] = threads
    recipe = _parsed(tree, recipe.folder)
    folder = (out or default_folder(recipe, digest_of(recipe))).resolve()
    storage = storage or f"journal://{folder / 'journal.log'}"
    place = masked(storage)
    with connected(address, cores=workers * threads, threads=threads, show_output=True) as ray:
        work = ray.remote(num_cpus=threads, max_retries=-1)(_work)
        say(f"== search: {workers} workers of {threads} threads on Ray, storage {place}")
        ray.get(
            [work.remote(tree, str(recipe.folder), str(folder), storage) for _ in range(workers)]
        )
    return search(recipe, out=folder, storage=storage)


def _work(tree: dict[str, Any], recipe_folder: str, out: str, storage: str) -> None:
    search(_parsed(tree, Path(recipe_folder)), out=Path(out), storage=storage)


def _parsed(tree: dict[str, Any], folder: Path) -> AnyRecipe:
    made = parse_any_recipe(tree)
    made._folder = folder.resolve()
    return made
