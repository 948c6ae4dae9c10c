"""Work in a child process: what it returns and raises, and how it ends."""

from __future__ import annotations

import operator
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from limbeck.contract.child import Child, TooMuch


def test_results_and_errors_come_back() -> None:
    child = Child()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: child.call(operator.neg, n, seconds=5), range(50)))
    assert found == [-n for n in range(50)]
    first = child.call(os.getpid, seconds=5)
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        child.call(operator.truediv, 1, 0, seconds=5)
    assert child.call(os.getpid, seconds=5) == first != os.getpid()


def test_a_call_that_takes_too_much_ends_the_child_and_the_next_one_has_another() -> None:
    child = Child()
    with pytest.raises(TooMuch, match=r"it was still at work after 0\.2 s"):
        child.call(operator.pow, 9, 9**9, seconds=0.2)
    with pytest.raises(TooMuch, match=r"it took more memory than it may \(1024 MB, or"):
        child.call(operator.mul, [None], 1 << 28, seconds=5)
    with pytest.raises(TooMuch, match="the system killed its process, most likely because memory"):
        child.call(signal.raise_signal, signal.SIGKILL, seconds=5)
    with pytest.raises(TooMuch, match=r"or failed \(SIGABRT\)"):
        child.call(os.abort, seconds=5)
    with pytest.raises(RuntimeError, match="status 3; its message says why"):
        child.call(exec, "import os; os._exit(3)", seconds=5)  # coverage replaces os._exit
    with pytest.raises(RuntimeError, match="_Unsendable: a lock"):
        child.call(_fail, seconds=5)
    assert child.call(operator.neg, 1, seconds=5) == -1


class _Unsendable(Exception):
    def __reduce__(self) -> str:
        raise TypeError("cannot be pickled")


def _fail() -> None:
    raise _Unsendable("a lock")


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


_PARENT = """
import operator, os, time
from limbeck.contract.child import Child
child = Child()
print(child.call(os.getpid, seconds=5), flush=True)
{then}
"""


@pytest.mark.parametrize(
    "then", ["", "child.call(operator.pow, 9, 9**9, seconds=2)", "time.sleep(60)"]
)
def test_the_child_ends_with_its_parent(then: str) -> None:
    command = [sys.executable, "-W", "error", "-c", _PARENT.format(then=then)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    if then:
        parent.send_signal(signal.SIGKILL)
    _, errors = parent.communicate(timeout=30)
    assert errors == b""
    ends = time.monotonic() + 20
    while runs(child):
        assert time.monotonic() < ends
        time.sleep(0.05)
