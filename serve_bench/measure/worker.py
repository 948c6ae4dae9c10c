"""The process of one arm: ``python -m serve_bench.measure.worker``, one JSON command a line on stdin, one JSON answer on stdout.

Whatever libraries print goes to stderr. Between commands it waits on the pipe and uses no processor; it ends when the pipe
is closed. Times are of `time.perf_counter`, in seconds.

    ready                                         -> at: when the interpreter was up
    open       runtime, spec, threads             -> import_s, load_s, facts
    generate   prompt, new_tokens                 -> started, at (a time a token), tokens, prompt_tokens (as the runtime counted
                                                     them), device_s (or null), peak_rss_bytes
    batch      prompts (rows), new_tokens         -> the same; tokens are rows, times are of a column
    last       ids                                -> token: the greedy choice after ``ids``, by the graph that is timed
    logp       ids, vocabulary, file              -> labels; writes log-probabilities [L - 1, V] to ``file``
    score      ids, scored, vocabulary, mixture   -> nll, kl, top1 (sums over scored labels), labels, last
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from limbeck.contract.errors import LimbeckError
from limbeck.contract.process import end_with_parent
from serve_bench.judge import quality
from serve_bench.measure.runtimes import Runtime, open_runtime, prepare


class Session:
    """What the worker holds between commands."""

    def __init__(self) -> None:
        self.runtime: Runtime | None = None
        self._scored: tuple[tuple[int, ...], Any] | None = (
            None  # ids and log-probabilities of the last block
        )

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
        """Write what this arm says of every token but the first."""
        log_probabilities = self._log_probabilities(ids, vocabulary)
        np.save(file, log_probabilities)
        return {"labels": len(log_probabilities)}

    def score(
        self, ids: list[int], scored: list[int], vocabulary: int, mixture: str | None
    ) -> dict[str, Any]:
        """Sums over the labels of one block, of which ``scored`` says 1; ``mixture`` is the file of the teachers' log-probabilities, or none."""
        mine = self._log_probabilities(ids, vocabulary)
        teachers = np.load(mixture, mmap_mode="r") if mixture else None
        return quality.sums(mine, np.asarray(ids[1:]), teachers, np.asarray(scored, bool))

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
    """Greedy, exactly ``new_tokens`` tokens a row whatever they are, with the time at which each column was known."""
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


def peak_rss() -> int:
    """The most memory this process ever held, in bytes, loading included."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


class Answering(Protocol):
    """Who answers the commands of a process."""

    def answer(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Do one command."""


def serve(commands: IO[str], answers: IO[str], session: Answering) -> None:
    """Answer commands until there are no more. An error of the user's making is an answer; a defect ends the process."""
    for line in commands:
        arguments = json.loads(line)
        try:
            answer = session.answer(arguments.pop("command"), arguments)
        except LimbeckError as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        except KeyboardInterrupt:
            return
        except Exception:
            traceback.print_exc()
            sys.exit(1)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main(session: Answering) -> None:
    """Keep the real stdout for answers and point file descriptor 1 at stderr, where C libraries print too."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        serve(sys.stdin, answers, session)
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(130)


if __name__ == "__main__":
    main(Session())
