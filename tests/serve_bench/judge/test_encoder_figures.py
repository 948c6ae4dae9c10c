"""Figures of an encoder's bench from samples and answers made by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from limbeck.contract.errors import RecipeError
from limbeck.contract.recipe import EncoderRecipe
from limbeck.contract.results.bench import Arm, Verdict
from serve_bench.judge.encoder import Quality
from serve_bench.judge.figures import Cell, Sample, by_block, speed
from serve_bench.judge.task import Measured, judge_bench
from serve_bench.tasks.encoder import Encoder
from tests.encoders import classifier_recipe, embedding_recipe, source

CELLS = (Cell(1, 8), Cell(4, 8))
TEACHERS = [{"name": "a", "model": source()}, {"name": "b", "model": source()}]
ARMS = [
    Arm("teacher:a", "a", "teacher", "torch", 4_000_000, {}),
    Arm("teacher:b", "b", "teacher", "torch", 4_000_000, {}),
    Arm("onnx:fp32", "fp32", "form", "onnxruntime", 2_000_000, {}),
    Arm("onnx:int8-dynamic", "int8-dynamic", "form", "onnxruntime", 500_000, {}),
    Arm("onnx:int8-dynamic:twin", "copy", "twin", "onnxruntime", 500_000, {}),
]
SECONDS = {
    "teacher:a": 8.0,
    "teacher:b": 2.0,
    "onnx:fp32": 2.0,
    "onnx:int8-dynamic": 1.0,
    "onnx:int8-dynamic:twin": 1.0,
}


def samples(blocks: int = 6) -> list[Sample]:
    """Every arm twice in every cell of a block; the machine grows slower from block to block, for
    all alike.
    """
    return [
        Sample(arm, block, position, (seconds * (1 + block) * cell.batch,), cell)
        for block in range(blocks)
        for cell in CELLS
        for position in (0, 1)
        for arm, seconds in SECONDS.items()
    ]


def predictions(right: int, total: int = 100) -> np.ndarray:
    """Logits of 100 examples of two classes by turns, the first ``right`` of which are right."""
    labels = np.arange(total) % 2
    said = np.where(np.arange(total) < right, labels, 1 - labels)
    return np.eye(2, dtype=np.float32)[said]


def quality(**right: int) -> Quality:
    counts = {"teacher:a": 96, "teacher:b": 90, "onnx:fp32": 95, "onnx:int8-dynamic": 95} | right
    groups = (np.arange(100) % 2).astype(np.int32)
    recipe = classifier_recipe(teachers=TEACHERS)
    return Quality(
        recipe, {name: predictions(count) for name, count in counts.items()}, groups, ARMS
    )


def judge(
    timed: list[Sample], found: Quality, shipped: str, arms: list[Arm], recipe: EncoderRecipe
) -> Verdict:
    task = Encoder(recipe)
    environment = {
        "blocks": 1,
        "stopped": "decided",
        "arms": {arm.id: {"steady": True} for arm in arms},
    }
    reference = task.reference(shipped, arms)
    return judge_bench(Measured([], timed, environment, found, reference, {}), task).verdict


def test_a_block_is_the_geometric_mean_of_its_cells_and_samples() -> None:
    assert by_block(samples(1), "teacher:a", "e2el").tolist() == pytest.approx(
        [16.0]
    )  # sqrt(8 x 32)
    assert by_block(samples(2), "teacher:a", "e2el", CELLS[1]).tolist() == pytest.approx(
        [32.0, 64.0]
    )


def test_the_ratio_is_paired_within_blocks() -> None:
    reference = Encoder(classifier_recipe()).reference("int8-dynamic", ARMS)
    ratio = speed(samples(), reference, "teacher:a", "e2el")
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((8.0, 8.0, 8.0))
    # A teacher that needs three tokens for two of the student's takes half as long again.
    arms = [dataclasses.replace(arm, token_rate=1.5) if arm is ARMS[0] else arm for arm in ARMS]
    reference = Encoder(classifier_recipe()).reference("int8-dynamic", arms)
    assert speed(samples(), reference, "teacher:a", "e2el").value == pytest.approx(12.0)


def test_the_better_teacher_is_the_one_with_the_better_metric_not_the_slower() -> None:
    recipe = classifier_recipe(
        teachers=TEACHERS, gates={"min_throughput_ratio": 7, "max_metric_loss": 0.02}
    )
    verdict = judge(samples(), quality(), "int8-dynamic", ARMS, recipe)
    assert verdict.status == "pass"
    assert verdict.gates[0].value == pytest.approx(8.0)
    assert verdict.gates[1].value == pytest.approx(1 - 0.95 / 0.96)
    swapped = quality(**{"teacher:b": 99})
    gates = {
        gate.name: gate for gate in judge(samples(), swapped, "int8-dynamic", ARMS, recipe).gates
    }
    assert gates["min_throughput_ratio"].value == pytest.approx(2.0)
    assert gates["min_throughput_ratio"].status == "fail"
    assert gates["max_metric_loss"].status == "fail"


def test_too_few_blocks_decide_nothing() -> None:
    recipe = classifier_recipe(teachers=TEACHERS, gates={"min_throughput_ratio": 7})
    assert judge(samples(3), quality(), "int8-dynamic", ARMS, recipe).status == "undecided"


def test_the_interval_of_a_loss_is_paired_over_examples() -> None:
    found = quality(**{"onnx:int8-dynamic": 96}).loss("onnx:int8-dynamic", "teacher:a")
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)  # the same examples are right
    found = quality().loss("onnx:int8-dynamic", "teacher:b")
    assert found.value == pytest.approx(1 - 95 / 90)
    assert found.low < found.value < found.high < 0.01


def level(blocks: int = 6, **seconds: float) -> list[Sample]:
    """As `samples`, of a machine that stays as it is."""
    return [
        Sample(arm, block, position, (taken * cell.batch,), cell)
        for block in range(blocks)
        for cell in CELLS
        for position in (0, 1)
        for arm, taken in (SECONDS | seconds).items()
    ]


def test_the_time_of_one_sequence_is_judged_by_its_whole_interval() -> None:
    """Milliseconds of batch 1 at the largest length; the other cells have no part in it."""

    def judged(asked: float, timed: list[Sample]) -> tuple[str, float]:
        recipe = classifier_recipe(
            gates={"max_latency_ms": asked},
            bench={"batches": [1, 4], "lengths": [8], "min_blocks": 6},
        )
        (gate,) = judge(timed, quality(), "int8-dynamic", ARMS, recipe).gates
        assert (gate.name, gate.unit, gate.least) == ("max_latency_ms", "ms", False)
        return gate.status, gate.value

    assert judged(1001, level()) == ("pass", pytest.approx(1000))
    assert judged(999, level()) == ("fail", pytest.approx(1000))
    assert judged(1001, level(5)) == ("undecided", pytest.approx(1000))  # too few blocks
    assert judged(2000, samples())[0] == "undecided"  # from 1 s to 6 s
    # Its copy is a tenth slower without fail: a process of its own may be so too.
    assert judged(1050, level(**{"onnx:int8-dynamic:twin": 1.1}))[0] == "undecided"


def test_the_time_of_one_sequence_needs_batches_of_one() -> None:
    with pytest.raises(RecipeError, match=r"gates\.max_latency_ms: .* add 1 to bench\.batches"):
        classifier_recipe(gates={"max_latency_ms": 3}, bench={"batches": [4]})


def test_sizes_and_quantising_are_judged() -> None:
    gates = {"max_size_ratio": 0.3, "max_size_mb": 0.4, "max_quantization_loss": 0.0}
    judged = judge(
        samples(),
        quality(),
        "int8-dynamic",
        ARMS,
        classifier_recipe(teachers=TEACHERS, gates=gates),
    ).gates
    assert {gate.name: gate.status for gate in judged} == {
        "max_quantization_loss": "pass",
        "max_size_ratio": "pass",
        "max_size_mb": "fail",
    }


def test_sentences_are_ranked_against_the_mean_of_the_teachers() -> None:
    draw = np.random.default_rng(0)
    vectors = {arm.id: draw.normal(size=(20, 6)).astype(np.float32) for arm in ARMS[:4]}
    vectors["onnx:int8-dynamic"] = vectors["onnx:fp32"]
    found = Quality(embedding_recipe(), vectors, np.zeros(20, np.int32), ARMS)
    assert found.value("teacher:a") > found.value("onnx:fp32")
    loss = found.loss("onnx:int8-dynamic", "onnx:fp32")
    assert (loss.value, loss.low, loss.high) == (0.0, 0.0, 0.0)
    worse = found.loss("onnx:fp32", "teacher:a")
    assert worse.low < worse.value < worse.high


def test_a_teacher_that_is_never_right_has_a_loss_to_compare_with() -> None:
    """A random stand-in may be all wrong: the loss over it is hugely negative, and no error."""
    found = quality(**{"teacher:b": 0})
    assert found.value("teacher:b") == 0
    assert found.loss("onnx:fp32", "teacher:b").value < -1e6
