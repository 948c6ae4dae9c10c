"""Shared ground of the tests of measuring."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Student and export of a pico run with one teacher."""
    from tests.serve_bench.measurable import make_measurable

    return make_measurable(tmp_path_factory.mktemp("run"))
