"""Time to the first token of prompts that share a beginning of 512 tokens, with 1 and 4 streams.

Each server is a process of its own, asked over HTTP by the same client: `limbeck serve`, and
llama.cpp's `llama-server` where one is named. A cold prompt has a beginning of its own, a warm one
shares it with prompts that were answered before. Cold and warm take turns, and so do the servers.
Prints one JSON object: medians of the time to the first token (ms), their ratios with intervals,
the share of prompt tokens that were reused, and memory.

    make bench-prefix ARGS=RUN
    make bench-prefix ARGS="RUN --peer .venvs/llama/bin/llama-server --gguf MODEL-q8_0.gguf"

Without RUN it exports SmolLM2-135M first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

from serve_bench.judge.stats import first_look, paired_ratio

OWN, NEW, FORM = 16, 4, "int8-weight"
STREAMS = (1, 4)


@dataclass
class Arm:
    """A running server, and the times to the first token that were seen at it, in seconds."""

    process: psutil.Popen
    address: str
    model: str
    seconds: dict[tuple[int, str], list[float]] = field(default_factory=dict)

    def metric(self, name: str) -> float:
        """One figure of /metrics."""
        text = urllib.request.urlopen(f"{self.address}/metrics").read().decode()
        found = re.search(rf"^{name} ([\d.e+]+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0


async def first_token(session: aiohttp.ClientSession, arm: Arm, ids: Sequence[int]) -> float:
    """Seconds to the first event with text; the rest of the stream is read too."""
    body = {
        "model": arm.model,
        "prompt": list(map(int, ids)),
        "max_tokens": NEW,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    started, first = time.perf_counter(), None
    async with session.post(f"{arm.address}/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise SystemExit(f"{arm.address}: {answer.status} {await answer.text()}")
        async for line in answer.content:
            if line.startswith(b"data: {") and first is None:
                first = time.perf_counter() - started
    assert first is not None
    return first


async def ask(arm: Arm, streams: int, prompts: Sequence[Sequence[int]]) -> float:
    """The median time to the first token of prompts that are sent at once."""
    async with aiohttp.ClientSession() as session:
        await first_token(session, arm, [1, 2, 3])  # the connection, and awake threads
        seconds = await asyncio.gather(*(first_token(session, arm, ids) for ids in prompts))
    return float(np.median(seconds))


def measure(arms: dict[str, Arm], *, vocabulary: int, prefix: int, rounds: int) -> None:
    """Cold and warm prompts in turn, at every server."""
    draw = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return draw.integers(100, vocabulary, count).tolist()

    shared = tokens(prefix)
    for arm in arms.values():
        asyncio.run(ask(arm, 1, [[*shared, *tokens(OWN)]]))
    for index in range(rounds):
        for streams in STREAMS:
            warm = [[*shared, *tokens(OWN)] for _ in range(streams)]
            cold = [tokens(prefix + OWN) for _ in range(streams)]
            order = list(arms.values())
            for arm in order if index % 2 else reversed(order):
                kinds = {"cold": cold, "warm": warm}
                for kind in kinds if index % 2 else reversed(kinds):
                    taken = arm.seconds.setdefault((streams, kind), [])
                    taken.append(asyncio.run(ask(arm, streams, kinds[kind])))


def start(command: Sequence[str], ready: str) -> Arm:
    """Start a server and wait until it answers at ``ready``, an address up to the port."""
    process = psutil.Popen(list(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while True:
        try:
            models = json.loads(urllib.request.urlopen(f"{ready}/v1/models").read())
            return Arm(process, ready, str(models["data"][0]["id"]))
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{' '.join(command)}: does not serve") from None
            time.sleep(0.2)


def report(arms: dict[str, Arm], rounds: int) -> dict[str, Any]:
    """The figures."""
    first = first_look(rounds)
    found: dict[str, Any] = {"rounds": rounds}
    for name, arm in arms.items():
        found[name] = {
            "ttft_ms": {
                f"{streams} {kind}": round(1e3 * float(np.median(seconds)), 1)
                for (streams, kind), seconds in arm.seconds.items()
            },
            "rss_mb": round(arm.process.memory_info().rss / 1e6, 1),
        }

    def ratio(over: list[float], under: list[float]) -> dict[str, Any]:
        interval = paired_ratio(np.array(over), np.array(under), first=first)
        bounds = [round(interval.low, 3), round(interval.high, 3)] if interval.bounded else None
        return {"value": round(interval.value, 3), "interval": bounds}

    ours = arms["limbeck"]
    found["warm_over_cold"] = {
        str(n): ratio(ours.seconds[n, "warm"], ours.seconds[n, "cold"]) for n in STREAMS
    }
    if "llama.cpp" in arms:
        peer = arms["llama.cpp"]
        found["ttft_ratio"] = {
            str(n): ratio(ours.seconds[n, "warm"], peer.seconds[n, "warm"]) for n in STREAMS
        }
    reused = ours.metric("limbeck_reused_prompt_tokens_total")
    found["hit_rate"] = round(reused / ours.metric("limbeck_prompt_tokens_total"), 3)
    found["prefix_cache_mb"] = round(ours.metric("limbeck_prefix_cache_bytes") / 1e6, 1)
    return found


def exported(work: Path) -> Path:
    """SmolLM2-135M, exported now."""
    from export import export_student
    from tests.benchmarks.smollm2 import demo_recipe, untrained_student

    untrained_student(work / "student")
    recipe = demo_recipe(f"export.forms=[fp32, {FORM}]")
    return export_student(student=work / "student", out=work / "onnx", recipe=recipe).path


def main() -> None:
    """Start the servers, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("artifact", nargs="?", type=Path, help="run folder or exported folder")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefix", type=int, default=512, help="tokens that prompts share")
    parser.add_argument("--vocabulary", type=int, default=49_000, help="tokens are drawn below it")
    parser.add_argument("--peer", type=Path, help="llama.cpp's llama-server")
    parser.add_argument("--gguf", type=Path, help="the peer's model")
    asked = parser.parse_args()
    arms: dict[str, Arm] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.artifact or exported(Path(temporary))
        threads = str(asked.threads)
        ours = [sys.executable, "-m", "limbeck", "serve", str(folder), "--form", FORM]
        try:
            arms["limbeck"] = start(
                [*ours, "--threads", threads, "--port", "8921"], "http://127.0.0.1:8921"
            )
            if asked.peer:
                options = ["-m", str(asked.gguf), "-t", threads, "-tb", threads, "-np", "4"]
                options += ["-c", "8192", "--no-webui", "--port", "8922"]
                arms["llama.cpp"] = start([str(asked.peer), *options], "http://127.0.0.1:8922")
            measure(arms, vocabulary=asked.vocabulary, prefix=asked.prefix, rounds=asked.rounds)
            print(json.dumps(report(arms, asked.rounds)))
        finally:
            for arm in arms.values():
                arm.process.terminate()
                arm.process.wait(timeout=60)


if __name__ == "__main__":
    main()
