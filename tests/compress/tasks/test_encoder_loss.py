"""The losses of encoders against independent references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from compress.tasks.classification import class_temperature, class_terms
from compress.tasks.embedding import (
    mixed_similarities,
    relational_loss,
    similarity_logits,
    similarity_weights,
    spearman,
)
from compress.tasks.encoder import Terms
from limbeck.contract.recipe import ClassFusion, EntropyWeights, UniformWeights

R, TAU = 6, 0.2


def vectors(seed: int, width: int = 5) -> Tensor:
    torch.manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(R, width), dim=-1)


def distribution(unit: Tensor, i: int) -> Tensor:
    """Similarities of example i to the others as probabilities, written out."""
    others = [j for j in range(len(unit)) if j != i]
    return torch.softmax(torch.stack([unit[i] @ unit[j] for j in others]) / TAU, dim=0)


def test_the_relational_loss_is_the_kl_to_the_mixture_of_similarity_distributions() -> None:
    student, teachers, weights = vectors(0), [vectors(1), vectors(2, width=7)], torch.rand(2, R)
    weights = weights / weights.sum(0)
    expected = 0.0
    for i in range(R):
        mixture = weights[0, i] * distribution(teachers[0], i) + weights[1, i] * distribution(
            teachers[1], i
        )
        expected += (
            torch.nn.functional.kl_div(
                distribution(student, i).log(), mixture, reduction="sum"
            ).item()
            / R
        )
    found = relational_loss(student, teachers, weights, temperature=TAU, relation="kl")
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_the_squared_relational_loss_is_over_pairs_of_different_examples() -> None:
    student, teachers, weights = vectors(0), [vectors(1), vectors(2)], torch.full((2, R), 0.5)
    pairs = [(i, j) for i in range(R) for j in range(R) if i != j]
    gaps = [
        0.5 * teachers[0][i] @ teachers[0][j]
        + 0.5 * teachers[1][i] @ teachers[1][j]
        - student[i] @ student[j]
        for i, j in pairs
    ]
    found = relational_loss(student, teachers, weights, temperature=TAU, relation="mse")
    assert found.item() == pytest.approx(float(torch.stack(gaps).square().mean()), rel=1e-5)


@pytest.mark.parametrize("relation", ["kl", "mse"])
def test_a_student_that_is_its_teacher_has_no_relational_loss_and_no_gradient(
    relation: str,
) -> None:
    student = vectors(3).requires_grad_(True)
    copies = [student.detach(), student.detach()]
    loss = relational_loss(
        student, copies, torch.full((2, R), 0.5), temperature=TAU, relation=relation
    )
    loss.backward()
    assert student.grad is not None
    assert abs(loss.item()) < 1e-6
    assert float(student.grad.abs().max()) < 1e-5


def test_turning_the_space_around_changes_no_relation() -> None:
    student, teacher, weights = vectors(0), vectors(1), torch.ones(1, R)
    turned = teacher @ torch.linalg.qr(torch.randn(5, 5))[0]
    both = [
        relational_loss(student, [t], weights, temperature=TAU, relation="kl").item()
        for t in (teacher, turned)
    ]
    assert both[0] == pytest.approx(both[1], rel=1e-4)


def test_the_weights_are_those_of_the_similarity_entropy() -> None:
    teachers = [vectors(1), vectors(2, width=3)]
    config = EntropyWeights(kind="entropy", sharpness=0.3, floor=0.1)
    weights, entropy = similarity_weights(config, teachers, temperature=TAU, names=["a", "b"])
    expected = np.array(
        [[stats.entropy(distribution(t, i).numpy()) for i in range(R)] for t in teachers]
    )
    np.testing.assert_allclose(entropy.numpy(), expected, rtol=1e-4)
    shares = np.exp(-expected / 0.3) / np.exp(-expected / 0.3).sum(0)
    np.testing.assert_allclose(weights.numpy(), 0.9 * shares + 0.05, rtol=1e-4)


def test_two_examples_that_are_alike_by_hand() -> None:
    """Three unit vectors, two the same: similarities (1, 0), so p = e^5 / (e^5 + 1) at a
    temperature of 0.2.
    """
    unit = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    p = torch.softmax(similarity_logits(unit, TAU), dim=-1)
    assert p[0, 1].item() == pytest.approx(0.9933071, abs=1e-6)
    assert p[2].tolist() == pytest.approx([0.5, 0.5, 0.0])
    _, entropy = similarity_weights(
        UniformWeights(kind="uniform"), [unit], temperature=TAU, names=["a"]
    )
    assert entropy[0, 2].item() == pytest.approx(np.log(2))


def test_spearman_ranks_the_pairs() -> None:
    ours, theirs = vectors(0), [vectors(1), vectors(2)]
    above = np.triu_indices(R, 1)
    mixed = mixed_similarities(theirs)
    mean = np.mean([(t @ t.T).numpy()[above] for t in theirs], axis=0)
    expected = stats.spearmanr((ours @ ours.T).numpy()[above], mean).statistic
    assert spearman(ours @ ours.T, mixed) == pytest.approx(expected)
    assert spearman(mixed, mixed) == pytest.approx(1.0)


LABELS = torch.arange(R) % 2


def classification(fusion: ClassFusion, z: Tensor, logits: list[Tensor]) -> Terms:
    names = [f"t{k}" for k in range(len(logits))]
    return class_terms(
        fusion,
        z,
        logits,
        LABELS,
        temperatures=[1.0] * len(logits),
        names=names,
        count=R,
        progress=1.0,
    )


def test_classification_is_label_loss_plus_kl_to_the_entropy_weighted_mixture() -> None:
    torch.manual_seed(0)
    z, logits = torch.randn(R, 3, requires_grad=True), [3 * torch.randn(R, 3), torch.randn(R, 3)]
    weights = EntropyWeights(kind="entropy", sharpness=0.3, floor=0.05)
    fusion = ClassFusion.model_validate(
        {"weights": weights.model_dump(), "calibration": {"kind": "none"}}
    )
    terms = classification(fusion, z, logits)

    p = torch.stack([torch.softmax(t, -1) for t in logits])
    entropy = -(p * p.log()).sum(-1)
    w = 0.95 * torch.softmax(-entropy / 0.3, dim=0) + 0.025
    logq = torch.log_softmax(z, -1)
    kl = torch.nn.functional.kl_div(logq, (w[..., None] * p).sum(0), reduction="batchmean")
    expected = 0.3 * torch.nn.functional.cross_entropy(z, LABELS) + 0.7 * kl
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(terms.weights_KR, w)
    (mine,) = torch.autograd.grad(terms.loss, z)
    (theirs,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_without_teachers_the_loss_is_the_labels() -> None:
    z = torch.randn(R, 2, requires_grad=True)
    terms = classification(ClassFusion(), z, [])
    expected = torch.nn.functional.cross_entropy(z, LABELS).item()
    assert terms.loss.item() == pytest.approx(expected, rel=1e-5)
    assert "fusion" not in terms.figures


def test_an_overconfident_teacher_is_calibrated() -> None:
    torch.manual_seed(1)
    right = torch.nn.functional.one_hot(LABELS, 2).float()
    wrong = torch.cat([1 - right[:2], right[2:]])  # two of six are wrong, and it is as sure of them
    # The greatest temperature that the recipe's bounds allow.
    found = class_temperature(ClassFusion().calibration, "t0", 20 * wrong, LABELS)
    assert found == pytest.approx(2.0)
