"""Several processes share a training and change nothing."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file

import compress
from compress import loop as train
from limbeck.contract.errors import RecipeError
from limbeck.contract.recipe import AnyRecipe, parse_any_recipe, parse_recipe
from limbeck.contract.recipe.checks import require_share_for_all
from tests.compress.conftest import shorten_evaluations
from tests.compress.test_compress import STUDENTS, events, tiny
from tests.encoders import classifier_recipe, embedding_recipe, source
from tests.forks import share

ENCODERS = ("classes-encoder", "vectors-encoder")


class Sharding(accelerate.Accelerator):
    """FSDP2 as `accelerate launch` would ask for it; on a CPU, accelerate takes no such wish."""

    def prepare(self, *objects: Any) -> Any:
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
        )
        return super().prepare(*objects)


def _leave_after_step_5(run: train.Run, event: str, figures: dict[str, Any]) -> None:
    _record(run, event, figures)
    if event == "step" and figures["step"] == 5:
        run.accelerator.wait_for_everyone()
        os._exit(0)


_record = train.Run.record


def work(folder: Path, names: Sequence[str], stopped: str | None) -> None:
    """Train ``STUDENT-MODE`` one after the other; of ``stopped``, leave after step 5 of 6."""
    shorten_evaluations(pytest.MonkeyPatch())
    for name in names:
        student, mode = name.split("-")
        if mode == "fsdp":
            train.Accelerator = Sharding
        if name == stopped:
            train.Run.record = _leave_after_step_5
        out = folder / name
        compress.distill(recipe=recipe_of(out, student, mode), out=out / "student")


def recipe_of(out: Path, student: str, mode: str) -> AnyRecipe:
    """The tiny recipe with a student; ``own`` adds text of its own. ``encoder`` is a tiny encoder
    of a task.
    """
    if mode == "encoder":
        return _encoder(classifier_recipe if student == "classes" else embedding_recipe)
    tree = tiny(out).resolved() | {"student": STUDENTS[student]}
    if mode == "own":
        tree["training"]["on_policy"] = {"prompts": {"tokens": 8}, "new_tokens": 12}
    return parse_recipe(tree)


def _encoder(make: Any) -> AnyRecipe:
    calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base = source()
    base = {**base, "config": base["config"] | calm}
    training = {"examples": 24, "batch": 8, "precision": "fp32", "threads": 1}
    tree = make(student={"kind": "full", "base": base}, training=training).resolved()
    if make is classifier_recipe:
        head = {"id2label": {"0": "code", "1": "prose"}}
        taught = [{**base, "seed": n, "config": base["config"] | head} for n in (5, 6)]
        tree["teachers"] = [{"name": f"t{n}", "model": m} for n, m in enumerate(taught)]
    return parse_any_recipe(tree)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what two processes made. The sharded ones are last: accelerate's state of a process
    stays sharded.
    """
    folder = tmp_path_factory.mktemp("two")
    names = ["lora-ddp", "lora-own", *ENCODERS, "lora-fsdp", "fresh-fsdp"]
    share(work, folder, names, "fresh-fsdp", processes=2, seconds=900)
    assert (folder / "lora-fsdp" / "student").exists()
    assert not (folder / "fresh-fsdp" / "student").exists()
    share(work, folder, ["fresh-fsdp"], None, processes=2, seconds=900)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The student that this process makes of the tiny recipe, once for all tests."""

    @functools.cache
    def run(student: str, mode: str) -> Path:
        folder = tmp_path_factory.mktemp("alone")
        compress.distill(recipe=recipe_of(folder, student, mode), out=folder / "student")
        return folder / "student"

    return run


@pytest.mark.parametrize(
    "name",
    ["lora-ddp", "lora-fsdp", pytest.param("fresh-fsdp", id="fresh-fsdp-stopped"), "lora-own"],
)
def test_two_processes_change_nothing(
    two: Path, alone: Callable[[str, str], Path], name: str
) -> None:
    """DDP, and FSDP2 with parameters sharded, over gloo: the losses and weights of one process,
    interrupted or not. With own text: the same texts too.
    """
    student, mode = name.split("-")
    folders = alone(student, "own" if mode == "own" else "ddp"), two / name / "student"
    one, shared = ([s["loss"] for s in events(folder, "step")] for folder in folders)
    assert len(one) == 6
    assert shared == pytest.approx(one, rel=1e-5)
    if mode == "own":
        texts = [(folder / "samples.jsonl").read_text() for folder in folders]
        assert texts[0] == texts[1]
        drawn = ([s["own_text"]["reverse_kl"] for s in events(f, "step")] for f in folders)
        assert next(drawn) == pytest.approx(next(drawn), rel=1e-4)
    weights, sharded = (load_file(folder / "model" / "model.safetensors") for folder in folders)
    assert sharded.keys() == weights.keys()
    for tensor_name, tensor in weights.items():
        torch.testing.assert_close(sharded[tensor_name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_two_processes_train_an_encoder_as_one(
    two: Path, alone: Callable[[str, str], Path], name: str
) -> None:
    """DDP over gloo gives the losses and the weights of one process."""
    found = []
    for out in (alone(*name.split("-")), two / name / "student"):
        found.append((events(out, "step"), load_file(out / "model" / "model.safetensors")))
    (one, weights), (shared, theirs) = found
    assert len(one) == 3
    for mine, other in zip(one, shared, strict=True):
        assert other["loss"] == pytest.approx(mine["loss"], rel=1e-4)
        assert other["weights"] == pytest.approx(mine["weights"], abs=2e-4)
    for name, tensor in weights.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("blocks", "micro", "processes", "sharded", "problem"),
    [
        (2, 1, 2, True, None),
        (3, 1, 2, False, None),
        (3, 2, 2, True, None),
        (
            3,
            1,
            2,
            True,
            r".* some of 2 processes would run 2 micro-batches and others 1; "
            r".* of 64, for example 64, or start",
        ),
        (
            2,
            4,
            3,
            False,
            r"the 2 blocks of a step cannot be shared by 3 processes; "
            r"make it a multiple of 96, for example 96",
        ),
        (2, 4, 4, False, r"the 2 blocks of a step cannot be shared by 4 processes"),
    ],
)
def test_every_process_needs_blocks_of_every_step(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    blocks: int,
    micro: int,
    processes: int,
    sharded: bool,
    problem: str | None,
) -> None:
    tokens = 32 * blocks
    recipe = tiny(
        tmp_path, training={"batch_tokens": tokens, "tokens": tokens, "micro_batch": micro}
    )
    if problem is None:
        require_share_for_all(recipe, processes=processes, sharded=sharded)
        return
    kind = DistributedType.FSDP if sharded else DistributedType.MULTI_CPU
    for name, value in (("num_processes", processes), ("distributed_type", kind)):
        monkeypatch.setattr(train.Accelerator, name, value)
    with pytest.raises(
        RecipeError, match=rf"training.batch_tokens: found {tokens} with data.block 32: {problem}"
    ):
        compress.distill(recipe=recipe, out=tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_a_sharded_student_cannot_write(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, training={"on_policy": {"prompts": {"tokens": 8}}})
    with pytest.raises(RecipeError, match=r"training.on_policy: a student whose .*\(FSDP\) cannot"):
        require_share_for_all(recipe, processes=2, sharded=True)
    require_share_for_all(recipe, processes=2, sharded=False)
