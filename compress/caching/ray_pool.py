"""Shards of a teacher cache made by actors on a Ray cluster.

An actor loads the text once, and the teachers when it makes its first shard. Ray starts an actor
again whose process was killed and gives its shard to it once more. A shard is seen when it is
whole, or not at all. The workers write to the cache folder, which all nodes must share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from limbeck.contract.progress import say, task
from limbeck.contract.ray_cluster import connected
from limbeck.contract.recipe import Recipe, parse_any_recipe


class _Worker:
    """An actor. Ray imports this module on the node that runs it."""

    def __init__(self, tree: dict[str, Any], folder: str, products: Mapping[str, str]) -> None:
        from compress.caching.filling import TeacherCache

        recipe: Any = parse_any_recipe(tree)
        recipe._folder = Path(folder)
        found = {name: Path(path) for name, path in products.items()}
        self._cache = TeacherCache(recipe, found)

    def make(self, teacher: int, shard: int) -> tuple[int, int, str]:
        """Teacher, shard, and the shard's digest."""
        return teacher, shard, self._cache.make(teacher, shard)


@contextmanager
def actors_of(
    recipe: Recipe, products: Mapping[str, Path], *, address: str, workers: int
) -> Iterator[list[Any]]:
    """Start ``workers`` actors, which end with the block.

    ``address`` is that of a running cluster, or `local` to start one on this machine. A worker
    takes as many cores as `training.threads`, or one. Raises as
    `limbeck.contract.ray_cluster.connected`.
    """
    threads = recipe.training.threads or 1
    with connected(address, cores=workers * threads, threads=threads) as ray:
        tree = recipe.resolved()
        tree["training"]["threads"] = threads
        actor = ray.remote(num_cpus=threads, max_restarts=-1, max_task_retries=-1)(_Worker)
        paths = {name: str(path.resolve()) for name, path in products.items()}
        folder = str(recipe.folder.resolve())
        actors = [actor.remote(tree, folder, paths) for _ in range(workers)]
        say(f"  {workers} workers of {threads} threads on Ray")
        yield actors


def make_shards(actors: Sequence[Any], jobs: Sequence[tuple[int, int]]) -> dict[str, str]:
    """Make shards, each given by its teacher and number, on actors; their digests."""
    from ray.util import ActorPool

    digests: dict[str, str] = {}
    with task("teacher cache, shards", len(jobs)) as progress:
        for teacher, shard, digest in ActorPool(list(actors)).map_unordered(
            lambda worker, job: worker.make.remote(*job), list(jobs)
        ):
            digests[f"{teacher}/{shard}"] = digest
            progress.advance()
    return digests
