"""Time to the first token of prompts that share a beginning of 512 tokens, with 1 and 4 streams.

Each server is a process of its own, asked over HTTP by the same client: `limbeck serve`, and
llama.cpp's `llama-server`. OpenVINO GenAI runs without HTTP, with its prefix cache on. A cold
prompt has a beginning of its own, a warm one shares it with prompts that were answered before.
Cold and warm take turns, and so do the servers. Prints one JSON object: medians of the time to the
first token (ms), `ttft_ratio` of warm prompts over the better peer's by streams, the share of
prompt tokens that were reused, and memory.

    make bench-prefix ARGS="--run runs/smollm2-135m-two-experts-..."

Without a run it exports the untrained SmolLM2-135M.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
import numpy as np

from tests.benchmarks.serving import peers
from tests.benchmarks.serving.peers import Process, Server

OWN, NEW = 16, 4
STREAMS = (1, 4)

Prompts = Sequence[Sequence[int]]
Ask = Callable[[Prompts], float]  # the median seconds to the first token of prompts sent at once
Seconds = dict[str, dict[tuple[int, str], list[float]]]


async def first_token(session: aiohttp.ClientSession, server: Server, ids: Sequence[int]) -> float:
    """Seconds to the first event with text; the rest of the stream is read too."""
    body = {
        "model": server.model,
        "prompt": list(map(int, ids)),
        "max_tokens": NEW,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    started, first = time.perf_counter(), None
    async with session.post(f"{server.address}/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise SystemExit(f"{server.address}: {answer.status} {await answer.text()}")
        async for line in answer.content:
            if line.startswith(b"data: {") and first is None:
                first = time.perf_counter() - started
    assert first is not None
    return first


def of_server(server: Server) -> Ask:
    """Prompts over HTTP."""

    async def ask(prompts: Prompts) -> float:
        async with aiohttp.ClientSession() as session:
            await first_token(session, server, [1, 2, 3])  # the connection, and awake threads
            seconds = await asyncio.gather(*(first_token(session, server, ids) for ids in prompts))
        return float(np.median(seconds))

    return lambda prompts: asyncio.run(ask(prompts))


def of_process(process: Process) -> Ask:
    """Prompts to OpenVINO."""

    def ask(prompts: Prompts) -> float:
        process.ask("generate", prompt=[1, 2, 3], new_tokens=NEW)
        job = {"prompts": [list(ids) for ids in prompts], "streams": len(prompts)}
        return float(np.median([at[0] for at in process.ask("load", new_tokens=NEW, **job)["at"]]))

    return ask


def measure(arms: dict[str, Ask], *, vocabulary: int, prefix: int, rounds: int) -> Seconds:
    """Cold and warm prompts in turn, at every server."""
    draw = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return draw.integers(100, vocabulary, count).tolist()

    seconds: Seconds = {name: {} for name in arms}
    shared = tokens(prefix)
    for ask in arms.values():
        ask([[*shared, *tokens(OWN)]])
    for index in range(rounds):
        for streams in STREAMS:
            warm = [[*shared, *tokens(OWN)] for _ in range(streams)]
            cold = [tokens(prefix + OWN) for _ in range(streams)]
            order = list(arms)
            for name in order if index % 2 else reversed(order):
                kinds = {"cold": cold, "warm": warm}
                for kind in kinds if index % 2 else reversed(kinds):
                    taken = seconds[name].setdefault((streams, kind), [])
                    taken.append(arms[name](kinds[kind]))
    return seconds


def report(seconds: Seconds) -> dict[str, Any]:
    """The ratios and medians."""

    def by_arm(streams: int) -> dict[str, Sequence[float]]:
        return {name: found[streams, "warm"] for name, found in seconds.items()}

    ours = seconds["limbeck"]
    return {
        "ttft_ratio": {str(n): peers.over_better(by_arm(n)) for n in STREAMS},
        "warm_over_cold": {str(n): peers.over(ours[n, "warm"], ours[n, "cold"]) for n in STREAMS},
        "ttft_ms": {
            f"{name} {streams} {kind}": round(1e3 * float(np.median(taken)), 1)
            for name, found in seconds.items()
            for (streams, kind), taken in found.items()
        },
    }


def main() -> None:
    """Start the servers, measure, print."""
    parser = peers.options(__doc__, rounds=12)
    parser.add_argument("--prefix", type=int, default=512, help="tokens that prompts share")
    parser.add_argument("--vocabulary", type=int, default=49_000, help="tokens are drawn below it")
    asked = parser.parse_args()
    with peers.workplace(asked.models) as work:
        models = peers.make_models(work, asked.run)
        servers = peers.start_all(models, asked.threads, streams=4, prefix_cache=True)
        try:
            arms = {
                name: of_server(server) if isinstance(server, Server) else of_process(server)
                for name, server in servers.items()
            }
            seconds = measure(
                arms, vocabulary=asked.vocabulary, prefix=asked.prefix, rounds=asked.rounds
            )
            ours = servers["limbeck"]
            assert isinstance(ours, Server)
            reused = ours.metric("limbeck_reused_prompt_tokens_total")
            found = report(seconds) | {
                "hit_rate": round(reused / ours.metric("limbeck_prompt_tokens_total"), 3),
                "prefix_cache_mb": round(ours.metric("limbeck_prefix_cache_bytes") / 1e6, 1),
            }
            print(json.dumps(found | peers.conditions(servers, asked.threads, asked.rounds)))
        finally:
            for server in servers.values():
                server.stop()


if __name__ == "__main__":
    main()
