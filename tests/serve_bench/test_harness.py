"""What the stage costs by itself: its import, and its loop around a generation."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


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
