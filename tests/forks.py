"""Processes that begin with everything imported: a start takes milliseconds instead of seconds.

A server process imports the libraries once for a session, and forks every process that is asked
for. No test has run in it, so no thread and no state of one is inherited.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["compress.loop", "peft", "transformers.models.llama.modeling_llama"]
)


def start(
    work: Callable[..., object], *arguments: Any, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Start a process that calls ``work``, a function of a module, with ``arguments``."""
    process = _CONTEXT.Process(target=_call, args=(work, arguments, dict(environment or {})))
    process.start()
    return process


def _call(
    work: Callable[..., object], arguments: tuple[Any, ...], environment: Mapping[str, str]
) -> None:
    os.environ.update(environment)
    work(*arguments)


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
