"""Shared ground of the tests: a cache of their own, and models and servers made once a session."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from limbeck.contract.artifact import Artifact
from tests.factory import Factory

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, which test modules do
# Tests share the cores: OpenMP threads of what the bench starts sleep, as if a user had said so.
os.environ.pop("LIMBECK_OMP_WAIT_POLICY", None)
# A shell that starts pytest in the background lets it ignore Ctrl-C, and all that the tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _no_fsync(file: Any) -> None:
    """Fails for a closed file, as `os.fsync` does, but does not wait for the disk."""
    os.fstat(file if isinstance(file, int) else file.fileno())


os.fsync = _no_fsync  # no test outlives a power failure


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing a test makes lands in the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True, scope="session")
def _workers_end_by_themselves() -> Iterator[None]:
    """Under `make coverage` a worker of the bench may end before it is killed: a killed process
    does not write down which branches it took.
    """
    if "COVERAGE_PROCESS_CONFIG" not in os.environ:
        yield
        return
    from serve_bench.measure.workers import Worker

    kill = Worker.kill

    def end(worker: Worker) -> None:
        stdin = worker._process.stdin
        if stdin is not None:
            with contextlib.suppress(OSError):
                stdin.close()
        until = time.monotonic() + 10
        while worker._process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        kill(worker)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "kill", end)
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Collect what the last test left, and set aside what is still here: libraries and fixtures.

    An export collects garbage five times, and each time would walk through all of torch and
    transformers: 0.6 s, which is more than the rest of a tiny export takes.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Factory:
    """Tiny students and exports, each made once for all workers of a session."""
    root = tmp_path_factory.getbasetemp()
    return Factory((root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "tiny")


@pytest.fixture(scope="session")
def traced_once(tiny: Factory) -> Iterator[None]:
    """torch's exporter traces a model once for all workers of a session."""
    with tiny.traced_once():
        yield


@pytest.fixture(scope="session")
def one_roofline() -> Iterator[None]:
    """Benches of this session measure the bandwidth of small arrays, once and in this process.

    In a process of its own, with arrays beyond the caches, it takes 4 s and a gigabyte.
    """
    import torch

    from serve_bench.measure import bench
    from serve_bench.measure.host.roofline import run_kernels

    @functools.cache
    def measure(*, threads: int, device: str) -> dict[str, Any]:
        before = torch.get_num_threads()
        try:
            return run_kernels(threads, device, array_bytes=1 << 22, seconds=0.02)
        finally:
            torch.set_num_threads(before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "measure_roofline", measure)
        yield


@pytest.fixture(scope="module")
def forked_workers() -> Iterator[None]:
    """The module's benches fork their torch arms, which load for 8 s otherwise, and do not wait."""
    from tests import forks

    with pytest.MonkeyPatch.context() as patch:
        forks.hurry(patch.setattr, forks.launch)
        yield


@pytest.fixture
def forked_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benches of the test fork every arm and do not wait; for tests that look at no memory."""
    from tests import forks

    forks.hurry(monkeypatch.setattr, forks.launch_any)


@pytest.fixture(scope="session")
def served(tiny: Factory) -> Artifact:
    """An exported tiny student with room for long answers, for the engine and the server."""
    sizes = {"max_position_embeddings": 512, "tie_word_embeddings": False}
    return tiny.exported(seed=3, sizes=sizes)


@pytest.fixture(scope="session")
def gpt2(tiny: Factory, traced_once: None) -> Artifact:
    """An exported tiny student of torch's exporter: its cache grows at every step."""
    return tiny.exported("gpt2")
