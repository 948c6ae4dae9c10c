"""A child ends with its parent, also when the parent is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from limbeck.contract.process import PARENT
from serve_bench.measure.host.machine import child_environment

_CHILD = """
import time
from limbeck.contract.process import end_with_parent
end_with_parent()
print("up", flush=True)
time.sleep(60)
"""
_PARENT = """
import subprocess, sys, time
from serve_bench.measure.host.machine import child_environment
command = [sys.executable, "-c", sys.argv[1]]
child = subprocess.Popen(command, env=child_environment(), stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def test_a_child_ends_when_its_parent_is_killed() -> None:
    command = [sys.executable, "-c", _PARENT, _CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert _runs(child)
        parent.send_signal(signal.SIGKILL)
    until = time.monotonic() + 10
    while _runs(child) and time.monotonic() < until:
        time.sleep(0.02)
    assert not _runs(child)


def test_a_child_whose_parent_is_gone_already_ends_at_once() -> None:
    environment = child_environment() | {PARENT: "1"}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD], env=environment, capture_output=True, timeout=20
    )
    assert (done.returncode, done.stdout) == (1, b"")


def test_a_child_finds_the_packages_of_its_parent_and_nothing_beside_them() -> None:
    first = child_environment()["PYTHONPATH"].split(os.pathsep)[0]
    assert Path(first, "serve_bench", "__init__.py").is_file()
    assert Path(first, "limbeck", "__init__.py").is_file()


@pytest.mark.parametrize("parent", [None, "", "abc", "-1"])
def test_only_a_child_that_was_given_a_parent_is_bound(parent: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != PARENT}
    environment |= {} if parent is None else {PARENT: parent}
    code = "from limbeck.contract.process import end_with_parent; end_with_parent()"
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=20).returncode == 0
