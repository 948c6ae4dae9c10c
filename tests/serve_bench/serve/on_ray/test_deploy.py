"""`limbeck serve --ray`: its options, its messages, and the application of a replica."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import RayActorError
from starlette.testclient import TestClient
from typer.testing import CliRunner, Result

from limbeck.app.cli import app
from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import EnvironmentalError
from limbeck.contract.limits import Limits
from serve_bench.serve.on_ray import deploy
from serve_bench.serve.on_ray.deploy import Replica, Replicas, build
from serve_bench.serve.server import Listener


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


# Options ------------------------------------------------------------------------------------------


def test_replicas_are_a_number_or_a_range() -> None:
    assert Replicas.of("2") == Replicas(2, 2)
    assert Replicas.of("2..8") == Replicas(2, 8)
    for wrong in ("0", "8..2", "2..", "..2", "two", "1.5", "-1", "2...8", ""):
        with pytest.raises(
            EnvironmentalError, match=r"expected a number from 1 to 9999, or a range"
        ):
            Replicas.of(wrong)


@pytest.mark.parametrize(
    ("given", "address"),
    [
        (["--ray"], "local"),
        (["--ray", "--replicas", "2..3"], "local"),
        (["--ray", "10.0.0.5:6379"], "10.0.0.5:6379"),
        (["--ray=10.0.0.5:6379"], "10.0.0.5:6379"),
    ],
)
def test_an_address_may_be_left_out(
    given: list[str], address: str, served: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[dict[str, Any]]()
    monkeypatch.setattr(deploy, "serve_on_ray", lambda folder, **options: calls.append(options))
    result = call(served.path, *given)
    assert result.exit_code == 0, result.stderr
    (options,) = calls
    assert options["address"] == address
    assert options["host"] == "127.0.0.1"


@pytest.fixture
def not_ray() -> Iterator[int]:
    """The port of a server that answers as HTTP/1 does."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        yield listening.getsockname()[1]
        thread.join()


def test_a_wrong_address_is_named_within_seconds(served: Artifact, not_ray: int) -> None:
    began = time.monotonic()
    for given, message in (
        (["--ray", "127.0.0.1:1"], "no Ray cluster answers there (["),
        (["--ray", "nowhere"], "--ray nowhere: this is no address; give host:port"),
        (["--ray", f"127.0.0.1:{not_ray}"], "something else than Ray answers there"),
        (["--ray", "--host", "localhost"], "--host localhost: with --ray give an address"),
        (["--ray", "10.0.0.5:6379", "--port", "0"], "--port 0: nodes of a cluster need"),
        (["--ray", "--replicas", "8..2"], "--replicas 8..2: expected a number"),
        (["--ray", "--replicas", "9" * 5000], "9: expected a number from 1 to 9999"),
        (["--replicas", "2"], "--replicas is for servers on Ray; add --ray"),
    ):
        result = call(served.path, *given)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.stderr
        assert message in result.stderr
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(("missing", "extra"), [("ray", "ray"), ("fastapi", "serve")])
def test_a_missing_extra_is_named(
    missing: str, extra: str, served: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("on_ray.deploy", "server"):
        monkeypatch.delitem(sys.modules, f"serve_bench.serve.{name}")
    monkeypatch.setitem(sys.modules, missing, None)
    result = call(served.path, "--ray")
    assert result.exit_code == 2
    assert (
        result.stderr
        == f"limbeck: {missing} is not installed; run: pip install 'limbeck[{extra}]'.\n"
    )


# A replica ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replica(served: Artifact) -> Iterator[Replica]:
    limits = Limits(api_key="secret", max_tokens=7)
    made = Replica(str(served.path), {"limits": limits, "form": "fp32", "threads": 1})
    yield made
    made._engine.close()


def test_a_replica_has_the_application_of_one_process(replica: Replica, server: Listener) -> None:
    here = replica.__serve_build_asgi_app__().app
    alone: Any = server.config.app
    assert here.openapi() == alone.openapi()
    assert [type(one.cls) for one in here.user_middleware] == [
        type(one.cls) for one in alone.user_middleware
    ]
    client = TestClient(here, base_url="http://localhost")
    body = {"model": "pico", "prompt": "a", "max_tokens": 3}
    assert client.post("/v1/completions", json=body).status_code == 401
    client.headers["Authorization"] = "Bearer secret"
    assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] <= 3
    assert client.post("/v1/completions", json=body | {"max_tokens": 8}).status_code == 400


def test_metrics_tell_the_replicas_apart(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    here = SimpleNamespace(
        deployment="student", app_name="limbeck", replica_id=SimpleNamespace(unique_id="one")
    )
    monkeypatch.setattr(deploy.serve, "get_replica_context", lambda: here)
    monkeypatch.setattr(deploy.serve, "get_deployment_handle", lambda *_: Handle(replica))
    client = TestClient(replica.__serve_build_asgi_app__(), base_url="http://localhost")
    client.headers["Authorization"] = "Bearer secret"
    assert client.get("/v1/models").status_code == 200
    (alone,) = (
        sum(sample.value for sample in family.samples if sample.name.endswith("_total"))
        for family in replica.metrics()[1]
        if family.name == "limbeck_requests"
    )
    text = client.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = [s for s in families["limbeck_requests"].samples if s.name.endswith("_total")]
    assert {sample.labels["replica"] for sample in samples} == {"one", "two"}
    assert sum(sample.value for sample in samples) == 2 * alone > 0
    assert families["limbeck_time_to_first_token_seconds"].type == "histogram"
    assert [sample.value for sample in families["limbeck_slots"].samples] == [64, 64]


class Handle:
    """Stands for Ray's handle of the deployment: this replica, one that dies, and a second one."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def broadcast(self, method: str) -> Handle:
        self._first, self._metrics = getattr(self._replica, method)()
        return self

    async def results_async(self, **options: Any) -> list[Any]:
        assert options["return_exceptions"]
        return [(self._first, self._metrics), RayActorError(), ("two", self._metrics)]


def test_a_replica_whose_engine_failed_is_ill(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica.check_health()
    monkeypatch.setattr(replica._engine, "failure", RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        replica.check_health()


def test_the_builder_of_rayservice(served: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_API_KEY", "secret")
    made: Any = build(
        {
            "artifact": str(served.path),
            "replicas": "2..8",
            "threads": 4,
            "max_batch": 16,
            "grace": 60.0,
            "limits": {"max_tokens": 9},
        }
    )
    deployment = made._bound_deployment
    config = deployment._deployment_config
    scaling = config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 8)
    assert scaling.target_ongoing_requests == 16
    assert config.graceful_shutdown_timeout_s == 60.0
    assert deployment.ray_actor_options["num_cpus"] == 4
    folder, options = deployment.init_args
    assert (folder, options["threads"]) == (str(served.path), 4)
    assert options["limits"] == Limits(api_key="secret", max_tokens=9)
    monkeypatch.setenv("LIMBECK_API_KEY", " ")
    with pytest.raises(EnvironmentalError, match="empty API key"):
        build({"artifact": str(served.path)})
