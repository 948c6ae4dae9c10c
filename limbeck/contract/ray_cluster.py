"""Connection to a Ray cluster, shared by every command that has --ray."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from limbeck.contract.environment import cache_folder
from limbeck.contract.errors import EnvironmentalError, LimbeckError, UserError

LOCAL = "local"  # the address that starts Ray on this machine
_CONNECT_SECONDS = 5.0
_STORE_BYTES = 150_000_000  # of a local cluster: only names and digests go through Ray


@contextmanager
def connected(address: str, *, cores: int, threads: int) -> Iterator[Any]:
    """Connect to the cluster at ``address`` and yield the `ray` module; disconnect at the end.

    `local` starts a cluster of ``cores`` on this machine, which lasts as long as the block. Every
    worker gets this process's cache folder and ``threads`` for OpenMP. Raises `EnvironmentalError`
    if no cluster answers, `UserError` if Ray is not installed, and a worker's own `LimbeckError`.
    """
    try:
        import ray
    except ImportError:
        raise UserError("ray is not installed; run: pip install 'limbeck[ray]'.") from None
    where = None if address == LOCAL else address
    if where is not None:
        _require_cluster(where)
    ray.init(
        address=where,
        num_cpus=cores if where is None else None,
        object_store_memory=_STORE_BYTES if where is None else None,
        include_dashboard=False if where is None else None,
        configure_logging=False,
        log_to_driver=False,
        runtime_env={"env_vars": environment(threads)},
    )
    try:
        yield ray
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LimbeckError):  # without the worker's traceback
            raise error.cause from None
        raise
    finally:
        ray.shutdown()


def environment(threads: int) -> dict[str, str]:
    """Environment variables of a worker."""
    return {
        "LIMBECK_CACHE": str(cache_folder().resolve()),
        "OMP_NUM_THREADS": str(threads),
        **{name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ},
    }


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
