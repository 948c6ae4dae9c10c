"""Child processes that end when their parent ends, even if the parent is killed."""

from __future__ import annotations

import ctypes
import os
import signal

PARENT = "LIMBECK_PARENT"  # environment variable: process id of the parent that a child ends with
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """End this process when the process that `PARENT` names ends; without that variable, do
    nothing.

    The system sends the signal (Linux only). Call it first of all in a process that was started to
    serve another one.
    """
    parent = os.environ.pop(PARENT, None)  # this process's own children have another parent
    if parent is None or not parent.isdecimal():
        return
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    if str(os.getppid()) != parent:  # it ended before the system was asked
        os._exit(1)
