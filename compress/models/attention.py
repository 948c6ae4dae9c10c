"""Causal attention of short blocks in bf16 on a CPU: three products.

torch's fused kernel takes about twice as long. Registered with transformers' `AttentionInterface`;
every other case goes to torch's `scaled_dot_product_attention`.
Shapes: R rows, H heads of queries, G groups of keys and values, L positions, d width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "limbeck-short"
LONGEST = 512  # positions; the backward pass keeps R H L^2 probabilities, too many for long blocks
_SPECIAL = ("softcap", "s_aux", "position_bias", "cache")  # what an architecture may ask beside


def use_short_attention(model: Any) -> None:
    """Switch a causal LM from torch's fused attention to `short_attention`; leave others alone."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def short_attention(
    module: Any, query_RHLd: Tensor, key_RGLd: Tensor, value_RGLd: Tensor,
    attention_mask: Tensor | None, dropout: float = 0.0, scaling: float | None = None,
    is_causal: bool | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as transformers calls it: the output [R, L, H, d], and no weights.

    Scores and probabilities are rounded to bf16, as the projections around them are.
    """
    (R, H, L, d), G = query_RHLd.shape, key_RGLd.shape[1]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    square = 1 < L <= LONGEST and key_RGLd.shape[2] == L
    plain = (
        causal
        and attention_mask is None
        and not dropout
        and all(options.get(name) is None for name in _SPECIAL)
    )
    dtype = (
        torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query_RHLd.dtype
    )
    if not (square and plain and dtype == torch.bfloat16 and query_RHLd.device.type == "cpu"):
        fused: tuple[Tensor, None] = sdpa_attention_forward(
            module, query_RHLd, key_RGLd, value_RGLd, attention_mask, dropout=dropout,
            scaling=scaling, is_causal=is_causal, **options,
        )  # fmt: skip
        return fused
    scale = d**-0.5 if scaling is None else scaling
    query = (query_RHLd * scale).to(dtype).reshape(R * G, -1, d)
    key, value = (part.to(dtype).reshape(R * G, L, -1) for part in (key_RGLd, value_RGLd))
    scores = torch.bmm(query, key.mT).view(R, H, L, L)
    scores = scores + torch.full((L, L), -torch.inf, dtype=dtype).triu(1)
    shares = torch.softmax(scores, dim=-1).view(R * G, -1, L)
    return torch.bmm(shares, value).view(R, H, L, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, short_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
