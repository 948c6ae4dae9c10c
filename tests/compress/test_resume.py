"""A training that is interrupted, killed, damaged or diverges."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress import checkpoint
from compress import loop as train
from compress.tasks import language_step
from compress.tasks.language import LanguageTask
from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import ArtifactError, DivergenceError, ModelError
from limbeck.contract.results.student import TeacherResult
from tests.compress.test_compress import events, interrupted_after, killed_while_writing, tiny
from tests.forks import start

_SOUND = 4  # parts of the first two steps of the tiny recipe


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


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("loss", r"loss nan.*Lower training.learning_rate \(now"),
        ("gradient", r"loss \d.*, gradient norm nan.*Lower training.learning_rate"),
        ("teacher", r"loss nan.*The teacher b answered with NaN or infinite numbers; leave it out"),
    ],
)
def test_what_is_not_finite_stops_with_place_and_remedy_and_keeps_the_checkpoint(
    whole: Artifact, tmp_path: Path, wrong: str, says: str
) -> None:
    """In the third step; without the fault, training goes on to the student of an undisturbed one.
    """  # fmt: skip
    real, calls = language_step.fused_loss, 0

    def poisoned(fusion: Any, **given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > _SOUND and wrong == "teacher":
            a, b = given["teachers"]
            given["teachers"] = [a, replace(b, hidden_RLd=b.hidden_RLd * float("inf"))]
        terms = real(fusion, **given)
        if calls > _SOUND and wrong == "loss":
            return replace(terms, loss=terms.loss * float("nan"))
        if calls > _SOUND and wrong == "gradient":
            terms.loss.register_hook(lambda slope: slope * float("nan"))
        return terms

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_step, "fused_loss", poisoned)
        kept = tmp_path / ".student.training" / "checkpoint.pt"
        diverged = rf"diverged at step 3: {says}"
        place = rf"batch [0-9a-f]{{16}}; the last good checkpoint is {re.escape(str(kept))}"
        with pytest.raises(DivergenceError, match=diverged) as raised:
            compress.distill(recipe=tiny(tmp_path), out=tmp_path / "student")
        assert re.search(place, str(raised.value))
    assert not (tmp_path / "student").exists()
    after = compress.distill(recipe=tiny(tmp_path), out=tmp_path / "student")
    name = "adapter/adapter_model.safetensors"
    assert (after.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_a_teacher_whose_loss_is_not_finite_is_named_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = LanguageTask.measure_teacher

    def measured(self: LanguageTask, k: int) -> TeacherResult:
        found = measure(self, k)
        return replace(found, nll={"code": float("inf")}) if k == 1 else found

    monkeypatch.setattr(LanguageTask, "measure_teacher", measured)
    with pytest.raises(ModelError, match=r"teacher b: its loss on .* of code is inf nats a token"):
        compress.distill(recipe=tiny(tmp_path), out=tmp_path / "student")
    assert not (tmp_path / ".student.training" / "teachers.json").exists()
