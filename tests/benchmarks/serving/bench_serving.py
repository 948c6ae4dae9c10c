"""Tokens a second of 1, 4 and 16 streams: `limbeck serve`, llama.cpp's server, OpenVINO GenAI.

Every stream asks for one prompt after another: 128 random tokens, so that no prefix is shared, and
64 new ones. The same client asks `limbeck serve` and `llama-server` over HTTP, on the same cores.
OpenVINO GenAI has no server; its pipeline runs in its own process **without HTTP and without a
client, which flatters it**. Programs take turns within each round.

Prints one JSON object: `throughput_ratio` is ours over the better peer's by streams, `gap_ratio`
the 99th percentile of the time between two tokens of a stream, likewise; `tokens_per_s`, `gap_ms`
and memory by program.

    make bench-serving ARGS="--run runs/smollm2-135m-two-experts-..."

Without a run it exports the untrained SmolLM2-135M.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

from tests.benchmarks.serving import peers
from tests.benchmarks.serving.peers import Process, Server

PROMPT, NEW = 128, 64
STREAMS = {1: 4, 4: 2, 16: 2}  # prompts that each stream asks for in a round

Prompts = Sequence[Sequence[int]]


@dataclass
class Taken:
    """What one program did, by streams: tokens a second and the tail of the gaps, by round."""

    rate: dict[int, list[float]] = field(default_factory=dict)
    gap: dict[int, list[float]] = field(default_factory=dict)

    def add(self, streams: int, seconds: float, at: Sequence[Sequence[float]]) -> None:
        """``at`` has the seconds of each request's tokens."""
        gaps = np.concatenate([np.diff(times) for times in at])
        self.rate.setdefault(streams, []).append(len(at) * NEW / seconds)
        self.gap.setdefault(streams, []).append(float(np.quantile(gaps, 0.99)))


async def stream(session: aiohttp.ClientSession, server: Server, ids: Sequence[int]) -> list[float]:
    """Seconds at each event of one answer; the answer has `NEW` tokens."""
    body = {
        "model": server.model,
        "prompt": list(ids),
        "max_tokens": NEW,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    at, written, started = [], 0, time.perf_counter()
    async with session.post(f"{server.address}/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise SystemExit(f"{server.address}: {answer.status} {await answer.text()}")
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                written = event["usage"]["completion_tokens"]
            if event["choices"]:
                at.append(time.perf_counter() - started)
    assert written == NEW, f"{server.address}: {written} tokens of {NEW}"
    return at


async def load(server: Server, prompts: Prompts, streams: int) -> tuple[float, list[list[float]]]:
    """Seconds of all ``prompts`` in ``streams`` streams, and of their events."""
    waiting, at = list(prompts), []

    async def ask(session: aiohttp.ClientSession) -> None:
        while waiting:
            at.append(await stream(session, server, waiting.pop()))

    # A connection for each request: llama.cpp's server may close an idle one while we write.
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        await stream(session, server, [1, 2, 3])  # awake threads
        started = time.perf_counter()
        await asyncio.gather(*(ask(session) for _ in range(streams)))
    return time.perf_counter() - started, at


def measure(
    programs: dict[str, Server | Process], *, vocabulary: int, rounds: int
) -> dict[str, Taken]:
    """All programs in turn, each number of streams in each round; the first round is dropped."""
    draw = np.random.default_rng(0)
    taken = {name: Taken() for name in programs}
    for index in range(-1, rounds):
        for streams, each in STREAMS.items():
            prompts = draw.integers(100, vocabulary, (streams * each, PROMPT)).tolist()
            for name in draw.permutation(list(programs)):
                program = programs[name]
                if isinstance(program, Server):
                    seconds, at = asyncio.run(load(program, prompts, streams))
                else:
                    program.ask("generate", prompt=[1, 2, 3], new_tokens=4)
                    found = program.ask("load", prompts=prompts, new_tokens=NEW, streams=streams)
                    seconds, at = found["seconds"], found["at"]
                if index >= 0:
                    taken[name].add(streams, seconds, at)
        print(f"round {index + 1} of {rounds}", file=sys.stderr)
    return taken


def report(taken: dict[str, Taken]) -> dict[str, Any]:
    """Ratios, then medians."""
    rates = {n: {name: t.rate[n] for name, t in taken.items()} for n in STREAMS}
    gaps = {n: {name: t.gap[n] for name, t in taken.items()} for n in STREAMS}
    return {
        "throughput_ratio": {str(n): peers.over_better(x, most=True) for n, x in rates.items()},
        "gap_ratio": {str(n): peers.over_better(x) for n, x in gaps.items()},
        "tokens_per_s": {
            f"{name} {n}": round(float(np.median(x[name])), 1)
            for n, x in rates.items()
            for name in taken
        },
        "gap_ms": {
            f"{name} {n}": round(1e3 * float(np.median(x[name])), 1)
            for n, x in gaps.items()
            for name in taken
        },
    }


def main() -> None:
    """Start the programs, measure, print."""
    parser = peers.options(__doc__, rounds=8)
    parser.add_argument("--vocabulary", type=int, default=49_000, help="tokens are drawn below it")
    asked = parser.parse_args()
    with peers.workplace(asked.models) as work:
        models = peers.make_models(work, asked.run)
        programs = peers.start_all(models, asked.threads, streams=max(STREAMS), context=512)
        try:
            taken = measure(programs, vocabulary=asked.vocabulary, rounds=asked.rounds)
            found = report(taken) | {"megabytes": models.megabytes()}
            print(json.dumps(found | peers.conditions(programs, asked.threads, asked.rounds)))
        finally:
            for program in programs.values():
                program.stop()


if __name__ == "__main__":
    main()
