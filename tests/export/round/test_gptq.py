"""GPTQ: the inputs after a rounded one make up for its error, as least squares has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import TensorProto

from export.graphs import form_files
from export.round.blocks import Blockwise, dequantize_blocks, quantize_blocks
from export.round.calibrate import calibration_for
from export.round.gptq import Shares, round_blocks, shares
from export.round.matrices import Matrix
from export.round.quantize import _write_matrix
from export.weights import WeightsFile
from limbeck.contract.errors import ArtifactError, RecipeError
from limbeck.contract.recipe import Int4WeightForm
from tests.factory import Factory
from tests.pico import pico_recipe

HOW = Blockwise(4, 16, zero_points=True)


def correlated(width: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """1,000 activations ``[S, K]`` that depend on each other and differ in size."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(width, width)) * np.exp(random.normal(size=width))
    return np.asarray(random.normal(size=(1000, width)) @ mixing, np.float32)


def weights(channels: int, width: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(1).normal(size=(channels, width)).astype(np.float32)


@pytest.mark.parametrize(
    "width", [256, 200]
)  # 200: the last block is half full, and so is the last step
def test_the_product_loses_less_than_by_rounding_to_nearest(width: int) -> None:
    x, w = correlated(width), weights(24, width)
    solved, nearest = round_blocks(w, HOW, shares(x.T @ x)), quantize_blocks(w, HOW)
    for mine, theirs in zip(solved, nearest, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        assert mine.flags.c_contiguous
    lost = [
        np.linalg.norm(x @ (dequantize_blocks(*found)[:, :width] - w).T)
        for found in (solved, nearest)
    ]
    assert lost[0] < 0.9 * lost[1]
    assert not dequantize_blocks(*solved)[:, width:].any()


def test_inputs_that_do_not_depend_on_each_other_are_rounded_to_nearest() -> None:
    w = weights(8, 64)
    solved = round_blocks(w, HOW, shares(np.diag(np.arange(1, 65, dtype=np.float32))))
    for mine, theirs in zip(solved, quantize_blocks(w, HOW), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_what_is_never_active_is_rounded_to_nearest() -> None:
    x, w = correlated(64), weights(8, 64)
    x[:, 16:32] = 0
    solved, nearest = round_blocks(w, HOW, shares(x.T @ x)), quantize_blocks(w, HOW)
    np.testing.assert_array_equal(solved[0][:, 1], nearest[0][:, 1])
    assert (solved[0][:, 2] != nearest[0][:, 2]).any()


def test_each_error_is_made_up_for_by_least_squares() -> None:
    """The formula as it is derived: once input k is fixed, the inputs after it move to where the
    loss is least (eq. 2 of the paper).
    """
    width, how = 160, Blockwise(4, 32, zero_points=True)  # longer than what is made up at once
    x, w = correlated(width, seed=2), weights(4, width)
    moments = x.T @ x
    damped = moments.astype(np.float64) + 0.01 * np.diag(moments).mean() * np.eye(width)
    left = w.astype(np.float64)
    codes, scales, zeros = round_blocks(w, how, shares(moments))
    later = sorted(range(width), key=lambda k: -moments[k, k])  # the largest moment first
    while later:
        k = later.pop(0)
        block = k // 32
        fixed = (codes[:, block, k % 32].astype(float) - zeros[:, block]) * scales[:, block]
        ends = np.isin(codes[:, block, k % 32], (0, 15))
        np.testing.assert_array_less(  # nothing nearer is on the grid
            np.where(ends, 0, np.abs(left[:, k] - fixed)), 0.501 * scales[:, block] + 1e-4
        )
        if later:
            moved = np.linalg.solve(damped[np.ix_(later, later)], damped[later, k])
            left[:, later] += (left[:, k] - fixed)[:, None] * moved


def test_a_matrix_in_pieces_is_solved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inverse of its moments is the costly part, and is the same for all its rows."""
    solved: list[int] = []

    def counted(moments: npt.NDArray[np.float32]) -> Shares:
        solved.append(len(moments))
        return shares(moments)

    monkeypatch.setattr("export.round.quantize.shares", counted)
    x, w = correlated(64), weights(40, 64)
    codes = {}
    for rows in (4096, 16):
        monkeypatch.setattr("export.round.quantize._ROWS", rows)
        written: dict[str, TensorProto] = {}
        with (tmp_path / str(rows)).open("wb") as out:
            file = WeightsFile(out, str(rows), written)
            _write_matrix(file, Matrix("m", 64, 40, rows=True, how=HOW), w, x.T @ x)
        codes[rows] = (tmp_path / str(rows)).read_bytes()
    assert solved == [64, 64]
    assert codes[4096] == codes[16]


def int4(**fields: Any) -> list[Any]:
    return ["fp32", {"kind": "int4-weight", "block_size": 16, **fields}]


def test_an_export_says_how_it_rounded(tiny: Factory) -> None:
    said, weights_of = {}, {}
    for name, fields in (
        ("default", {}),
        ("gptq", {"algorithm": "gptq"}),
        ("rtn", {"algorithm": "rtn"}),
    ):
        exported = tiny.exported(forms=int4(**fields), sizes={"num_hidden_layers": 1})
        said[name] = exported.result["forms"]["int4-weight"]["algorithm"]
        weights_of[name] = (exported.path / "onnx" / "model_q4.onnx_data").read_bytes()
    assert said == {"default": "gptq", "gptq": "gptq", "rtn": "rtn"}
    assert weights_of["default"] == weights_of["gptq"] != weights_of["rtn"]


def test_without_training_text_it_says_what_to_do(tmp_path: Path) -> None:
    form, graphs = Int4WeightForm(kind="int4-weight"), form_files(tmp_path, "fp32")
    with pytest.raises(
        ArtifactError,
        match=r"calibration.safetensors is missing; int4-weight .* or set its algorithm: rtn",
    ):
        calibration_for(form, graphs, tmp_path, {"matrix": "activation"})
    assert (
        calibration_for(form, graphs, tmp_path, {"matrix": "activation"}, as_they_are=True) is None
    )


def test_recovery_trains_through_rounding_to_nearest() -> None:
    export = {"recover": {"tokens": 1024}}
    with pytest.raises(RecipeError, match=r"export.recover: .* leave algorithm out of int4-weight"):
        pico_recipe(
            export=export | {"forms": int4(algorithm="gptq")}, gates={"max_quantization_loss": 0.01}
        )
    pico_recipe(export=export | {"forms": int4()}, gates={"max_quantization_loss": 0.01})
