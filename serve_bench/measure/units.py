"""Units of timed work: one generation of a language model, or one batch of an encoder."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

import numpy as np

from limbeck.contract.data.examples import Examples
from limbeck.contract.data.heldout import Blocks
from serve_bench.judge.figures import Cell, Sample
from serve_bench.measure.workers import Worker

# Steady: after so many generations and seconds at least, the last three within 10 %. Given up after
# so many of both.
_WARM_LEAST, _WARM_SECONDS, _WARM_WINDOW, _WARM_SPREAD = 3, 0.5, 3, 1.10
_WARM_MOST, _WARM_PATIENCE = 10, 3.0
_WARM_TOKENS = 16  # of a warm-up generation after the first, which is as long as the timed ones
_RUN = 0.05  # seconds a sample of a batch takes at least: a short batch is run several times


class Unit(Protocol):
    """A piece of work that every arm of a block is timed on."""

    @property
    def prompts(self) -> Sequence[Sequence[int]]:
        """Token rows of the work, the same for every arm."""

    @property
    def tokens_made(self) -> int:
        """Tokens that energy is counted by: generated ones; of an encoder, those that it reads."""

    def once(self, worker: Worker) -> int:
        """Do it once, untimed; the most memory that the process held so far, in bytes."""

    def warm(self, worker: Worker, raw: IO[str]) -> dict[str, Any]:
        """Run a worker until its times are steady; ``steady``, ``warm_up_runs``, ``warm_up_s``."""

    def time(self, worker: Worker) -> dict[str, Any]:
        """Time it once; the fields of its row in samples.jsonl."""


@dataclass(frozen=True)
class Generation:
    """A language model's `Unit`: a prompt, then exactly ``new_tokens`` greedy tokens."""

    tokens: list[int]
    new_tokens: int

    @property
    def prompts(self) -> list[list[int]]:
        return [self.tokens]

    @property
    def tokens_made(self) -> int:
        return self.new_tokens

    def once(self, worker: Worker) -> int:
        return int(worker.generate(self.tokens, self.new_tokens)["peak_rss_bytes"])

    def warm(self, worker: Worker, raw: IO[str]) -> dict[str, Any]:
        return warm(worker, self.tokens, self.new_tokens, raw)

    def time(self, worker: Worker) -> dict[str, Any]:
        answer = worker.generate(self.tokens, self.new_tokens)
        row = {"prompt_tokens": len(self.tokens), "started": answer["started"], "at": answer["at"]}
        if answer["device_s"] is not None:
            row["device_s"] = answer["device_s"]
        return row | {"tokens": answer["tokens"]}


@dataclass(frozen=True)
class Batch:
    """Sequences of one length, read at once.

    ``runs`` is filled while warming up: repetitions a sample, by arm and cell.
    """

    cell: Cell
    prompts: list[list[int]]
    runs: dict[tuple[str, Cell], int] = field(repr=False)

    @property
    def tokens_made(self) -> int:
        return self.cell.batch * self.cell.length

    def once(self, worker: Worker) -> int:
        return int(worker.ask("time", ids=self.prompts, runs=1)["peak_rss_bytes"])

    def warm(self, worker: Worker, raw: IO[str]) -> dict[str, Any]:
        times, steady, started = list[float](), False, time.monotonic()
        while len(times) < _WARM_MOST and not steady:
            times.append(worker.ask("time", ids=self.prompts, runs=1)["seconds"])
            window = times[-_WARM_WINDOW:]
            steady = len(window) == _WARM_WINDOW and max(window) <= _WARM_SPREAD * min(window)
        self.runs[worker.arm.id, self.cell] = max(1, math.ceil(_RUN / min(times)))
        row = {"event": "warm-up", "arm": worker.arm.id, **self.cell._asdict(), "seconds": times}
        raw.write(json.dumps(row) + "\n")
        spent = time.monotonic() - started
        return {"steady": steady, "warm_up_runs": len(times), "warm_up_s": spent}

    def time(self, worker: Worker) -> dict[str, Any]:
        count = self.runs[worker.arm.id, self.cell]
        seconds = worker.ask("time", ids=self.prompts, runs=count)["seconds"] / count
        return {**self.cell._asdict(), "runs": count, "seconds": seconds}


def prompt(heldout: Mapping[str, Blocks], block: int, tokens: int, *, then: int = 0) -> list[int]:
    """The prompt of a block: a window of held-out text, blocks joined, read from its start again
    where it ends.

    With ``then`` it is the so many tokens that follow the prompt.
    """
    blocks = heldout[sorted(heldout)[block % len(heldout)]]
    text = np.concatenate(
        [row[:length] for row, length in zip(blocks.input_ids, blocks.lengths, strict=True)]
    )
    window = np.resize(np.roll(text, -tokens * (block // len(heldout))), tokens + then)
    return [int(token) for token in (window[tokens:] if then else window)]


def batch(heldout: Examples, cell: Cell, block: int) -> list[list[int]]:
    """Rows of a block: windows of held-out text, examples joined, read from its start again where
    it ends."""
    rows = zip(heldout.input_ids, heldout.lengths, strict=True)
    text, wanted = np.concatenate([row[:length] for row, length in rows]), cell.batch * cell.length
    window = np.roll(text, -wanted * block)
    found: list[list[int]] = np.resize(window, (cell.batch, cell.length)).tolist()
    return found


def warm(worker: Worker, tokens: list[int], new_tokens: int, raw: IO[str]) -> dict[str, Any]:
    """Run a worker until its time per token is steady, or patience ends."""
    speeds, started = list[float](), time.monotonic()
    for run in itertools.count():
        answer = worker.generate(tokens, new_tokens if run == 0 else min(new_tokens, _WARM_TOKENS))
        raw.write(
            json.dumps({"event": "warm-up", "arm": worker.arm.id, "run": run, "at": answer["at"]})
            + "\n"
        )
        seconds = time.monotonic() - started
        if run == 0:
            started = time.monotonic()  # the first one compiles, allocates and reads pages
            continue
        speeds.append(Sample(worker.arm.id, 0, 0, tuple(answer["at"])).tpot)
        window = speeds[-_WARM_WINDOW:]
        enough = len(speeds) >= _WARM_LEAST and seconds >= _WARM_SECONDS
        steady = enough and max(window) <= _WARM_SPREAD * min(window)
        if steady or (len(speeds) >= _WARM_MOST and seconds >= _WARM_PATIENCE):
            return {"steady": steady, "warm_up_runs": run + 1, "warm_up_s": seconds}
    raise AssertionError("unreachable")
