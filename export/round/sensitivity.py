"""Cost of rounding each matrix alone, and the matrices of a 4-bit form that get 8 bits for a bound.

Estimated in torch on the student: KL from its own outputs, to second order in the change of the
weights. Activations stay in float, because their rounding is the same with 4 and 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from export.graphs import Graphs
from export.round.blocks import Blockwise, dequantize_blocks
from export.round.gptq import round_blocks, shares
from export.round.matrices import Matrix
from export.round.origin import Part, matrix_values
from export.round.scheme import stored_bytes
from limbeck.contract.data.arrays import Floats
from limbeck.contract.models.loading import load_pretrained
from limbeck.contract.progress import task


@dataclass(frozen=True)
class Cost:
    """Cost of a matrix in few bits, and the bytes that more bits take."""

    matrix: str
    parameters: tuple[str, ...]
    kl: float  # nats a token, when it alone is rounded to few bits
    bytes: int  # in few bits
    extra_bytes: int  # in more bits

    @property
    def worth(self) -> float:
        """KL saved per byte."""
        return self.kl / self.extra_bytes


def measure_costs(
    model: Path,
    graphs: Graphs,
    matrices: Mapping[str, Matrix],
    parts: Mapping[str, Sequence[Part]],
    rows: Sequence[npt.NDArray[np.int64]],
    *,
    more: Blockwise,
    moments: Mapping[str, Floats],
    seed: int = 0,
) -> list[Cost]:
    """Cost of each of ``matrices`` of the fp32 ``graphs``, the greatest worth first.

    To second order, KL is 1/2 E[(g D x)²], half the Fisher information along the change of the
    weights D (Martens, arXiv 1412.1193, section 5): x are the inputs of the matrix, and g is the
    gradient of -log p(y) by its outputs, for a token y drawn from the model itself. One pass over
    the token ``rows`` ``[S]``, forwards and backwards, serves all matrices.

    ``parts`` maps each matrix to parameters of the transformers folder ``model``. ``moments`` are
    those of `export.round.calibrate.Calibration`, empty for rounding to nearest. ``seed`` is of the
    drawn tokens.
    """
    from transformers import AutoModelForCausalLM

    loaded = (
        load_pretrained(AutoModelForCausalLM, model, dtype=torch.float32)
        .eval()
        .requires_grad_(False)
    )
    changes: dict[str, list[tuple[str, Tensor]]] = {}  # of each matrix, by module
    for name, matrix in matrices.items():
        assert isinstance(matrix.how, Blockwise)
        values_NK = matrix_values(matrix, graphs)
        change_NK = torch.from_numpy(rounded(values_NK, matrix.how, moments.get(name)) - values_NK)
        changes[name] = [
            (part.parameter.rpartition(".")[0], change_NK[part.start : part.start + part.rows])
            for part in parts[name]
        ]
    squares = dict.fromkeys(matrices, 0.0)
    draw = torch.Generator().manual_seed(seed)
    modules = {module for pieces in changes.values() for module, _ in pieces}
    with _Recorded(loaded, modules) as recorded, task("sensitivity", len(rows)) as progress:
        for row in rows:
            logits_SV = loaded(input_ids=torch.from_numpy(row)[None], use_cache=False).logits[0]
            labels_S = torch.multinomial(logits_SV.detach().softmax(-1), 1, generator=draw)[:, 0]
            torch.nn.functional.cross_entropy(logits_SV, labels_S, reduction="sum").backward()
            for name, pieces in changes.items():
                effect_S = sum((recorded.effect(*piece) for piece in pieces), torch.zeros(()))
                squares[name] += float(effect_S.double().square().sum())
            progress.advance()
    positions = sum(len(row) for row in rows)
    costs = []
    for name, matrix in matrices.items():
        few, many = (stored_bytes(matrix.channels, matrix.width, h) for h in (matrix.how, more))
        kl = squares[name] / positions / 2
        parameters = tuple(part.parameter for part in parts[name])
        costs.append(Cost(name, parameters, kl, few, many - few))
    return sorted(costs, key=lambda cost: -cost.worth)


def rounded(weights_NK: Floats, how: Blockwise, moments_KK: Floats | None = None) -> Floats:
    """``weights[N, K]`` after `export.round.gptq.round_blocks`."""
    found = None if moments_KK is None else shares(moments_KK)
    return dequantize_blocks(*round_blocks(weights_NK, how, found))[:, : weights_NK.shape[1]]


def within_bytes(costs: Sequence[Cost], room: int) -> list[str]:
    """Matrices that get more bits within ``room`` bytes: greatest worth first, if they fit."""
    chosen = []
    for cost in costs:
        if cost.extra_bytes <= room:
            room -= cost.extra_bytes
            chosen.append(cost.matrix)
    return chosen


def within_loss(
    costs: Sequence[Cost], bound: float, measure: Callable[[list[str]], float]
) -> tuple[list[str], float]:
    """The shortest head of ``costs`` that gets more bits and keeps ``bound``, and its loss.

    ``measure`` gives the loss. The first guess assumes that it falls with the summed KL of the
    matrices in few bits; bisection follows, which makes up to ten forms for 150 matrices. Returns
    all of them if no shorter head is within the bound.
    """
    # KL left after each head
    left = np.concatenate([np.cumsum([cost.kl for cost in costs][::-1])[::-1], [0.0]])
    low, high = 0, len(costs)  # the least head that may do; the least known to do, or all
    loss_at: dict[int, float] = {0: measure([])}
    if loss_at[0] <= bound:
        return [], loss_at[0]
    wanted = left[0] * bound / loss_at[0]
    guess = int(np.argmax(left <= wanted))
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        loss_at[guess] = measure([cost.matrix for cost in costs[:guess]])
        if loss_at[guess] <= bound:
            high = guess
        else:
            low = guess
        guess = (low + high) // 2
    if high not in loss_at:
        loss_at[high] = measure([cost.matrix for cost in costs[:high]])
    return [cost.matrix for cost in costs[:high]], loss_at[high]


class _Recorded:
    """Inputs of modules, and gradients of their outputs, in the latest pass over one row."""

    def __init__(self, model: Any, modules: Collection[str]) -> None:
        self._inputs: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._model, self._modules, self._hooks = model, modules, ExitStack()

    def __enter__(self) -> _Recorded:
        # parameters need no gradient, so the embeddings begin the graph of operations
        self._add(self._model.get_input_embeddings(), lambda _, __, out: out.requires_grad_())
        for name in self._modules:
            self._add(self._model.get_submodule(name), partial(self._keep, name))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def effect(self, module: str, change_NK: Tensor) -> Tensor:
        """Change of -log p at each position ``[S]`` to first order, for changed weights."""
        return ((self._inputs[module] @ change_NK.T) * self._gradients[module]).sum(-1)

    def _add(self, module: Any, hook: Callable[..., Any]) -> None:
        self._hooks.callback(module.register_forward_hook(hook).remove)

    def _keep(self, name: str, _: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._inputs[name] = inputs[0].detach().flatten(0, -2)
        output.register_hook(
            lambda gradient: self._gradients.update({name: gradient.flatten(0, -2)})
        )
