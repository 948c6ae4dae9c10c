"""Feature alignment: the depth map, and its loss by hand."""

from __future__ import annotations

import pytest
import torch

from compress.features import Projections, feature_loss, layer_pairs
from limbeck.contract.errors import RecipeError
from limbeck.contract.recipe import Features


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
