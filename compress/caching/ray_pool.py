"""Shards of a teacher cache made by actors on a Ray cluster.

An actor loads the text once, and the teachers when it makes its first shard. Ray starts an actor
again whose process was killed and gives its shard to it once more. A shard is seen when it is
whole, or not at all. The workers write to the cache folder, which all nodes must share.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.contract.errors import EnvironmentalError, LimbeckError, UserError
from limbeck.contract.progress import say, task
from limbeck.contract.recipe import Recipe, parse_any_recipe
from limbeck.contract.sources.places import cache_folder

_CONNECT_SECONDS = 5.0
LOCAL = "local"  # the address that starts Ray here


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


def environment(threads: int) -> dict[str, str]:
    """Environment variables of a worker."""
    return {
        "LIMBECK_CACHE": str(cache_folder().resolve()),
        "OMP_NUM_THREADS": str(threads),
        **{name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ},
    }


def fill_on_ray(
    recipe: Recipe,
    products: Mapping[str, Path],
    jobs: Sequence[tuple[int, int]],
    *,
    address: str,
    workers: int,
) -> dict[str, str]:
    """Make shards, each given by its teacher and number, on ``workers`` actors; their digests.

    ``address`` is that of a running cluster, or `local` to start one on this machine while the call
    lasts. A worker takes as many cores as `training.threads`, or one. Raises
    `EnvironmentalError` if no cluster answers, `UserError` if Ray is not installed, and what a
    worker raises.
    """
    try:
        import ray
        from ray.util import ActorPool
    except ImportError:
        raise UserError("ray is not installed; run: pip install 'limbeck[ray]'.") from None
    threads = recipe.training.threads or 1
    where = None if address == LOCAL else address
    if where is not None:
        _require_cluster(where)
    ray.init(
        address=where,
        num_cpus=workers * threads if where is None else None,
        include_dashboard=False if where is None else None,
        configure_logging=False,
        log_to_driver=False,
        runtime_env={"env_vars": environment(threads)},
    )
    try:
        tree = recipe.resolved()
        tree["training"]["threads"] = threads
        actor = ray.remote(num_cpus=threads, max_restarts=-1, max_task_retries=-1)(_Worker)
        paths = {name: str(path.resolve()) for name, path in products.items()}
        folder = str(recipe.folder.resolve())
        pool = ActorPool([actor.remote(tree, folder, paths) for _ in range(workers)])
        say(f"  {workers} workers of {threads} threads on Ray")
        digests: dict[str, str] = {}
        with task("teacher cache, shards", len(jobs)) as progress:
            for teacher, shard, digest in pool.map_unordered(
                lambda worker, job: worker.make.remote(*job), list(jobs)
            ):
                digests[f"{teacher}/{shard}"] = digest
                progress.advance()
        return digests
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LimbeckError):  # without the worker's traceback
            raise error.cause from None
        raise
    finally:
        ray.shutdown()


def _require_cluster(address: str) -> None:
    """Raise `EnvironmentalError` if nothing listens there: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise EnvironmentalError(
            f"--ray {address}: this is no address; give host:port, as `ray start --head` prints "
            "it, or local."
        )
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise EnvironmentalError(
            f"--ray {address}: no Ray cluster answers there ({error}); start one with `ray start "
            "--head`, or use --ray local."
        ) from error
