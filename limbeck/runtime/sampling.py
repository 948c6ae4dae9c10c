"""Choosing the next token from logits, and the log-probabilities of a choice. Needs numpy alone.

The filters and their order are those of transformers: repetition penalty, the model's end held
back, temperature, top-k, top-p, min-p. Frequency and presence penalties are OpenAI's. V is the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from limbeck.contract.errors import ModelError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults are greedy and change no logit."""

    temperature: float = 0.0  # 0 takes the likeliest token
    top_p: float = 1.0  # draw from the likeliest tokens that hold this share
    top_k: int = 0  # draw from this many of the likeliest tokens; 0 is all
    min_p: float = 0.0  # drop tokens below this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # over prompt and answer
    frequency_penalty: float = 0.0  # over the answer, a count
    presence_penalty: float = 0.0  # over the answer, once a token
    min_tokens: int = 0  # tokens of the answer before a stop token may come


GREEDY = Sampling()


class Constraint(Protocol):
    """What an answer may hold, such as `limbeck.runtime.grammar.Constraint`."""

    ended: bool

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Whether each token ``[V]`` may come next; always at least one."""

    def accept(self, token: int) -> None:
        """Go on by one token."""


class Sampler:
    """The choices of one sequence: its random draws, and the tokens that its penalties count."""

    def __init__(
        self,
        sampling: Sampling = GREEDY,
        *,
        prompt: Sequence[int] = (),
        stop_ids: Collection[int] = (),
        seed: int | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        """Without a ``seed`` every sampler draws differently."""
        self._sampling = sampling
        self._draw = np.random.default_rng(seed)
        self._stop_ids = sorted(stop_ids)
        self._seen = np.array(prompt if sampling.repetition_penalty != 1 else (), np.int64)
        self._counts: dict[int, int] = {}  # of the answer
        self._made = 0
        self._constraint = constraint

    @property
    def ended(self) -> bool:
        """Whether the constraint has accepted the end of the answer."""
        return self._constraint is not None and self._constraint.ended

    def next(self, row: npt.NDArray[np.float32]) -> int:
        """Choose the token after logits ``row[V]``, which stay unchanged, and count it.

        Raises as the constraint and `choose` do.
        """
        token = choose(self._adjusted(row), self._sampling, self._draw)
        self._counts[token] = self._counts.get(token, 0) + 1
        self._made += 1
        if self._constraint is not None:
            self._constraint.accept(token)
        return token

    def _adjusted(self, row: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        sampling, held_back = self._sampling, self._made < self._sampling.min_tokens
        counted = sampling.frequency_penalty or sampling.presence_penalty
        constraint = self._constraint
        if sampling.repetition_penalty == 1 and not (counted or held_back or constraint):
            return row
        row = row.copy()
        made = np.array(list(self._counts), np.int64)
        if sampling.repetition_penalty != 1:
            seen = self._seen = np.union1d(self._seen, made)
            values, penalty = row[seen], np.float32(sampling.repetition_penalty)
            row[seen] = np.where(values < 0, values * penalty, values / penalty)
        if counted:
            counts = np.array(list(self._counts.values()), np.float32)
            row[made] -= sampling.frequency_penalty * counts + sampling.presence_penalty
        ends = [token for token in self._stop_ids if token < len(row)] if held_back else []
        if len(ends) == len(row):  # nothing else is left to choose
            ends = []
        if constraint is not None:
            allowed = constraint.allowed()
            row[~allowed] = -np.inf
            allowed[ends] = False
            if not allowed.any():  # a complete text ends, even before `min_tokens`
                return row
        row[ends] = -np.inf
        return row


def choose(
    row: npt.NDArray[np.float32],
    sampling: Sampling = GREEDY,
    draw: np.random.Generator | None = None,
) -> int:
    """The next token from logits ``row[V]``: the greatest at temperature 0, else a draw.

    Without ``draw`` every call draws from a fresh source.
    Raises `ModelError` when the greatest logit is no finite number.
    """
    likeliest = int(row.argmax())  # of the first NaN, where there is one
    if not np.isfinite(row[likeliest]):
        raise ModelError(
            f"found a logit of {row[likeliest]}, expected finite numbers; export the student again."
        )
    if sampling.temperature <= 0:
        return likeliest
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the greatest to -inf
        weights = np.exp((row.astype(np.float64) - row[likeliest]) / sampling.temperature)
    weights /= weights.sum()
    draw = draw or np.random.default_rng()
    if sampling.top_p >= 1 and not sampling.min_p and not 0 < sampling.top_k < len(row):
        return _pick(weights, draw)
    kept = _candidates(weights, sampling)
    return int(kept[_pick(weights[kept], draw)])


def _candidates(weights: npt.NDArray[np.float64], sampling: Sampling) -> npt.NDArray[np.int64]:
    """Tokens that the filters leave, likeliest first. The likeliest token always stays."""
    top_k, top_p = sampling.top_k, sampling.top_p
    narrow = 0 < top_k < len(weights)
    # Tokens below (1 - top_p) / V hold less than 1 - top_p together, so none of them is in the
    # set, and the rest is quicker to sort.
    least = np.partition(weights, -top_k)[-top_k] if narrow else (1 - top_p) / len(weights)
    likely = np.flatnonzero(weights >= min(least, weights.max()))
    order = likely[np.argsort(-weights[likely], kind="stable")]
    values = weights[order]
    if top_p < 1:
        before = np.cumsum(values) - values
        inside = before < top_p * (values.sum() if narrow else 1.0)
        inside[0] = True
        order, values = order[inside], values[inside]
    kept: npt.NDArray[np.int64] = order[values >= sampling.min_p * values[0]]
    return kept


def _pick(weights: npt.NDArray[np.float64], draw: np.random.Generator) -> int:
    """An index into ``weights``, drawn with the probability of its share of their sum."""
    cumulative = weights.cumsum()
    index = cumulative.searchsorted(draw.random() * cumulative[-1], side="right")
    return min(int(index), len(weights) - 1)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (nats) at one position: the chosen token and the likeliest ones."""

    token: int
    logprob: float
    rank: int  # 1 is the likeliest
    top: tuple[tuple[int, float], ...]  # token and log-probability, likeliest first


def logprobs(row: npt.NDArray[np.float32], token: int, count: int) -> TokenLogprobs:
    """Log-softmax of ``row[V]`` at ``token`` and at the ``count`` likeliest tokens.

    The row is the model's own: no penalty and no temperature, as vLLM's default has it.
    """
    values = row.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    best: npt.NDArray[np.int64] = np.zeros(0, np.int64)
    if count:
        best = np.argpartition(-values, min(count, len(values)) - 1)[:count]
        best = best[np.lexsort((best, -values[best]))]
    return TokenLogprobs(
        token=token,
        logprob=float(values[token]),
        rank=int((values > values[token]).sum()) + 1,
        top=tuple((int(i), float(values[i])) for i in best),
    )
