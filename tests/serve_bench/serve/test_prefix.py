"""The prefix cache: greedy answers equal a cold run, whatever was answered before."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.contract.artifact import Artifact
from limbeck.runtime.decoder import Decoder, common_prefix
from serve_bench.serve.batch import bytes_per_token
from serve_bench.serve.engine import Engine
from serve_bench.serve.prefix import PrefixCache
from tests.serve_bench.serve.test_engine import collect, running, start

QUICK = settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
# Few tokens and a few long beginnings, so that prompts share prefixes of every length.
BEGINNINGS = [list(range(n, n + 40)) for n in (5, 90)] + [[]]
prompts = st.builds(
    lambda beginning, cut, rest: [*beginning[:cut], *rest],
    st.sampled_from(BEGINNINGS),
    st.integers(0, 40),
    st.lists(st.integers(1, 3), min_size=1, max_size=12),
)


@pytest.fixture(scope="module", params=["fused", "growing"])
def folder(request: pytest.FixtureRequest, served: Artifact, gpt2: Artifact) -> Path:
    return (served if request.param == "fused" else gpt2).path


@cache
def alone(folder: Path) -> Decoder:
    return Decoder(folder, form="fp32", threads=1)


@cache
def cold(folder: Path, ids: tuple[int, ...], count: int) -> list[int]:
    return list(alone(folder).generate(ids, count))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    token = bytes_per_token(alone(folder))
    with running(folder, max_batch=3, prefix_bytes=150 * token) as open_engine:  # so some go
        yield open_engine


@QUICK
@given(asked=st.lists(st.tuples(prompts, st.integers(1, 8)), min_size=1, max_size=6))
def test_answers_equal_a_cold_run(folder: Path, engine: Engine, asked: list[Any]) -> None:
    streams = [start(engine, ids, count) for ids, count in asked]
    found = [collect(pieces)[0] for _, pieces in streams]
    assert found == [cold(folder, tuple(ids), count) for ids, count in asked]
    for (stream, _), (ids, _) in zip(streams, asked, strict=True):
        assert 0 <= stream.reused < len(ids)
    assert engine.prefix_bytes <= 150 * (bytes_per_token(alone(folder)) + 8)


@QUICK
@given(asked=st.lists(st.tuples(prompts, st.integers(1, 8)), min_size=1, max_size=6))
def test_a_decoder_that_resumes_equals_a_cold_run(folder: Path, asked: list[Any]) -> None:
    decoder, before = Decoder(folder, form="fp32", threads=1), list[int]()
    for ids, count in asked:
        tokens = list(decoder.generate(ids, count, resume=True))
        assert tokens == cold(folder, tuple(ids), count)
        assert decoder.reused == max(min(common_prefix(before, ids), len(ids) - 2), 0)
        before = [*ids, *tokens[:-1]]  # the last token was never read


def test_the_next_turn_and_a_repetition_read_only_what_is_new(folder: Path) -> None:
    with running(folder) as engine:
        first, second = list(range(10, 40)), [7, 8, 9]
        answer = collect(start(engine, first, 6)[1])[0]
        turn = [*first, *answer, *second]
        stream, pieces = start(engine, turn, 4)
        assert collect(pieces)[0] == cold(folder, tuple(turn), 4)
        assert stream.reused == len(first) + len(answer) - 1  # the last token was never read
        again, pieces = start(engine, turn, 4)
        assert collect(pieces)[0] == cold(folder, tuple(turn), 4)
        assert again.reused == len(turn) - 2
        one_token = start(engine, [*range(50, 70)], 1)
        collect(one_token[1])
        warmed, pieces = start(engine, [*range(50, 70), 1, 2], 3)
        collect(pieces)
        assert warmed.reused == 20


def test_a_running_request_shares_its_beginning(folder: Path) -> None:
    ids = list(range(10, 40))
    with running(folder) as engine:
        first, first_pieces = start(engine, ids, 20)
        second, second_pieces = start(engine, [*ids, 3, 4], 5)
        assert collect(first_pieces)[0] == cold(folder, tuple(ids), 20)
        assert collect(second_pieces)[0] == cold(folder, (*ids, 3, 4), 5)
        assert (first.reused, second.reused) == (0, len(ids))


def test_no_token_of_a_prompt_is_read_by_itself(folder: Path) -> None:
    """A run of one token adds in another order, which 8-bit activations make a difference of."""
    with running(folder) as engine:
        sizes, fill = list[int](), engine._batch.fill

        def recorded(ids: Any, **how: Any) -> Any:
            sizes.append(len(ids))
            return fill(ids, **how)

        engine._batch.fill = recorded  # type: ignore[method-assign]
        blocker = start(engine, [1, 2], 40)[0]  # so that prompts are read in chunks
        most = engine.longest - 1
        for length in (2, 3, 17, 18, 33, 129, 130, 257):
            ids = [(7 * at + length) % 256 for at in range(min(length, most))]
            for again in range(3):
                stream, pieces = start(engine, ids, 1)
                assert collect(pieces)[0] == cold(folder, tuple(ids), 1)
                assert stream.reused <= len(ids) - 2
                assert stream.reused == len(ids) - 2 or not again
        blocker.cancel()
        assert min(sizes) == 2


def test_owners_share_nothing(folder: Path) -> None:
    ids = list(range(10, 40))
    with running(folder) as engine:
        reused = []
        for owner in ("a", "b", "a"):
            stream, pieces = start(engine, ids, 3, owner=owner)
            assert collect(pieces)[0] == cold(folder, tuple(ids), 3)
            reused.append(stream.reused)
        assert reused == [0, 0, len(ids) - 2]


def test_no_budget_keeps_and_shares_nothing(folder: Path) -> None:
    with running(folder, prefix_bytes=0) as engine:
        streams = [start(engine, list(range(10, 40)), 3) for _ in range(3)]
        for stream, pieces in streams:
            collect(pieces)
            assert stream.reused == 0
        assert engine.prefix_bytes == 0


# The cache by itself ------------------------------------------------------------------------------


def put(cache: PrefixCache, ids: list[int], owner: str = "") -> None:
    arrays = [np.full((1, len(ids), 1), ids[-1], np.float32)]
    cache.put(ids, owner, 4, lambda: arrays)


def test_the_least_recently_used_goes_first() -> None:
    cache = PrefixCache(3 * 12 * 2)  # three sequences of two tokens: 8 bytes of ids and 4 of array
    for ids in ([1, 1], [2, 2], [3, 3]):
        put(cache, ids)
    assert cache.bytes == 72
    assert cache.find([1, 1], "")[0] == 2
    put(cache, [4, 4])
    assert [cache.find([n, n], "")[0] for n in (1, 2, 3, 4)] == [2, 0, 2, 2]
    assert cache.bytes == 72
    put(cache, list(range(10, 20)))  # larger than the budget: not kept, and nothing is lost for it
    assert cache.find(list(range(10, 20)), "")[0] == 0
    assert cache.bytes == 72


def test_many_short_sequences_are_not_kept_without_end() -> None:
    """Each prompt is compared with all of them, so thousands would cost more than they save."""
    cache = PrefixCache(1 << 40)
    for n in range(600):
        put(cache, [n, n])
    assert [cache.find([n, n], "")[0] for n in (0, 87, 88, 599)] == [0, 0, 2, 2]
    assert cache.bytes == 512 * 24


def test_a_longer_sequence_takes_the_place_of_its_beginning() -> None:
    cache = PrefixCache(10_000)
    put(cache, [1, 2])
    put(cache, [1, 2, 3, 4])
    put(cache, [1, 2, 3])
    assert cache.bytes == 12 * 4
    length, (array,) = cache.find([1, 2, 3, 9], "")
    assert (length, array.shape) == (3, (1, 3, 1))
    assert (array == 4).all()
    put(cache, [1, 2], owner="b")
    assert cache.find([1, 2, 3], "b")[0] == 2
