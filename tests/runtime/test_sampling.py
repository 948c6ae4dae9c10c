"""Choosing tokens, held to transformers' own logits processors and to torch."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from limbeck.contract.errors import ModelError
from limbeck.runtime.sampling import Sampler, Sampling, choose, logprobs

V = 40


class Grid:
    """Draws at even distances: every token comes up as often as its probability says."""

    def __init__(self, points: int) -> None:
        self._points, self._at = points, -0.5

    def random(self) -> float:
        self._at += 1
        return self._at / self._points


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.5, top_k=5),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_k=V + 9),
        Sampling(temperature=1.0, top_p=0.6),
        Sampling(temperature=1.0, top_p=0.01),
        Sampling(temperature=1.3, min_p=0.2),
        Sampling(temperature=1.3, min_p=1.0),
        Sampling(temperature=0.9, top_k=12, top_p=0.7),
        Sampling(temperature=1.1, top_k=20, top_p=0.9, min_p=0.1),
    ],
)
def test_draws_are_transformers(sampling: Sampling) -> None:
    row = np.random.default_rng(3).normal(0, 2, V).astype(np.float32)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    expected = warpers(torch.zeros(1, 1, dtype=torch.long), torch.tensor(row)[None])[0].softmax(0)
    points = 2000
    draw = Grid(points)
    counts = Counter(choose(row, sampling, draw) for _ in range(points))  # type: ignore[arg-type]
    found = np.array([counts[token] / points for token in range(V)])
    np.testing.assert_allclose(found, expected.numpy(), atol=1.5 / points)


@pytest.mark.parametrize("logit", [np.nan, np.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9)])
def test_a_logit_that_is_no_number_is_an_error(logit: float, sampling: Sampling) -> None:
    row = np.zeros(V, np.float32)
    row[3] = logit
    with pytest.raises(ModelError, match=f"found a logit of {logit}, expected finite numbers"):
        choose(row, sampling)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_and_least_length_are_transformers(penalty: float) -> None:
    draw = np.random.default_rng(5)
    prompt, stop_ids = [1, 2, 2, 7], [3, 9]
    sampling = Sampling(repetition_penalty=penalty, min_tokens=6)
    sampler = Sampler(sampling, prompt=prompt, stop_ids=stop_ids)
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(penalty),
            MinNewTokensLengthLogitsProcessor(len(prompt), 6, stop_ids),
        ]
    )
    ids = list(prompt)
    for _ in range(25):
        row = draw.normal(0, 1, V).astype(np.float32)
        row[stop_ids] += 2  # so that the ends would come
        kept = row.copy()
        expected = processors(torch.tensor([ids]), torch.tensor(row)[None])[0]
        token = sampler.next(row)
        assert token == int(expected.argmax())
        np.testing.assert_array_equal(row, kept)
        ids.append(token)
    assert not set(ids[4:10]) & set(stop_ids)
    assert set(ids[10:]) & set(stop_ids)


def test_frequency_and_presence_are_openais_formula() -> None:
    draw = np.random.default_rng(7)
    sampler = Sampler(Sampling(frequency_penalty=0.4, presence_penalty=0.7), prompt=[1, 1, 1])
    made: Counter[int] = Counter()
    for _ in range(40):
        row = draw.normal(0, 1, 12).astype(np.float32)
        scores = [float(row[t]) - 0.4 * made[t] - 0.7 * (made[t] > 0) for t in range(12)]
        token = sampler.next(row)
        assert token == int(np.argmax(scores))
        made[token] += 1
    assert max(made.values()) < 12


def test_a_sampler_repeats_with_its_seed() -> None:
    rows = np.random.default_rng(0).normal(0, 1, (30, V)).astype(np.float32)
    drawn = []
    for seed in (1, 1, 2, None, None):
        sampler = Sampler(Sampling(temperature=1.0), seed=seed)
        drawn.append([sampler.next(row) for row in rows])
    assert drawn[0] == drawn[1]
    assert all(one != other for one, other in pairwise(drawn[1:]))


@pytest.mark.parametrize("count", [0, 1, 5, V, V + 3])
def test_logprobs_are_torchs(count: int) -> None:
    row = np.random.default_rng(1).normal(0, 3, V).astype(np.float32)
    expected = torch.tensor(row).double().log_softmax(0)
    values, ids = expected.topk(min(count, V))
    for token in (0, 17, int(expected.argmax())):
        found = logprobs(row, token, count)
        assert found.logprob == pytest.approx(float(expected[token]), abs=1e-9)
        assert found.rank == int((expected > expected[token]).sum()) + 1
        assert [one for one, _ in found.top] == ids.tolist()
        np.testing.assert_allclose([value for _, value in found.top], values, atol=1e-9)


def test_where_every_token_ends_the_answer_none_is_held_back() -> None:
    sampler = Sampler(Sampling(min_tokens=5), stop_ids=range(4))
    assert sampler.next(np.array([0, 2, 1, -1], np.float32)) == 1
