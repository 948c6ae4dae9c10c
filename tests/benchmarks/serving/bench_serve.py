"""Many streams at once against `limbeck serve` in a process of its own: no error, no leak.

Without a path it exports a tiny random model; with one (a run folder or an exported folder) it
serves that. Every client sends one request after another with the official client: streams read to
the end, streams left early, whole answers. Memory is the server's resident set without the caches,
read twice a second; the caches follow the tokens held and come and go by design.

The rule for a leak: the same load runs first as a warm-up, in which allocators, thread pools and
caches of a fixed size fill. (Prompts use a thousand words, so that the tokenizer's cache of 10,000
words per thread fills too.) Then the time is cut into six windows. The smallest resident set of
each window is taken, and the median slope between all pairs is the growth. A leak raises this floor
for good; memory in use, or garbage that waits to be collected, does not. Prints one JSON object,
and exits with 1 if a bound does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import openai
import psutil

CACHE_MB = 500
SLACK_MB = 300  # what answers, activations and the allocator may take beside the caches
SLOPE_MB = 2.0  # a minute
WINDOWS = 6
WORDS = ["".join(random.Random(word).choices("abcdefgh", k=1 + word % 9)) for word in range(1000)]
LEFT_EARLY, AT_ONCE = 0.15, 0.15  # shares of the requests


@dataclass
class Load:
    """What the clients saw."""

    address: str
    model: str
    most: int  # tokens of the context that a request uses at most
    requests: int = 0
    cancelled: int = 0
    errors: list[str] = field(default_factory=list)


async def client(load: Load, seed: int, until: float) -> None:
    """Ask until the time is over."""
    draw = random.Random(seed)
    async with openai.AsyncOpenAI(
        base_url=load.address, api_key="none", max_retries=0, timeout=120
    ) as api:
        while time.monotonic() < until:
            prompt = " ".join(draw.choices(WORDS, k=load.most))[: draw.randint(1, load.most // 2)]
            count, kind = draw.randint(4, load.most // 2), draw.random()
            try:
                answer = await api.completions.create(
                    model=load.model,
                    prompt=prompt,
                    max_tokens=count,
                    seed=draw.randrange(2**31),
                    temperature=draw.choice([0.0, 1.0]),
                    top_p=draw.choice([0.9, 1.0]),
                    stream=kind >= AT_ONCE,
                    extra_body={"ignore_eos": True},
                )
                if isinstance(answer, openai.AsyncStream):
                    leave = draw.randint(1, count) if kind < AT_ONCE + LEFT_EARLY else count + 2
                    seen = 0
                    async with answer:
                        async for _ in answer:
                            if (seen := seen + 1) == leave:
                                break
                    load.cancelled += leave <= count
                    if leave > count and seen != count + 1:
                        load.errors.append(f"{seen} events, expected {count + 1}")
                elif answer.usage.completion_tokens != count:
                    load.errors.append(f"{answer.usage.completion_tokens} tokens, expected {count}")
            except openai.APIError as error:
                load.errors.append(f"{type(error).__name__}: {error} ({error.__cause__!r})")
                await asyncio.sleep(0.1)
            load.requests += 1


async def drive(load: Load, streams: int, seconds: float) -> None:
    """All clients at once."""
    until = time.monotonic() + seconds
    await asyncio.gather(*(client(load, seed, until) for seed in range(streams)))


def metric(address: str, name: str) -> float:
    """One figure of /metrics."""
    text = urllib.request.urlopen(address.replace("/v1", "/metrics")).read().decode()
    found = re.search(rf"^{name} ([\d.e+]+)$", text, re.MULTILINE)
    assert found, name
    return float(found[1])


def pico(root: Path) -> Path:
    """A tiny exported student."""
    from export import export_student
    from tests.pico import make_model, make_student, pico_recipe

    make_student(root / "student", make_model(root / "model", max_position_embeddings=512))
    return export_student(student=root / "student", out=root / "onnx", recipe=pico_recipe()).path


def main() -> None:
    """Serve, drive, measure, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", nargs="?", type=Path, help="run folder or exported folder")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--warm-up", type=float, default=30, help="seconds of the same load before")
    parser.add_argument("--streams", type=int, default=64)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.artifact or pico(Path(temporary))
        options = ["--port", "0", "--max-batch", str(asked.streams), "--cache-mb", str(CACHE_MB)]
        server = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from limbeck.app.cli import main; main()",
                "serve",
                str(folder),
                *options,
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            failures, figures = measure(server, asked.streams, asked.warm_up, asked.seconds)
        finally:
            server.terminate()
            server.wait(timeout=60)
    for failure in failures:
        print(failure, file=sys.stderr)
    print(json.dumps(figures))
    sys.exit(1 if failures else 0)


def growth(at: Sequence[float], megabytes: Sequence[float]) -> float:
    """Median slope between the smallest values of the windows, MB per minute (Theil-Sen)."""
    parts = np.array_split(np.arange(len(at)), WINDOWS)
    lows = [part[np.argmin(np.asarray(megabytes)[part])] for part in parts]
    slopes = [
        60 * (megabytes[b] - megabytes[a]) / (at[b] - at[a])
        for a, b in itertools.combinations(lows, 2)
    ]
    return float(np.median(slopes))


def measure(
    server: subprocess.Popen[str], streams: int, warm_up: float, seconds: float
) -> tuple[list[str], dict[str, float]]:
    """What did not hold, and the figures."""
    assert server.stderr
    line = server.stderr.readline()
    found = re.fullmatch(r"serving (.+) \(.*\) at (\S+)\n", line)
    assert found, line + server.stderr.read()
    threading.Thread(target=lambda: sys.stderr.writelines(server.stderr or []), daemon=True).start()
    model, address = found[1], found[2]
    card = json.loads(urllib.request.urlopen(f"{address}/models").read())["data"][0]
    load = Load(address, model, min(256, card["max_model_len"]))
    asyncio.run(
        drive(load, 1, 1)
    )  # one client first: what an idle server holds once it has answered
    process, idle = psutil.Process(server.pid), psutil.Process(server.pid).memory_info().rss / 1e6

    samples: list[tuple[float, float, float]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            cached = metric(address, "limbeck_cache_bytes") / 1e6
            samples.append((time.monotonic(), process.memory_info().rss / 1e6, cached))

    watching = threading.Thread(target=watch)
    generated, started = metric(address, "limbeck_generated_tokens_total"), time.monotonic()
    watching.start()
    asyncio.run(drive(load, streams, warm_up + seconds))
    took = time.monotonic() - started
    over.set()
    watching.join()
    deadline = time.monotonic() + 10
    while metric(address, "limbeck_running") and time.monotonic() < deadline:
        time.sleep(0.05)

    at, megabytes, cached = np.array(samples).T
    late = (at >= started + warm_up) & (at <= started + warm_up + seconds)
    slope = growth(at[late], (megabytes - cached)[late])
    figures = {
        "errors": len(load.errors),
        "requests": load.requests,
        "cancelled": load.cancelled,
        "rss_slope_mb_per_min": round(slope, 2),
        "idle_rss_mb": round(idle, 1),
        "peak_rss_mb": round(float(megabytes.max()), 1),
        "peak_cache_mb": round(float(cached.max()), 1),
        "slots_left": int(metric(address, "limbeck_slots") - metric(address, "limbeck_running")),
        "tokens_per_s": round(
            (metric(address, "limbeck_generated_tokens_total") - generated) / took, 1
        ),
    }
    failures = list(dict.fromkeys(load.errors))[:5]
    if slope > SLOPE_MB:
        failures.append(f"memory grows by {slope:.1f} MB per minute, at most {SLOPE_MB:g} expected")
    if figures["peak_rss_mb"] > idle + CACHE_MB + SLACK_MB:
        failures.append(
            f"{figures['peak_rss_mb']} MB resident, "
            f"at most {idle + CACHE_MB + SLACK_MB:.0f} expected"
        )
    if figures["slots_left"] != streams:
        failures.append(f"{figures['slots_left']} of {streams} slots are free at the end")
    if not load.cancelled:
        failures.append("no request was left early; give it more seconds")
    return failures, figures


if __name__ == "__main__":
    main()
