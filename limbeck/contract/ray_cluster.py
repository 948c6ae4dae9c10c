"""Connection to a Ray cluster, shared by every command that has --ray."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from limbeck.contract.environment import cache_folder
from limbeck.contract.errors import EnvironmentalError, LimbeckError, UserError

LOCAL = "local"  # the address that starts Ray on this machine
_CONNECT_SECONDS = 5.0
# An HTTP/2 client begins so, and an HTTP/2 server, as every gRPC server is, with a frame of type 4.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_STORE_BYTES = 150_000_000  # of a local cluster: only names and digests go through Ray


@contextmanager
def connected(
    address: str, *, cores: int, threads: int, show_output: bool = False
) -> Iterator[Any]:
    """Connect to the cluster at ``address`` and yield the `ray` module; disconnect at the end.

    `local` starts a cluster of ``cores`` on this machine, which lasts as long as the block. Every
    worker gets this process's cache folder and ``threads`` for OpenMP. ``show_output`` prints here
    what workers print. Raises `EnvironmentalError`
    if no cluster answers, `UserError` if Ray is not installed, and a worker's own `LimbeckError`.
    """
    try:
        import ray
    except ImportError:
        raise UserError("ray is not installed; run: pip install 'limbeck[ray]'.") from None
    here = address == LOCAL
    if not here:
        require_cluster(address)
    handler = signal.getsignal(signal.SIGTERM)  # Ray sets one of its own
    try:
        ray.init(
            address=address,  # `local` is Ray's own name too
            num_cpus=cores if here else None,
            object_store_memory=_STORE_BYTES if here else None,
            include_dashboard=False if here else None,
            configure_logging=False,
            log_to_driver=show_output,
            runtime_env={"env_vars": environment(threads)},
        )
    except Exception as error:  # other versions there than here, or a machine that is too busy
        ray.shutdown()
        raise EnvironmentalError(f"--ray {address}: Ray does not start here: {error}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
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


def require_cluster(address: str) -> None:
    """Raise `EnvironmentalError` if no gRPC server is there: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not (port.isascii() and port.isdigit()):
        raise EnvironmentalError(
            f"--ray {address}: this is no address; give host:port, as `ray start --head` prints "
            "it, or local."
        )
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS) as connection:
            connection.sendall(_GREETING)
            answer = connection.recv(9)
    except (OSError, ValueError, OverflowError) as error:  # a ValueError: no name that can be
        raise EnvironmentalError(
            f"--ray {address}: no Ray cluster answers there ({error}); start one with `ray start "
            "--head`, or use --ray local."
        ) from error
    if answer[3:4] != b"\x04" and os.environ.get("RAY_USE_TLS", "0") == "0":
        raise EnvironmentalError(
            f"--ray {address}: something else than Ray answers there; give the port that "
            "`ray start --head` prints, 6379 by default."
        )
