"""The `server` scenario's client beside NVIDIA's aiperf: equal bodies, arrivals and server.

Both clients ask two servers. The first answers at a constant pace, so every difference is the
clients'. The second is `limbeck serve` on an exported folder: a path, or else a random model of
some 24 million parameters whose tokens are all printable. (aiperf times text, and a byte that is
half a character has none.) Both clients run at the same time, because a shared machine can be a
third slower in one minute than in the next.

The first round warms up and does not count. Each later round gives the ratio of the medians, ours
over theirs; the median over rounds is the result. aiperf counts from the sending, the scenario from
the scheduled arrival, so our own client's delay is in the ratio; it is printed too. Prints one JSON
object: the ratio farthest from 1, and each server's figures. Exits with 1 if a request failed or a
median is more than 5 % apart. `make bench-load` sets up .venvs/load-generators.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.contract.recipe import ServerScenario, Slo
from limbeck.runtime.endpoint import Endpoint, find_endpoint
from serve_bench.judge import scenarios
from serve_bench.measure.scenarios import load
from serve_bench.worker.client import streamed
from tests.pico import make_tokenizer
from tests.servers.fake_server import FakeServer

ROOT = Path(__file__).resolve().parents[3]
AIPERF = ROOT / ".venvs" / "load-generators" / "bin" / "aiperf"
FIRST, PACE = (
    0.1,
    0.01,
)  # seconds to the first token and between tokens, about those of the demo's student
PROMPT, NEW = 128, 32  # tokens
LIMIT = 0.05  # of a ratio from 1
_START = 5.0  # seconds that aiperf takes before its first request, about
Figures = dict[
    str, list[float]
]  # milliseconds of every request; and `errors`, one 1.0 for each failed request


def prompts(index: int, tokens: int) -> list[int]:
    """Random tokens, printable ones of a byte-level vocabulary."""
    return [int(token) for token in np.random.default_rng((5, index)).integers(0, 94, tokens)]


def ours(endpoint: Endpoint, asked: ServerScenario, rate: float) -> Figures:
    """One run of the scenario at ``rate`` requests/s."""
    rows = load.Loop(endpoint, prompts, load.Sizes(PROMPT, NEW), asked).at(rate)
    done = [row for row in rows if row["error"] is None]
    return {
        "ttft": [1e3 * scenarios.ttft(row) for row in done],
        "tpot": [1e3 * found for row in done if (found := scenarios.tpot(row)) is not None],
        "late": [1e3 * (row["sent"] - row["scheduled"]) for row in done],
        "errors": [1.0]
        * (len(rows) - len(done) + sum(row["output_tokens"] != NEW for row in done)),
    }


def theirs(endpoint: Endpoint, due: Sequence[float], folder: Path) -> Figures:
    """One run of aiperf: the bodies our client sends, at the same times."""
    trace, tokenizer = folder / "trace.jsonl", folder / "tokenizer"
    make_tokenizer().save_pretrained(
        tokenizer
    )  # it wants one, and asks it nothing: counts are the server's
    bodies = [streamed(endpoint, prompts(index, PROMPT), NEW) for index in range(len(due))]
    trace.write_text(
        "".join(
            json.dumps({"timestamp": 1e3 * at, "payload": body}) + "\n"
            for at, body in zip(due, bodies, strict=True)
        )
    )
    command = [
        AIPERF,
        "profile",
        "--model",
        endpoint.model,
        "--url",
        endpoint.url.removesuffix("/v1"),
        "--endpoint-type",
        "completions",
        "--streaming",
        "--input-file",
        trace,
        "--custom-dataset-type",
        "mooncake_trace",
        "--fixed-schedule",
        "--tokenizer",
        tokenizer,
        "--use-server-token-count",
        "--ui",
        "none",
        "--artifact-dir",
        folder / "artifacts",
        "--export-level",
        "records",
        "--no-gpu-telemetry",
        "--no-server-metrics",
        "--workers-max",
        "1",
        "--record-processors",
        "1",
    ]
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH"
    }  # our code is not for its environment
    ended = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True
    )
    if ended.returncode:
        sys.exit(
            f"aiperf ended with status {ended.returncode}:\n{(ended.stdout + ended.stderr)[-3000:]}"
        )
    (export,) = folder.rglob("profile_export.jsonl")
    records = [json.loads(line) for line in export.read_text().splitlines()]
    done = [record["metrics"] for record in records if record.get("error") is None]
    written = [found["output_sequence_length"]["value"] for found in done]
    return {
        "ttft": [found["time_to_first_token"]["value"] for found in done],
        "tpot": [found["inter_token_latency"]["value"] for found in done],
        "errors": [1.0] * (len(due) - len(done) + sum(count != NEW for count in written)),
    }


def compare(url: str, requests: int, rate: float, rounds: int, folder: Path) -> dict[str, Any]:
    """Both clients against one server at once, ``rounds`` times after one that does not count."""
    slo = Slo(ttft_ms=6e5, tpot_ms=6e5)  # nothing is given up while the machine is slow
    asked = ServerScenario(kind="server", slo=slo, requests=requests)
    endpoint = find_endpoint(url)
    load.Loop(endpoint, prompts, load.Sizes(PROMPT, NEW), asked).alone()
    due = load.arrivals(rate, requests)
    pairs = []
    with ThreadPoolExecutor(1) as beside:
        for index in range(rounds + 1):
            work = folder / str(index)
            work.mkdir(parents=True)
            other = beside.submit(theirs, endpoint, due, work)
            time.sleep(_START)
            pairs.append((ours(endpoint, asked, rate), other.result()))

    figures: dict[str, Any] = {"errors": sum(len(run["errors"]) for pair in pairs for run in pair)}
    for name in ("ttft", "tpot"):
        medians = [[float(np.median(run[name])) for run in pair] for pair in pairs[1:]]
        ratio = statistics.median(mine / other for mine, other in medians)
        figures |= {
            f"{name}_ratio": round(ratio, 4),
            f"{name}_ms": [[round(median, 2) for median in pair] for pair in medians],
        }
    return figures | {"late_ms": [round(float(np.median(run["late"])), 2) for run, _ in pairs[1:]]}


@contextlib.contextmanager
def constant() -> Iterator[str]:
    """The address of a server of constant pace, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,))
    process.start()
    try:
        yield here.recv()
    finally:
        here.send("end")
        process.join()


def _serve(pipe: multiprocessing.connection.Connection) -> None:
    with FakeServer(first=FIRST, pace=PACE) as server:
        pipe.send(server.url)
        pipe.recv()


def printable_model(folder: Path) -> Path:
    """An exported random model that says printable bytes alone."""
    from safetensors.numpy import load_file, save_file

    from export import export_student
    from tests.pico import make_model, make_student, pico_recipe

    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    }
    model = make_model(
        folder / "model",
        scale=0.05,
        max_position_embeddings=512,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=False,
        **sizes,
    )
    weights = load_file(model / "model.safetensors")
    symbols = make_tokenizer().convert_ids_to_tokens(range(258))
    silent = [
        index for index, symbol in enumerate(symbols) if len(symbol) > 1 or not "!" <= symbol <= "~"
    ]
    weights["lm_head.weight"][silent] = 0  # never above the best of what is left
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    make_student(folder / "student", model)
    return export_student(
        student=folder / "student", out=folder / "onnx", recipe=pico_recipe()
    ).path


def main() -> None:
    """Ask both servers by both clients."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "artifact", nargs="?", type=Path, help="exported folder whose tokens all carry text"
    )
    parser.add_argument(
        "--requests", type=int, default=40, help="requests of one client in one round"
    )
    parser.add_argument(
        "--rate", type=float, default=4.0, help="requests/s of the server of constant pace"
    )
    parser.add_argument(
        "--served-rate", type=float, default=1.0, help="requests/s of `limbeck serve`"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with constant() as url:
            found = {
                "constant": compare(
                    url, asked.requests, asked.rate, asked.rounds, folder / "constant"
                )
            }
        artifact = asked.artifact or printable_model(folder)
        with load.serve(artifact, threads=1, log=folder / "server.log") as url:
            found["served"] = compare(
                url, asked.requests, asked.served_rate, asked.rounds, folder / "served"
            )
    worst = {
        name: max(
            (figures[name] for figures in found.values()), key=lambda ratio: abs(np.log(ratio))
        )
        for name in ("ttft_ratio", "tpot_ratio")
    }
    errors = sum(figures["errors"] for figures in found.values())
    print(json.dumps({**worst, "errors": errors, **found}))
    sys.exit(1 if errors or any(abs(ratio - 1) > LIMIT for ratio in worst.values()) else 0)


if __name__ == "__main__":
    main()
