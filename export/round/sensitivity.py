"""Cost of rounding each matrix alone, and the matrices of a 4-bit form that get 8 bits for a bound.

Measured in torch on the student: KL from its own outputs on held-out text when one matrix of the
graph has its rounded values. Activations stay in float, because their rounding is the same with 4
and 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from export.graphs import Graphs
from export.round.blocks import Blockwise, Floats, dequantize_blocks
from export.round.gptq import round_blocks, shares
from export.round.matrices import Matrix
from export.round.origin import Part, matrix_values
from export.round.scheme import stored_bytes
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
    texts: Sequence[npt.NDArray[np.int64]],
    *,
    more: Blockwise,
    tokens: int,
    moments: Mapping[str, Floats],
) -> list[Cost]:
    """Cost of each of ``matrices`` of the fp32 ``graphs``, the greatest worth first.

    ``parts`` maps each to parameters of the transformers folder ``model``. ``texts`` are rows of
    held-out tokens, of which ``tokens`` are read. ``moments`` are those of
    `export.round.calibrate.Calibration`, empty for rounding to nearest. Only the layers from the
    changed one on are run again: earlier layers give the same outputs.
    """
    from transformers import AutoModelForCausalLM

    loaded = (
        load_pretrained(AutoModelForCausalLM, model, dtype=torch.float32)
        .eval()
        .requires_grad_(False)
    )
    parameters = dict(loaded.named_parameters())
    length = max(min(tokens // len(texts), *(len(text) for text in texts)), 1)
    ids_RL = torch.from_numpy(np.stack([text[:length] for text in texts]))
    costs = []
    with (
        torch.inference_mode(),
        _Replay(loaded) as replay,
        task("sensitivity of matrices", len(matrices)) as progress,
    ):
        reference = loaded(input_ids=ids_RL, use_cache=False).logits.log_softmax(-1)
        for name, matrix in matrices.items():
            assert isinstance(matrix.how, Blockwise)
            rounded_NK = torch.from_numpy(
                rounded(matrix_values(matrix, graphs), matrix.how, moments.get(name))
            )
            kept = {part.parameter: parameters[part.parameter].clone() for part in parts[name]}
            for part in parts[name]:
                rows = rounded_NK[part.start : part.start + part.rows]
                parameters[part.parameter].copy_(rows.T if part.turned else rows)
            with replay.up_to(kept):
                changed = loaded(input_ids=ids_RL, use_cache=False).logits.log_softmax(-1)
            kl = float(
                (reference.exp() * (reference - changed)).sum(-1, dtype=torch.float64).mean()
            )
            for parameter, values in kept.items():
                parameters[parameter].copy_(values)
            few, many = (
                stored_bytes(matrix.channels, matrix.width, how) for how in (matrix.how, more)
            )
            costs.append(Cost(name, tuple(kept), max(kl, 0.0), few, many - few))
            progress.advance()
    return sorted(costs, key=lambda cost: -cost.worth)


def rounded(weights_NK: Floats, how: Blockwise, moments_KK: Floats | None = None) -> Floats:
    """``weights[N, K]`` after `export.round.gptq.round_blocks`."""
    shares_KK = None if moments_KK is None else shares(moments_KK)
    return dequantize_blocks(*round_blocks(weights_NK, how, shares_KK))[:, : weights_NK.shape[1]]


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


class _Replay:
    """Keep the output of each decoder layer of the first run, to skip layers before a change."""

    def __init__(self, model: Any) -> None:
        count = model.config.get_text_config().num_hidden_layers
        lists = (
            (n, m)
            for n, m in model.named_modules()
            if isinstance(m, torch.nn.ModuleList) and len(m) == count
        )
        found: tuple[str, Any] = next(lists, ("", ()))
        self._prefix, self._layers = found
        self._answers: dict[int, Any] = {}
        self._skipped = 0

    def __enter__(self) -> _Replay:
        for index, layer in enumerate(self._layers):
            layer.forward = self._remember(index, layer.forward)
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self._layers:
            del layer.forward

    @contextmanager
    def up_to(self, changed: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the block, skip layers before the first that owns a ``changed`` parameter."""
        owners = [
            next(
                (i for i in range(len(self._layers)) if name.startswith(f"{self._prefix}.{i}.")), 0
            )
            for name in changed
        ]
        self._skipped = min(owners)
        yield
        self._skipped = 0

    def _remember(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def answer(*args: Any, **options: Any) -> Any:
            if index < self._skipped:
                return self._answers[index]
            found = forward(*args, **options)
            self._answers.setdefault(index, found)
            return found

        return answer
