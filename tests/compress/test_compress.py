"""The distillation stage on pico models: it learns, it resumes in the same bits, its inputs are checked."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

import compress
from compress import checkpoint
from compress import loop as train
from compress.features import Projections, feature_loss, layer_pairs
from compress.models.body import Body, head_of
from compress.models.language import (
    byte_tokenizer,
    cast_frozen,
    load_model,
    model_folder,
    random_model,
    require_same_tokenizer,
)
from compress.models.students import with_lora
from compress.tasks import language_models, language_step
from limbeck.contract.artifact import open_artifact
from limbeck.contract.errors import (
    ArtifactError,
    DataError,
    DivergenceError,
    EnvironmentalError,
    ModelError,
    RecipeError,
)
from limbeck.contract.heldout import load_heldout
from limbeck.contract.recipe import Features, LoraStudent, RandomModel, Recipe, parse_recipe
from tests.pico import make_model

TINY = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


def tiny(folder: Path, **over: Any) -> Recipe:
    """Two random teachers of different widths, two domains of real text, a few steps."""
    tree = {
        "name": "tiny",
        "teachers": [
            {"name": "a", "model": {"kind": "random", "config": TINY, "seed": 1}},
            {"name": "b", "model": {"kind": "random", "config": {**TINY, "hidden_size": 48, "num_hidden_layers": 3}, "seed": 2}},
        ],
        "data": {
            "domains": [
                {"name": "code", "text": {"kind": "stdlib", "paths": ["abc.py"]}},
                {"name": "prose", "text": {"kind": "stdlib", "paths": ["this.py"], "format": {"kind": "python-strings", "min_chars": 400}}},
            ],
            "block": 32,
            "heldout": {"every": 4, "piece_chars": 128, "blocks": 2},
        },
        "student": {"kind": "lora", "base": {"kind": "random", "config": TINY, "seed": 0}, "rank": 4, "dropout": 0.1},
        "training": {
            "tokens": 64 * 6, "batch_tokens": 64, "micro_batch": 1, "learning_rate": 1e-2, "threads": 1, "precision": "fp32",
            "evaluate_every": 3, "checkpoint_every": 2,
        },
    }  # fmt: skip
    for key, value in over.items():
        tree[key] = (
            {**tree[key], **value}
            if isinstance(tree.get(key), dict) and isinstance(value, dict)
            else value
        )
    recipe = parse_recipe(tree)
    recipe._folder = folder
    return recipe


def events(path: Path, event: str) -> list[dict[str, Any]]:
    return [
        row
        for line in (path / "log.jsonl").read_text().splitlines()
        if (row := json.loads(line))["event"] == event
    ]


@pytest.mark.parametrize(
    "student",
    [
        {"kind": "lora", "base": {"kind": "random", "config": TINY, "seed": 0}, "rank": 4},
        {"kind": "fresh", "config": TINY},
    ],
    ids=["lora", "fresh"],
)
def test_a_student_is_trained_and_complete(tmp_path: Path, student: dict[str, Any]) -> None:
    recipe = tiny(tmp_path, training={"tokens": 64 * 40}).model_copy(
        update={"student": parse_recipe({**tiny(tmp_path).resolved(), "student": student}).student}
    )
    recipe._folder = tmp_path
    artifact = compress.distill(recipe=recipe, out=tmp_path / "student")
    first, *_, last = events(artifact.path, "evaluate")
    assert last["mean_nll"] < first["mean_nll"] - 0.1
    assert artifact.result["mean_nll"] == pytest.approx(
        min(e["mean_nll"] for e in events(artifact.path, "evaluate")), abs=1e-3
    )
    steps = events(artifact.path, "step")
    assert len(steps) == 40
    assert set(steps[0]["weights"]) == {"code", "prose"}
    assert sum(steps[0]["weights"]["code"].values()) == pytest.approx(1, abs=1e-3)
    assert steps[0]["features"] > steps[-1]["features"]
    assert set(load_heldout(artifact.path / "heldout.safetensors")) == {"code", "prose"}
    assert [t["name"] for t in json.loads((artifact.path / "teachers.json").read_text())] == [
        "a",
        "b",
    ]
    saved = load_file(artifact.path / "model" / "model.safetensors")
    assert not any("lora" in name or "projection" in name for name in saved)
    assert (artifact.path / "adapter").is_dir() == (student["kind"] == "lora")
    assert not list(tmp_path.glob(".*"))


def test_a_complete_student_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compress.distill(recipe=tiny(tmp_path), out=tmp_path / "student")
    monkeypatch.setattr(train, "train", None)
    assert compress.distill(recipe=tiny(tmp_path), out=tmp_path / "student").digest == first.digest


@pytest.mark.parametrize("after", [1, 3, 4])
def test_an_interrupted_run_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    whole = compress.distill(recipe=tiny(tmp_path), out=tmp_path / "whole" / "student")
    real, done = train._step, 0

    def killed(*args: Any, **kwargs: Any) -> dict[str, Any]:
        nonlocal done
        done += 1
        if done > after:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        compress.distill(recipe=tiny(tmp_path), out=tmp_path / "cut" / "student")
    assert not (tmp_path / "cut" / "student").exists()
    torch.rand(7)  # whatever the process did in between
    monkeypatch.setattr(train, "_step", real)
    cut = compress.distill(recipe=tiny(tmp_path), out=tmp_path / "cut" / "student")
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (cut.path / name).read_bytes() == (whole.path / name).read_bytes()
    drop = ("seconds", "tokens_per_second")
    logs = [
        [{k: v for k, v in row.items() if k not in drop} for row in events(a.path, "step")]
        for a in (whole, cut)
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("granularity", ["token", "sequence", "batch"])
def test_micro_batches_change_nothing(tmp_path: Path, granularity: str) -> None:
    results = []
    for micro in (1, 2):
        recipe = tiny(
            tmp_path,
            training={"micro_batch": micro, "tokens": 64 * 3},
            student={"dropout": 0.0},
            fusion={"weights": {"kind": "entropy", "granularity": granularity}},
        )
        artifact = compress.distill(recipe=recipe, out=tmp_path / str(micro))
        results.append(
            (
                [s["loss"] for s in events(artifact.path, "step")],
                load_file(artifact.path / "model" / "model.safetensors"),
            )
        )
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(tensor, results[1][1][name], rtol=1e-3, atol=1e-5)


# accelerate takes FSDP for GPUs only and ignores it on a CPU; its FSDP2 code runs there all the same when told to.
PROCESSES = """
import os
import sys
from pathlib import Path
import accelerate
import compress
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from compress import checkpoint
from compress import loop as train
from limbeck.contract.recipe import parse_recipe
from tests.compress.test_compress import STUDENTS, tiny

class Sharding(accelerate.Accelerator):
    def prepare(self, *objects):
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        return super().prepare(*objects)

def leave_after_step_5(run, event, figures, record=train.Run.record):
    record(run, event, figures)
    if event == "step" and figures["step"] == 5:
        run.accelerator.wait_for_everyone()
        os._exit(0)

out, student, mode, stop = Path(sys.argv[1]), *sys.argv[2:]
if mode == "fsdp":
    train.Accelerator = Sharding
if stop == "stop":
    train.Run.record = leave_after_step_5
recipe = parse_recipe(tiny(out).resolved() | {"student": STUDENTS[student]})
compress.distill(recipe=recipe, out=out / "student")
"""
STUDENTS = {
    "lora": {"kind": "lora", "base": {"kind": "random", "config": TINY, "seed": 0}, "rank": 4},
    "fresh": {"kind": "fresh", "config": TINY},
}


def _in_processes(
    count: int, out: Path, student: str, mode: str = "ddp", *, stop: bool = False
) -> None:
    """The tiny recipe with ``count`` processes; ``stop`` leaves without a word after step 5 of 6."""
    script = out.with_suffix(".py")
    script.write_text(PROCESSES)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={count}",
        str(script),
    ]
    command += [str(out), student, mode, "stop" if stop else "end"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent.parent.parent),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder that one process made of the tiny recipe with a student, once for all tests."""

    @functools.cache
    def run(student: str) -> Path:
        folder = tmp_path_factory.mktemp("alone") / student
        _in_processes(1, folder, student)
        return folder / "student"

    return run


@pytest.mark.parametrize(
    ("student", "mode", "stopped"),
    [("lora", "ddp", False), ("lora", "fsdp", False), ("fresh", "fsdp", True)],
)
def test_two_processes_change_nothing(
    tmp_path: Path, alone: Callable[[str], Path], student: str, mode: str, stopped: bool
) -> None:
    """DDP, and FSDP2 with parameters sharded, over gloo: the losses and weights of one process, interrupted or not."""
    if stopped:
        _in_processes(2, tmp_path / "two", student, mode, stop=True)
        assert not (tmp_path / "two" / "student").exists()
    _in_processes(2, tmp_path / "two", student, mode)
    folders = alone(student), tmp_path / "two" / "student"
    one, two = ([s["loss"] for s in events(folder, "step")] for folder in folders)
    assert len(one) == 6
    assert two == pytest.approx(one, rel=1e-5)
    weights, sharded = (load_file(folder / "model" / "model.safetensors") for folder in folders)
    assert sharded.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(sharded[name], tensor, rtol=1e-3, atol=1e-5)


def test_cached_teachers_teach_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached equals live up to the bf16 of the cache; a second run with other weights loads no teacher body."""
    live = compress.distill(recipe=tiny(tmp_path, student={"dropout": 0.0}), out=tmp_path / "live")
    recipe = tiny(tmp_path, student={"dropout": 0.0}, training={"teacher_cache": "hidden"})
    cached = compress.distill(recipe=recipe, out=tmp_path / "cached")
    losses = [[s["loss"] for s in events(a.path, "step")] for a in (live, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)

    def no_body(*_: Any, **__: Any) -> None:
        raise AssertionError("a teacher body was loaded")

    monkeypatch.setattr("compress.teachers.cache.Teachers", no_body)
    options = {
        "training": {"teacher_cache": "hidden", "micro_batch": 2},
        "student": {"dropout": 0.0},
    }
    other = tiny(tmp_path, fusion={"weights": {"kind": "uniform"}}, **options)
    compress.distill(recipe=other, out=tmp_path / "other")
    fewer = tiny(tmp_path, teachers=[tiny(tmp_path).resolved()["teachers"][1]], **options)
    compress.distill(recipe=fewer, out=tmp_path / "fewer")


TOPK = {
    "features": {"weight": 0},
    "fusion": {"calibration": {"kind": "none"}},
    "student": {"dropout": 0.0},
}


def test_topk_of_everything_is_the_live_loss(tmp_path: Path) -> None:
    live = compress.distill(recipe=tiny(tmp_path, **TOPK), out=tmp_path / "live")
    cache = {"kind": "topk", "k": 257}
    kept = compress.distill(
        recipe=tiny(tmp_path, **TOPK, training={"teacher_cache": cache}), out=tmp_path / "kept"
    )
    losses = [[s["loss"] for s in events(a.path, "step")] for a in (live, kept)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name in ("a", "b"):
        assert live.result["teachers"][name]["nll"] == pytest.approx(
            kept.result["teachers"][name]["nll"], rel=1e-4
        )


@pytest.mark.parametrize("sampling", ["top", "unbiased"])
def test_topk_cache_trains(tmp_path: Path, sampling: str) -> None:
    cache = {"kind": "topk", "k": 16, "sampling": sampling}
    artifact = compress.distill(
        recipe=tiny(tmp_path, **TOPK, training={"teacher_cache": cache}), out=tmp_path / "student"
    )
    first, *_, last = events(artifact.path, "evaluate")
    assert last["mean_nll"] < first["mean_nll"]


def test_a_4_bit_base_is_not_trained_on_a_cpu(tmp_path: Path) -> None:
    student = {
        "kind": "lora",
        "base": {"kind": "random", "config": TINY},
        "rank": 4,
        "quantize": "nf4",
    }
    with pytest.raises(
        EnvironmentalError, match=r"student\.quantize: nf4 cannot be trained on a CPU.*int8"
    ):
        compress.distill(
            recipe=tiny(tmp_path, student=student, training={"device": "cpu"}),
            out=tmp_path / "student",
        )


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_quantised_base_and_teachers(tmp_path: Path, form: str) -> None:
    """bitsandbytes on the CPU: quantised teachers beside a QLoRA student, merged into the fp32 base."""
    wide = {**TINY, "hidden_size": 64, "intermediate_size": 64}
    teachers = [
        {"name": "a", "model": {"kind": "random", "config": wide, "seed": 1}, "quantize": form}
    ]
    student = {
        "kind": "lora",
        "base": {"kind": "random", "config": wide, "seed": 0},
        "rank": 4,
        "quantize": "int8",
    }
    recipe = tiny(tmp_path, teachers=teachers, student=student, training={"tokens": 64 * 12})
    artifact = compress.distill(recipe=recipe, out=tmp_path / "student")
    first, *_, last = events(artifact.path, "evaluate")
    assert last["mean_nll"] < first["mean_nll"]
    saved = load_file(artifact.path / "model" / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    assert json.loads((artifact.path / "teachers.json").read_text())[0]["quantize"] == form


@pytest.mark.parametrize(
    "options", [{"dora": True}, {"rslora": True}, {"targets": ["q_proj", "down_proj"]}]
)
def test_kinds_of_adapters(tmp_path: Path, options: dict[str, Any]) -> None:
    artifact = compress.distill(recipe=tiny(tmp_path, student=options), out=tmp_path / "student")
    merged, adapted = (
        Body(load_model(artifact.path / "model")),
        load_file(artifact.path / "adapter" / "adapter_model.safetensors"),
    )
    assert merged.layers == 2
    assert any("lora_magnitude_vector" in name for name in adapted) == ("dora" in options)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    runs = []
    for on in (False, True):
        recipe = tiny(tmp_path, student={"dropout": 0.0}, training={"gradient_checkpointing": on})
        runs.append(
            [
                s["loss"]
                for s in events(
                    compress.distill(recipe=recipe, out=tmp_path / str(on)).path, "step"
                )
            ]
        )
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_calibration_can_be_fixed(tmp_path: Path) -> None:
    fusion = {"calibration": {"kind": "fixed", "values": {"a": 1.5, "b": 0.8}}}
    result = compress.distill(recipe=tiny(tmp_path, fusion=fusion), out=tmp_path / "student").result
    assert {name: r["temperature"] for name, r in result["teachers"].items()} == {
        "a": 1.5,
        "b": 0.8,
    }


def test_a_budget_in_minutes_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(
        step=0.1
    )  # a clock of its own: on a busy machine three seconds hold any number of steps
    monkeypatch.setattr("compress.loop.time", SimpleNamespace(monotonic=lambda: next(ticks)))
    recipe = tiny(
        tmp_path,
        training={
            "tokens": None,
            "minutes": 0.05,
            "evaluate_every": 1000,
            "checkpoint_every": 1000,
        },
    )
    result = compress.distill(recipe=recipe, out=tmp_path / "student").result
    steps = events(tmp_path / "student", "step")
    assert len(steps) == result["steps"] > 3
    assert steps[-2]["seconds"] < 3 <= steps[-1]["seconds"]
    assert steps[-1]["learning_rate"] < steps[len(steps) // 2]["learning_rate"]


def test_a_budget_in_minutes_goes_by_the_clock_of_the_first_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another process is told counts, and not its own clock."""
    told = iter([10.0, 45.0, 61.0])
    monkeypatch.setattr(train, "broadcast", lambda mine: torch.full_like(mine, next(told)))
    recipe = tiny(
        tmp_path, training={"tokens": None, "minutes": 1, "warmup": 0, "schedule": "linear"}
    )
    compress.distill(recipe=recipe, out=tmp_path / "student")
    steps = events(tmp_path / "student", "step")
    assert [s["seconds"] for s in steps] == [10, 45, 61]
    assert [s["learning_rate"] for s in steps] == pytest.approx([1e-2, 1e-2 * 5 / 6, 1e-2 / 4])


@pytest.mark.parametrize(
    ("blocks", "micro", "processes", "sharded", "problem"),
    [
        (2, 1, 2, True, None),
        (3, 1, 2, False, None),
        (3, 2, 2, True, None),
        (3, 1, 2, True, r".* some of 2 processes would run 2 micro-batches and others 1; .* of 64, for example 64, or start"),
        (2, 4, 3, False, r"the 2 blocks of a step cannot be shared by 3 processes; make it a multiple of 96, for example 96"),
        (2, 4, 4, False, r"the 2 blocks of a step cannot be shared by 4 processes"),
    ],
)  # fmt: skip
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
        language_models.require_share_for_all(recipe, processes=processes, sharded=sharded)
        return
    kind = DistributedType.FSDP if sharded else DistributedType.MULTI_CPU
    for name, value in (("num_processes", processes), ("distributed_type", kind)):
        monkeypatch.setattr(train.Accelerator, name, value)
    with pytest.raises(
        RecipeError, match=rf"training.batch_tokens: found {tokens} with data.block 32: {problem}"
    ):
        compress.distill(recipe=recipe, out=tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_killed_without_warning(tmp_path: Path) -> None:
    """kill -9 in the middle: the checkpoint on disk is whole, and the next run ends in the same bits."""
    script = tmp_path / "job.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nimport compress\nfrom tests.compress.test_compress import tiny\n"
        "compress.distill(recipe=tiny(Path(sys.argv[1])), out=Path(sys.argv[1]) / 'student')\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent.parent.parent),
        "OMP_NUM_THREADS": "1",
    }
    job = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], env=environment, stderr=subprocess.DEVNULL
    )
    checkpoint = tmp_path / ".student.training" / "checkpoint.pt"
    while not checkpoint.exists() and job.poll() is None:
        time.sleep(0.01)
    job.kill()
    job.wait()
    assert not (tmp_path / "student").exists()
    cut = compress.distill(recipe=tiny(tmp_path), out=tmp_path / "student")
    whole = compress.distill(recipe=tiny(tmp_path), out=tmp_path / "whole" / "student")
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


@contextlib.contextmanager
def killed_while_writing() -> Iterator[None]:
    """Whatever is written here stays half-written."""
    real = Path.write_text

    def half(path: Path, text: str) -> None:
        real(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    def dies(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        patch.setattr(os, "fsync", dies)
        yield


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft asks for the old name
def test_killed_while_the_teachers_figures_are_written(tmp_path: Path) -> None:
    run = train.setup(recipe=tiny(tmp_path), products={}, work=tmp_path / "work", key="k")
    with killed_while_writing(), pytest.raises(KeyboardInterrupt):
        train.measure_teachers(run)
    assert train.measure_teachers(run).keys() == {"a", "b"}


def test_golden_losses(tmp_path: Path) -> None:
    """A refactor must reproduce the loss of every step; the text is fixed here so that it is the same everywhere."""
    (tmp_path / "text.txt").write_text(
        "".join(f"{i} bottles of beer on the wall, {i} bottles of beer.\n" for i in range(200))
    )
    data = {
        "domains": [{"name": "beer", "text": {"kind": "files", "paths": ["text.txt"]}}],
        "heldout": {"every": 5, "piece_chars": 256, "blocks": 2},
    }
    recipe = tiny(
        tmp_path, data=data, student={"dropout": 0.0}, fusion={"weights": {"kind": "entropy"}}
    )
    artifact = compress.distill(recipe=recipe, out=tmp_path / "student")
    assert [s["loss"] for s in events(artifact.path, "step")] == pytest.approx(GOLDEN, rel=1e-3)


GOLDEN = [1.771, 1.737, 1.720, 1.707, 1.688, 1.69]


def test_a_recipe_can_teach_another(tmp_path: Path) -> None:
    """Experts that are LoRA students of one base share that base in memory."""
    products = {}
    for seed in (1, 2):
        expert = tiny(tmp_path, seed=seed, teachers=[])
        products[f"expert{seed}"] = compress.distill(
            recipe=expert, out=tmp_path / f"expert{seed}"
        ).path
    teachers = [
        {"name": name, "model": {"kind": "recipe", "recipe": f"{name}.yaml"}} for name in products
    ]
    recipe = tiny(tmp_path, teachers=teachers)
    from compress.teachers.live import Teachers, teacher_folders

    loaded = Teachers(
        teacher_folders(recipe, products), device=torch.device("cpu"), compute_dtype=torch.float32
    )
    assert loaded.bodies[0].model is loaded.bodies[1].model
    ids = torch.arange(12)[None]
    states, _ = loaded.states(ids)
    for (_, path), state in zip(products.items(), states, strict=True):
        merged, _ = Body(load_model(path / "model")).states(ids)
        torch.testing.assert_close(state.hidden_RLd, merged.detach(), rtol=1e-4, atol=1e-4)
    artifact = compress.distill(recipe=recipe, out=tmp_path / "student", products=products)
    assert [t["model"] for t in json.loads((artifact.path / "teachers.json").read_text())] == [
        str(p / "model") for p in products.values()
    ]
    assert (
        artifact.manifest["parents"]["teacher expert1"] == open_artifact(products["expert1"]).digest
    )


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    recipe = tiny(
        tmp_path,
        training={
            "learning_rate": 3.0,
            "tokens": 64 * 30,
            "evaluate_every": 1,
            "patience": 2,
            "schedule": "constant",
        },
    )
    result = compress.distill(recipe=recipe, out=tmp_path / "student").result
    assert result["steps"] <= result["best_step"] + 2 < 30


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


def test_learning_rate_warms_up_and_decays() -> None:
    config = tiny(Path()).training.model_copy(update={"learning_rate": 1.0, "warmup": 0.2})
    rates = [train.learning_rate(config, step / 10, 1 / 10) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.1
    linear = config.model_copy(update={"schedule": "linear"})
    assert [train.learning_rate(linear, done, 0.1) for done in (0.2, 0.6, 1.0)] == pytest.approx(
        [1, 0.5, 0]
    )
    assert (
        train.learning_rate(
            config.model_copy(update={"schedule": "constant", "warmup": 0.0}), 0.9, 0.1
        )
        == 1
    )


# Features --------------------------------------------------------------------------------------------------------


def test_depth_map() -> None:
    config = Features(pairs=3)
    assert layer_pairs(config, student_layers=6, teacher_layers=12) == [(2, 4), (4, 8), (6, 12)]
    assert layer_pairs(config, student_layers=2, teacher_layers=30) == [(1, 15), (2, 30)]
    assert layer_pairs(Features(layers=((1, 2),)), student_layers=2, teacher_layers=3) == [(1, 2)]
    with pytest.raises(RecipeError, match=r"\(1, 4\) is past the last layer"):
        layer_pairs(Features(layers=((1, 4),)), student_layers=2, teacher_layers=3)


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_identical_states_have_no_feature_loss(distance: str) -> None:
    state = torch.randn(2, 5, 8)
    projections = Projections(student_width=8, teacher_widths=[8], pairs=[[(1, 1)]])
    loss = feature_loss(
        projections({1: state}),
        [[state]],
        torch.ones(1, 2, 5),
        torch.ones(2, 5, dtype=torch.bool),
        distance=distance,
        denominator=10,
    )
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)


def test_feature_loss_by_hand() -> None:
    mine, theirs = (
        torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]),
        torch.tensor([[[0.0, 2.0], [3.0, 0.0]]]),
    )
    weights, valid = torch.tensor([[[0.25, 0.75]]]), torch.tensor([[True, True]])
    assert float(
        feature_loss([[mine]], [[theirs]], weights, valid, distance="cosine", denominator=2)
    ) == pytest.approx(0.125)
    assert (
        float(
            feature_loss(
                [[mine]], [[theirs]], weights, valid & False, distance="cosine", denominator=2
            )
        )
        == 0
    )


# Inputs ----------------------------------------------------------------------------------------------------------


def test_different_tokenizers_are_refused_with_count_and_examples(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    byte_tokenizer().save_pretrained(tmp_path / "a")
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "hello": 1}, unk_token="<|endoftext|>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>").save_pretrained(
        tmp_path / "b"
    )
    for folder in ("a", "b"):
        random_model(TINY, vocab_size=257, seed=0, where="t").save_pretrained(tmp_path / folder)
    with pytest.raises(
        ModelError,
        match=r"257 of 258 tokens have another id or are missing \('.*' is .* in x and .* in y; .*; .*\)",
    ):
        require_same_tokenizer({"x": tmp_path / "a", "y": tmp_path / "b"})
    teachers = [
        {"name": n, "model": {"kind": "local", "path": str(tmp_path / n)}} for n in ("a", "b")
    ]
    with pytest.raises(ModelError, match="have different tokenizers"):
        compress.distill(recipe=tiny(tmp_path, teachers=teachers), out=tmp_path / "student")
    assert not (tmp_path / "student").exists()


def folder_without(path: Path, *files: str) -> Path:
    byte_tokenizer().save_pretrained(path)
    random_model(TINY, vocab_size=257, seed=0, where="t").save_pretrained(path)
    for file in files:
        (path / file).unlink()
    return path


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        ("model.safetensors", None, r"no weights; expected \*.safetensors"),
        (
            "model.safetensors",
            "pytorch_model.bin",
            r"pytorch_model.bin is a pickle.*safetensors and GGUF only",
        ),
        ("config.json", None, "no config.json"),
        (
            "tokenizer.json",
            None,
            "no tokenizer that transformers can load|only a slow tokenizer|different tokenizers",
        ),
    ],
)
def test_unusable_teacher_folders_are_refused(
    tmp_path: Path, remove: str, add: str | None, message: str
) -> None:
    folder = folder_without(tmp_path / "model", remove)
    if add:
        (folder / add).write_bytes(b"\x80\x04.")
    recipe = tiny(tmp_path, teachers=[{"name": "a", "model": {"kind": "local", "path": "model"}}])
    with pytest.raises(ModelError, match=message):
        compress.distill(recipe=recipe, out=tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_incomplete_weights_are_never_made_up(tmp_path: Path) -> None:
    """Transformers fills what is missing with random numbers; what is tied to something that is there is not missing."""
    folder = tmp_path / "model"
    config = {**TINY, "tie_word_embeddings": False}

    def written(config: dict[str, Any], body: bool = False) -> Path:
        model: Any = random_model(config, vocab_size=257, seed=0, where="t")
        (model.model if body else model).save_pretrained(folder)
        return folder

    with pytest.raises(
        ModelError,
        match=r"model: .*lacks 1 of its weights \(for example lm_head.weight\)\. Save the whole",
    ):
        load_model(written(config, body=True))
    load_model(written(TINY, body=True))  # its head is the embedding
    path = written(config) / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"num_hidden_layers": 3}))
    with pytest.raises(
        ModelError,
        match=r"lacks 9 of its weights \(for example model.layers.2.input_layernorm.weight, ",
    ):
        load_model(folder)
    path.write_text(json.dumps(saved | {"intermediate_size": 40}))
    with pytest.raises(
        ModelError,
        match=r"6 of its weights do not fit .*down_proj.weight is 32x48, expected 32x40; .*config",
    ):
        load_model(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        ModelError,
        match=r"model: its weights cannot be read \(.*\); copy or download the folder again",
    ):
        load_model(folder)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft asks for the old name
def test_an_adapter_that_was_cut_short_is_named(tmp_path: Path) -> None:
    base = RandomModel(kind="random", config=TINY, seed=1)
    model = load_model(model_folder(base, folder=tmp_path))
    with_lora(model, LoraStudent(kind="lora", base=base, rank=4), 0).save_pretrained(
        tmp_path / "adapter"
    )
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    teacher = {"name": "a", "model": base.model_dump(mode="json"), "adapter": "adapter"}
    with pytest.raises(ModelError, match=r"this adapter's weights cannot be read .*deserializing"):
        compress.distill(recipe=tiny(tmp_path, teachers=[teacher]), out=tmp_path / "student")


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft asks for the old name
def test_adapters_know_that_gpt2_stores_its_weights_turned(tmp_path: Path) -> None:
    """Left to find out by itself PEFT warns, which is an error here."""
    folder = make_model(tmp_path / "gpt2", model_type="gpt2", n_embd=32, n_head=2)
    config = LoraStudent(kind="lora", base=RandomModel(kind="random", config={}), rank=4)
    adapted = with_lora(load_model(folder), config, 0)
    shapes = {n: p.shape for n, p in adapted.named_parameters() if "lora_A" in n and "c_fc" in n}
    assert {tuple(shape) for shape in shapes.values()} == {(4, 32)}
    with pytest.raises(
        ModelError, match=r"student.targets: .* Linear layers of this model: .*c_attn"
    ):
        with_lora(load_model(folder), config.model_copy(update={"targets": ("q_proj",)}), 0)


def test_other_bad_inputs(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(EnvironmentalError, match="torch sees no GPU here"):
            compress.distill(
                recipe=tiny(tmp_path, training={"device": "cuda"}), out=tmp_path / "student"
            )
    with pytest.raises(ModelError, match="no such file or folder"):
        compress.distill(
            recipe=tiny(
                tmp_path, teachers=[{"name": "a", "model": {"kind": "gguf", "path": "x.gguf"}}]
            ),
            out=tmp_path / "s",
        )
    (tmp_path / "empty").mkdir()
    adapter = [{"name": "a", "model": {"kind": "random", "config": TINY}, "adapter": "empty"}]
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        compress.distill(recipe=tiny(tmp_path, teachers=adapter), out=tmp_path / "s")
    with pytest.raises(
        ModelError, match=r"student.targets: .* Linear layers of this model: .*q_proj"
    ):
        compress.distill(
            recipe=tiny(tmp_path, student={"targets": ["nowhere"]}), out=tmp_path / "s"
        )
    domains = [{"name": "x", "text": {"kind": "files", "paths": ["missing.txt"]}}]
    with pytest.raises(DataError, match="no such file"):
        compress.distill(recipe=tiny(tmp_path, data={"domains": domains}), out=tmp_path / "s")
    with pytest.raises(ModelError, match="no model_type"):
        compress.distill(
            recipe=tiny(tmp_path, teachers=[], student={"base": {"kind": "random", "config": {}}}),
            out=tmp_path / "s",
        )


def test_heads_respect_logit_scale_and_soft_cap() -> None:
    for config, scale, cap in (
        ({**TINY, "model_type": "granite", "logits_scaling": 4.0}, 0.25, None),
        (
            {**TINY, "model_type": "gemma2", "final_logit_softcapping": 3.0, "head_dim": 16},
            1.0,
            3.0,
        ),
    ):
        model = random_model(config, vocab_size=257, seed=0, where="t").eval()
        head = head_of(model)
        assert (head.scale, head.softcap) == (scale, cap)
        ids = torch.arange(9)[None]
        hidden, _ = Body(model).states(ids)
        torch.testing.assert_close(
            head.logits(hidden), model(input_ids=ids).logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft 0.21.2 with transformers 5.23
def test_frozen_matrices_cast_once_give_the_same_bits(tmp_path: Path) -> None:
    """A LoRA student under bf16 autocast: states and gradients do not change when its frozen matrices are cast before."""
    from compress.models.students import build_model

    recipe = tiny(tmp_path, student={"dropout": 0.0})
    folder = model_folder(recipe.student.base, folder=tmp_path)
    ids = torch.randint(0, 257, (2, 16))
    found = []
    for cast in (False, True):
        model, _, _ = build_model(recipe, folder=folder, calibration=[], device=torch.device("cpu"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.01)
        if cast:
            cast_frozen(model, torch.bfloat16)
            frozen = [p for n, p in model.named_parameters() if "base_layer.weight" in n]
            assert len(frozen) == 14
            assert all(p.dtype == torch.bfloat16 for p in frozen)
            assert Body(model).head.weight_Vd.dtype == torch.float32  # tied with the embedding
        with torch.autocast("cpu", torch.bfloat16):
            hidden, _ = Body(model).states(ids)
        hidden.float().square().sum().backward()
        found.append([hidden, *(p.grad for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# Trackers -------------------------------------------------------------------------------------


def test_trackers_get_the_numbers_of_the_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    recipe = tiny(tmp_path, training={"tokens": 128, "trackers": ["tensorboard"]})
    plain = tiny(tmp_path, training={"tokens": 128})
    assert recipe.distillation() == plain.distillation()  # what is logged trains nothing again
    student = compress.distill(recipe=recipe, out=tmp_path / "student").path
    (file,) = (student / "trackers").rglob("events*")
    assert b"step/loss" in file.read_bytes()
    assert b"evaluate/nll/" in file.read_bytes()


def test_a_tracker_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "get_available_trackers", list)
    recipe = tiny(tmp_path, training={"trackers": ["wandb"]})
    with pytest.raises(EnvironmentalError, match="trackers: wandb cannot be imported here; run"):
        compress.distill(recipe=recipe, out=tmp_path / "student")
