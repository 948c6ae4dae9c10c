"""Size of each exported form of an encoder, from its shapes alone: what `export.encoders` will write; see `export.plan.language`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from export.encoders import encoder_scheme
from export.plan.language import Matrix
from export.round.blocks import Blockwise
from export.round.quantize import stored_bytes
from limbeck.contract.recipe import EncoderForm

# Bytes of the graph file without weights: of a model, and of one of its layers in fp32, in blockwise forms and in those that have nodes
# for the rounding of activations. Measured on tiny models: torch's exporter keeps notes on every node, with the names of modules and
# the files that they come from.
_GRAPHS = {
    ("bert", "classification"): (60_000, (85_200, 69_400, 72_400)),
    ("bert", "embedding"): (54_000, (74_500, 60_900, 63_900)),
    ("roberta", "classification"): (72_000, (90_600, 73_700, 76_800)),
    ("roberta", "embedding"): (63_000, (77_900, 63_600, 66_600)),
    ("distilbert", "classification"): (53_000, (84_600, 68_300, 71_300)),
    ("distilbert", "embedding"): (47_000, (70_200, 56_800, 59_800)),
}
_INLINE = 256  # bytes below which the exporter keeps a tensor in the graph, where it is not rounded


def encoder_form_bytes(model: Any, form: EncoderForm, *, task: str) -> int:
    """Bytes of graph and weights of ``form`` of an encoder on the meta device, with the head of its ``task``."""
    config = model.config
    matrices = list(_matrices(model, task))
    # A sentence encoder's graph ends at the token states: a pooler has no part in it.
    used = [
        p
        for name, p in model.named_parameters()
        if task == "classification" or not name.startswith("pooler.")
    ]
    rest: int = 4 * (sum(p.numel() for p in used) - sum(m.channels * m.width for m in matrices))
    rest += sum(
        b.numel() * b.element_size() for b in model.buffers()
    )  # tables of positions and kinds of tokens
    scheme = encoder_scheme(form, int(config.hidden_size))
    whole, (fp32, blockwise, integer) = _GRAPHS.get(
        (config.model_type, task), _GRAPHS["bert", task]
    )
    if scheme is None:
        layer, weights = fp32, 4 * sum(m.channels * m.width for m in matrices)
    else:
        layer = blockwise if isinstance(scheme.body, Blockwise) else integer
        weights = sum(stored_bytes(m.channels, m.width, getattr(scheme, m.part)) for m in matrices)
    return whole + int(config.num_hidden_layers) * layer + rest + weights


def _matrices(model: Any, task: str) -> Iterator[Matrix]:
    """Every matrix that becomes a MatMul or a Gather. Forms of encoders round all products alike, but for the head's."""
    read = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
    head = read[-1][1] if task == "classification" else None
    for name, module in read:
        unused = task == "embedding" and name.startswith("pooler.")
        if unused or 4 * module.weight.numel() < _INLINE:
            continue
        channels, width = module.weight.shape
        yield Matrix(
            channels,
            width,
            "head" if module is head or isinstance(module, nn.Embedding) else "body",
        )
