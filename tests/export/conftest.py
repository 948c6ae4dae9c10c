"""The export that most tests of this folder read."""

from __future__ import annotations

from pathlib import Path

import pytest

from limbeck.contract.artifact import Artifact
from tests.factory import Factory


@pytest.fixture(autouse=True)
def _traced_once(traced_once: None) -> None:
    """All tests of this folder share what torch's exporter makes."""


@pytest.fixture(scope="module")
def exported(tiny: Factory) -> Artifact:
    return tiny.exported()


@pytest.fixture
def copy(tiny: Factory, exported: Artifact, tmp_path: Path) -> Path:
    return tiny.copy(exported, tmp_path / "copy")
