"""Experiment trackers beside the log, each where its package is installed."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest

import compress
from compress import checkpoint
from limbeck.contract.errors import EnvironmentalError
from limbeck.contract.sources.preflight import preflight
from tests.compress.test_compress import tiny


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # libraries of the trackers' own
@pytest.mark.parametrize(
    ("tracker", "package", "files"),
    [
        ("tensorboard", "tensorboardX", "events*"),
        ("wandb", "wandb", "run-*.wandb"),
        ("mlflow", "mlflow", "mlflow.db"),
        ("trackio", "trackio", "tiny.db"),
    ],
)
def test_trackers_get_the_numbers_of_the_log(
    tracker: str, package: str, files: str, tmp_path: Path
) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    recipe = tiny(tmp_path, training={"tokens": 128, "trackers": [tracker]})
    plain = tiny(tmp_path, training={"tokens": 128})
    assert recipe.distillation() == plain.distillation()  # what is logged trains nothing again
    student = compress.distill(recipe=recipe, out=tmp_path / "student").path
    written = next((student / "trackers").rglob(files)).read_bytes()
    assert b"step/loss" in written
    assert b"evaluate/nll/" in written


def test_trackio_that_writes_elsewhere_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the folder's name once, while it is imported."""
    utils = types.ModuleType("trackio.utils")
    utils.TRACKIO_DIR = Path("elsewhere")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio.utils", utils)
    monkeypatch.setattr(checkpoint, "get_available_trackers", lambda: ["trackio"])
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    with pytest.raises(EnvironmentalError, match="trackio was imported before and writes to else"):
        checkpoint.require_trackers(["trackio"], tmp_path)
    monkeypatch.setenv("TRACKIO_DIR", "elsewhere")  # as the user wants it
    checkpoint.require_trackers(["trackio"], tmp_path)


def test_a_tracker_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "get_available_trackers", list)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    recipe = tiny(tmp_path, training={"trackers": ["wandb"]})
    (mistake,) = preflight(recipe)
    assert mistake == "training.trackers: wandb is not installed here; run: pip install wandb"
    with pytest.raises(EnvironmentalError, match="trackers: wandb cannot be imported here; run"):
        compress.distill(recipe=recipe, out=tmp_path / "student")
