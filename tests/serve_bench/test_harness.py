"""What the stage costs by itself, its import and its loop, and what it shows meanwhile."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from limbeck.contract.results.bench import Arm
from serve_bench.judge.figures import Reference, Sample
from serve_bench.measure import live


@pytest.mark.slow
def test_the_harness_costs_next_to_nothing() -> None:
    from tests.benchmarks.harness_overhead import overhead

    found = overhead(blocks=3, new_tokens=4)
    assert found["overhead_low"] <= found["overhead"] <= found["overhead_high"]
    assert found["token_ms"] > 0


def test_importing_the_stage_is_cheap() -> None:
    program = (
        "import sys, serve_bench; print(sorted(m for m in ('torch', 'onnxruntime', 'matplotlib', "
        "'numpy') if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": "."},
    )
    assert done.stdout.strip() == "[]"


# What is shown meanwhile --------------------------------------------------------------------------

ARMS = tuple(Arm(n, n, "form", "onnxruntime", 2_500_000) for n in ("int8 [a]", "fp32"))
REFERENCE = Reference("x", "int8", ARMS, 6)
TESTS: list[live.Test] = [("prompt 8", "ttft", None, 8.0), ("2 tokens", "tpot", None, 1.0)]
# A first token after 0.1 s, and the second 0.02 s later.
SAMPLES = [Sample(ARMS[0].id, block, 0, (0.1, 0.12)) for block in range(2)]


def test_an_arm_that_was_not_timed_yet_has_no_rate() -> None:
    found = live.rows(REFERENCE, SAMPLES, TESTS, threads=2)
    assert [row[:5] for row in found] == [
        [name, "2.5 MB", "onnxruntime", "2", test]
        for name in ("int8 [a]", "fp32")
        for test in ("prompt 8", "2 tokens")
    ]
    # 8 tokens in 0.1 s, one in 0.02 s; two blocks are too few for an interval.
    assert [row[5:] for row in found] == [["80.0", ""], ["50.0", ""], ["", ""], ["", ""]]


def test_a_terminal_shows_the_table_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with live.live_table(REFERENCE, "tokens/s", TESTS, threads=2) as tell:
        tell(SAMPLES, "block 2 of [at least] 6")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    lines = [line.split() for line in shown.splitlines()]
    assert ["model", "size", "runtime", "threads", "test", "tokens/s", "95", "%"] in lines
    assert ["int8", "[a]", "2.5", "MB", "onnxruntime", "2", "prompt", "8", "80.0"] in lines
    assert ["fp32", "2.5", "MB", "onnxruntime", "2", "prompt", "8"] in lines
    assert "block 2 of [at least] 6" in shown


def test_elsewhere_a_line_appears_every_ten_seconds_and_the_table_in_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with live.live_table(REFERENCE, "tokens/s", TESTS, threads=2) as tell:
        for second in range(25):
            now[0] = float(second)
            tell(SAMPLES, f"second {second}")
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["  timing: second 10", "  timing: second 20"]
    assert said[2].split()[:3] == ["model", "size", "runtime"]
    assert len(said) == 2 + 2 + 4
