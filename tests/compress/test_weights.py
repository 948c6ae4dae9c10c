"""Weights of teachers, and their calibration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.chunked import fused_loss
from compress.head import IGNORED, Head, fit_temperature, label_nll
from compress.loss import plain_loss
from compress.weights import Reach, log_prior, weigh
from limbeck.contract.recipe import (
    CaMkdWeights,
    CorrectedEntropyWeights,
    EbkdWeights,
    EntropyWeights,
    Fusion,
    InverseEntropyWeights,
    LabelWeights,
    PosteriorWeights,
    StaticWeights,
)
from tests.compress.problems import NAMES, WEIGHTS, problem


@pytest.mark.parametrize("weights", WEIGHTS, ids=repr)
def test_weights_are_a_distribution(weights: Any) -> None:
    g = torch.Generator().manual_seed(0)
    entropy, logp = torch.rand(3, 4, 6, generator=g) * 5, -torch.rand(3, 4, 6, generator=g) * 8
    labels = torch.randint(-1, 5, (4, 6), generator=g)
    labels[labels < 0] = IGNORED
    w = weigh(weights, entropy, logp, labels, names=NAMES)
    assert (w >= 0).all()
    torch.testing.assert_close(w.sum(0), torch.ones(4, 6))


def test_weights_by_hand() -> None:
    entropy, logp = torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([[[-2.0]], [[-1.0]]])
    labels = torch.zeros(1, 1, dtype=torch.long)

    def first(config: Any) -> float:
        return float(weigh(config, entropy, logp, labels, names=("a", "b"))[0, 0, 0])

    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    assert first(EntropyWeights(kind="entropy", sharpness=2, floor=0)) == pytest.approx(sigmoid(1))
    assert first(EntropyWeights(kind="entropy", sharpness=2, floor=0.1)) == pytest.approx(
        0.9 * sigmoid(1) + 0.05
    )
    assert first(
        EntropyWeights(kind="entropy", sharpness=2, floor=0, control="inverted")
    ) == pytest.approx(sigmoid(-1))
    # 1 / H and 1 - H / sum H with 0.01 nats added to each entropy: both are 3.01 / 4.02.
    assert first(InverseEntropyWeights(kind="inverse_entropy")) == pytest.approx(3.01 / 4.02)
    assert first(EbkdWeights(kind="ebkd")) == pytest.approx(3.01 / 4.02)
    assert first(LabelWeights(kind="label", sharpness=0.5)) == pytest.approx(sigmoid(-2))
    assert first(CaMkdWeights(kind="ca_mkd")) == pytest.approx(
        1 - sigmoid(1)
    )  # CE 2 and 1: the better one gets more
    # The first position has no evidence yet: the one with less entropy gets more, by 0.5 × 2 nats.
    assert first(PosteriorWeights(kind="posterior", entropy=0.5)) == pytest.approx(sigmoid(1))
    # One position: entropy + (surprise - entropy) is the surprise itself.
    assert first(
        CorrectedEntropyWeights(kind="corrected_entropy", sharpness=1, floor=0)
    ) == pytest.approx(sigmoid(-1))


@pytest.mark.parametrize(
    "config", [InverseEntropyWeights(kind="inverse_entropy"), EbkdWeights(kind="ebkd")], ids=repr
)
def test_rounding_of_an_entropy_near_zero_moves_no_weight(config: Any) -> None:
    """Two certain teachers differ by what float32 loses in log V - sum p z: about 1e-6 nats."""
    entropy = torch.tensor([0.0, 2e-6])[:, None, None]
    labels, logp = torch.zeros(1, 1, dtype=torch.long), torch.zeros(2, 1, 1)
    weights = weigh(config, entropy, logp, labels, names=("a", "b"))
    torch.testing.assert_close(weights, torch.full_like(weights, 0.5), rtol=3e-4, atol=0)


def test_a_prior_by_domain_is_that_of_bayes_rule() -> None:
    """prior^1 * likelihood^0.5, over the tokens before; a domain without a prior is uniform."""
    prior = {"code": {"a": 3.0, "b": 1.0}, "prose": {"b": 2.0}}
    config = PosteriorWeights(kind="posterior", evidence=0.5, prior=prior)
    domains, cpu = ["code", "prose", "other"], torch.device("cpu")
    logp_KRL = torch.log(torch.tensor([0.25, 0.04]))[:, None, None].expand(2, 3, 2)
    given = log_prior(config, ["a", "b"], domains, device=cpu)
    w = weigh(config, torch.zeros(2, 3, 2), logp_KRL, torch.ones(3, 2, dtype=torch.long),
              names=["a", "b"], prior_KR=given)  # fmt: skip
    # 0.25^0.5 = 0.5 and 0.04^0.5 = 0.2 after one token.
    assert w[0, :, 0].tolist() == pytest.approx([0.75, 0.0, 0.5])
    assert w[0, :, 1].tolist() == pytest.approx([1.5 / 1.7, 0.0, 0.5 / 0.7])
    assert log_prior(PosteriorWeights(kind="posterior"), ["a"], ["code"], device=cpu) is None


def test_no_teacher_stands_in_for_the_one_that_the_prior_names() -> None:
    """Where that one has no distribution for the label, all weights are 0."""
    config = PosteriorWeights(kind="posterior", prior={"code": {"a": 1.0}})
    zeros_KRL, labels_RL = torch.zeros(2, 1, 2), torch.ones(1, 2, dtype=torch.long)
    target_KRL = torch.tensor([[[True, False]], [[True, True]]])
    reach = Reach(target_KRL, torch.ones_like(target_KRL), torch.ones_like(target_KRL))
    given = log_prior(config, ["a", "b"], ["code"], device=torch.device("cpu"))
    w = weigh(config, zeros_KRL, zeros_KRL, labels_RL, names=["a", "b"], prior_KR=given,
              reach=reach)  # fmt: skip
    assert w[:, 0].T.tolist() == [[1, 0], [0, 0]]


def test_floor_warm_up_and_even_shares_count_the_teachers_that_are_there() -> None:
    """Of three teachers, b is absent at the first label, and only c is there at the second."""
    zeros_KRL, labels_RL = torch.zeros(3, 1, 2), torch.ones(1, 2, dtype=torch.long)
    target_KRL = torch.tensor([[[True, False]], [[False, False]], [[True, True]]])
    reach = Reach(target_KRL, torch.ones_like(target_KRL), torch.ones_like(target_KRL))

    def at(config: Any, progress: float, entropy_KRL: Tensor = zeros_KRL) -> list[list[float]]:
        found = weigh(config, entropy_KRL, zeros_KRL, labels_RL, names=["a", "b", "c"],
                      progress=progress, reach=reach)  # fmt: skip
        return found[:, 0].T.tolist()

    static = StaticWeights(kind="static", values={"a": 1, "b": 1, "c": 0})
    assert at(static, 1) == [[1, 0, 0], [0, 0, 1]]
    config = EntropyWeights(kind="entropy", granularity="token", sharpness=1, floor=0.1, warmup=0.5)
    entropy_KRL = torch.tensor([0.0, 0.0, math.log(3)])[:, None, None].expand(3, 1, 2)
    # exp(-entropy) is 1 and 1 / 3: weights 3 / 4 and 1 / 4, of which a tenth is shared evenly.
    whole = 0.9 * 0.75 + 0.05
    half = 0.5 * whole + 0.25
    for progress, first in ((1.0, whole), (0.5, whole), (0.25, half)):
        expected = [[first, 0, 1 - first], [0, 0, 1]]
        torch.testing.assert_close(
            torch.tensor(at(config, progress, entropy_KRL)), torch.tensor(expected)
        )


def test_the_posterior_is_causal_and_bayes_rule() -> None:
    logp = torch.tensor([[[-1.0, -2.0, -3.0]], [[-2.0, -1.0, -1.0]]])
    labels = torch.zeros(1, 3, dtype=torch.long)
    w = weigh(PosteriorWeights(kind="posterior"), torch.zeros(2, 1, 3), logp, labels)[0, 0]
    expected = [
        0.5,
        1 / (1 + math.exp(-1)),
        0.5,
    ]  # evidence before each position: (0,0), (-1,-2), (-3,-3)
    torch.testing.assert_close(w, torch.tensor(expected))


@pytest.mark.parametrize("chunk", [3, 64])
def test_the_evidence_of_a_prompt_is_as_if_the_prompt_were_labelled(chunk: int) -> None:
    """Posterior weights after a prompt that is read but not learnt, chunked and plain."""
    parts = problem(masked=0)
    fusion = Fusion(weights=PosteriorWeights(kind="posterior", evidence=0.8), chunk=chunk)
    whole = fused_loss(fusion, **parts)
    labels = parts["labels_RL"].clone()
    labels[:, :3] = IGNORED
    after = {**parts, "labels_RL": labels, "prior_KR": whole.label_logp_KRL[..., :3].sum(-1)}
    terms = fused_loss(fusion, **after)
    torch.testing.assert_close(terms.weights_KRL[..., 3:], whole.weights_KRL[..., 3:])
    torch.testing.assert_close(terms.loss, plain_loss(fusion, **after), rtol=1e-5, atol=1e-6)
    del after["prior_KR"]
    assert not torch.allclose(fused_loss(fusion, **after).weights_KRL, terms.weights_KRL)


def test_batch_granularity_needs_no_neighbour_when_given_global_means() -> None:
    means = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    config = EntropyWeights(kind="entropy", granularity="batch", sharpness=1, floor=0)
    w = weigh(
        config,
        torch.rand(2, 1, 4),
        torch.zeros(2, 1, 4),
        torch.zeros(1, 4, dtype=torch.long),
        global_means_2K=means,
    )
    torch.testing.assert_close(w[0], torch.full((1, 4), 1 / (1 + math.exp(-1))))


def test_calibration_finds_the_temperature_that_was_put_in() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, 4000, 6, generator=g), torch.randn(9, 6, generator=g)
    truth = torch.distributions.Categorical(logits=hidden[0] @ weight.T / 1.6)
    torch.manual_seed(0)
    labels = truth.sample()[None]
    assert fit_temperature(
        hidden, Head(weight), labels, bounds=(0.5, 3), positions=4000
    ) == pytest.approx(1.6, rel=0.05)
    assert fit_temperature(
        hidden, Head(weight), labels, bounds=(0.5, 1.2), positions=4000
    ) == pytest.approx(1.2)


def test_label_nll_sums_by_row() -> None:
    parts = problem()
    hidden, head, labels = parts["hidden_RLd"].detach(), parts["head"], parts["labels_RL"]
    logp = torch.log_softmax(head.logits(hidden), -1).detach()
    expected = [
        -sum(float(logp[r, t, y]) for t, y in enumerate(row.tolist()) if y != IGNORED)
        for r, row in enumerate(labels)
    ]
    torch.testing.assert_close(
        label_nll(hidden, head, labels, chunk=3),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-5,
        atol=1e-5,
    )
