"""Figures from samples and log-probabilities, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from serve_bench.judge import figures, quality
from serve_bench.judge.figures import Sample


def test_tpot_leaves_prompt_and_first_token_out() -> None:
    sample = Sample("a", 0, 0, (0.5, 0.6, 0.8, 1.1))
    assert sample.ttft == 0.5
    assert sample.e2el == 1.1
    assert sample.tpot == pytest.approx((1.1 - 0.5) / 3)
    assert sample.itl == pytest.approx([0.1, 0.2, 0.3])


def test_blocks_take_the_geometric_mean_of_both_directions() -> None:
    samples = [
        Sample("a", 0, 0, (1.0, 2.0)),
        Sample("a", 0, 3, (4.0, 8.0)),
        Sample("b", 0, 1, (9.0, 9.5)),
    ]
    assert figures.by_block(samples, "a", "ttft") == pytest.approx([2.0])
    assert figures.by_block(samples, "a", "tpot") == pytest.approx([2.0])


def test_sums_by_hand(tmp_path: Path) -> None:
    one, two = (
        np.log(np.array([[0.5, 0.5]], np.float32)),
        np.log(np.array([[0.9, 0.1]], np.float32)),
    )
    np.save(tmp_path / "1.npy", one)
    np.save(tmp_path / "2.npy", two)
    quality.mix([tmp_path / "1.npy", tmp_path / "2.npy"], tmp_path / "m.npy")
    mixture = np.load(tmp_path / "m.npy")
    assert np.exp(mixture) == pytest.approx(np.array([[0.7, 0.3]]))
    every = np.array([True])
    found = quality.sums(one, np.array([1]), mixture, every)
    assert found["nll"] == pytest.approx(np.log(2))
    assert found["kl"] == pytest.approx(0.7 * np.log(0.7 / 0.5) + 0.3 * np.log(0.3 / 0.5))
    assert quality.sums(two, np.array([0]), mixture, every)["top1"] == 1
    assert (
        quality.sums(np.log(np.array([[0.1, 0.9]], np.float32)), np.array([0]), mixture, every)[
            "top1"
        ]
        == 0
    )
    assert quality.sums(one, np.array([1]), None, every)["kl"] is None


def test_sums_leave_out_what_is_not_scored() -> None:
    draw = np.random.default_rng(0)
    arm, mixture = (
        quality.log_softmax(draw.normal(size=(40, 5)).astype(np.float32)) for _ in range(2)
    )
    labels, scored = draw.integers(0, 5, 40), np.arange(40) % 3 == 0
    found = quality.sums(arm, labels, mixture, scored)
    alone = quality.sums(arm[scored], labels[scored], mixture[scored], scored[scored])
    assert found["labels"] == scored.sum()
    assert {k: found[k] for k in ("nll", "kl", "top1")} == pytest.approx(
        {k: alone[k] for k in ("nll", "kl", "top1")}
    )
    assert found["last"] == arm[-1].argmax()


def test_calibration_error_by_hand() -> None:
    # Confident at 0.9 and right once of twice: off by 0.4. Confident at 0.6 and right: off by 0.4.
    # 0.96 and 0.9 lie in two bins.
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.04, 0.96]], np.float32)
    first = quality.calibration(np.log(probabilities[:2]), np.array([0, 1]))
    rest = quality.calibration(np.log(probabilities[2:]), np.array([1, 1]))
    assert len(first) == quality.BINS
    assert sum(count for count, _, _ in first) == 2
    assert first[13] == pytest.approx([2, 1.8, 1])
    assert quality.calibration_error([first, rest]) == pytest.approx((2 * 0.4 + 0.4 + 0.04) / 4)
    sure = quality.calibration(np.log(np.array([[1.0, 1e-30]], np.float32)), np.array([0]))
    assert sure[-1] == [1, 1, 1]  # a confidence of 1 is in the last bin
    assert quality.calibration_error([sure]) == 0


def test_log_softmax_of_large_logits() -> None:
    logits = np.array([[1e4, 1e4, 0.0], [-3.0, 0.0, 3.0]], np.float32)
    found = quality.log_softmax(logits.copy())
    assert found[0, :2] == pytest.approx(-np.log(2))
    assert np.exp(found).sum(1) == pytest.approx([1.0, 1.0])
