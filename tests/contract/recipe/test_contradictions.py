"""Fields that are right alone and contradict each other: the message names the place and the
remedy."""

from __future__ import annotations

from typing import Any

import pytest

from limbeck.contract.errors import RecipeError
from limbeck.contract.recipe.checks import require_equal_shares
from tests.contract.recipe.test_recipe import mistakes, plain, teacher
from tests.encoders import classifier_recipe, embedding_recipe, source

_ONE = [teacher("a")]
_SERVED = {
    "name": "far",
    "model": {
        "kind": "server", "url": "http://x/v1", "model": "m", "tokenizer": teacher()["model"],
    },
}  # fmt: skip
_PLAIN = {"calibration": {"kind": "none"}}
_STATIC = {"kind": "static", "batch": 1, "length": 1024}


def training(**over: Any) -> dict[str, Any]:
    return {"training": {"tokens": 1024, "batch_tokens": 32} | over}


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        (training(minutes=1), "training: give the budget once, as `tokens` or as `minutes`"),
        (
            training(tokens=None, minutes=1, teacher_cache={"kind": "hidden"}),
            "training.minutes: a teacher cache must know its text beforehand",
        ),
        (
            training(teacher_cache={"kind": "topk"})
            | {"teachers": _ONE, "features": {"weight": 0}},
            "training.teacher_cache: topk keeps the distributions of uncalibrated teachers",
        ),
        (
            training(teacher_cache={"kind": "topk"})
            | {"teachers": _ONE, "features": {"weight": 1}, "fusion": _PLAIN},
            "training.teacher_cache: topk keeps no hidden states; set features.weight: 0",
        ),
        (
            training(teacher_cache={"kind": "topk"})
            | {"teachers": _ONE, "features": {"weight": 0}, "fusion": _PLAIN | {"temperature": 2}},
            "training.teacher_cache: topk is kept at temperature 1",
        ),
        (
            training(tokens=None, minutes=1)
            | {"teachers": [_SERVED], "features": {"weight": 0}, "fusion": _PLAIN},
            "training.minutes: teacher far is behind a server and reads all text beforehand",
        ),
        (
            {"teachers": [_SERVED], "features": {"weight": 0}},
            "fusion.calibration: teacher far is behind a server, which answers uncalibrated",
        ),
        (
            {
                "teachers": _ONE,
                "fusion": {"weights": {"kind": "posterior", "prior": {"prose": {"a": 0}}}},
            },
            "fusion.weights.prior.prose: all are 0",
        ),
        (
            {"teachers": _ONE, "fusion": {"calibration": {"kind": "fixed", "values": {"b": 1}}}},
            "fusion.calibration.values: found ['b']; name each teacher once: ['a']",
        ),
        ({"export": {"opset": 21, "backend": "genai"}}, "export.opset: genai leaves no choice"),
        (
            {
                "student": {"kind": "lora", "base": teacher()["model"], "dora": True},
                "export": {"adapters": "separate"},
            },
            "export.adapters: DoRA is more than a low-rank update",
        ),
        (
            {
                "student": {"kind": "merge", "base": teacher()["model"]},
                "teachers": [teacher("a"), teacher("b")],
                "export": {"recover": {"tokens": 1024}},
            },
            "export.recover: a merge is not trained",
        ),
        (
            {"export": {"shapes": _STATIC, "backend": "genai"}},
            "export.shapes: genai leaves no choice, since GenAI's builder only makes graphs of",
        ),
        (
            {"export": {"shapes": _STATIC | {"length": 20}, "backend": "dynamo"}},
            "export.shapes.length: found 20; data.block and bench.prompt_tokens + bench.new_tokens",
        ),
        (
            {
                "export": {"shapes": _STATIC, "backend": "dynamo"},
                "bench": {"scenarios": [{"kind": "offline"}]},
            },
            "bench.scenarios: offline runs batches of changing size",
        ),
        (
            {"export": {"shapes": _STATIC, "backend": "dynamo", "adapters": "separate"}},
            "export.shapes: adapters, mixed and recover need graphs of dynamic shapes",
        ),
    ],
)
def test_language_models(over: dict[str, Any], expected: str) -> None:
    found = mistakes(plain(**over))
    assert [line for line in found if line.startswith(expected)], found


@pytest.mark.parametrize(
    ("make", "over", "expected"),
    [
        (
            classifier_recipe,
            {"budget": {"size_mb": 1, "quality": {"metric": "macro_f1", "max_loss": 0.1}},
             "bench": {"metric": "accuracy"}},
            "budget.quality.metric: found 'macro_f1', but bench.metric is 'accuracy'",
        ),
        (
            classifier_recipe,
            {"export": {"shapes": _STATIC | {"length": 20}}},
            "export.shapes.length: found 20; data.max_tokens and bench.lengths need",
        ),
        (
            classifier_recipe,
            {"training": {"examples": 3, "batch": 4}},
            "training.examples: found 3; it should be at least one step (training.batch = 4)",
        ),
        (
            embedding_recipe,
            {"training": {"examples": 8, "batch": 2}},
            "training.batch: found 2; similarities within a batch need at least 3 examples",
        ),
        (
            embedding_recipe,
            {"fusion": {"weights": {"kind": "entropy", "control": "shuffled"}}},
            "fusion.weights.control: shuffled permutes the positions of a text",
        ),
        (
            classifier_recipe,
            {"student": {"kind": "fresh", "config": source()["config"]}},
            "student.kind: a fresh student takes its tokenizer from the first teacher",
        ),
        (
            classifier_recipe,
            {"gates": {"max_latency_ms": 5}, "bench": {"batches": [4]}},
            "gates.max_latency_ms: this is the time of one sequence; add 1 to bench.batches",
        ),
    ],
)  # fmt: skip
def test_encoders(make: Any, over: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make(**over)
    assert f"\n  {expected}" in str(caught.value)


def test_processes_share_an_encoders_step_evenly() -> None:
    recipe = classifier_recipe(training={"examples": 16, "batch": 8})
    require_equal_shares(recipe, processes=4)
    with pytest.raises(RecipeError, match=r"training.batch: found 8; 3 processes .* example 9"):
        require_equal_shares(recipe, processes=3)
