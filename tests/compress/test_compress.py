"""The distillation stage on pico models: it learns, it resumes in the same bits, its inputs are
checked.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress import loop as train
from compress.models.body import Body
from compress.models.language import load_model
from limbeck.contract.artifact import open_artifact
from limbeck.contract.data.heldout import load_heldout
from limbeck.contract.errors import EnvironmentalError
from limbeck.contract.recipe import Recipe, parse_recipe

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def tiny(folder: Path, **over: Any) -> Recipe:
    """Two random teachers of different widths, two domains of real text, a few steps."""
    tree = {
        "name": "tiny",
        "teachers": [
            {"name": "a", "model": {"kind": "random", "config": TINY, "seed": 1}},
            {
                "name": "b",
                "model": {
                    "kind": "random",
                    "config": {**TINY, "hidden_size": 48, "num_hidden_layers": 3},
                    "seed": 2,
                },
            },
        ],
        "data": {
            "domains": [
                {"name": "code", "text": {"kind": "stdlib", "paths": ["abc.py"]}},
                {
                    "name": "prose",
                    "text": {
                        "kind": "stdlib",
                        "paths": ["this.py"],
                        "format": {"kind": "python-strings", "min_chars": 400},
                    },
                },
            ],
            "block": 32,
            "heldout": {"every": 4, "piece_chars": 128, "blocks": 2},
        },
        "student": {
            "kind": "lora",
            "base": {"kind": "random", "config": TINY, "seed": 0},
            "rank": 4,
            "dropout": 0.1,
        },
        "training": {
            "tokens": 64 * 6,
            "batch_tokens": 64,
            "micro_batch": 1,
            "learning_rate": 1e-2,
            "threads": 1,
            "precision": "fp32",
            "evaluate_every": 3,
            "checkpoint_every": 2,
        },
        "bench": {"prompt_tokens": 24, "new_tokens": 8},  # the models read 64 tokens
    }
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


# accelerate takes FSDP for GPUs only and ignores it on a CPU; its FSDP2 code runs there all the
# same when told to.
STUDENTS = {
    "lora": {"kind": "lora", "base": {"kind": "random", "config": TINY, "seed": 0}, "rank": 4},
    "fresh": {"kind": "fresh", "config": TINY},
}


def test_cached_teachers_teach_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached equals live up to the bf16 of the cache; a second run with other weights loads no
    teacher body.
    """
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


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"quantize": "nf4"}, r"student\.quantize: nf4 cannot be trained on a CPU.*int8"),
        ({"quantize": "int8", "dora": True}, r"student\.dora: DoRA .* on an int8 base on a CPU"),
    ],
)
def test_bases_that_a_cpu_cannot_train_on(
    tmp_path: Path, options: dict[str, Any], problem: str
) -> None:
    base = {"kind": "random", "config": TINY}
    student = {"kind": "lora", "base": base, "rank": 4, **options}
    with pytest.raises(EnvironmentalError, match=problem):
        compress.distill(
            recipe=tiny(tmp_path, student=student, training={"device": "cpu"}),
            out=tmp_path / "student",
        )


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_quantised_base_and_teachers(tmp_path: Path, form: str) -> None:
    """bitsandbytes on the CPU: quantised teachers beside a QLoRA student, merged into the fp32
    base.
    """
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


@contextlib.contextmanager
def interrupted_after(steps: int) -> Iterator[None]:
    """Ctrl-C in the step after so many."""
    real, done = train._step, 0

    def step(*args: Any, **kwargs: Any) -> dict[str, Any]:
        nonlocal done
        done += 1
        if done > steps:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            yield


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


def test_golden_losses(tmp_path: Path) -> None:
    """A refactor must reproduce the loss of every step; the text is fixed here so that it is the
    same everywhere.
    """
    (tmp_path / "text.txt").write_text(
        "".join(f"{i} bottles of beer on the wall, {i} bottles of beer.\n" for i in range(200))
    )
    data = {
        "domains": [{"name": "beer", "text": {"kind": "files", "paths": ["text.txt"]}}],
        "heldout": {"every": 5, "piece_chars": 256, "blocks": 2},
    }
    recipe = tiny(
        tmp_path,
        data=data,
        student={"dropout": 0.0, "init": "base"},
        fusion={"weights": {"kind": "entropy"}},
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
