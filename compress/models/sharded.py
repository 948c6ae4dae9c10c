"""Parameters sharded over several processes (FSDP2): gather whole values, and scatter them back.

A tensor that is not sharded passes unchanged. All processes call each function, or none does.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(value: Any) -> Any:
    """``value`` with every sharded tensor in its dicts and lists gathered."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, list) else value


def like(parameter: Tensor, value: Any) -> Any:
    """A whole tensor of a parameter's shape cut as the parameter is; anything else unchanged."""
    if (
        isinstance(parameter, DTensor)
        and isinstance(value, Tensor)
        and value.shape == parameter.shape
    ):
        return distribute_tensor(
            value.to(parameter.device), parameter.device_mesh, parameter.placements
        )
    return value
