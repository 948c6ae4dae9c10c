"""Rounding to nearest in blocks that share a scale, for MatMulNBits and GatherBlockQuantized.

Shape letters: K inputs of a product, N outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from limbeck.contract.data.arrays import Floats

Codes = npt.NDArray[np.uint8]

BLOCKS = (128, 64, 32, 16)


@dataclass(frozen=True)
class Blockwise:
    """MatMulNBits: weights in blocks along the summed dimension; activations in 8 bits at run time.

    Without ``zero_points`` a block is symmetric around the middle code.
    """

    bits: int
    block: int
    zero_points: bool = False


def block_size_for(width: int) -> int:
    """The largest of 128, 64, 32, 16 that divides ``width`` (no padding); 16 if none does."""
    return next((block for block in BLOCKS if width % block == 0), 16)


def quantize_blocks(weights_NK: Floats, how: Blockwise) -> tuple[Codes, Floats, Codes]:
    """Round ``weights[N, K]`` in blocks along K.

    Returns codes ``[N, ceil(K / block), block]``, scales ``[N, ceil(K / block)]`` and zero points
    of the scales' shape: weight = (code - zero point) * scale. Codes are not packed.
    """
    rows, width = weights_NK.shape
    blocks = math.ceil(width / how.block)
    padded = np.zeros((rows, blocks * how.block), np.float32)
    padded[:, :width] = weights_NK
    grouped = padded.reshape(rows, blocks, how.block)
    scales, zeros = block_grid(grouped, how)
    codes = np.rint(grouped * inverse(scales)[:, :, None]) + zeros[:, :, None]
    return np.clip(codes, 0, 2**how.bits - 1).astype(np.uint8), scales, zeros


def block_grid(blocks: Floats, how: Blockwise) -> tuple[Floats, Codes]:
    """Scales and zero points of blocks along the last axis; 0 can be represented exactly."""
    steps, middle = 2**how.bits - 1, 2 ** (how.bits - 1)
    if how.zero_points:
        low, high = np.minimum(blocks.min(axis=-1), 0), np.maximum(blocks.max(axis=-1), 0)
        scales = ((high - low) / np.float32(steps)).astype(np.float32)
        return scales, np.rint(-low * inverse(scales)).astype(np.uint8)
    scales = (np.abs(blocks).max(axis=-1) / np.float32(middle - 1)).astype(np.float32)
    return scales, np.full(scales.shape, middle, np.uint8)


def dequantize_blocks(codes: Codes, scales: Floats, zeros: Codes) -> Floats:
    """Inverse of `quantize_blocks`: weights ``[N, blocks * block]``."""
    back = (codes.astype(np.float32) - zeros[:, :, None]) * scales[:, :, None]
    return np.asarray(back.reshape(len(codes), -1), np.float32)


def pack_nibbles(codes: Codes) -> Codes:
    """Pack two 4-bit codes per byte along the last axis, the first in the low half; pad with 0."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    return np.asarray(codes[..., ::2] | codes[..., 1::2] << 4, np.uint8)


def unpack_nibbles(packed: Codes) -> Codes:
    """Inverse of `pack_nibbles`; an odd axis keeps the 0 that filled it up."""
    pairs = np.stack([packed & 15, packed >> 4], axis=-1)
    return np.asarray(pairs.reshape(*packed.shape[:-1], -1), np.uint8)


def inverse(scales: Floats) -> Floats:
    """1 / scale, 0 where a scale is 0."""
    with np.errstate(divide="ignore"):
        return np.where(scales > 0, 1 / scales, 0).astype(np.float32)
