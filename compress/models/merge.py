"""Merge teachers of one base without training: add their weighted differences to the base.

With W_0 the base's weights, W_k those of teacher k, and w_k its weight:

    average     W_0 + sum_k w_k (W_k - W_0)
                task arithmetic, arXiv 2212.04089; for LoRA adapters this is peft's exact `cat`
    ties        trim each difference to its largest share, elect a sign, average the values that
                agree: TIES, arXiv 2306.01708
    dare_ties   drop at random and rescale before `ties`: DARE, arXiv 2311.03099
    svd         average, of which each matrix keeps its largest singular values: what a LoRA
                adapter of that rank can hold; for LoRA adapters this is peft's `svd`

The arithmetic on tensors is peft's (`peft.utils.merge_utils`). Two models can be merged when their
parameters have the same names and shapes; whether that is worth anything is measured, not assumed:
`best_merge` scores the candidates on text and takes the best.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.contract.errors import ModelError
from limbeck.contract.progress import task

Method = Literal["average", "ties", "dare_ties", "svd"]
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Merge:
    """One way to merge: a method and a weight for each teacher, by name."""

    method: Method
    weights: Mapping[str, float]
    density: float = 0.5  # share of each difference that `ties` and `dare_ties` keep
    rank: int = 16  # singular values of each matrix that `svd` keeps

    def __str__(self) -> str:
        """For messages and reports: ``average of speeches (0.5) and scripture (0.5)``."""
        parts = [f"{name} ({weight:.3g})" for name, weight in self.weights.items()]
        return f"{self.method} of {' and '.join(parts)}" if parts else "the base"


BASE = Merge("average", {})


def parameters_of(model: Any) -> dict[str, Tensor]:
    """Parameters of ``model`` by name; those that are tied count once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def can_be_merged(base: State, teacher: State) -> bool:
    """Whether ``teacher`` has the parameters of ``base``, by name and shape."""
    return {n: t.shape for n, t in base.items()} == {n: t.shape for n, t in teacher.items()}


def candidates(names: Sequence[str]) -> list[Merge]:
    """Merges worth scoring for teachers of these names, the base included.

    All teachers, at their average, at 1.5 times it, and by `ties`; all but one by the first and the
    last, if there are at least three, so that one bad teacher cannot spoil the rest; each alone;
    and the base without teachers.
    """
    K = len(names)
    found = []
    for kept in [names, *(itertools.combinations(names, K - 1) if K > 2 else ())]:
        if (k := len(kept)) > 1:
            found.append(Merge("average", dict.fromkeys(kept, 1 / k)))
            found.append(Merge("ties", dict.fromkeys(kept, 1.0)))
    if K > 1:
        found.insert(1, Merge("average", dict.fromkeys(names, 1.5 / K)))
    return [*found, *(Merge("average", {name: 1.0}) for name in names), BASE]


def merged(
    merge: Merge, base: State, teachers: Mapping[str, State], *, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Name and merged value of each parameter of ``base``, one at a time, in the base's dtype.

    ``seed`` sets the random drops of `dare_ties`, which are drawn anew for each parameter.
    """
    for index, (name, weights) in enumerate(base.items()):
        yield name, _merged(merge, name, weights, teachers, seed=seed * 1_000_003 + index)


def _merged(
    merge: Merge, name: str, start: Tensor, teachers: Mapping[str, State], *, seed: int
) -> Tensor:
    used = [teacher for teacher, weight in merge.weights.items() if weight]
    if not used or not start.is_floating_point():
        return start
    differences = [teachers[teacher][name].float() - start.float() for teacher in used]
    if not any(bool(difference.any()) for difference in differences):
        return start
    from peft.utils import merge_utils  # seconds, which only a merge needs

    weights = torch.tensor([merge.weights[teacher] for teacher in used])
    if merge.method in ("average", "svd"):
        change = merge_utils.task_arithmetic(differences, weights)
        if merge.method == "svd" and change.ndim == 2:
            change = _cut(change, merge.rank)
    elif merge.method == "ties":
        change = merge_utils.ties(differences, weights, merge.density)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            change = merge_utils.dare_ties(differences, weights, merge.density)
    found: Tensor = start.float() + change
    return found.to(start.dtype)


def _cut(change_NK: Tensor, rank: int) -> Tensor:
    """The nearest matrix of ``rank`` (Eckart and Young)."""
    U, S, V = torch.linalg.svd(change_NK, full_matrices=False)
    found: Tensor = U[:, :rank] * S[:rank] @ V[:rank]
    return found


def load_merged(model: Any, values: Iterator[tuple[str, Tensor]]) -> None:
    """Put merged parameters into ``model``, which has all of them."""
    parameters = dict(model.named_parameters())
    for name, value in values:
        parameter = parameters[name]
        # Replaced, not written: the old one may be mapped from a file.
        parameter.data = value.to(parameter.device)


@dataclass(frozen=True)
class Choice:
    """The merge that a student starts from, and what each candidate scored."""

    merge: Merge
    scores: Mapping[str, float]  # nats a token on training text, by the candidate's description


def best_merge(
    model: Any,
    base: State,
    teachers: Mapping[str, State],
    score: Callable[[Any], float],
    *,
    among: Sequence[Merge] | None = None,
    seed: int = 0,
) -> Choice:
    """Score merges on text with ``score(model)`` (nats per token); leave ``model`` at the best.

    ``among`` defaults to `candidates`. If scores are equal, the first is taken. Raises
    `ModelError` if no score is finite.
    """
    tried = candidates(list(teachers)) if among is None else among
    scores: dict[str, float] = {}
    best, lowest = tried[0], math.inf
    with task(
        "merging the teachers, scored on training text", len(tried), unit="nats a token"
    ) as progress:
        for merge in tried:
            load_merged(model, merged(merge, base, teachers, seed=seed))
            scores[str(merge)] = found = score(model)
            if found < lowest:
                best, lowest = merge, found
            progress.advance(1, loss=found)
    if not math.isfinite(lowest):
        raise ModelError(
            f"none of {len(tried)} merges of {', '.join(teachers)} has a finite loss on training "
            "text; look for broken weights in these teachers, or set student.init: base."
        )
    load_merged(model, merged(best, base, teachers, seed=seed))
    return Choice(best, scores)
