"""Memory over 10,000 steps of training, generated tokens, and requests to a server.

``python -m tests.faults.growth [NAME …]`` prints a table; exits with 1 where memory grows. Each
piece of work runs in a process of its own, and its resident memory is read from outside. The first
third warms up and is not judged.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import http.client
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy

from limbeck.contract.recipe import parse_recipe
from tests.faults.killing import job

COUNT = 10_000
ALLOWED = 1 << 20  # bytes over the judged part: a hundred a step and more would be seen
_WINDOWS = 20
_INTERVAL = 0.1  # seconds between two readings


@dataclass(frozen=True)
class Slope:
    """A line through the medians of `_WINDOWS` windows, in bytes over the judged part."""

    growth: float
    error: float  # standard error of the growth

    @property
    def grows(self) -> bool:
        """Whether more than `ALLOWED` was gained beyond doubt (two standard errors)."""
        return self.growth - 2 * self.error > ALLOWED


def slope(resident: Sequence[float]) -> Slope:
    """Of readings at equal intervals, in bytes; the first third is left out."""
    judged = np.asarray(resident[len(resident) // 3 :])
    medians = [float(np.median(part)) for part in np.array_split(judged, _WINDOWS)]
    line = scipy.stats.linregress(np.linspace(0, 1, _WINDOWS), medians)
    return Slope(float(line.slope), float(line.stderr))


def train(folder: Path) -> None:
    """Steps of the tiny job; evaluations and checkpoints among them."""
    from compress import distill

    raw = job.recipe().model_dump(mode="json", exclude_unset=True)
    raw["training"] |= {
        "tokens": COUNT * raw["training"]["batch_tokens"], "evaluate_every": 500,
        "checkpoint_every": 500,
    }  # fmt: skip
    distill(recipe=parse_recipe(raw), out=folder / "grown")


def generate(folder: Path) -> None:
    """Tokens, as the bench's process makes them: 100 at a time after prompts of several lengths."""
    from serve_bench.worker.language import Session

    session = Session()
    spec = {"artifact": str(folder / "run" / "onnx"), "form": "int8-weight"}
    session.open("onnxruntime", spec, threads=1)
    for turn in range(COUNT // 100):
        prompt = [5 + (turn * 7 + n) % 200 for n in range(1 + turn % 24)]
        session.answer("generate", {"prompt": prompt, "new_tokens": 100})


def serve(folder: Path) -> None:
    """Requests of four clients at once; prompts differ, and some begin alike.

    The prefix cache is full after some forty requests: until then it grows as it should. Words
    come again, because the tokenizer remembers up to 10,000 of them.
    """
    from tests.serve_bench.serve.asking import serving

    with serving(
        folder / "run" / "onnx", form="int8-weight", grace=1.0, prefix_bytes=200_000
    ) as server:
        port = int(server.address.rpartition(":")[2])
        with concurrent.futures.ProcessPoolExecutor(
            4, mp_context=multiprocessing.get_context("spawn")
        ) as clients:
            for done in [clients.submit(ask, port, first) for first in range(4)]:
                done.result()


def ask(port: int, first: int) -> None:
    """A quarter of the requests."""
    model = job.recipe().name
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for number in range(first, COUNT, 4):
        prompt = f"{'shared ' * (number % 3)}{number % 97}"
        body = {"model": model, "prompt": prompt, "max_tokens": 3, "seed": number}
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"}
        )
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        answer.read()


WORK: dict[str, Callable[[Path], None]] = {
    "steps of training": train,
    "tokens generated": generate,
    "requests served": serve,
}


def readings(work: Callable[[Path], None], folder: Path) -> list[float]:
    """Resident bytes of a process that does ``work``, every `_INTERVAL` until its end."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=(folder,))
    process.start()
    statm, found = Path(f"/proc/{process.pid}/statm"), []
    page = os.sysconf("SC_PAGE_SIZE")
    while process.is_alive():
        if pages := int(statm.read_text().split()[1]):  # 0: it has ended just now
            found.append(float(pages * page))
        time.sleep(_INTERVAL)
    assert process.exitcode == 0, f"{work.__name__} ended with {process.exitcode}"
    return found


def main() -> int:
    """Measure the chosen kinds of work."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.growth", description=__doc__)
    parser.add_argument("names", nargs="*", help="of work; default: all three")
    asked, failures = parser.parse_args(), 0
    print(
        f"{'10,000':20} {'seconds':>8} {'MB held':>8} {'growth, MB':>11} {'error':>6}", flush=True
    )
    with tempfile.TemporaryDirectory(prefix="limbeck-growth-") as root:
        folder = Path(root)
        for stage in ("compress", "export"):
            job.run_stage(stage, folder)
        for name, work in WORK.items():
            if asked.names and not any(part in name for part in asked.names):
                continue
            started = time.monotonic()
            found = readings(work, folder)
            line = slope(found)
            failures += line.grows
            print(
                f"{name:20} {time.monotonic() - started:8.0f} {np.median(found) / 2**20:8.0f} "
                f"{line.growth / 2**20:11.2f} {line.error / 2**20:6.2f}"
                f"{'   GROWS' if line.grows else ''}",
                flush=True,
            )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
