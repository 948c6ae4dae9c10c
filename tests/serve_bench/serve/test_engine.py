"""Continuous batching: whatever joins and leaves, every request gets what it would get alone."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import (
    ClosedError,
    ContextError,
    DataError,
    EnvironmentalError,
    QueueFullError,
)
from limbeck.runtime.decoder import Decoder
from limbeck.runtime.sampling import Sampling
from serve_bench.serve.batch import GrowingBatch, InPlaceBatch, Pages, bytes_per_token, open_batch
from serve_bench.serve.engine import Engine, Piece, Request
from serve_bench.serve.text.stops import StopStrings

OF_SAMPLING = {field.name for field in fields(Sampling)}


@contextmanager
def running(folder: Path, **options: Any) -> Iterator[Engine]:
    engine = Engine(folder, **{"form": "fp32", "threads": 1, **options})
    try:
        yield engine
    finally:
        engine.close()


class Held:
    """Stops an engine before each step until it is told to go on."""

    def __init__(self, engine: Engine) -> None:
        self.go = threading.Semaphore(0)
        self.rows: list[int] = []
        step = engine._batch.step

        def held(ids: Any) -> Any:
            self.rows.append(len(ids))
            self.go.acquire()
            return step(ids)

        engine._batch.step = held  # type: ignore[method-assign]

    def free(self) -> None:
        self.go.release(10**4)


def collect(pieces: queue.SimpleQueue[Piece]) -> tuple[list[int], str, str]:
    """Tokens, text and reason of a whole answer."""
    tokens, text = [], ""
    while True:
        piece = pieces.get(timeout=30)
        text += piece.text
        if piece.finish:
            return tokens, text, piece.finish
        assert piece.token is not None
        tokens.append(piece.token)


def start(
    engine: Engine, ids: list[int], count: int, **options: Any
) -> tuple[Any, queue.SimpleQueue[Piece]]:
    pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
    given = {name: options.pop(name) for name in list(options) if name in OF_SAMPLING}
    request = Request(tuple(ids), count, sampling=Sampling(**given), **options)
    return engine.submit(request, pieces.put), pieces


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# Exactness ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["fused", "growing"])
def test_ragged_requests_that_join_and_leave_get_what_each_gets_alone(
    served: Artifact, gpt2: Artifact, backend: str
) -> None:
    folder = (served if backend == "fused" else gpt2).path
    alone = Decoder(folder, form="fp32", threads=1)
    draw = np.random.default_rng(0)
    most = (alone.context or 0) - 24
    asked = [
        (draw.integers(0, 256, length).tolist(), int(count))
        for length, count in zip(draw.integers(1, most, 30), draw.integers(1, 24, 30), strict=True)
    ]
    expected = [list(alone.generate(ids, count)) for ids, count in asked]
    with running(folder, max_batch=5) as engine:
        assert isinstance(engine._batch, InPlaceBatch if backend == "fused" else GrowingBatch)
        held = Held(engine)
        answers = []
        for index, (ids, count) in enumerate(asked):
            answers.append(start(engine, ids, count)[1])
            held.go.release(1 + index % 3)
        held.free()
        found = [collect(pieces) for pieces in answers]
    assert [tokens for tokens, _, _ in found] == expected
    assert {finish for _, _, finish in found} == {"length"}
    assert max(held.rows) == 5
    assert len(set(held.rows)) > 2


def test_a_long_prompt_is_read_between_the_steps_of_others(served: Artifact) -> None:
    alone = Decoder(served.path, form="fp32", threads=1)
    long = np.random.default_rng(1).integers(0, 256, 400).tolist()
    with running(served.path) as engine:
        held = Held(engine)
        _, short = start(engine, [1, 2, 3], 40)
        until(lambda: bool(held.rows))
        _, pieces = start(engine, long, 8)
        held.free()
        found = collect(pieces)[0], collect(short)[0]
    assert found == (list(alone.generate(long, 8)), list(alone.generate([1, 2, 3], 40)))
    assert held.rows.count(1) >= 3  # 400 tokens are four chunks, with a step after each
    assert held.rows.count(2) == 7


def test_draws_repeat_with_the_seed_and_are_those_of_the_decoder(served: Artifact) -> None:
    alone = Decoder(served.path, form="fp32", threads=1)
    with running(served.path) as engine:
        drawn = []
        for options in ({"seed": 1}, {"seed": 1}, {"seed": 2}, {"seed": 1, "top_p": 0.4}, {}, {}):
            pieces = [start(engine, [5, 6], 12, temperature=2.0, **options)[1] for _ in range(2)]
            drawn.append([collect(one)[0] for one in pieces])
    assert (
        drawn[0]
        == drawn[1]
        == [list(alone.generate([5, 6], 12, sampling=Sampling(temperature=2.0), seed=1))] * 2
    )
    assert (
        drawn[3]
        == [list(alone.generate([5, 6], 12, sampling=Sampling(temperature=2.0, top_p=0.4), seed=1))]
        * 2
    )
    assert (
        len(
            {
                tuple(tokens)
                for pair in (drawn[0], drawn[2], drawn[3], drawn[4], drawn[5])
                for tokens in pair
            }
        )
        == 7
    )


# Ends ---------------------------------------------------------------------------------------------


def test_a_stop_token_or_string_ends_it_and_is_not_told(served: Artifact) -> None:
    with running(served.path) as engine:
        tokens, text, _ = collect(start(engine, [1, 2, 3], 20)[1])
        end = tokens[7]
        found = collect(start(engine, [1, 2, 3], 20, stop_ids=frozenset({end}))[1])
        assert found[0] == tokens[: tokens.index(end)]
        assert found[2] == "stop"
        stop = text[4:7]
        before = text[: text.index(stop)]
        found = collect(start(engine, [1, 2, 3], 20, stop=("never here", stop))[1])
        assert (found[1], found[2]) == (before, "stop")
        assert tokens[: len(found[0])] == found[0]
        assert len(found[0]) < 20
        assert collect(start(engine, [1, 2, 3], 20, stop=("never here",))[1])[1:] == (
            text,
            "length",
        )


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
def test_stop_strings_are_found_wherever_the_text_is_cut(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    search = StopStrings(tuple(stops))
    told = [search.add(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    told.append(search.rest())
    whole = "".join(told)
    assert not any(stop in whole for stop in stops)
    assert search.met == any(stop in text for stop in stops)
    assert text.startswith(whole)
    assert whole == text or any(text[len(whole) :].startswith(stop) for stop in stops)


def test_cancelling_frees_the_place_of_what_runs_and_of_what_waits(served: Artifact) -> None:
    with running(served.path, max_batch=2, max_queue=1) as engine:
        held = Held(engine)
        first, first_pieces = start(engine, [1], 500)
        _, second_pieces = start(engine, [2], 30)
        until(lambda: 2 in held.rows or held.go.release() or False)
        third, third_pieces = start(engine, [3], 5)
        with pytest.raises(QueueFullError, match="found 1 requests waiting, at most 1 may"):
            start(engine, [4], 5)
        third.cancel()
        first.cancel()
        held.free()
        assert collect(first_pieces)[2] == collect(third_pieces)[2] == "cancelled"
        assert collect(second_pieces)[2] == "length"
        until(lambda: engine.running == engine.waiting == 0)
        assert collect(start(engine, [4], 5)[1])[2] == "length"
        for piece in engine.generate(Request((1,), 500)):
            assert piece.token is not None
            break
        until(lambda: engine.running == 0)


def test_time_runs_out(served: Artifact) -> None:
    with running(served.path, max_batch=1) as engine:
        held = Held(engine)
        _, runs = start(engine, [1], 400, timeout=0.05)
        _, waits = start(engine, [1], 400, timeout=0.05)
        time.sleep(0.1)
        held.free()
        assert collect(runs)[2] == "timeout"
        assert collect(waits)[::2] == ([], "timeout")


def test_closing_lets_what_runs_finish_or_ends_it(served: Artifact) -> None:
    engine = Engine(served.path, form="fp32", threads=1)
    _, pieces = start(engine, [1], 50)
    engine.close(grace=30)
    assert engine.ended
    assert collect(pieces)[2] == "length"
    with pytest.raises(ClosedError, match="shutting down"):
        start(engine, [1], 5)

    engine = Engine(served.path, form="fp32", threads=1)
    held = Held(engine)
    _, pieces = start(engine, [1], 500)
    until(lambda: bool(held.rows))
    engine.close(grace=30, wait=False)
    engine.close(wait=False)
    held.free()
    tokens, _, finish = collect(pieces)
    assert finish == "closed"
    assert len(tokens) < 500
    until(lambda: engine.ended)


def test_a_defect_ends_every_request_and_is_kept(served: Artifact) -> None:
    engine, begun = Engine(served.path, form="fp32", threads=1), threading.Event()

    def broken(ids: Any) -> Any:
        begun.wait(30)
        raise ZeroDivisionError("broken")

    engine._batch.step = broken  # type: ignore[method-assign]
    answers = [start(engine, [token], 5)[1] for token in (1, 2)]
    begun.set()
    assert {collect(pieces)[2] for pieces in answers} == {"failed"}
    assert isinstance(engine.failure, ZeroDivisionError)
    with pytest.raises(ClosedError, match=r"failed.*broken"):
        start(engine, [1], 5)
    engine.close()


def test_a_request_that_cannot_be_sampled_fails_alone(served: Artifact) -> None:
    with running(served.path) as engine:
        expected = collect(start(engine, [1, 2], 20)[1])
        good = start(engine, [1, 2], 20)[1]
        for temperature in (0.0, 1.0):
            # float32 keeps this penalty as 0, and a logit divided by it is none.
            odd = start(engine, [5], 4, repetition_penalty=1e-50, temperature=temperature)[1]
            assert collect(odd)[2] == "failed"
        assert collect(good) == expected == collect(start(engine, [1, 2], 20)[1])
        assert not engine.failure


# Limits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "count", "kind", "message"),
    [
        ([], 1, DataError, "empty prompt"),
        ([1, 258], 1, DataError, "found token 258 in the prompt, expected 0 to 257"),
        ([-1], 1, DataError, "found token -1"),
        ([1], 0, DataError, "found 0 tokens to generate"),
        (
            [1] * 500,
            13,
            ContextError,
            r"prompt of 500 tokens and 13 to generate, 513 together; the context here is 512",
        ),
    ],
)
def test_what_can_never_be_answered_is_refused(
    served: Artifact, ids: list[int], count: int, kind: type[Exception], message: str
) -> None:
    with running(served.path) as engine:
        with pytest.raises(kind, match=message):
            start(engine, ids, count)
        assert engine.waiting == engine.running == 0


def test_requests_wait_for_room_in_the_cache(served: Artifact) -> None:
    alone = Decoder(served.path, form="fp32", threads=1)
    room = 100 * bytes_per_token(alone)
    with running(served.path, cache_bytes=room, max_batch=8) as engine:
        assert engine.longest == 100
        held = Held(engine)
        held.free()
        answers = [start(engine, [token] * 20, 20)[1] for token in range(7)]
        found = [collect(pieces)[0] for pieces in answers]
        assert found == [list(alone.generate([token] * 20, 20)) for token in range(7)]
        assert max(held.rows) == 2
        with pytest.raises(ContextError, match="context here is 100"):
            start(engine, [1] * 90, 11)
    with pytest.raises(
        EnvironmentalError, match=r"at least 8192 bytes|expected at least \d+ .*--cache-mb"
    ):
        Engine(served.path, form="fp32", threads=1, cache_bytes=1000, max_batch=8)


def test_what_waits_for_room_counts_as_waiting_though_rows_are_free(served: Artifact) -> None:
    room = 100 * bytes_per_token(Decoder(served.path, form="fp32", threads=1))
    with running(served.path, cache_bytes=room, max_batch=8, max_queue=1) as engine:
        held = Held(engine)
        answers = [start(engine, [token] * 20, 20)[1] for token in range(3)]  # two have room
        with pytest.raises(QueueFullError, match="found 1 requests waiting, at most 1 may"):
            start(engine, [3] * 20, 20)
        held.free()
        assert [collect(pieces)[2] for pieces in answers] == ["length"] * 3


def test_a_row_that_leaves_gives_its_memory_back(served: Artifact) -> None:
    batch = open_batch(Decoder(served.path, form="fp32", threads=1), rows=3, tokens=1000)
    assert isinstance(batch, InPlaceBatch)
    for ids in ([1, 2, 3], [4], [5, 6]):
        batch.fill(ids)
        batch.join()
    batch.step(np.array([7, 8, 9]))
    assert batch.held == 9
    written = [
        [int((pages.array[row] != 0).any(axis=(0, 2)).sum()) for row in range(4)]
        for pages in batch._buffers.values()
    ]
    assert written == [[4, 2, 3, 0]] * 4
    batch.leave(0)
    batch.fill([1, 2])
    batch.drop()
    assert batch.held == 5
    written = [
        [int((pages.array[row] != 0).any(axis=(0, 2)).sum()) for row in range(4)]
        for pages in batch._buffers.values()
    ]
    assert written == [[3, 2, 0, 0]] * 4


def test_memory_is_taken_where_it_is_written_and_given_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    pages = Pages((4, 1, 1 << 14, 256), np.float32)  # 16 MB a row
    assert resident() - before < 2 << 20
    pages.array[1] = 1.0
    pages.array[2] = 1.0
    assert resident() - before > 30 << 20
    pages.give_back(1)
    pages.give_back(2)
    assert resident() - before < 2 << 20
    assert not pages.array[1].any()
