"""Choose the matrices of int4-weight that keep 8 bits, for a size or a loss."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from export.graphs import Graphs, form_files
from export.heldout import heldout_nll, relative_rise
from export.round.blocks import Blockwise
from export.round.calibrate import Calibration
from export.round.matrices import matrices_of
from export.round.origin import origins
from export.round.quantize import quantize_weights
from export.round.scheme import Scheme, stored_bytes
from export.round.sensitivity import Cost, measure_costs, within_bytes, within_loss
from limbeck.contract.data.heldout import Blocks
from limbeck.contract.progress import say
from limbeck.contract.recipe import Gates, MixedByLoss, MixedBySize

_NODE_BYTES = 600  # most that a rounded product adds to graph and padding


def choose_bits(
    mixed: MixedBySize | MixedByLoss,
    gates: Gates,
    *,
    scheme: Scheme,
    graphs: Graphs,
    model: Path,
    rows: Sequence[npt.NDArray[np.int64]],
    heldout: Mapping[str, Blocks],
    calibrate: Callable[[Scheme], Calibration | None],
) -> tuple[Scheme, dict[str, Any]]:
    """``scheme`` with 4 bits except in the head and the chosen matrices, and the manifest's entry.

    Sensitivities are measured on some of the calibration ``rows``, a loss on all of ``heldout``.
    ``calibrate`` measures the activations that a scheme needs. Gates use the same ``heldout``, so a
    bound on the loss is no independent finding there.
    """
    flat, more = with_more(scheme, ()), scheme.head
    assert isinstance(more, Blockwise)
    matrices = matrices_of(graphs, flat)
    body = {name: matrix for name, matrix in matrices.items() if matrix.how == flat.body}
    calibration = calibrate(flat)
    costs = measure_costs(
        model,
        graphs,
        body,
        origins(body, graphs, model),
        _spread(rows, mixed.tokens),
        more=more,
        moments=calibration.moments if calibration else {},
    )

    found: dict[str, Any] = {"kind": mixed.kind}
    if isinstance(mixed, MixedBySize):
        bound = mixed.mb or gates.max_size_mb or _bytes(graphs, scheme) / 1e6
        least = _bytes(graphs, flat)
        chosen = within_bytes(costs, int(bound * 1e6) - least)
        found |= {"bound_mb": bound}
        if least > bound * 1e6:
            say(f"export: 4 bits alone take {least / 1e6:.1f} MB, above the {bound:g} MB asked for")
    else:
        rise = mixed.rise or gates.max_quantization_loss
        assert rise is not None
        exact = heldout_nll(graphs.all, heldout)

        def measure(names: list[str]) -> float:
            rounded = _rounded_nll(graphs, with_more(scheme, names), calibration, heldout)
            return relative_rise(rounded, exact)

        chosen, reached = within_loss(costs, rise, measure)
        found |= {"bound_rise": rise, "rise": reached}
        if reached > rise:
            say(
                f"export: 8 bits everywhere still lose {reached:.2%}, above the {rise:.2%} asked "
                "for"
            )
    say(f"export: {len(chosen)} of {len(costs)} matrices get 8 bits")
    return with_more(scheme, chosen), found | {
        "sensitivity": [_entry(cost, cost.matrix in set(chosen)) for cost in costs]
    }


def _rounded_nll(
    graphs: Graphs, scheme: Scheme, calibration: Calibration | None, heldout: Mapping[str, Blocks]
) -> dict[str, float]:
    """Held-out loss of the graphs rounded by ``scheme``, in files that are deleted again."""
    with tempfile.TemporaryDirectory(dir=graphs.data.parent) as temporary:
        made = form_files(Path(temporary), "int4-weight")
        made.data.parent.mkdir()
        quantize_weights(graphs, made, scheme=scheme, metadata={}, calibration=calibration)
        return heldout_nll(made.all, heldout)


def same_bits(scheme: Scheme, found: dict[str, Any]) -> tuple[Scheme, dict[str, Any]]:
    """The choice of an earlier `choose_bits`, from the manifest.

    A recovered student was trained with that choice.
    """
    return with_more(
        scheme, [entry["matrix"] for entry in found["sensitivity"] if entry["bits"] == 8]
    ), found


def more_bits_everywhere(found: Mapping[str, Any]) -> bool:
    """Whether a choice, as in the manifest, left no matrix in 4 bits."""
    return all(entry["bits"] == 8 for entry in found["sensitivity"])


def with_more(scheme: Scheme, names: Sequence[str]) -> Scheme:
    """``scheme`` with 4 bits except in the head and ``names``, which get the head's bits."""
    few, more = scheme.body, scheme.head
    assert isinstance(few, Blockwise)
    assert isinstance(more, Blockwise)
    return replace(scheme, attention=few, narrow=few, exceptions=dict.fromkeys(names, more))


def _spread(rows: Sequence[npt.NDArray[np.int64]], tokens: int) -> list[npt.NDArray[np.int64]]:
    """Rows from all over ``rows`` with at least ``tokens`` tokens, or all of them."""
    longest = max(len(row) for row in rows)
    count = min(len(rows), math.ceil(tokens / longest))
    return [rows[index * len(rows) // count] for index in range(count)]


def _entry(cost: Cost, chosen: bool) -> dict[str, Any]:
    return asdict(cost) | {"bits": 8 if chosen else 4}


def _bytes(graphs: Graphs, scheme: Scheme) -> int:
    """Estimated size of graph and weights; slightly too large."""
    proto = onnx.load(graphs.last, load_external_data=False)
    matrices = matrices_of(graphs, scheme)
    whole = graphs.last.stat().st_size + _NODE_BYTES * len(matrices)
    for tensor in proto.graph.initializer:
        matrix, entry = matrices.get(tensor.name), {e.key: e.value for e in tensor.external_data}
        if matrix is not None:
            assert isinstance(matrix.how, Blockwise)
            whole += stored_bytes(matrix.channels, matrix.width, matrix.how)
        elif "length" in entry:
            whole += int(entry["length"])
    return whole
