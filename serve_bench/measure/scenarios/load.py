"""The server scenario: requests arrive at random whether or not earlier ones are answered, and each
is timed from when it was due, so that a stalled server (or a late client) hides nothing. Finds the
highest rate that still meets the SLO.

Knows arrivals, rates and processes; one request is `serve_bench.worker.client`, figures are
`serve_bench.judge.scenarios`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import math
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import aiohttp
import httpx2
import numpy as np

from limbeck.contract.errors import EnvironmentalError
from limbeck.contract.progress import say
from limbeck.contract.recipe import ServerScenario, UrlTarget
from limbeck.runtime.endpoint import Endpoint, find_endpoint
from serve_bench.judge.scenarios import meets
from serve_bench.measure.host.machine import child_environment
from serve_bench.worker.client import open_session, request, streamed

_DOUBLINGS = 12  # and halvings, at most
_READY = 120.0  # seconds that our own server may take to load
_LEAD = 0.05  # seconds from building the tasks to the first arrival
# Seconds before its arrival that a request is waited for without sleeping: timers come up to 1.5 ms
# late
_AWAKE = 0.002
_PATIENCE = 30.0  # seconds after its arrival, or five times the SLO, when a request has failed
# the extra limbeck[serve], as it is imported
_SERVED_BY = ("fastapi", "uvicorn", "prometheus_client")
_WARM = 3  # requests one after another before the first rate

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Tokens of every request."""

    prompt_tokens: int
    new_tokens: int


def require_server(asked: ServerScenario, artifact: Path | None) -> None:
    """Raise `EnvironmentalError` if the scenario cannot run, before anything is measured."""
    if isinstance(asked.target, UrlTarget):
        find_endpoint(asked.target.url, asked.target.model, asked.target.key_variable)
    elif artifact is None:
        raise EnvironmentalError(
            "the server scenario needs an exported folder or a URL; a model in torch is not served."
        )
    elif missing := [name for name in _SERVED_BY if importlib.util.find_spec(name) is None]:
        raise EnvironmentalError(
            f"the server scenario needs {', '.join(missing)}, which `limbeck serve` runs on; run: "
            "pip install 'limbeck[serve]'."
        )


def measure_server(
    asked: ServerScenario,
    artifact: Path | None,
    prompts: Callable[[int, int], list[int]],
    sizes: Sizes,
    raw: IO[str],
    *,
    threads: int,
    folder: Path,
) -> dict[str, Any]:
    """Find the highest rate of the target; every request goes to ``raw``. Returns who was asked:
    the `target` of the result.

    Raises `EnvironmentalError` when the server does not start, does not answer, or refuses the
    warm-up.
    """
    with _target(asked, artifact, threads=threads, log=folder / "server.log") as (endpoint, target):
        loop = Loop(endpoint, prompts, sizes, asked)
        first = asked.first_rate or 0.5 / loop.alone()

        def try_rate(rate: float, phase: str) -> bool:
            rows = [row | {"phase": phase} for row in loop.at(rate)]
            raw.writelines(json.dumps(row) + "\n" for row in rows)
            raw.flush()
            good = meets(rows, asked.slo)
            say(f"  server, {rate:.3g} requests/s: {'meets' if good else 'misses'} the SLO")
            return good

        search(
            try_rate,
            first,
            bisections=asked.bisections,
            until=time.monotonic() + 60 * asked.minutes,
        )
    return target


def search(
    try_rate: Callable[[float, str], bool], first: float, *, bisections: int, until: float
) -> None:
    """Double from ``first`` while rates hold (halve while none does), then bisect between the last
    that holds and the first that does not."""
    holds, fails, rate = 0.0, math.inf, first
    for _ in range(_DOUBLINGS):
        if try_rate(rate, "double"):
            holds = max(holds, rate)
        else:
            fails = min(fails, rate)
        if (holds and math.isfinite(fails)) or time.monotonic() >= until:
            break
        rate = rate * 2 if holds else rate / 2
    for _ in range(bisections):
        if not holds or math.isinf(fails) or time.monotonic() >= until:
            return
        rate = (holds + fails) / 2
        if try_rate(rate, "bisect"):
            holds = rate
        else:
            fails = rate


def arrivals(rate: float, count: int) -> list[float]:
    """Seconds from the first of ``count`` arrivals to each, at ``rate`` a second with exponential
    gaps; always the same ones."""
    gaps = np.random.default_rng((2, round(1e6 * rate))).exponential(1 / rate, count)
    times: list[float] = (np.cumsum(gaps) - gaps[0]).tolist()
    return times


class Loop:
    """Sends requests to one endpoint: one after another, or at a rate."""

    def __init__(
        self,
        endpoint: Endpoint,
        prompts: Callable[[int, int], list[int]],
        sizes: Sizes,
        asked: ServerScenario,
    ) -> None:
        self._endpoint, self._prompts, self._sizes, self._asked = endpoint, prompts, sizes, asked
        slo = (asked.slo.ttft_ms + sizes.new_tokens * asked.slo.tpot_ms) / 1e3
        self._patience = max(_PATIENCE, 5 * slo)

    def alone(self) -> float:
        """Seconds that one request takes when nothing else is asked.

        Raises `EnvironmentalError` when the server refuses it.
        """
        bodies = self._bodies(_WARM)

        async def run() -> list[Row]:
            async with open_session() as session:
                return [
                    await self._one(session, i, time.perf_counter(), 0.0, bodies[i])
                    for i in range(_WARM)
                ]

        rows = asyncio.run(run())
        if errors := [row["error"] for row in rows if row["error"]]:
            raise EnvironmentalError(
                f"{self._endpoint.url}: the server cannot be measured ({errors[0]})."
            )
        return float(np.median([row["at"][-1] for row in rows]))

    def at(self, rate: float) -> list[Row]:
        """One row a request, as in samples.jsonl, of random arrivals at ``rate`` requests/s."""
        due = arrivals(rate, self._asked.requests)
        bodies = self._bodies(len(due))

        async def run() -> list[Row]:
            async with open_session() as session:
                start = time.perf_counter() + _LEAD
                tasks = [self._one(session, i, start, due[i], bodies[i]) for i in range(len(due))]
                return list(await asyncio.gather(*tasks))

        return [{"event": "request", "rate": rate, **row} for row in asyncio.run(run())]

    def _bodies(self, count: int) -> list[bytes]:
        """Written out before anything is due."""
        prompts = (self._prompts(index, self._sizes.prompt_tokens) for index in range(count))
        return [
            json.dumps(streamed(self._endpoint, prompt, self._sizes.new_tokens)).encode()
            for prompt in prompts
        ]

    async def _one(
        self, session: aiohttp.ClientSession, index: int, start: float, after: float, body: bytes
    ) -> Row:
        """One request, due ``after`` seconds from ``start``; times in its row count from then."""
        due = start + after
        await asyncio.sleep(due - _AWAKE - time.perf_counter())
        while time.perf_counter() < due:
            await asyncio.sleep(0)  # others go on meanwhile
        sent, at, read, written, error = time.perf_counter(), list[float](), None, 0, None
        try:
            async with asyncio.timeout(max(0.0, due + self._patience - sent)):
                answer = await request(session, self._endpoint, body)
            at, read, written = answer.at, answer.prompt_tokens, answer.output_tokens
        except ValueError as failure:
            error = str(failure)
        except TimeoutError:
            error = f"no answer within {self._patience:.0f} s of its arrival"
        row: Row = {"index": index, "scheduled": round(after, 6), "sent": round(sent - start, 6)}
        row |= {
            "at": [round(t - due, 6) for t in at],
            "prompt_tokens": read,
            "output_tokens": written,
        }
        return row | {"error": error}


@contextlib.contextmanager
def _target(
    asked: ServerScenario, artifact: Path | None, *, threads: int, log: Path
) -> Iterator[tuple[Endpoint, dict[str, Any]]]:
    """The endpoint, and what to call it."""
    if isinstance(asked.target, UrlTarget):
        endpoint = find_endpoint(asked.target.url, asked.target.model, asked.target.key_variable)
        yield endpoint, {"label": asked.target.url, "kind": "url", "model": endpoint.model}
        return
    assert artifact is not None, "require_server was not asked"
    with serve(artifact, threads=threads, log=log) as url:
        endpoint = find_endpoint(url)
        yield (
            endpoint,
            {
                "label": f"limbeck serve {artifact.name}",
                "kind": "artifact",
                "model": endpoint.model,
            },
        )


@contextlib.contextmanager
def serve(artifact: Path, *, threads: int, log: Path) -> Iterator[str]:
    """`limbeck serve` as a process of ours while the block runs; its address.

    Raises `EnvironmentalError` when it does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = child_environment()
    environment.pop("LIMBECK_API_KEY", None)  # it listens to this machine alone, and to us
    command = ["serve", str(artifact), "--port", str(port), "--threads", str(threads)]
    command += ["--prefix-cache-mb", "0"]  # prompts repeat here, and each one is to be read
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from limbeck.app.cli import main; main()", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
        )
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + _READY
    while time.monotonic() < until:
        if process.poll() is not None:
            raise EnvironmentalError(
                f"limbeck serve ended with status {process.returncode}. Its last "
                f"words:\n{log.read_text('utf-8', errors='replace').strip()[-2000:]}"
            )
        with contextlib.suppress(httpx2.HTTPError):
            if httpx2.get(f"{url}/health", timeout=1).status_code == 200:
                return
        time.sleep(0.1)
    raise EnvironmentalError(
        f"limbeck serve was not ready after {_READY:.0f} s; its log "
        f"ends:\n{log.read_text('utf-8')[-2000:]}"
    )
