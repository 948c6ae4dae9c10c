"""Two replicas on a Ray cluster of this machine: equal text, and a death and an upgrade under load.

LIMBECK_LOAD="64 60" makes it 64 clients for 60 seconds, instead of 16 for 20.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from limbeck.contract.artifact import Artifact
from limbeck.contract.limits import Limits
from limbeck.contract.recipe import ServerScenario, Slo
from limbeck.runtime.endpoint import find_endpoint
from limbeck.runtime.text import load_text
from serve_bench.measure.scenarios import load
from serve_bench.serve.on_ray.deploy import Replicas, serve_on_ray
from tests.factory import Factory
from tests.serve_bench.serve.asking import PROMPTS, greedy, until

pytestmark = pytest.mark.slow
LIGHT = Path(__file__).parents[3] / "light"
CLIENTS, SECONDS = map(int, os.environ.get("LIMBECK_LOAD", "16 20").split())
TOKENS = 200


@dataclass
class Cluster:
    """Ray on this machine, and the port on which its proxy answers."""

    address: str
    port: int

    def serve(self, folder: Path) -> None:
        """What `limbeck serve FOLDER --ray ADDRESS --replicas 2` does."""
        serve_on_ray(
            folder,
            address=self.address,
            replicas=Replicas(2, 2),
            host="127.0.0.1",
            port=self.port,
            limits=Limits(),
            grace=20.0,
            threads=1,
            form="fp32",
        )

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(method, path, sent, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def metric(self, name: str) -> dict[str, float]:
        """A metric by replica."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.ask("GET", "/metrics")[1]):
            for sample in family.samples:
                if sample.name == name:
                    replica = sample.labels["replica"]
                    found[replica] = found.get(replica, 0) + sample.value
        return found


@pytest.fixture(scope="module")
def cluster(served: Artifact) -> Iterator[Cluster]:
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="ray is not installed")
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as free:
        patch.setenv("PYTHONPATH", str(LIGHT), prepend=os.pathsep)
        port = free.getsockname()[1]
        free.close()
        head = {"num_cpus": 2, "object_store_memory": 150_000_000, "include_dashboard": False}
        nodes = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
        try:
            made = Cluster(nodes.address, port)
            made.serve(served.path)
            yield made
        finally:
            nodes.shutdown()


def wanted(prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": "pico", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, **more}


def test_replicas_answer_as_one_process_does(cluster: Cluster, served: Artifact) -> None:
    text = load_text(served.path)
    before = cluster.metric("limbeck_requests_total")
    for prompt in PROMPTS * 3:
        status, answer = cluster.ask("POST", "/v1/completions", wanted(prompt))
        assert status == 200
        expected = greedy(served.path, text.encode(prompt), TOKENS)
        assert json.loads(answer)["choices"][0]["text"] == expected
    after = cluster.metric("limbeck_requests_total")
    assert len(after) == 2
    assert sum(after.values()) - sum(before.values()) >= 3 * len(PROMPTS)
    assert cluster.ask("GET", "/health") == (200, '{"status":"ok"}')
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{cluster.port}/v1", api_key="none")
    with client, client.completions.create(**wanted("a"), stream=True) as events:
        parts = [event.choices[0].text for event in events]
    assert len(parts) > 2
    assert "".join(parts) == greedy(served.path, text.encode("a"), TOKENS)


def test_a_client_that_leaves_frees_its_slot(cluster: Cluster) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{cluster.port}/v1", api_key="none")
    asked = wanted("a", extra_body={"ignore_eos": True}) | {"max_tokens": 500}
    for _ in range(4):
        with client.completions.create(**asked, stream=True) as events:
            next(iter(events))
    until(lambda: sum(cluster.metric("limbeck_running").values()) == 0)
    written = sum(cluster.metric("limbeck_generated_tokens_total").values())
    time.sleep(0.5)
    assert sum(cluster.metric("limbeck_generated_tokens_total").values()) == written
    text = cluster.ask("GET", "/metrics")[1]
    cancelled = re.findall(r'^limbeck_finished_total{reason="cancelled".*} ([\d.]+)$', text, re.M)
    assert 1 <= sum(map(float, cancelled)) <= 4


def test_the_server_scenario_drives_it(cluster: Cluster) -> None:
    slo = Slo(ttft_ms=6e5, tpot_ms=6e5)
    asked = ServerScenario(kind="server", slo=slo, requests=8)
    endpoint = find_endpoint(f"http://127.0.0.1:{cluster.port}/v1")
    loop = load.Loop(endpoint, lambda index, tokens: [index] * tokens, load.Sizes(16, 8), asked)
    rows = loop.at(8.0)
    assert [row["error"] for row in rows] == [None] * 8
    assert [row["output_tokens"] for row in rows] == [8] * 8


@dataclass
class Client:
    """Asks again and again until the end, every second time for a stream."""

    cluster: Cluster
    expected: dict[str, dict[str, str]]  # by prefix of the fingerprint and by prompt
    number: int
    answers: dict[str, int] = field(default_factory=dict)  # by student
    wrong: list[str] = field(default_factory=list)
    lost: list[tuple[float, float]] = field(default_factory=list)  # streams: begun, cut
    requests: list[tuple[float, float]] = field(default_factory=list)  # all: begun, ended

    def run(self, over: threading.Event) -> None:
        turn = self.number
        while not over.is_set():
            prompt, turn = PROMPTS[turn % len(PROMPTS)], turn + 1
            began = time.monotonic()
            try:
                self._ask(prompt, began, stream=bool(turn % 2))
            except Exception as error:
                self.wrong.append(f"{prompt[:10]}: {error!r}")
            self.requests.append((began, time.monotonic()))

    def _ask(self, prompt: str, began: float, *, stream: bool) -> None:
        status, answer = self.cluster.ask("POST", "/v1/completions", wanted(prompt, stream=stream))
        if status != 200:
            self.wrong.append(f"{status} {answer}")
        elif not stream:
            whole = json.loads(answer)
            self._check(prompt, whole["system_fingerprint"], whole["choices"][0]["text"])
        else:
            *events, last = [line[6:] for line in answer.splitlines() if line]
            found = [json.loads(event) for event in events]
            if last != "[DONE]":
                error = json.loads(last)["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert (error["type"], error["code"]) == ("server_error", "replica_lost")
                self.lost.append((began, time.monotonic()))
                return
            parts = "".join(event["choices"][0]["text"] for event in found)
            self._check(prompt, found[0]["system_fingerprint"], parts)

    def _check(self, prompt: str, fingerprint: str, text: str) -> None:
        self.answers[fingerprint] = self.answers.get(fingerprint, 0) + 1
        if text != self.expected[fingerprint][prompt]:
            self.wrong.append(f"{fingerprint} {prompt[:10]}: {text!r}")


def test_a_death_and_an_upgrade_under_load(
    cluster: Cluster, served: Artifact, tiny: Factory
) -> None:
    sizes = {"max_position_embeddings": 512, "tie_word_embeddings": False}
    other = tiny.exported(seed=4, sizes=sizes)
    expected = {
        f"limbeck-{student.digest[:12]}-fp32": {
            prompt: greedy(student.path, load_text(student.path).encode(prompt), TOKENS)
            for prompt in PROMPTS
        }
        for student in (served, other)
    }
    over = threading.Event()
    clients = [Client(cluster, expected, number) for number in range(CLIENTS)]
    threads = [threading.Thread(target=one.run, args=(over,)) for one in clients]
    for thread in threads:
        thread.start()
    try:
        time.sleep(SECONDS / 3)
        running = cluster.metric("limbeck_running")
        killed_at = time.monotonic()
        os.kill(_a_replica(), signal.SIGKILL)
        time.sleep(SECONDS / 3)
        cluster.serve(other.path)
        upgraded_at = time.monotonic()
        time.sleep(SECONDS / 3)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    lost = [cut for one in clients for cut in one.lost]
    answers = {name: sum(one.answers.get(name, 0) for one in clients) for name in expected}
    print(f"\nanswers {answers}, lost streams {len(lost)}, running before {running}")
    assert [one.wrong for one in clients if one.wrong] == []
    assert len(running) == 2
    # Lost are streams of the dead replica alone: they ran when it died, and others ran elsewhere.
    ran = [1 for one in clients for start, end in one.requests if start < killed_at < end]
    assert all(start < killed_at < cut for start, cut in lost), (killed_at, lost)
    assert len(lost) < len(ran)
    first, second = (answers[name] for name in expected)
    assert first > CLIENTS
    assert second >= CLIENTS
    assert all(end > upgraded_at for one in clients for _, end in one.requests[-1:])


def _a_replica() -> int:
    """The process of one replica."""
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        ours = os.getpid() in {parent.pid for parent in process.parents()}
        if ours and "ServeReplica:limbeck:student" in title:
            return int(process.pid)
    raise AssertionError("no replica runs")
