"""Compare two ways to compute a model's answer. If they differ, a shortcut computes another model.

Every stage that does not call a model's own forward pass checks here first. The caller gives the
tensors, so torch is not imported.

Shapes: R rows, L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from limbeck.contract.errors import ModelError

# Positions. tests/real/test_probe.py allows a probe of SmolLM2-135M 1 s of processor time; on one
# core with AVX2 it took 0.4 s in fp32 and 0.7 s in bf16 and fp16. 16 positions took up to 2.5 s.
_LENGTH = 6
# Largest difference of two logits, as a share of the largest logit, that rounding explains.
_TOLERANCE = {"torch.float32": 1e-4, "torch.float16": 1e-2, "torch.bfloat16": 5e-2}


def probe_ids(
    vocabulary: int, *, context: int | None = None, extra: Iterable[int] = ()
) -> list[list[int]]:
    """Token ids [2, L] below ``vocabulary``. The rows are equal in their first half only.

    ``extra`` ids come first: tokens that this model treats in a way of its own.
    """
    length = max(2, min(_LENGTH, context or _LENGTH))
    spread = [(index * 7919 + 11) % vocabulary for index in range(2 * length)]
    first = [*dict.fromkeys(extra), *spread][:length]
    half = length // 2
    return [first, first[:half] + spread[-(length - half) :]]


def difference(ours: Any, theirs: Any) -> float:
    """Largest difference, relative to the largest value of ``theirs``; NaN if one is not finite."""
    ours, theirs = ours.detach().float(), theirs.detach().float()
    gap = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)
    return float(gap)


def require_equal(ours: Any, theirs: Any, *, where: str, what: str, dtype: Any = None) -> None:
    """Raise `ModelError` unless two tensors of logits are equal up to rounding.

    ``theirs`` is the model's own answer; ``what`` names how ``ours`` was computed. ``dtype`` is the
    number type of the weights, if it differs from that of ``theirs``.
    """
    if not bool(theirs.isfinite().all()):
        raise ModelError(
            f"{where}: the model answers a test batch with NaN or infinite logits. "
            "Load it as fp32, or save its weights again."
        )
    tolerance = _TOLERANCE.get(str(dtype or theirs.dtype), 1e-4)
    gap = difference(ours, theirs)
    if not gap <= tolerance:
        raise ModelError(
            f"{where}: {what} gives other logits than the model's own forward pass "
            f"(largest difference {gap:.2g} of the largest logit, allowed {tolerance:g}). "
            "Limbeck cannot use this model."
        )
