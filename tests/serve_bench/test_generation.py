"""Figures of generated text, worked out by hand; BLEU, chrF and ROUGE-L where their
libraries are.
"""

from __future__ import annotations

import numpy as np
import pytest

from limbeck.contract.results.bench import Interval
from serve_bench.judge.stats import mean_interval
from serve_bench.measure import generation

ROWS = {"onnx:fp32": [[1, 2, 3, 4], [5, 5, 5, 5]], "onnx:int8": [[1, 2, 9, 4], [5, 5, 5, 5]]}
TEXT = [[1, 2, 3, 4], [6, 7, 8, 9]]


def decode(row: list[int]) -> str:
    return " ".join(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"][i]
        for i in row
    )


def test_greedy_match_counts_up_to_the_first_difference() -> None:
    assert (
        generation.common_prefix([1, 2, 9, 4], [1, 2, 3, 4]) == 2
    )  # what agrees later goes on from another text
    assert generation.common_prefix([1, 2], [1, 2]) == 2
    found = generation.describe(ROWS, TEXT, decode=decode, against=["onnx:fp32", "gone"])
    assert found["arms"]["onnx:fp32"]["greedy_match"] == {}
    assert found["arms"]["onnx:int8"]["greedy_match"]["onnx:fp32"]["value"] == 0.75
    assert (found["prompts"], found["tokens"]) == (2, 4)


def test_distinct_and_repetition_by_hand() -> None:
    # Pairs of the first row: 12 23 34; of the second 55 three times.
    assert generation.distinct(ROWS["onnx:fp32"], 1) == 5 / 8
    assert generation.distinct(ROWS["onnx:fp32"], 2) == 4 / 6
    assert generation.repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert generation.repetition([7] * 8) == pytest.approx(4 / 5)
    assert generation.repetition([1, 2]) == 0


def test_without_the_libraries_the_overlap_is_absent_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = generation.describe(ROWS, TEXT, decode=decode, against=[])
    assert found["overlap"] is None
    assert "limbeck[eval]" in found["why"]


def test_overlap_with_the_text() -> None:
    pytest.importorskip("sacrebleu", reason="extra [eval] is not installed")
    pytest.importorskip("rouge_score", reason="extra [eval] is not installed")
    same = generation.overlap(["one two three four five"] * 3, ["one two three four five"] * 3)
    assert same["bleu"] == pytest.approx(100)
    assert same["chrf"]["value"] == pytest.approx(100)
    assert same["rouge_l"] == {"value": 100, "low": 100, "high": 100, "n": 3}
    # ROUGE-L of "one three" in "one two three four": precision 1, recall 1/2, F1 2/3.
    half = generation.overlap(["one three"], ["one two three four"])
    assert half["rouge_l"]["value"] == pytest.approx(200 / 3)
    assert "version:" in half["signatures"]["bleu"]


def test_mean_and_its_interval() -> None:
    found = mean_interval(np.array([0.0, 1.0] * 50))
    assert found.value == 0.5
    assert found.low == pytest.approx(0.4, abs=0.02)
    assert found.high == pytest.approx(0.6, abs=0.02)
    assert mean_interval(np.ones(3)) == Interval(1.0, 1.0, 1.0, 3)
