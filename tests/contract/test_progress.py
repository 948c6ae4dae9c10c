"""Progress in lines: estimates of the time left, of a task and of the whole job, and units."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from limbeck.contract import progress
from limbeck.contract.machine import OtherWork, watch_other_work
from limbeck.contract.progress import about, before, task

Wait = Callable[[float], None]


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Wait:
    """A clock that moves when the test says so."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip()


def test_a_main_task_shows_its_own_time_left_and_that_of_the_whole_job(
    capsys: pytest.CaptureFixture[str], wait: Wait
) -> None:
    with before(lambda _: 300.0), task("training", 10, unit="nats a token", main=True) as work:
        wait(20)
        work.advance(loss=3.25, best=3.5)  # one of ten steps took 20 s, so nine take 180 s
        assert shown(capsys) == (
            "training: 1/10  20 s, about 3 min left (whole job: about 8 min)  "
            "loss 3.25 nats a token  best 3.5 nats a token"
        )
        wait(10)
        work.advance(loss=3.0)  # 15 s a step
        assert "about 2 min left (whole job: about 7 min)" in shown(capsys)


def test_a_main_task_alone_is_the_whole_job(capsys: pytest.CaptureFixture[str], wait: Wait) -> None:
    with task("training", 10, main=True) as work:
        wait(20)
        work.advance()
    assert shown(capsys) == "training: 1/10  20 s, about 3 min left"


@pytest.mark.parametrize("main", [True, False])
def test_a_terminal_shows_a_bar_with_figures_and_the_label_as_it_is(
    monkeypatch: pytest.MonkeyPatch, main: bool
) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with before(lambda _: 7200.0), task("teacher [b]", 4, unit="nats", main=main) as work:
        work.advance(2, loss=3.25)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "  teacher [b] " in plain
    assert "2/4" in plain
    assert "loss 3.25 nats" in plain
    assert ("whole job: about 2.0 h" in plain) == main


def test_parts_of_a_job_within_another_are_all_counted(
    capsys: pytest.CaptureFixture[str], wait: Wait
) -> None:
    """Two trainings follow that take twice and three times as long, then 60 s of something else."""
    with (
        before(lambda _: 60.0),
        before(lambda own: (2 + 3) * own),
        task("training", 2, main=True) as work,
    ):
        wait(15)
        work.advance()
        assert "about 15 s left (whole job: about 4 min)" in shown(capsys)  # 15 + 150 + 60
    with before(lambda _: 60.0), before(lambda _: None), task("training", 2, main=True) as work:
        wait(15)
        work.advance()
        assert shown(capsys) == "training: 1/2  15 s, about 15 s left"


def test_a_task_that_goes_on_is_estimated_from_its_new_steps(
    capsys: pytest.CaptureFixture[str], wait: Wait
) -> None:
    with task("training", 100, done=90) as work:
        wait(30)
        work.advance(2)
        assert "92/100  30 s, about 2 min left" in shown(capsys)
    with task("training", seconds=60) as work:  # a budget of time
        wait(20)
        work.advance()
        assert shown(capsys) == "training: 1  20 s, about 40 s left"
    with task("reading") as work:  # nothing is known of its end
        wait(20)
        work.advance()
        assert shown(capsys) == "reading: 1  20 s"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (9000, "2.5 h")],
)
def test_times_are_written_in_words(seconds: float, words: str) -> None:
    assert about(seconds) == words


def test_other_programs_are_seen_with_the_time_that_they_took() -> None:
    """A program beside this one counts its own processor time; this one's own is not counted."""
    burn = (
        "import time\n"
        "while time.process_time() < 0.5: pass\n"
        "print(time.process_time(), flush=True)\n"
        "time.sleep(60)"
    )
    with watch_other_work() as other:
        started = time.monotonic()
        with subprocess.Popen([sys.executable, "-c", burn], stdout=subprocess.PIPE) as busy:
            assert busy.stdout is not None
            took = float(busy.stdout.readline())
            found, wall = other(), time.monotonic() - started
            busy.kill()
    assert found.cores >= 0.8 * took / wall
    assert found.cores <= found.of


def test_what_else_ran_is_named() -> None:
    busy = OtherWork(0.9, 2, {"python": 0.8, "tar": 0.1})
    assert busy.is_busy
    assert str(busy) == "other programs took 0.9 of 2 cores (python 0.8, tar 0.1)"
    assert not OtherWork(0.2, 2, {}).is_busy
