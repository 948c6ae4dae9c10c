"""Operations and memory of a model without its weights: its modules run on fake tensors.

Fake tensors have shapes and no values. Nothing here knows of recipes; callers add what a loop keeps
beside a model.
"""

from __future__ import annotations

import copy
import math
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from limbeck.contract.recipe import fingerprint

TRIAL_VOCABULARY = 1024  # of a model whose layers are timed
_TRACES: dict[str, Trace] = {}  # of this process, by the fingerprint of what was asked
_TRACED = (2, 4)  # layers that are traced; all others lie on the line through both


_EXPERTS = torch.ops.aten._grouped_mm  # the product of each token with its experts


@dataclass(frozen=True)
class Trace:
    """One micro-batch through a model: operations, and bytes on top of those alive before."""

    forward: float
    backward: float
    kept: int  # between forward and backward
    forward_peak: int
    backward_peak: int


def trace_model(
    model: Any, run: Callable[[Any, Tensor], Tensor], *, rows: int, length: int, trains: bool
) -> Trace:
    """Trace ``run`` on a model of the meta device and token ids ``[rows, length]``.

    With ``trains`` the backward pass is traced too.
    """
    _rotate_by_default(model)
    with FakeTensorMode():
        _on_the_cpu(model)
        model.train(trains)
        ids = torch.zeros((rows, length), dtype=torch.int64)
        known = [*model.parameters(), *model.buffers(), ids]
        for parameter in model.parameters():
            if parameter.requires_grad:  # gradients are counted with the optimiser
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        operations = FlopCounterMode(display=False, custom_mapping={_EXPERTS: _of_experts})
        with Live(known) as live, operations as counter:
            output = run(model, ids)
            kept, forward_peak, forward = live.now, live.peak, counter.get_total_flops()
            live.peak = live.now
            if trains:
                output.backward(torch.empty_like(output))
            return Trace(
                forward, counter.get_total_flops() - forward, kept, forward_peak, live.peak
            )


def _of_experts(tokens_Sd: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Operations of a product of S tokens with their experts, which torch does not count."""
    return 2 * int(math.prod(out_shape)) * int(tokens_Sd[-1])


def _rotate_by_default(model: Any) -> None:
    """Give every rotary embedding the default kind: it has the same tensors.

    The kind `dynamic` reads the positions' values, which a trace does not have.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            module.rope_type = "default"
        elif isinstance(kinds, dict):  # of each layer type
            module.rope_type = dict.fromkeys(kinds, "default")


def traced_once(key: Any, trace: Callable[[], Trace]) -> Trace:
    """Return ``trace()``; the same key is traced once in a process: experts often have one shape.

    ``key`` is plain data that decides the trace.
    """
    name = fingerprint(key)
    if name not in _TRACES:
        _TRACES[name] = trace()
    return _TRACES[name]


def on_a_line(layers: int, trace_of: Callable[[int], Trace]) -> Trace:
    """Return the trace of ``layers`` layers from traces of few: each layer adds the same."""
    few = [n for n in _TRACED if n < layers] if layers > _TRACED[1] else [layers]
    traces = [trace_of(n) for n in few]
    if len(few) == 1:
        return traces[0]
    steps = (layers - few[0]) / (few[1] - few[0])

    def at(name: str) -> float:
        first, second = (getattr(t, name) for t in traces)
        return float(first + (second - first) * steps)

    return Trace(
        at("forward"),
        at("backward"),
        *(round(at(n)) for n in ("kept", "forward_peak", "backward_peak")),
    )


def resized(config: Any, *, layers: int) -> Any:
    """A copy with fewer layers; lists that hold one entry a layer are cut with them."""
    smaller = copy.deepcopy(config)
    text = smaller.get_text_config()  # of a model that reads pictures too, the part inside
    before = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return smaller


def operations_a_second(step: Callable[[], None], *, seconds: float, device: torch.device) -> float:
    """Repeat ``step`` for about ``seconds``; return the median of its operations a second."""
    rates: list[float] = []
    started = time.perf_counter()
    while len(rates) < 3 or time.perf_counter() - started < seconds:
        with FlopCounterMode(display=False) as counter:
            begun = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            rates.append(counter.get_total_flops() / (time.perf_counter() - begun))
    return sorted(rates[1:])[len(rates[1:]) // 2]  # the first one warms up


class Live(TorchDispatchMode):
    """Bytes of living storages that operators made, now and at the peak."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: Any = weakref.WeakKeyDictionary({t.untyped_storage(): True for t in known})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _EXPERTS.default:  # torch has no fake kernel of it but for bf16
            result = args[0].new_empty((args[0].shape[0], args[1].shape[-1]))
        else:
            result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen[storage] = True
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._let_go, size)

    def _let_go(self, size: int) -> None:
        self.now -= size


def _on_the_cpu(model: Any) -> None:
    """Replace parameters and buffers of the meta device by fake tensors of the active mode."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, value in kind.items():
                if value is None:
                    continue
                if id(value) not in made:  # tied ones stay tied
                    fake = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                    trained = isinstance(value, nn.Parameter)
                    made[id(value)] = (
                        value,
                        nn.Parameter(fake, value.requires_grad) if trained else fake,
                    )
                kind[name] = made[id(value)][1]


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
