"""Processes that begin with everything imported: a start takes milliseconds instead of seconds.

A server process imports the libraries once for a session, and forks every process that is asked
for. No test has run in it, so no thread and no state of one is inherited.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from limbeck.contract.process import PARENT
from limbeck.contract.results.bench import Arm, TaskName
from serve_bench.measure import clock, units, workers
from serve_bench.measure.host import machine
from serve_bench.worker.__main__ import run

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "compress.loop",
        "onnxruntime",
        "peft",
        "serve_bench.worker.encoder",
        "serve_bench.worker.language",
        "transformers.models.bert.modeling_bert",
        "transformers.models.llama.modeling_llama",
    ]
)


def start(
    work: Callable[..., object], *arguments: Any, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Start a process that calls ``work``, a function of a module, with ``arguments``."""
    forkserver._forkserver.ensure_running()
    server = forkserver._forkserver._forkserver_address
    process = _CONTEXT.Process(
        target=_call, args=(work, arguments, dict(environment or {}), server)
    )
    process.start()
    return process


def _call(
    work: Callable[..., object],
    arguments: tuple[Any, ...],
    environment: Mapping[str, str],
    server: str,
) -> None:
    os.environ.update(environment)
    # What this process starts is forked by the server that forked it.
    forkserver._forkserver._forkserver_address = server
    use_server_of_parent()
    work(*arguments)


def use_server_of_parent() -> None:
    """Start no server in this process: the one that it was forked by, or that its parent used,
    does.
    """
    forkserver._forkserver.ensure_running = lambda: None


def command(folder: Path, *arguments: str) -> None:
    """The command line in ``folder``, for `start`, as the arms of its bench are forked; its output
    goes to the files stdout and stderr.
    """
    from limbeck.app import cli

    hurry(setattr, launch_any)
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    sys.argv = ["limbeck", *arguments]
    cli.main()


def share(work: Callable[..., object], *arguments: Any, processes: int, seconds: float) -> None:
    """Let ``processes`` do ``work`` as torchrun would start them; all must end well in time."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    everyone = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
    started = [
        start(
            work,
            *arguments,
            environment={k: str(v) for k, v in everyone.items()}
            | {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]
    until = time.monotonic() + seconds
    try:
        while any(process.exitcode is None for process in started):
            assert time.monotonic() < until, "not done in time"
            assert not any(process.exitcode for process in started), "its traceback is on stderr"
            time.sleep(0.05)
        assert [process.exitcode for process in started] == [0] * processes
    finally:
        for process in started:
            process.kill()
            process.join()


# Processes of the bench ---------------------------------------------------------------------------


class ForkedWorker:
    """The forked process of an arm, as far as a `Worker` needs `subprocess.Popen`."""

    def __init__(self, task: TaskName, environment: Mapping[str, str], log: Path) -> None:
        commands, asked = _CONTEXT.Pipe(duplex=False)
        told, answers = _CONTEXT.Pipe(duplex=False)
        with commands, asked, told, answers:
            # Its parent is the fork server, which ends with these tests.
            mine = {name: value for name, value in environment.items() if name != PARENT}
            self._process = start(_worker, task, commands, answers, log, environment=mine)
            self.stdin = os.fdopen(os.dup(asked.fileno()), "w", buffering=1, encoding="utf-8")
            self.stdout = os.fdopen(os.dup(told.fileno()), encoding="utf-8")
        self.pid = self._process.pid

    def kill(self) -> None:
        self._process.kill()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


def _worker(task: str, commands: Connection, answers: Connection, log: Path) -> None:
    with log.open("wb") as stderr:
        for number, file in enumerate((commands, answers, stderr)):
            os.dup2(file.fileno(), number)
    commands.close()
    answers.close()
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    run(task)


_launch = workers.launch


def launch_any(arm: Arm, task: TaskName, environment: dict[str, str], log: Path) -> Any:
    """As `serve_bench.measure.workers.launch`, with a fork for every arm."""
    return ForkedWorker(task, environment, log)


def launch(arm: Arm, task: TaskName, environment: dict[str, str], log: Path) -> Any:
    """As `serve_bench.measure.workers.launch`, with a fork for torch in eager mode.

    Other runtimes keep a process of their own: it holds no torch, and tests look at its memory.
    """
    if arm.runtime == "torch":
        return launch_any(arm, task, environment, log)
    return _launch(arm, task, environment, log)


def hurry(set_attribute: Callable[[Any, str, Any], None], start_arm: Callable[..., Any]) -> None:
    """Let benches start arms by ``start_arm`` and leave out what makes times steady: tests with
    other work on the same cores look at what is timed, not at how long it takes.
    """
    set_attribute(workers, "launch", start_arm)
    set_attribute(units, "_WARM_SECONDS", 0.0)
    set_attribute(units, "_WARM_PATIENCE", 0.0)
    set_attribute(units, "_RUN", 0.0)
    set_attribute(clock, "PAUSE", 0.0)
    set_attribute(machine, "_WATCHED", 0.0)
