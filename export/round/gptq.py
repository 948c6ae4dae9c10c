"""GPTQ: round weights to few bits so that they compensate each other's errors (Frantar et al. 2022,
arXiv 2210.17323).

A matrix is rounded one input at a time. The remaining inputs take over the error of the product,
weighted by the second moments of the activations. onnxruntime's solver of this name passes no error
on (docs/experiments/forms.md), so this one is our own.

Shape letters: K inputs of a product, N outputs.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from export.round.blocks import Blockwise, Codes, Floats, block_grid, inverse, quantize_blocks

_DAMPING = 0.01  # of the mean second moment, on the diagonal; the paper's
_AT_ONCE = 128  # inputs after which the rest of the matrix takes over


def round_blocks(
    weights_NK: Floats, how: Blockwise, shares_KK: Floats | None
) -> tuple[Codes, Floats, Codes]:
    """Codes, scales and zero points of ``weights[N, K]``, as from `blocks.quantize_blocks`.

    ``shares_KK`` is the result of `shares`; without it the weights are rounded to nearest.
    """
    if shares_KK is None:
        return quantize_blocks(weights_NK, how)
    channels, width = weights_NK.shape
    blocks, most = math.ceil(width / how.block), 2**how.bits - 1
    left_KN = weights_NK.T.astype(np.float32, order="C")
    codes_KN = np.empty((width, channels), np.float32)
    scales, zeros = np.empty((blocks, channels), np.float32), np.empty((blocks, channels), np.uint8)
    step = math.lcm(how.block, _AT_ONCE)
    for start in range(0, width, step):
        end = min(start + step, width)
        errors = np.empty((end - start, channels), np.float32)
        for k in range(start, end):
            block = k // how.block
            if k % how.block == 0:
                scales[block], zeros[block] = block_grid(left_KN[k : k + how.block].T, how)
                per_step, zero = inverse(scales[block]), zeros[block].astype(np.float32)
            codes_KN[k] = np.clip(np.rint(left_KN[k] * per_step) + zero, 0, most)
            error = (left_KN[k] - (codes_KN[k] - zero) * scales[block]) / shares_KK[k, k]
            left_KN[k + 1 : end] -= np.outer(shares_KK[k, k + 1 : end], error)
            errors[k - start] = error
        left_KN[end:] -= shares_KK[start:end, end:].T @ errors
    # beyond the width: 0
    codes = np.repeat(zeros.T[:, :, None], how.block, axis=2).reshape(channels, -1)
    codes[:, :width] = codes_KN.T
    return (
        codes.reshape(channels, blocks, how.block),
        np.ascontiguousarray(scales.T),
        np.ascontiguousarray(zeros.T),
    )


def shares(moments_KK: Floats) -> Floats:
    """Upper triangular U with Uᵀ U the inverse of the damped moments.

    U[k, j] / U[k, k] of input k's error is passed on to input j. ``moments_KK`` is the sum of x xᵀ
    over the activations that a matrix reads. An input that is always 0 is rounded to nearest.
    """
    damped: npt.NDArray[np.float64] = moments_KK.astype(np.float64)
    diagonal = np.einsum("kk->k", damped)  # a view
    damping = _DAMPING * float(diagonal.mean())
    diagonal[diagonal == 0] = 1.0
    diagonal += damping
    lower: npt.NDArray[np.float64] = np.linalg.cholesky(np.linalg.inv(damped))
    return np.ascontiguousarray(lower.T, np.float32)
