"""The commands of a language model's process. Times are of `time.perf_counter`, in seconds.

ready                               -> at: when the interpreter was up
open       runtime, spec, threads   -> import_s, load_s, facts
generate   prompt, new_tokens       -> started, at (a time a token), tokens, device_s (or null),
                                       prompt_tokens (by the runtime's count), peak_rss_bytes
batch      prompts, new_tokens      -> the same; tokens are rows, times are of a column
last       ids                      -> token: the greedy choice of the timed graph after ``ids``
logp       ids, vocabulary, file    -> labels; writes log-probabilities [L - 1, V] to ``file``
score      ids, scored, vocabulary, -> nll, kl, top1 (sums over scored labels), labels, last
           mixture
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from serve_bench.judge import quality
from serve_bench.worker.process import peak_rss
from serve_bench.worker.runtimes import Runtime, open_runtime, prepare


class Session:
    """State of the worker between commands."""

    def __init__(self) -> None:
        self.runtime: Runtime | None = None
        # ids and log-probabilities of the last block
        self._scored: tuple[tuple[int, ...], Any] | None = None

    def answer(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Do one command."""
        if command == "ready":
            return {"at": time.perf_counter()}
        if command == "open":
            return self.open(**arguments)
        assert self.runtime is not None, f"{command} before open"
        match command:
            case "generate":
                answer = generate(self.runtime, [arguments["prompt"]], arguments["new_tokens"])
                return answer | {"tokens": answer["tokens"][0]}
            case "batch":
                return generate(self.runtime, **arguments)
            case "last":
                return {
                    "token": int(self.runtime.begin(np.asarray([arguments["ids"]], np.int64), 1)[0])
                }
            case "logp":
                return self.logp(**arguments)
            case "score":
                return self.score(**arguments)
            case "evaluate":
                return self.evaluate(**arguments)
        raise AssertionError(f"no such command: {command}")

    def open(self, runtime: str, spec: dict[str, Any], threads: int) -> dict[str, Any]:
        """Import the libraries, open the arm, and time both."""
        started = time.perf_counter()
        prepare(runtime, spec)
        imported = time.perf_counter()
        self.runtime = open_runtime(runtime, spec, threads=threads)
        return {
            "import_s": imported - started,
            "load_s": time.perf_counter() - imported,
            "facts": self.runtime.facts,
        }

    def logp(self, ids: list[int], vocabulary: int, file: str) -> dict[str, Any]:
        """Write this arm's log-probabilities for every token but the first."""
        log_probabilities = self._log_probabilities(ids, vocabulary)
        np.save(file, log_probabilities)
        return {"labels": len(log_probabilities)}

    def score(
        self, ids: list[int], scored: list[int], vocabulary: int, mixture: str | None
    ) -> dict[str, Any]:
        """Sums over the labels of one block that ``scored`` marks with 1.

        ``mixture`` is the file of the teachers' log-probabilities, or None.
        """
        mine = self._log_probabilities(ids, vocabulary)
        teachers = np.load(mixture, mmap_mode="r") if mixture else None
        return quality.sums(mine, np.asarray(ids[1:]), teachers, np.asarray(scored, bool))

    def evaluate(self, ids: list[int], scored: list[int], vocabulary: int) -> dict[str, Any]:
        """Nats of the tokens that ``scored`` marks with 1, and how many are the first choice."""
        assert self.runtime is not None
        marked = np.asarray(scored, bool)
        logits = self.runtime.score(np.asarray(ids, np.int64))[:-1, :vocabulary]
        log_p, labels = quality.log_softmax(logits[marked]), np.asarray(ids[1:])[marked]
        return {
            "nll": -float(log_p[np.arange(len(labels)), labels].astype(np.float64).sum()),
            "right": int((log_p.argmax(1) == labels).sum()),
        }

    def _log_probabilities(self, ids: list[int], vocabulary: int) -> quality.LogProbabilities:
        assert self.runtime is not None
        key = (vocabulary, *ids)
        if self._scored is None or self._scored[0] != key:
            self._scored = None  # before the next one is made: one block in memory, not two
            logits = self.runtime.score(np.asarray(ids, np.int64))
            self._scored = (key, quality.log_softmax(logits[:-1, :vocabulary]))
        found: quality.LogProbabilities = self._scored[1]
        return found


def generate(runtime: Runtime, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Greedy, exactly ``new_tokens`` tokens a row, end tokens included, with the time at which each
    column was known."""
    clock = time.perf_counter
    rows = np.array(prompts, np.int64)
    at, columns = [0.0] * new_tokens, [rows[:, 0]] * new_tokens
    started = clock()
    columns[0] = runtime.begin(rows, new_tokens)
    at[0] = clock()
    for index in range(1, new_tokens):
        columns[index] = runtime.step(columns[index - 1])
        at[index] = clock()
    return {
        "started": started,
        "at": at,
        "tokens": np.stack(columns, axis=1).tolist(),
        "prompt_tokens": runtime.prompt_tokens(),
        "device_s": runtime.device_seconds(),
        "peak_rss_bytes": peak_rss(),
    }
