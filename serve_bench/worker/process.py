"""The process of one arm: one JSON command a line on stdin, one JSON answer a line on stdout.

Output of libraries goes to stderr. Between commands the process waits on the pipe and uses no
processor; it ends when the pipe is closed. The commands are in `serve_bench.worker.language` and
`serve_bench.worker.encoder`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import IO, Any, Protocol

from limbeck.contract.errors import LimbeckError
from limbeck.contract.process import end_with_parent


def peak_rss() -> int:
    """The most memory this process ever held, in bytes, loading included."""
    try:
        for line in Path("/proc/self/status").read_text("utf-8").splitlines():
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
    """Answer commands until the pipe is closed.

    An error of the user's making is an answer; a defect ends the process.
    """
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
    """Keep the real stdout for answers; C libraries print to file descriptor 1, now stderr."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        serve(sys.stdin, answers, session)
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(130)
