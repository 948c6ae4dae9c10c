"""What Ray Serve's router adds to the time to the first token.

Two servers of one student: `limbeck serve`, and `limbeck serve --ray` with one replica. The same
client asks them in turn for short streamed answers, one request at a time over an open connection.
A round's figure is the difference of the two medians of its requests. Prints one JSON object:
`router_ms`, the median over rounds, with its 95 % interval; the medians; versions; the processor.

    make bench-serve-ray ARGS="runs/smollm2-135m-two-experts-... --rounds 20"

Without a folder it exports a random model of some 24 million parameters.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import aiohttp
import numpy as np

from serve_bench.judge.stats import median_interval
from tests.benchmarks.serving import peers
from tests.benchmarks.serving.bench_load import printable_model
from tests.benchmarks.serving.bench_prefix import first_token
from tests.benchmarks.serving.peers import Server, processor

PROMPT = 16  # tokens
LIGHT = peers.ROOT / "tests/light"  # lets processes of Ray start faster
ON_RAY = ("--ray", "local", "--replicas", "1")


def start(folder: Path, threads: int, *more: str) -> Server:
    """`limbeck serve` on a free port, in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "limbeck", "serve", folder, "--threads", str(threads)]
    options = ["--port", str(port), "--prefix-cache-mb", "0", *more]
    return Server(f"http://127.0.0.1:{port}", [*command, *options])


async def measure(servers: dict[str, Server], rounds: int, requests: int) -> dict[str, list[float]]:
    """Milliseconds to the first token, the median of each round, by server."""
    draw = np.random.default_rng(0)
    medians: dict[str, list[float]] = {name: [] for name in servers}
    async with aiohttp.ClientSession() as session:
        for number in range(rounds + 1):
            taken: dict[str, list[float]] = {name: [] for name in servers}
            for index in range(requests):
                ids = draw.integers(0, 94, PROMPT).tolist()
                for name in list(servers) if index % 2 else reversed(servers):
                    taken[name].append(1e3 * await first_token(session, servers[name], ids))
            if number:  # the first round warms up
                for name, found in taken.items():
                    medians[name].append(float(np.median(found)))
    return medians


def main() -> None:
    """Start both servers, ask them, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("artifact", nargs="?", type=Path, help="an exported folder, or its run")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--requests", type=int, default=20, help="of each server in a round")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(LIGHT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.artifact or printable_model(Path(temporary))
        servers = {"plain": start(folder, asked.threads)}
        try:
            servers["ray"] = start(folder, asked.threads, *ON_RAY)
            medians = asyncio.run(measure(servers, asked.rounds, asked.requests))
        finally:
            for server in servers.values():
                server.stop()
    differences = np.subtract(medians["ray"], medians["plain"])
    found = median_interval(differences, error=0.05)
    print(
        json.dumps(
            {
                "router_ms": round(found.value, 2),
                "interval": [round(b, 2) for b in (found.low, found.high) if found.bounded],
                "ttft_ms": {name: round(float(np.median(m)), 2) for name, m in medians.items()},
                "rounds": asked.rounds,
                "requests": asked.requests,
                "threads": asked.threads,
                "libraries": [f"{n} {metadata.version(n)}" for n in ("ray", "onnxruntime")],
                "processor": processor(),
            }
        )
    )


if __name__ == "__main__":
    main()
