"""Attention of an encoder as one operator of ONNX Runtime, com.microsoft.MultiHeadAttention, in place of the eight that it is written in.

Registers an implementation of attention with transformers; a model loaded under its name is exported with the operator. What it
computes outside an export is nothing: such a model is for the exporter alone.

Shape letters: B rows, L tokens, H heads, D numbers a head.
"""

from __future__ import annotations

from typing import Any

import torch

FUSED = (
    "bert",
    "distilbert",
    "roberta",
    "xlm-roberta",
    "camembert",
)  # model types whose attention is scores, mask, softmax
NAME = "limbeck_fused"


def register() -> str:
    """Make the fused attention known to transformers; its name, for ``attn_implementation``."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, fused_attention)
    AttentionMaskInterface.register(NAME, token_mask)
    return NAME


def token_mask(*, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
    """The client's mask ``[B, L]`` as it is; the operator takes no other."""
    return attention_mask


def fused_attention(
    module: torch.nn.Module,
    query_BHLD: torch.Tensor,
    key_BHLD: torch.Tensor,
    value_BHLD: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The operator, as torch's exporter writes it: states ``[B, L, H, D]``, and no weights."""
    rows, heads, tokens, size = query_BHLD.shape

    def flat(x_BHLD: torch.Tensor) -> torch.Tensor:
        return x_BHLD.transpose(1, 2).reshape(rows, tokens, heads * size)

    out = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        [flat(query_BHLD), flat(key_BHLD), flat(value_BHLD), None, attention_mask.to(torch.int32)],
        {"num_heads": heads, "scale": scaling, "mask_filter_value": torch.finfo(torch.float32).min},
        dtype=query_BHLD.dtype,
        shape=(rows, tokens, heads * size),
        version=1,
    )
    return out.reshape(rows, tokens, heads, size), None
