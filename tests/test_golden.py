"""The whole job on tiny models gives the recorded weights, graphs and figures (`tests.golden`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import golden

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_pico_gives_what_was_recorded(tmp_path: Path) -> None:
    recorded = json.loads(golden.RECORDED.read_text()).get(golden.machine(), {})
    if "pico" not in recorded:
        pytest.skip(f"no digests were recorded on {golden.machine()}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LIMBECK_CACHE": str(tmp_path / "cache")}
    environment.pop("OMP_NUM_THREADS", None)  # digests are of all cores
    subprocess.run(
        [sys.executable, "-m", "limbeck", "run", "pico", "--out", str(tmp_path / "run")],
        env=environment,
        check=True,
    )
    found = golden.signature(tmp_path / "run")
    assert found["quality"]
    assert golden.differences(recorded["pico"], found) == []


def test_a_changed_digit_is_a_difference() -> None:
    kept = {"student": "a", "quality": {"nll": 1.0}}
    assert golden.differences(kept, kept | {"more": 1}) == []
    assert golden.differences(kept, {"student": "a", "quality": {"nll": 1.0000001}}) == [
        "quality/nll: recorded 1.0, found 1.0000001"
    ]
    assert golden.differences(kept, {"student": "a"}) == ["quality/nll: recorded 1.0, found None"]
