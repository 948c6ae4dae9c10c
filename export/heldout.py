"""Held-out loss of a graph, by block and by domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from limbeck.contract.data.heldout import Blocks, mean_nll
from limbeck.contract.progress import task
from limbeck.contract.recipe import Provider
from limbeck.runtime.decoder import GraphDecoder


def heldout_losses(
    all_logits: Path, heldout: Mapping[str, Blocks], *, provider: Provider = "cpu"
) -> dict[str, list[float]]:
    """Nats of each held-out block over its scored tokens, by domain, from an all-logits graph."""
    decoder = GraphDecoder(all_logits, provider=provider)
    found: dict[str, list[float]] = {name: [] for name in heldout}
    with task(f"held-out text: {all_logits.stem}", sum(map(len, heldout.values()))) as progress:
        for name, blocks in heldout.items():
            for ids, length, scored in zip(
                blocks.input_ids, blocks.lengths, blocks.scored, strict=True
            ):
                logits = decoder.score(ids[None, :length])[0]
                found[name].append(row_loss(logits, ids[:length], scored[:length]))
                progress.advance()
    return found


def row_loss(
    logits: npt.NDArray[np.float32], ids: npt.NDArray[Any], scored: npt.NDArray[Any]
) -> float:
    """Nats of the ``scored`` tokens of a row ``ids`` ``[L]``, from its ``logits`` ``[L, V]``."""
    columns = np.flatnonzero(scored)
    chosen = logits[columns - 1]
    most = chosen.max(axis=1)
    normaliser = most + np.log(np.exp(chosen - most[:, None]).sum(axis=1, dtype=np.float64))
    return float((normaliser - chosen[np.arange(len(columns)), ids[columns]]).sum())


def per_token(
    losses: Mapping[str, Sequence[float]], heldout: Mapping[str, Blocks]
) -> dict[str, float]:
    """Nats a scored token by domain, of what `heldout_losses` found on the same blocks."""
    return {name: sum(nats) / heldout[name].labels for name, nats in losses.items()}


def heldout_nll(all_logits: Path, heldout: Mapping[str, Blocks]) -> dict[str, float]:
    """Nats a scored token of every domain, from a graph that keeps all logits."""
    return per_token(heldout_losses(all_logits, heldout), heldout)


def relative_rise(form: Mapping[str, float], fp32: Mapping[str, float]) -> float:
    """Rise of a form's mean held-out loss over fp32's: 0.02 is 2 % worse.

    What `gates.max_quantization_loss` bounds.
    """
    return mean_nll(form) / mean_nll(fp32) - 1
