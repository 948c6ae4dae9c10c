"""A training that is interrupted, killed, damaged or diverges."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress import checkpoint
from compress import loop as train
from compress.tasks import language_step
from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import ArtifactError, DivergenceError
from tests.compress.test_compress import events, interrupted_after, killed_while_writing, tiny
from tests.forks import start


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The student of the tiny recipe, made without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    return compress.distill(recipe=tiny(folder), out=folder / "student")


@pytest.mark.parametrize("after", [1, 3, 4])
def test_an_interrupted_run_ends_in_the_same_bits(
    whole: Artifact, tmp_path: Path, after: int
) -> None:
    with interrupted_after(after):
        compress.distill(recipe=tiny(tmp_path), out=tmp_path / "cut" / "student")
    assert not (tmp_path / "cut" / "student").exists()
    torch.rand(7)  # whatever the process did in between
    cut = compress.distill(recipe=tiny(tmp_path), out=tmp_path / "cut" / "student")
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (cut.path / name).read_bytes() == (whole.path / name).read_bytes()
    drop = ("seconds", "tokens_per_second")
    logs = [
        [{k: v for k, v in row.items() if k not in drop} for row in events(a.path, "step")]
        for a in (whole, cut)
    ]
    assert logs[0] == logs[1]


def _train(folder: Path) -> None:
    compress.distill(recipe=tiny(folder), out=folder / "student")


def test_killed_without_warning(whole: Artifact, tmp_path: Path) -> None:
    """kill -9 in the middle: the checkpoint on disk is whole, and the next run ends in the same
    bits.
    """
    job = start(_train, tmp_path)
    checkpoint = tmp_path / ".student.training" / "checkpoint.pt"
    while not checkpoint.exists() and job.exitcode is None:
        time.sleep(0.01)
    job.kill()
    job.join()
    assert not (tmp_path / "student").exists()
    cut = compress.distill(recipe=tiny(tmp_path), out=tmp_path / "student")
    assert (cut.path / "model/model.safetensors").read_bytes() == (
        whole.path / "model/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("length", [0, 1, 4000, -1])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, length: int) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.write_checkpoint(path, {"key": "mine", "model": {"weight": torch.rand(2000)}})
    assert not path.with_name("checkpoint.pt.writing").exists()
    assert (checkpoint.read_checkpoint(path, key="mine", device="cpu") or {})["model"][
        "weight"
    ].shape == (2000,)
    assert checkpoint.read_checkpoint(path, key="another's", device="cpu") is None
    assert checkpoint.read_checkpoint(tmp_path / "none.pt", key="mine", device="cpu") is None
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(
        ArtifactError,
        match=r"checkpoint.pt: the checkpoint cannot be read .*; delete it, and the same command",
    ):
        checkpoint.read_checkpoint(path, key="mine", device="cpu")


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft asks for the old name
def test_killed_while_the_teachers_figures_are_written(tmp_path: Path) -> None:
    run = train.setup(recipe=tiny(tmp_path), products={}, work=tmp_path / "work", key="k")
    with killed_while_writing(), pytest.raises(KeyboardInterrupt):
        train.measure_teachers(run)
    assert train.measure_teachers(run).keys() == {"a", "b"}


def test_nan_stops_with_step_batch_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = language_step.fused_loss

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        terms = real(*args, **kwargs)
        return type(terms)(**{**vars(terms), "loss": terms.loss * float("nan")})

    monkeypatch.setattr(language_step, "fused_loss", poisoned)
    with pytest.raises(
        DivergenceError,
        match=r"diverged at step 1: loss nan.*batch [0-9a-f]{16}.*Lower training.learning_rate",
    ):
        compress.distill(recipe=tiny(tmp_path), out=tmp_path / "student")
    assert not (tmp_path / "student").exists()
