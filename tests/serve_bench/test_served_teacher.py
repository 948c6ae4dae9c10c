"""A teacher behind a server in the bench: not run, judged by the losses of its answers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from limbeck.contract.results.bench import Arm
from serve_bench.judge import language
from serve_bench.judge.figures import Reference
from serve_bench.judge.gates import Evidence, best_teacher, language_gates
from serve_bench.judge.stats import Interval
from serve_bench.measure.arms import teachers_of
from tests.pico import pico_recipe


def test_it_is_judged_as_a_teacher_that_ran_here_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    sizes = {"labels": [20, 25, 30, 31], "utf8_bytes": [50, 60, 70, 71]}
    domains = dict.fromkeys(("letters", "numbers"), sizes)
    losses = {
        arm: {name: {"nll": draw.uniform(50, 90, 4).tolist()} for name in domains}
        for arm in ("onnx:fp32", "teacher:here")
    }
    arms = tuple(
        Arm(arm, arm.split(":")[1], role, "torch", 10, {})  # type: ignore[arg-type]
        for arm, role in (("onnx:fp32", "form"), ("teacher:here", "teacher"))
    )
    same = {name: found["nll"] for name, found in losses["teacher:here"].items()}
    quality = {"domains": domains, "arms": losses, "served": {"far": same}, "mixture_of": []}
    none = Interval(1.0, 1.0, 1.0, 6)
    timing = Evidence("r", "fp32", {}, none, none, 10, 10, None, {})
    monkeypatch.setattr(language, "timing_evidence", lambda *_: timing)
    nll = np.mean([sum(nats) / sum(domains[name]["labels"]) for name, nats in same.items()])
    found = language.evidence([], quality, Reference("r", "fp32", arms, 3))
    far, here = found.rise_over_teachers["far"], found.rise_over_teachers["here"]
    assert far[0] == pytest.approx(nll)
    assert here[0] == pytest.approx(nll)
    assert dataclasses.astuple(far[1]) == pytest.approx(dataclasses.astuple(here[1]))
    better = {name: [nats - 5 for nats in values] for name, values in same.items()}
    found = language.evidence(
        [], quality | {"served": {"far": better}}, Reference("r", "fp32", arms, 3)
    )
    assert best_teacher(found) == "far"
    recipe = pico_recipe(
        teachers=[{"name": "far", "model": {"kind": "random", "config": {}}}],
        gates={"max_loss_vs_best_teacher": 0.01},
    )
    (gate,) = (g for g in language_gates(recipe.gates, found) if "best single" in g.title)
    assert "far, the best single teacher" in gate.sentence


@pytest.mark.parametrize("here", [True, False])
def test_a_teacher_of_another_tokenizer_is_compared_in_bits_a_byte(
    monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    """By hand: the mean over domains of bits a byte, which weighs other than that of nats a token.

    A server's teacher is no arm, and is compared all the same.
    """
    domains = {
        "prose": {"labels": [10, 10], "utf8_bytes": [50, 40]},
        "numbers": {"labels": [10, 10], "utf8_bytes": [10, 12]},
    }
    nats = {"onnx:fp32": ([20.0, 24.0], [30.0, 26.0]), "teacher:far": ([25.0, 26.0], [20.0, 21.0])}
    losses = {
        arm: {name: {"nll": n} for name, n in zip(domains, found, strict=True)}
        for arm, found in nats.items()
    }
    quality = {"domains": domains, "arms": losses, "mixture_of": [],
               "other_tokenizers": ["teacher:far"]}  # fmt: skip
    arms = [Arm("onnx:fp32", "fp32", "form", "onnxruntime", 10, {})]
    if here:
        arms.append(Arm("teacher:far", "far", "teacher", "torch", 10, {}))
    none = Interval(1.0, 1.0, 1.0, 6)
    timing = Evidence("r", "fp32", {}, none, none, 10, 10, None, {})
    monkeypatch.setattr(language, "timing_evidence", lambda *_: timing)
    found = language.evidence([], quality, Reference("r", "fp32", tuple(arms), 3))
    ours, theirs = (44 / 90 + 56 / 22) / 2, (51 / 90 + 41 / 22) / 2
    assert found.by_byte == {"far"}
    assert found.rise_over_teachers["far"][1].value == pytest.approx(ours / theirs - 1)


def test_it_is_no_arm(tmp_path: Path) -> None:
    class Student:
        path = tmp_path

    entries = [{"name": "far", "server": "http://host/v1", "model": "big", "temperature": 1.0}]
    (tmp_path / "teachers.json").write_text(json.dumps(entries))
    assert teachers_of(Student) == []  # type: ignore[arg-type]
