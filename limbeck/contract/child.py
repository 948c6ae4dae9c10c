"""Functions on strangers' input, run in a child process that ends when they take too much.

Knows processes and their limits; knows nothing of the functions. Nothing else can stop a
computation within C, or bound its memory.
"""

from __future__ import annotations

import atexit
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

MEMORY = 1 << 30  # bytes that one call may add
_TOO_LARGE = f"it took more memory than it may ({MEMORY >> 20} MB, or what `ulimit -v` leaves)"
_SLEEP = 60.0  # seconds beyond its processor time that a call may wait for a processor
_GRACE = 5.0  # seconds until a process that has closed its pipe is gone
T = TypeVar("T")


class TooMuch(Exception):
    """A function that took more time or memory than it may, or a value nested too deeply."""


class Child:
    """A child process that is started at the first call and again after one that took too much.

    Any thread may call; one call runs at a time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._owner = 0  # process id; a forked copy of this process needs a child of its own

    def call(self, function: Callable[..., T], *given: Any, seconds: float) -> T:
        """``function(*given)``, a function of a module on values that can be pickled.

        It may take ``seconds`` of a processor and `MEMORY`. Raises `TooMuch`, and what the
        function raises.
        """
        with self._lock:
            pipe = self._started()
            try:
                pipe.send((function, given, seconds))
                if not pipe.poll(seconds + _SLEEP):
                    self._end()
                    raise TooMuch(f"it had no result after {seconds + _SLEEP:g} s")
                done, result = pipe.recv()
            except RecursionError:  # before a byte was sent
                raise TooMuch("the values are nested too deeply") from None
            except (EOFError, OSError):
                raise TooMuch(self._why(seconds)) from None
            except BaseException:  # an answer that nobody reads must not be that of the next call
                self._end()
                raise
        if done:
            return result  # type: ignore[no-any-return]  # of the function, in the child
        if isinstance(result, MemoryError):
            raise TooMuch(_TOO_LARGE)
        raise result

    def _started(self) -> Connection:
        alive = self._process is not None and self._process.poll() is None
        if self._pipe is not None and alive and self._owner == os.getpid():
            return self._pipe
        self._end()
        ours, theirs = Pipe()
        # The child finds the same packages. `-P` keeps out the folder that this process is in.
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        theirs.close()
        self._pipe, self._owner = ours, os.getpid()
        atexit.unregister(self._end)
        atexit.register(self._end)
        return ours

    def _why(self, seconds: float) -> str:
        """Why the child ended within a call. Raises `RuntimeError` when that is a defect."""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)  # its pipe closes a moment before it has a status
        self._end()
        status = self._process.returncode
        if status >= 0:
            raise RuntimeError(
                f"the child process ended with status {status}; its message says why"
            )
        if -status == signal.SIGPROF:
            return f"it was still at work after {seconds:g} s"
        if -status == signal.SIGKILL:
            return "the system killed its process, most likely because memory ran out"
        return f"{_TOO_LARGE}, or failed ({signal.Signals(-status).name})"

    def _end(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
        self._pipe = None


def _serve(pipe: Connection) -> None:
    """Run what comes through ``pipe`` until the parent closes it or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    while True:
        try:
            function, given, seconds = pipe.recv()  # this imports the function's module
        except (EOFError, ConnectionResetError):
            return
        if statm.exists():
            now = int(statm.read_bytes().split()[0]) * resource.getpagesize()
            within = now + MEMORY if soft == resource.RLIM_INFINITY else min(now + MEMORY, soft)
            resource.setrlimit(resource.RLIMIT_AS, (within, hard))
        signal.setitimer(signal.ITIMER_PROF, seconds)  # then the system ends this process
        try:
            answer = True, function(*given)
        except BaseException as error:
            answer = False, error
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        try:
            pipe.send(answer)
        except (pickle.PicklingError, TypeError, AttributeError):  # a panic of Rust, for example
            pipe.send((False, RuntimeError(f"{type(answer[1]).__name__}: {answer[1]}")))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
