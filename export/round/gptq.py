"""GPTQ: round weights to few bits so that they compensate each other's errors (Frantar et al. 2022,
arXiv 2210.17323).

A matrix is rounded one input at a time, the one with the largest second moment first. The remaining
inputs take over the error of the product, weighted by the second moments of the activations.
onnxruntime's solver of this name passes no error on (docs/experiments/forms.md), so this one is
our own.

Shape letters: K inputs of a product, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from export.round.blocks import Blockwise, Codes, inverse, quantize_blocks
from limbeck.contract.data.arrays import Floats

_DAMPING = 0.01  # of the mean second moment, on the diagonal; the paper's
_AT_ONCE = 128  # inputs after which the rest of the matrix takes over


@dataclass(frozen=True)
class Shares:
    """Who takes over the error of an input: U[k, j] / U[k, k] of the k-th goes to the j-th."""

    order_K: npt.NDArray[np.int64]  # of the inputs, first rounded first
    upper_KK: Floats  # U, upper triangular, in that order


def round_blocks(
    weights_NK: Floats, how: Blockwise, shares: Shares | None
) -> tuple[Codes, Floats, Codes]:
    """Codes, scales and zero points of ``weights[N, K]``, as from `blocks.quantize_blocks`.

    The scales are those of rounding to nearest; without ``shares`` the codes are, too.
    """
    codes, scales, zeros = quantize_blocks(weights_NK, how)
    if shares is None:
        return codes, scales, zeros
    width, most = weights_NK.shape[1], 2**how.bits - 1
    order_K, upper_KK = shares.order_K, shares.upper_KK
    block_K = order_K // how.block
    scale_KN, zero_KN = scales.T[block_K], zeros.T[block_K].astype(np.float32)
    left_KN = weights_NK.T[order_K].astype(np.float32, order="C")
    codes_KN = np.empty(left_KN.shape, np.uint8)
    for start in range(0, width, _AT_ONCE):
        end = min(start + _AT_ONCE, width)
        errors = np.empty((end - start, len(weights_NK)), np.float32)
        for k in range(start, end):
            code_N = np.rint(left_KN[k] * inverse(scale_KN[k])) + zero_KN[k]
            codes_KN[k] = np.clip(code_N, 0, most)
            back_N = (codes_KN[k] - zero_KN[k]) * scale_KN[k]
            errors[k - start] = error_N = (left_KN[k] - back_N) / upper_KK[k, k]
            left_KN[k + 1 : end] -= np.outer(upper_KK[k, k + 1 : end], error_N)
        left_KN[end:] -= upper_KK[start:end, end:].T @ errors
    codes = codes.reshape(len(weights_NK), -1)  # what is beyond the width stays
    codes[:, order_K] = codes_KN.T
    return codes.reshape(len(weights_NK), -1, how.block), scales, zeros


def shares(moments_KK: Floats) -> Shares:
    """Order of the inputs, and the triangular U with Uᵀ U the inverse of the damped moments.

    ``moments_KK`` is the sum of x xᵀ over the activations that a matrix reads. An input that is
    always 0 is rounded to nearest.
    """
    damped: npt.NDArray[np.float64] = moments_KK.astype(np.float64)
    diagonal = np.einsum("kk->k", damped)  # a view
    order_K = np.argsort(-diagonal, kind="stable")
    damping = _DAMPING * float(diagonal.mean())
    diagonal[diagonal == 0] = 1.0
    diagonal += damping
    lower = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order_K, order_K)]))
    return Shares(order_K, np.ascontiguousarray(lower.T, np.float32))
