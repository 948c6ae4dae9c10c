"""The parent's end of the processes that run arms: one process an arm, so that memory, threads and
libraries are its own.

Knows pipes. The other end is `serve_bench.worker.process`.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from limbeck.contract import errors
from limbeck.contract.environment import as_by_default
from limbeck.contract.errors import EnvironmentalError
from limbeck.contract.results.bench import Arm, TaskName
from serve_bench.measure.fairness import require_same_work
from serve_bench.measure.host.machine import child_environment

_TAIL = 2000  # characters of a worker's stderr in an error


class Worker:
    """The process that runs one arm.

    It waits on its pipe and uses no processor between commands.
    """

    def __init__(self, arm: Arm, *, threads: int, log: Path, task: TaskName = "causal-lm") -> None:
        """Start it; ``log`` receives its stderr, and the output of libraries."""
        self.arm, self._log = arm, log
        self.spawned = time.perf_counter()
        environment = child_environment(
            OMP_NUM_THREADS=str(threads),
            OPENBLAS_NUM_THREADS="1",  # numpy is used for scoring only
            TOKENIZERS_PARALLELISM="false",
            HF_HUB_OFFLINE="1",
        )
        environment = as_by_default(environment)
        self._process = launch(arm, task, environment, log)
        self.opened: dict[str, Any] = {}

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def open(self, *, threads: int) -> None:
        """Open the arm in it; raises as `ask`."""
        self.opened = self.ask(
            "open", runtime=self.arm.runtime, spec=dict(self.arm.spec), threads=threads
        )

    def generate(self, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
        """One greedy generation; times in seconds after its start.

        Raises `DataError` when it did other work than was asked.
        """
        answer = self.ask("generate", prompt=list(prompt), new_tokens=new_tokens)
        return self._checked(answer | {"rows": [answer["tokens"]]}, [prompt], new_tokens)

    def batch(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, Any]:
        """The same of several prompts of one length at once."""
        answer = self.ask(
            "batch", prompts=[list(prompt) for prompt in prompts], new_tokens=new_tokens
        )
        return self._checked(answer | {"rows": answer["tokens"]}, prompts, new_tokens)

    def _checked(
        self, answer: dict[str, Any], prompts: Sequence[Sequence[int]], new_tokens: int
    ) -> dict[str, Any]:
        require_same_work(
            self.arm.id,
            answer,
            rows=len(prompts),
            prompt_tokens=len(prompts[0]),
            new_tokens=new_tokens,
        )
        answer["at"] = [round(t - answer["started"], 7) for t in answer["at"]]
        return answer

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send one command and wait for its answer.

        Raises the worker's `LimbeckError`, or `EnvironmentalError`.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._died(command)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind = getattr(errors, answer["kind"], EnvironmentalError)
            raise kind(f"{self.arm.id}: {answer['error']}")
        return answer

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # it died with a command of ours unread
                    pipe.close()

    def _died(self, command: str) -> EnvironmentalError:
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        hint = (
            " Signal 9 is how Linux takes memory back: is there enough for all arms at once?"
            if code == -9
            else ""
        )
        tail = self._log.read_text("utf-8", errors="replace").strip()[-_TAIL:] or "(nothing)"
        return EnvironmentalError(
            f"{self.arm.id}: its process {how} during {command!r}.{hint} Its last words:\n{tail}"
        )


def launch(
    arm: Arm, task: TaskName, environment: dict[str, str], log: Path
) -> subprocess.Popen[str]:
    """Start the process of an arm; ``log`` receives its stderr."""
    with log.open("wb") as stderr:
        # -P: the user's working directory is no place to import from.
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "serve_bench.worker", task],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            text=True,
            bufsize=1,
        )


class Workers:
    """All arms' processes; leaving the context kills every one."""

    def __init__(self, folder: Path, *, threads: int, task: TaskName = "causal-lm") -> None:
        """``folder`` receives their logs; ``task`` decides which commands the processes know."""
        self._folder, self._threads, self._task = folder, threads, task
        self._all: dict[str, Worker] = {}

    def start(self, arm: Arm) -> Worker:
        """Start the process of an arm and open the arm in it."""
        self.create(arm)
        return self.open(arm)

    def create(self, arm: Arm) -> Worker:
        """Start the process of an arm; the arm is not open yet."""
        worker = Worker(
            arm, threads=self._threads, log=self._folder / f"{len(self._all)}.log", task=self._task
        )
        self._all[arm.id] = worker
        return worker

    def open(self, arm: Arm) -> Worker:
        """Open an arm in its process."""
        worker = self._all[arm.id]
        worker.open(threads=self._threads)
        return worker

    def stop(self, arms: Iterable[Arm]) -> None:
        """End the processes of some arms."""
        for arm in list(arms):
            self._all.pop(arm.id).kill()

    @property
    def running(self) -> list[Arm]:
        """Arms that are open."""
        return [worker.arm for worker in self._all.values()]

    def __getitem__(self, arm: Arm) -> Worker:
        return self._all[arm.id]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._all.values():
            worker.kill()
