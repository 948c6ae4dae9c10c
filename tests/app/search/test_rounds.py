"""Who goes on: the worse half is out after every round of training."""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import compress
from compress.teachers.cache import CachedTeachers
from limbeck.app.search import finals, rounds, state, storage, variants
from limbeck.app.search.candidates import Candidate, Search
from limbeck.app.search.state import Clock
from limbeck.contract.errors import DivergenceError
from limbeck.contract.recipe import Budget, Recipe
from tests.app.search.candidates import LOSSES, Killed, candidate, pico


@pytest.fixture
def stood_in(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Which rounds were trained; the loss of a student is made up."""
    trained: list[tuple[str, int]] = []

    def heal(
        *, recipe: Recipe, rounds: Sequence[int], goes_on: Callable[[int, float], bool], **_: Any
    ) -> None:
        name = recipe.name.removeprefix("pico-")
        for index, tokens in enumerate(rounds):
            if (name, tokens) not in trained:  # a later round goes on from the earlier one
                trained.append((name, tokens))
            if not goes_on(index, LOSSES[name] - tokens / 1e4):
                return

    monkeypatch.setattr(compress, "heal", heal)
    monkeypatch.setattr(compress, "cache_teachers", lambda **_: trained.append(("teachers", 0)))
    monkeypatch.setattr(rounds, "WAIT", 0.01)
    monkeypatch.setattr(storage, "WAIT", 0.01)
    return trained


def halve(folder: Path, *, until: float = float("inf"), **over: Any) -> list[Candidate]:
    """Candidates after the rounds."""
    recipe = pico(**{"search.finalists": 1, **over})
    candidates = [candidate(name) for name in LOSSES]
    students = {name: recipe.resolved()["student"] for name in LOSSES}
    clock = Clock(folder / state.SPENT)
    with storage.opened(None, folder, name="students", seed=0) as shared:
        asked = Search(recipe, students, candidates, recipe.budget, folder)
        rounds.halve(asked, clock, shared, until=until)
    return candidates


def test_the_worse_half_gets_no_second_round_and_nothing_is_trained_twice(
    tmp_path: Path, stood_in: list[tuple[str, int]]
) -> None:
    candidates = halve(tmp_path)
    assert [name for name, tokens in stood_in if tokens == 512] == list(LOSSES)
    assert [name for name, tokens in stood_in if tokens == 1024] == [
        "a",
        "c",
    ]  # the better half, the best first
    assert stood_in.count(("teachers", 0)) == 1
    left = {c.student: c.nll for c in candidates if c.out is None}
    assert left == {"a": pytest.approx(3.0 - 0.1024), "c": pytest.approx(3.5 - 0.1024)}
    assert not (tmp_path / "healing").exists()
    assert next(c for c in candidates if c.student == "d").out == "behind after 512 tokens"
    stood_in.clear()
    again = halve(tmp_path)
    assert stood_in == []
    assert again == candidates


def test_a_half_that_the_finals_have_room_for_gets_no_further_round(
    tmp_path: Path, stood_in: list[tuple[str, int]]
) -> None:
    candidates = halve(tmp_path, **{"search.finalists": 2})
    assert {tokens for _, tokens in stood_in} == {0, 512}
    assert all(c.out is None for c in candidates)
    assert next(c.student for c in finals.finalists(candidates, Budget(size_mb=1))) == "a"


def test_what_is_beaten_does_not_lie_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[set[str]] = []

    def heal(
        *, recipe: Recipe, work: Path, goes_on: Callable[[int, float], bool], **_: Any
    ) -> None:
        work.mkdir(parents=True)
        left.append({path.name for path in work.parent.iterdir()})
        goes_on(0, LOSSES[recipe.name.removeprefix("pico-")])

    monkeypatch.setattr(compress, "heal", heal)
    monkeypatch.setattr(compress, "cache_teachers", lambda **_: None)
    halve(tmp_path, **{"search.rungs": [512]})
    assert left == [
        {"a"},
        {"a", "b"},
        {"a", "b", "c"},
        {"a", "c", "d"},
    ]  # b cannot be among two of four any more


def test_a_student_whose_process_was_killed_is_taken_up_again(
    tmp_path: Path, stood_in: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(compress, "heal", lambda **_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            halve(tmp_path)
    assert stood_in == [("teachers", 0)]
    candidates = halve(tmp_path)
    assert stood_in.count(("teachers", 0)) == 1
    assert {name for name, tokens in stood_in if tokens} == set(LOSSES)
    assert all(c.nll is not None for c in candidates)


def test_what_a_killed_worker_leaves_behind_is_taken_up(
    tmp_path: Path, stood_in: list[tuple[str, int]]
) -> None:
    killed = storage._me() | {"started": 0.0}  # another process that had this number
    with storage.opened(None, tmp_path, name="students", seed=0) as shared:
        rounds._enqueue(shared.study, [], [(name, 0) for name in LOSSES], float("inf"))
        shared.study.ask().set_user_attr("worker", killed)
    assert all(c.nll is not None for c in halve(tmp_path))


def test_two_workers_share_the_students_and_both_know_all_losses(
    tmp_path: Path, stood_in: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first worker stands in the middle of its first student until the second one has done all
    the others."""
    heal, both = compress.heal, threading.Barrier(2)
    others_done = threading.Event()
    first: list[str] = []

    def slow(**given: Any) -> None:
        name = given["recipe"].name.removeprefix("pico-")
        if not first:
            first.append(name)
            both.wait(10)
            assert others_done.wait(10)
        heal(**given)
        if len({n for n, tokens in stood_in if tokens}) == len(LOSSES) - 1:
            others_done.set()

    monkeypatch.setattr(compress, "heal", slow)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(halve, tmp_path)
        both.wait(10)
        two = pool.submit(halve, tmp_path)
        assert one.result(30) == two.result(30)
    assert sorted(name for name, tokens in stood_in if tokens == 512) == sorted(LOSSES)
    assert all(c.nll is not None for c in one.result())


def work_in(folder: Path, out: Path) -> None:
    """One worker in a process of its own, with made-up losses; writes to ``out`` which rounds it
    trained, and what all came to."""
    mine: list[str] = []

    def heal(
        *, recipe: Recipe, rounds: Sequence[int], goes_on: Callable[[int, float], bool], **_: Any
    ) -> None:
        name = recipe.name.removeprefix("pico-")
        time.sleep(0.3)
        for index, tokens in enumerate(rounds):
            if not goes_on(index, LOSSES[name] - tokens / 1e4):
                mine.append(f"{name} {tokens}")
                return

    compress.heal, compress.cache_teachers, rounds.WAIT = heal, lambda **_: None, 0.01  # type: ignore[assignment]
    found = {c.student: (c.nll, c.out) for c in halve(folder)}
    out.write_text(json.dumps({"mine": mine, "found": found}))


def test_two_processes_share_the_students(tmp_path: Path) -> None:
    children, files = [], [tmp_path / f"told-{n}.json" for n in range(2)]
    (tmp_path / "work").mkdir()
    for file in files:
        if (child := os.fork()) == 0:  # a fresh process would load torch first
            try:
                work_in(tmp_path / "work", file)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0 if file.exists() else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    told = [json.loads(file.read_text()) for file in files]
    assert told[0]["found"] == told[1]["found"]
    trained = told[0]["mine"] + told[1]["mine"]
    assert sorted(trained) == sorted([*(f"{name} 512" for name in LOSSES), "a 1024", "c 1024"])


def test_no_student_is_begun_when_the_time_is_up(
    tmp_path: Path, stood_in: list[tuple[str, int]]
) -> None:
    candidates = halve(tmp_path, until=0.0)
    assert [c.out for c in candidates] == ["no time left for it"] * len(LOSSES)
    assert stood_in == [("teachers", 0)]


def test_what_there_was_no_time_for_goes_on_when_there_is_more(
    tmp_path: Path, stood_in: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time is up in the first round and before the second; with more of it all comes to what it
    would have come to at once."""
    for folder in ("at-once", "cut"):
        (tmp_path / folder).mkdir()
    at_once = halve(tmp_path / "at-once")
    stood_in.clear()
    monkeypatch.setattr(
        Clock, "spent", lambda _: 60.0 * len(stood_in)
    )  # a minute a round, and one for the teachers
    halve(tmp_path / "cut", until=200.0)
    assert [name for name, tokens in stood_in if tokens] == ["a", "b", "c"]
    cut = halve(tmp_path / "cut", until=200.0)  # no more time than before
    assert len(stood_in) == 4
    assert [(c.student, c.tokens) for c in cut if c.late] == [("a", 512), ("c", 512), ("d", 0)]
    assert halve(tmp_path / "cut") == at_once
    assert stood_in[4:] == [("d", 512), ("a", 1024), ("c", 1024)]


def test_the_clock_counts_work_and_not_the_night_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(state.time, "monotonic", lambda: now[0])
    clock = Clock(tmp_path / "spent.json")
    now[0] += 60
    clock.save()
    now[0] += 30_000  # it was killed, and nobody came back for hours
    again = Clock(tmp_path / "spent.json")
    now[0] += 5
    assert again.spent() == 65


def test_a_student_that_diverges_is_out_and_the_others_go_on(
    tmp_path: Path, stood_in: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    heal = compress.heal

    def diverging(**given: Any) -> None:
        if given["recipe"].name == "pico-a":
            raise DivergenceError("it diverged at step 3")
        heal(**given)

    monkeypatch.setattr(compress, "heal", diverging)
    found = {c.student: c for c in halve(tmp_path)}
    assert found["a"].out == "diverged"
    assert found["c"].out is None


def test_healing_in_rounds_is_one_training_that_can_be_interrupted(tmp_path: Path) -> None:
    """A stop after the first round leaves the rest untrained; going on tells the first round again,
    and ends in the same loss."""
    recipe = pico(
        **{
            "training.batch_tokens": 256,
            "training.checkpoint_every": 1,
            "data.heldout": {"blocks": 2},
        }
    )
    options: dict[str, Any] = {"recipe": recipe, "products": {}, "rounds": (256, 512, 1024)}

    def heal(work: str, says: Callable[[int], bool]) -> list[tuple[int, float]]:
        told: list[tuple[int, float]] = []

        def goes_on(index: int, nll: float) -> bool:
            told.append((index, nll))
            return says(index)

        compress.heal(**options, work=tmp_path / work, goes_on=goes_on)
        return told

    def killed(index: int) -> bool:
        if index == 1:
            raise Killed
        return True

    whole = heal("whole", lambda _: True)
    assert [index for index, _ in whole] == [0, 1, 2]
    assert whole[2][1] < whole[0][1]
    with pytest.raises(Killed):
        heal("work", killed)
    assert (tmp_path / "work" / "checkpoint.pt").exists()
    assert heal("work", lambda _: True) == whole
    assert heal("stopped", lambda _: False) == whole[:1]
    assert heal("stopped", lambda _: True) == whole  # as if it had not stopped


def test_teachers_run_once_for_every_student_and_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    recipe = pico(**{"data.heldout": {"blocks": 2}})
    options: dict[str, Any] = {"products": {}, "rounds": (512, 1024)}
    compress.cache_teachers(recipe=recipe, work=tmp_path / "teachers", **options)
    monkeypatch.setattr(CachedTeachers, "_load", lambda _: pytest.fail("a teacher ran again"))
    cut = {"kind": "shrink", "base": recipe.resolved()["student"]["base"], "layers": 2}
    short = variants.variant(recipe, name="cut", student=cut)
    compress.heal(recipe=short, work=tmp_path / "cut", goes_on=lambda *_: True, **options)


def test_a_round_is_no_longer_than_the_training(
    tmp_path: Path, stood_in: list[tuple[str, int]]
) -> None:
    halve(tmp_path, **{"training.tokens": 1536, "search.rungs": [512, 100_000]})
    assert {tokens for _, tokens in stood_in} == {0, 512, 1536}
