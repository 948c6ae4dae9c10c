"""OpenVINO GenAI's side of the serving benchmarks, in its own environment.

    python peer_openvino.py convert MODEL OUT
        the model with int8 weights, by optimum-intel and nncf
    python peer_openvino.py serve FOLDER THREADS PREFIX_CACHE
        one JSON job a line on standard input, one JSON answer a line on standard output

There is no HTTP between, which flatters it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

_ANSWERS = os.fdopen(os.dup(1), "w")  # OpenVINO may print; that goes to standard error from here on
os.dup2(2, 1)


def convert(model: str, out: str) -> None:
    """Write the stateful int8 model and its tokenizer."""
    program = str(Path(sys.executable).parent / "optimum-cli")
    command = [program, "export", "openvino", "--model", model, "--weight-format", "int8"]
    subprocess.run([*command, "--task", "text-generation-with-past", out], check=True)


class Peer:
    """One pipeline with continuous batching."""

    def __init__(self, folder: str, threads: int, *, prefix_cache: bool) -> None:
        import numpy
        import openvino
        import openvino_genai as genai

        self._numpy, self._openvino, self._genai = numpy, openvino, genai
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 1  # GB
        scheduler.enable_prefix_caching = prefix_cache
        self._pipeline = genai.ContinuousBatchingPipeline(
            folder, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        self.library = f"openvino-genai {genai.__version__}"
        self._next = 0

    def _add(self, prompt: list[int], new_tokens: int) -> Any:
        options = self._genai.GenerationConfig()
        options.max_new_tokens, options.min_new_tokens = new_tokens, new_tokens
        options.ignore_eos, options.do_sample = True, False
        tokens = self._openvino.Tensor(self._numpy.asarray([prompt], self._numpy.int64))
        self._next += 1
        return self._pipeline.add_request(self._next, tokens, options)

    def generate(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        """Seconds from the start to each token."""
        return {"at": self.load([prompt], new_tokens, 1)["at"][0]}

    def load(self, prompts: list[list[int]], new_tokens: int, streams: int) -> dict[str, Any]:
        """Answer all ``prompts``, at most ``streams`` at once; seconds from a prompt's start."""
        waiting, running = deque(prompts), []
        times: list[list[float]] = []
        started = time.perf_counter()
        while waiting or running:
            while waiting and len(running) < streams:
                begun = time.perf_counter()
                times.append([])
                running.append((self._add(waiting.popleft(), new_tokens), begun, times[-1]))
            self._pipeline.step()
            now = time.perf_counter()
            for handle, begun, seen in running:
                while handle.can_read():
                    for output in handle.read().values():
                        seen.extend([now - begun] * len(output.generated_ids))
            running = [entry for entry in running if len(entry[2]) < new_tokens]
        return {"seconds": time.perf_counter() - started, "at": times}


def main() -> None:
    """Convert, or answer until standard input ends."""
    if sys.argv[1] == "convert":
        convert(*sys.argv[2:])
        return
    peer = Peer(sys.argv[2], int(sys.argv[3]), prefix_cache=sys.argv[4] == "1")
    print(json.dumps({"library": peer.library}), file=_ANSWERS, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(getattr(peer, job.pop("do"))(**job)), file=_ANSWERS, flush=True)


if __name__ == "__main__":
    main()
