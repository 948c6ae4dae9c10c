"""A student deployed on Ray Serve: replicas with the application and the engine of one process.

Ray routes requests to the replica with the shorter queue, starts and stops replicas, replaces dead
ones, and drains those that it stops. Needs the extras ``limbeck[ray,serve]``.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prometheus_client import Metric
from ray import serve
from ray.exceptions import RayError

from limbeck.contract.errors import EnvironmentalError
from limbeck.contract.limits import Limits
from limbeck.contract.progress import say
from limbeck.contract.ray_cluster import LOCAL, connected, require_cluster
from limbeck.contract.reading import reading
from serve_bench.serve.listener import open_door
from serve_bench.serve.on_ray.proxy import Carried
from serve_bench.serve.server import load

NAME = "limbeck"  # of the application on the cluster: one student is served there
_SCRAPE = 5.0  # seconds that a replica may take for its metrics
# Variables of Ray's proxies. Ray Serve imports the middleware in them and puts it around them.
# Threads and actor calls between client and engine make the first token later.
PROXY = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_bench.serve.on_ray.proxy:middlewares",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
}
_REPLICA = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
_QUIET = {"enable_access_log": False, "log_level": "WARNING"}


@dataclass(frozen=True)
class Replicas:
    """How many processes serve a student: between ``fewest`` and ``most``."""

    fewest: int
    most: int

    def __str__(self) -> str:
        return str(self.fewest) if self.fewest == self.most else f"{self.fewest} to {self.most}"

    @staticmethod
    def of(text: str) -> Replicas:
        """Read ``N`` or ``N..M``. Raises `EnvironmentalError`."""
        first, dots, last = str(text).partition("..")
        fewest, most = first.strip(), last.strip() if dots else first.strip()
        numbers = all(part.isdecimal() and len(part) < 5 for part in (fewest, most))
        if not (numbers and 1 <= int(fewest) <= int(most)):
            raise EnvironmentalError(
                f"--replicas {text}: expected a number from 1 to 9999, or a range such as 2..8."
            )
        return Replicas(int(fewest), int(most))


class Replica:
    """One process of the deployment."""

    def __init__(self, folder: str, options: dict[str, Any]) -> None:
        self._application, self._engine, _ = load(
            Path(folder), gather=self._metrics_of_all, **options
        )

    def __serve_build_asgi_app__(self) -> Any:
        return Carried(self._application)

    def check_health(self) -> None:
        """Called by Ray, which replaces this process if it raises."""
        if self._engine.failure:
            raise self._engine.failure

    def metrics(self) -> tuple[str, list[Metric]]:
        """The name of this replica and its metrics."""
        found = self._application.state.registry.collect()
        return serve.get_replica_context().replica_id.unique_id, list(found)

    async def _metrics_of_all(self) -> list[Metric]:
        here = serve.get_replica_context()
        every = serve.get_deployment_handle(here.deployment, here.app_name).broadcast("metrics")
        found = await every.results_async(timeout_s=_SCRAPE, return_exceptions=True)
        return together(one for one in found if not isinstance(one, RayError))


def together(replicas: Iterable[tuple[str, list[Metric]]]) -> list[Metric]:
    """Metrics of several replicas; the label ``replica`` tells them apart.

    Prometheus sums them. A sum made here would fall when a replica ends, and Prometheus would take
    that for a counter that starts again at 0.
    """
    families: dict[str, Metric] = {}
    for name, metrics in replicas:
        for metric in metrics:
            family = families.setdefault(
                metric.name, Metric(metric.name, metric.documentation, metric.type, metric.unit)
            )
            family.samples += [
                sample._replace(labels={**sample.labels, "replica": name})
                for sample in metric.samples
            ]
    return list(families.values())


def application(
    folder: Path,
    replicas: Replicas,
    *,
    limits: Limits,
    grace: float = 30.0,
    threads: int = 1,
    max_batch: int = 64,
    max_queue: int = 256,
    **options: Any,
) -> serve.Application:
    """The Serve application over the ``onnx`` artifact at ``folder``; ``options`` as `load` has.

    Replicas are added when more than ``max_batch`` requests a replica wait or run.
    """
    options |= {"threads": threads, "max_batch": max_batch, "max_queue": max_queue}
    count: dict[str, Any] = {"num_replicas": replicas.fewest}
    if replicas.most > replicas.fewest:
        scaling = {"min_replicas": replicas.fewest, "max_replicas": replicas.most}
        count = {"autoscaling_config": {**scaling, "target_ongoing_requests": max_batch}}
    deployment = serve.deployment(
        name="student",
        # The engine refuses what is too much: Ray would let it wait without an answer.
        max_ongoing_requests=max_batch + max_queue + limits.max_connections,
        max_constructor_retry_count=3,
        graceful_shutdown_timeout_s=grace,
        ray_actor_options={"num_cpus": threads, "runtime_env": {"env_vars": _REPLICA}},
        **count,
    )
    return deployment(serve.ingress()(Replica)).bind(str(folder), {"limits": limits, **options})


def build(args: dict[str, Any]) -> serve.Application:
    """The application for `serve run` and KubeRay's RayService, which give it ``args``.

    These are ``artifact``, ``replicas``, ``limits`` and the options of `application`. The API key
    is read from LIMBECK_API_KEY.
    """
    folder, replicas = Path(args.pop("artifact")), Replicas.of(args.pop("replicas", "1"))
    limits = Limits(**args.pop("limits", {}), api_key=os.environ.get("LIMBECK_API_KEY"))
    return application(folder, replicas, limits=limits, **args)


def serve_on_ray(
    folder: Path,
    *,
    address: str,
    replicas: Replicas,
    host: str,
    port: int,
    limits: Limits,
    grace: float,
    threads: int | None,
    **options: Any,
) -> None:
    """Serve on the Ray cluster at ``address``, or on one of this machine, ``local``.

    On a cluster it returns when the replicas answer; a student that is served there is replaced.
    On this machine it returns after SIGTERM or Ctrl-C. Raises as `connected` and `open_server` do.
    """
    threads = threads or 1
    port = _checked(host, port, here=address == LOCAL)
    if not ipaddress.ip_address(host).is_loopback:
        limits = replace(limits, allowed_hosts=limits.allowed_hosts or ("*",))
    if address != LOCAL:
        require_cluster(address)
    # A student that cannot be served must not replace one that is: it is loaded here first.
    with reading(folder):
        _, engine, title = load(folder, limits=limits, threads=threads, **options)
    engine.close()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if address == LOCAL:  # Ray gives its workers the least priority, which is not for servers
        os.environ.setdefault("RAY_worker_niceness", "0")
    with connected(address, cores=replicas.most * threads, threads=threads):
        before = serve.status()
        if NAME not in before.applications:
            serve.start(
                http_options={"host": host, "port": port, "keep_alive_timeout_s": 30},
                logging_config=_QUIET,
                controller_options={"runtime_env": {"env_vars": PROXY}},
            )
        try:
            serve.run(
                application(
                    folder, replicas, limits=limits, grace=grace, threads=threads, **options
                ),
                name=NAME,
                logging_config=_QUIET,
            )
        except RuntimeError as error:
            raise EnvironmentalError(f"Ray Serve could not deploy {folder}: {error}") from None
        title = f"{title[:-1]}, replicas: {replicas})"
        ended = _signalled() if address == LOCAL else None
        if NAME in before.applications:
            say(f"serving {title} in place of what was served before")
        elif before.proxies:  # of another application; they keep their own settings
            say(f"serving {title} where Ray Serve listened before, and asks no second replica")
        else:
            say(f"serving {title} at http://{host}:{port}/v1")
        if ended is not None:
            ended.wait()
            say(f"shutting down; running requests have {grace:g} s left")
            serve.delete(NAME)


def _checked(host: str, port: int, *, here: bool) -> int:
    """The port to listen on. Raises `EnvironmentalError` for an address that cannot be had."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise EnvironmentalError(
            f"--host {host}: with --ray give an address, such as 127.0.0.1 or 0.0.0.0."
        ) from None
    if not here:
        if not port:
            raise EnvironmentalError("--port 0: nodes of a cluster need a port that is known.")
        return port
    door = open_door(host, port)
    try:
        return int(door.getsockname()[1])
    finally:
        door.close()


def _signalled() -> threading.Event:
    """Set by SIGTERM or Ctrl-C; the one after it raises KeyboardInterrupt."""
    ended = threading.Event()

    def end(*_: object) -> None:
        ended.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    return ended
