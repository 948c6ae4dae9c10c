"""Runs that are stopped, go on, and end with a verdict."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck.contract.artifact import open_artifact
from limbeck.contract.recipe import load_recipe
from tests import ROOT, forks
from tests.app.cli.calls import GOOD, called_alone

SHORT = {"prompt_tokens": 8, "new_tokens": 4, "minutes": 0.02, "min_blocks": 3, "threads": 1}


def endless(folder: Path) -> None:
    """`limbeck run` with a training that never ends."""
    import compress
    from limbeck.app import plan
    from limbeck.runtime import session

    def distill(**_: Any) -> None:
        Path("working").touch()
        time.sleep(60)

    plan.seconds_after_training = lambda _: {}  # loads transformers
    compress.distill = distill
    session.import_onnxruntime = lambda: None
    forks.command(folder, "run", "mine.yaml")


def until(process: Any, true: Callable[[], bool], folder: Path) -> None:
    """Wait while ``process`` runs, which has to make ``true`` so."""
    while not true():
        assert process.exitcode is None, (folder / "stderr").read_text()
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD)
    process = forks.start(endless, tmp_path)
    until(process, (tmp_path / "working").exists, tmp_path)
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == code
    assert (tmp_path / "stdout").read_text() == ""
    assert (tmp_path / "stderr").read_text().splitlines() == [
        "== compress",
        "",
        "stopped; run the same command again to go on",
    ]


def _endless_but_deaf(folder: Path) -> None:
    """As `endless`; the first Ctrl-C comes while a weak reference's callback runs."""
    import weakref

    class Held:
        pass

    def lost(_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass

    held = Held()
    reference = weakref.ref(held, lost)
    sleep = time.sleep

    def deaf(seconds: float) -> None:
        nonlocal held
        del held
        sleep(seconds)

    time.sleep = deaf
    endless(folder)
    del reference


def test_a_stop_that_python_had_to_ignore_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD)
    process = forks.start(_endless_but_deaf, tmp_path)
    process.join(20)
    assert process.exitcode == 130
    assert (tmp_path / "stderr").read_text().splitlines() == [
        "== compress",
        "",
        "stopped; run the same command again to go on",
    ]


_LOADING = """
import os, signal
try:
    os.kill(os.getpid(), signal.{name})
    for _ in range(1000):
        pass
except KeyboardInterrupt as stop:  # as pybind11 does where the libraries of onnxruntime start
    raise ImportError("initialization failed") from stop
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stop_while_a_library_is_loaded_is_no_broken_library(
    tmp_path: Path, name: str, code: int
) -> None:
    (tmp_path / "onnxruntime.py").write_text(_LOADING.format(name=name))
    done = subprocess.run(
        [sys.executable, "-m", "limbeck", "run", "pico"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.split("\n")[-2]) == (
        code,
        "stopped; run the same command again to go on",
    )
    assert "install" not in done.stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    command = (
        f"{sys.executable} -c 'from limbeck.app.cli import main; main()' recipes --json "
        "| head -c 1; exit ${PIPESTATUS[0]}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[", "")


def test_pico_stopped_in_training_goes_on_to_a_verdict(tmp_path: Path) -> None:
    """The command as a user meets it: stopped by Ctrl-C, started again, and once more when all is
    done."""
    out, err = tmp_path / "stdout", tmp_path / "stderr"
    short = (f"bench={json.dumps(SHORT)}", "training.tokens=2560")
    run = ("run", "pico", "--out", "out", *(part for each in short for part in ("--set", each)))
    process = forks.start(forks.command, tmp_path, *run)
    until(process, lambda: err.exists() and "training pico" in err.read_text(), tmp_path)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert err.read_text().splitlines()[-1] == "stopped; run the same command again to go on"
    assert not (tmp_path / "out" / "student").exists()

    process = forks.start(forks.command, tmp_path, *run)
    process.join()
    assert process.exitcode == 0, err.read_text()
    assert "verdict: pass" in out.read_text()
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    digests = [
        open_artifact(tmp_path / "out" / name).digest for name in ("student", "onnx", "bench")
    ]

    light = {"numpy", "onnxruntime", "matplotlib", "scipy"}  # no torch, transformers or onnx
    again, imported = called_alone(*run)
    assert imported <= light
    assert again.count("already complete") == 3
    assert [
        open_artifact(tmp_path / "out" / name).digest for name in ("student", "onnx", "bench")
    ] == digests
    assert (
        load_recipe("pico", overrides=short).digest
        == json.loads((tmp_path / "out" / "run.json").read_text())["digest"]
    )


@pytest.mark.slow
def test_two_processes_share_the_training_and_the_first_does_the_rest(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "limbeck",
        "run",
        "pico",
        "--out",
        "out",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [done.stderr.count(f"== {stage}") for stage in ("compress", "export", "bench")] == [
        1,
        1,
        1,
    ]
    assert done.stdout.count("verdict: pass") == 1
    assert open_artifact(tmp_path / "out" / "student").result["steps"] > 0


# Sends itself a signal at the import of a module.
_AT = """
import os, runpy, signal, sys
class Stop:
    def find_spec(self, name, *_):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Stop())
sys.argv = ["bin/limbeck", "validate", "pico"]
runpy.run_module("limbeck", run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("module", "started"),
    [("limbeck.contract.environment", False), ("typer", False), ("limbeck.app.cli.use", False),
     ("limbeck.app.pico", True)],
)  # fmt: skip
def test_a_signal_at_the_start_leaves_no_traceback(
    number: signal.Signals, module: str, started: bool
) -> None:
    """Before the command has begun the signal ends the process, as the shell reports it."""
    code = _AT.format(module=module, number=int(number))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == (128 + number if started else -number)
    said = "\nstopped; run the same command again to go on\n" if started else ""
    assert (done.stdout, done.stderr) == ("", said)
