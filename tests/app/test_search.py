"""The search: what is ruled out unseen, what is predicted, who goes on, and the recipe that is left
at the end."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import compress
import serve_bench
from compress.teachers.cache import CachedTeachers
from limbeck.app import search as module
from limbeck.app.cli import app
from limbeck.app.search import finals, language, probes, rounds, search, state, variants
from limbeck.app.search.candidates import Candidate, fit_speed
from limbeck.app.search.language import final_recipe
from limbeck.app.search.outcome import (
    Found,
    draw,
    excess,
    missed_bound,
    nearest,
    out_of_time,
    pareto_front,
)
from limbeck.app.search.state import Clock
from limbeck.contract.errors import (
    ArtifactError,
    DivergenceError,
    EnvironmentalError,
    ModelError,
    ParityError,
)
from limbeck.contract.recipe import Budget, QualityBudget, Recipe, load_recipe, parse_recipe

BUDGET = {"size_mb": 0.6, "tpot_ms": 5.0}


def pico(**over: Any) -> Recipe:
    settings = {"budget": BUDGET, "search.rungs": [512, 1024], **over}
    return load_recipe(
        "pico", overrides=[f"{key}={json.dumps(value)}" for key, value in settings.items()]
    )


def candidate(
    student: str, form: str = "int8-weight", *, size: int = 100, layers: int = 4
) -> Candidate:
    return Candidate(student, form, student, size, layers)


# Speed --------------------------------------------------------------------------------------------


def test_the_speed_model_recovers_the_law_that_made_its_points() -> None:
    points = [
        candidate("s", form, size=mb * 1_000_000, layers=layers)
        for form in ("int8-weight", "int4-weight")
        for mb, layers in ((50, 10), (80, 15), (110, 30), (140, 20))
    ]
    cost = {"int8-weight": 0.04, "int4-weight": 0.07}

    def law(c: Candidate) -> float:
        return 0.5 + 0.03 * c.layers + cost[c.form] * c.size / 1e6

    fitted = fit_speed(points, [law(c) for c in points])
    unseen = candidate("t", "int4-weight", size=95_000_000, layers=12)
    assert fitted(unseen) == pytest.approx(law(unseen), rel=1e-6)
    assert fitted.error == pytest.approx(0, abs=1e-6)


def test_the_error_of_the_speed_model_is_that_of_points_it_had_not_seen() -> None:
    points = [candidate("s", size=mb * 1_000_000, layers=mb // 5) for mb in (50, 80, 110, 140)]
    times = [5.0, 8.0, 11.0, 28.0]  # the last is twice what the others say
    assert fit_speed(points, times).error == pytest.approx(0.5, rel=0.05)
    assert fit_speed(points[:1], times[:1]).error is None


def timed_field(folder: Path, **bounds: float) -> dict[str, Candidate]:
    """Five shapes, of which three were timed at a millisecond a layer, after what is too slow is
    ruled out."""
    field = [candidate(f"s{n}", size=n * 10_000_000, layers=n) for n in (2, 4, 6, 8, 10)]
    times = {f"s{n}-int8-weight": {"tpot_ms": float(n), "ttft_ms": 3.0 * n} for n in (2, 6, 10)}
    (folder / state.TIMING).write_text(json.dumps(times))
    recipe = pico(budget=bounds, **{"search.probes": 3})
    assert recipe.budget is not None
    probes.predict_speeds(recipe, {}, field, recipe.budget, folder)
    return {c.student: c for c in field}


def test_what_misses_a_bound_by_more_than_the_error_is_ruled_out(tmp_path: Path) -> None:
    field = timed_field(tmp_path, tpot_ms=7.1)
    assert {name: c.out for name, c in field.items() if c.out} == {
        "s8": "predicted tpot 8.00 ms",
        "s10": "timed tpot 10.00 ms",
    }
    assert field["s4"].predicted == pytest.approx({"tpot_ms": 4.0, "ttft_ms": 12.0})
    assert not field["s4"].timed
    assert timed_field(tmp_path, tpot_ms=7.3)["s8"].out is None  # 8 ms, give or take a tenth
    first = timed_field(tmp_path, tpot_ms=99, ttft_ms=20.0)  # which is three times as long
    assert {name: c.out for name, c in first.items() if c.out} == {
        "s8": "predicted ttft 24.00 ms",
        "s10": "timed ttft 30.00 ms",
    }


def test_what_is_planned_too_large_is_ruled_out_before_anything_is_made() -> None:
    recipe = pico(budget={"size_mb": 0.6})
    assert recipe.budget is not None
    field = language.sized(recipe, dict(language.students(recipe)))
    module._rule_out_sizes(field, recipe.budget)
    assert {c.out is None for c in field} == {True, False}
    for c in field:
        assert (c.out is None) == (c.size <= 0.6e6 * 1.02), c.name


def test_what_this_machine_has_no_memory_to_train_is_ruled_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = pico(
        **{"search.depths": [1.0, 0.5, 0.25], "search.widths": [0.5], "search.ranks": [8]}
    )
    students, budget = dict(language.students(recipe)), recipe.budget
    assert budget is not None
    planned: list[str] = []

    def memory(made: Recipe, *, here: int) -> tuple[int, int]:
        planned.append(made.name)
        return (
            made.student.layers or 0
        ) * 10_000_000 if made.student.kind == "shrink" else 5_000_000, here

    def left(here: int) -> tuple[set[str], list[Candidate]]:
        planned.clear()
        monkeypatch.setattr(module, "training_memory", lambda made: memory(made, here=here))
        field = language.sized(recipe, students)
        module._rule_out_memory(recipe, students, field, budget)
        return {c.student for c in field if c.out is None}, field

    cuts = {"cut-4x128", "cut-2x128", "cut-1x128"}
    assert left(50_000_000)[0] == students.keys()
    assert len(planned) == 2  # the largest of each kind
    assert left(20_000_000)[0] == students.keys() - {"cut-4x128"}
    assert (
        "planned to take more memory than there is here, and left out: cut-4x128"
        in capsys.readouterr().err
    )
    assert left(9_000_000)[0] == students.keys() - cuts
    none, field = left(1_000_000)
    assert none == set()
    said = missed_bound([c for c in field if c.student in cuts], Budget(size_mb=1))
    assert said == (
        "No student that is small enough can be trained here: cut-1x128 is planned to train "
        "in 10.0 MB of memory, and "
        "1.000 MB are here."
    )


def test_what_is_looked_among_is_named_by_what_it_keeps() -> None:
    recipe = pico(
        **{"search.depths": [1.0, 0.5], "search.widths": [1.0, 0.5], "search.hidden": [1.0, 0.5]}
    )
    students = dict(language.students(recipe))
    base = variants.dimensions(
        recipe, {"kind": "shrink", "base": recipe.resolved()["student"]["base"]}
    )
    layers, neurons, hidden = (
        base[name] for name in ("layers", "intermediate_size", "hidden_size")
    )
    cuts = {name.removeprefix("cut-") for name in students if name.startswith("cut-")}
    assert len(cuts) == 2 * 2 * 2 - 1  # all but the whole base
    assert f"{layers // 2}x{neurons}" in cuts
    assert f"{layers}x{neurons}x{hidden // 2}" in cuts
    narrow = students[f"cut-{layers}x{neurons // 2}x{hidden // 2}"]
    assert (narrow["intermediate_size"], narrow["hidden_size"]) == (neurons // 2, hidden // 2)
    sizes = {c.student: c.size for c in language.sized(recipe, students) if c.form == "int8-weight"}
    assert sizes[f"cut-{layers}x{neurons}x{hidden // 2}"] < sizes[f"cut-{layers}x{neurons // 2}"]


def test_a_cut_that_was_asked_for_and_lies_on_the_grid_is_tried_once() -> None:
    base = pico().resolved()["student"]["base"]
    for layers, names in (
        (2, ["cut-4x256", "cut-2x256"]),
        (3, ["cut-4x256", "cut-2x256", "asked"]),
    ):
        asked = {
            "kind": "shrink",
            "base": base,
            "layers": layers,
            "hidden_size": 64,
            "calibration_blocks": 2,
        }
        space = {"ranks": [], "depths": [1.0, 0.5], "widths": [1.0]}
        assert list(dict(language.students(pico(student=asked, search=space)))) == names


# Halving ------------------------------------------------------------------------------------------

LOSSES = {"a": 3.0, "b": 4.0, "c": 3.5, "d": 5.0}


class Killed(BaseException):
    """A process that ends in the middle."""


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
    monkeypatch.setattr(rounds, "_WAIT", 0.01)
    return trained


def halve(folder: Path, *, until: float = float("inf"), **over: Any) -> list[Candidate]:
    """Candidates after the rounds."""
    recipe = pico(**{"search.finalists": 1, **over})
    candidates = [candidate(name) for name in LOSSES]
    students = {name: recipe.resolved()["student"] for name in LOSSES}
    rounds.halve(recipe, students, candidates, folder, Clock(folder / state.SPENT), until=until)
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
    with rounds._study(tmp_path, 0) as study:
        rounds._enqueue(study, list(LOSSES), 0, float("inf"))
        study.ask()
        study.ask().set_user_attr("worker", "killed")
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "killed").touch()  # nobody holds its lock
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
    assert list((tmp_path / "workers").iterdir()) == []


def work_in(folder: Path) -> None:
    """One worker in a process of its own, with made-up losses; says which rounds it trained, and
    what all came to."""
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

    compress.heal, compress.cache_teachers, rounds._WAIT = heal, lambda **_: None, 0.01  # type: ignore[assignment]
    found = {c.student: (c.nll, c.out) for c in halve(folder)}
    print(json.dumps({"mine": mine, "found": found}))


def test_two_processes_share_the_students(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.app.test_search import work_in; "
        "work_in(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [json.loads(worker.communicate(timeout=600)[0].splitlines()[-1]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
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


# Finalists ----------------------------------------------------------------------------------------


def test_each_form_has_its_best_student_measured_first() -> None:
    """4 bits cost what is not known yet: the best int8 student is measured though two int4 ones are
    ahead of it."""
    field = [
        candidate("a", "int4-weight"),
        candidate("b", "int4-weight"),
        candidate("c"),
        candidate("d"),
    ]
    for place, c in enumerate(field[:3]):
        c.nll, c.tokens = 3.0 + place, 1024
    field[2].tokens = 512
    assert [c.student for c in finals.finalists(field, Budget(size_mb=1))] == ["a", "c", "b"]


def test_what_is_inside_every_bound_is_measured_before_what_may_be() -> None:
    field = [
        candidate(name, size=size)
        for name, size in (("a", 1_010_000), ("b", 900_000), ("c", 800_000))
    ]
    for place, c in enumerate(field):
        c.nll, c.tokens, c.predicted = (
            3.0 + place,
            1024,
            {"tpot_ms": 8.5 if c.student == "b" else 7.0},
        )
    assert [c.student for c in finals.finalists(field, Budget(size_mb=1, tpot_ms=8))] == [
        "c",
        "a",
        "b",
    ]
    assert [c.student for c in finals.finalists(field, Budget(tpot_ms=8))] == ["a", "c", "b"]


def test_the_front_is_what_no_other_beats_in_both() -> None:
    points = [(3.0, 1.0), (1.0, 4.0), (2.0, 4.0), (2.5, 2.0), (4.0, 1.5)]
    assert pareto_front(points) == [(1.0, 4.0), (2.5, 2.0), (3.0, 1.0)]
    assert pareto_front([]) == []


def test_the_picture_shows_every_student_that_has_a_loss(tmp_path: Path) -> None:
    field = [candidate("healed"), candidate("whole", "int4-weight"), candidate("unseen")]
    for c, nll in zip(field, (4.0, 3.0, None), strict=True):
        c.nll, c.predicted = nll, {"tpot_ms": 5.0}
    field[1].measured = {"size": 1e6, "tpot_ms": 6.0, "nll": 3.0}
    draw(field, Budget(size_mb=1, tpot_ms=8), field[1], tmp_path / "search.svg")
    svg = (tmp_path / "search.svg").read_text()
    assert svg.count("<!-- healed -->") == svg.count("<!-- whole -->") == 2
    assert "<!-- unseen -->" not in svg


def test_the_next_ones_are_measured_while_none_keeps_the_budget_and_time_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    field = [candidate(name) for name in LOSSES]
    for c in field:
        c.nll, c.tokens = LOSSES[c.student], 512
    measured: list[str] = []

    monkeypatch.setattr(
        finals, "_measure", lambda _, __, c, *___: _measured(measured, c, c.student == "b")
    )
    recipe = pico(**{"search.finalists": 1})
    assert recipe.budget is not None
    finals.measure_finalists(
        recipe, {}, field, recipe.budget, tmp_path, Clock(tmp_path / state.SPENT)
    )
    assert measured == ["a", "c", "b"]
    assert field[-1].out == "not among the finalists"
    measured.clear()
    for c in field:
        c.measured, c.verdict = {}, None
    spent = recipe.budget.model_copy(update={"hours": 1e-9})
    finals.measure_finalists(recipe, {}, field, spent, tmp_path, Clock(tmp_path / state.SPENT))
    assert measured == ["a"]
    # Two are wanted, and time is up after the first; but what was measured before an interruption
    # is not lost.
    two = pico(**{"search.finalists": 2})
    for done, expected in ((None, ["a"]), ("c", ["a", "c"])):
        measured.clear()
        for c in field:
            c.measured, c.verdict, c.out = {}, None, None
        if done:
            (tmp_path / f"finalists/{done}-int8-weight").mkdir(parents=True)
            (tmp_path / f"finalists/{done}-int8-weight/report.json").touch()
        finals.measure_finalists(two, {}, field, spent, tmp_path, Clock(tmp_path / state.SPENT))
        assert measured == expected
        assert next(c.out for c in field if c.student == "d") == "no time left to measure it"


def _measured(told: list[str], finalist: Candidate, passes: bool) -> None:
    told.append(finalist.student)
    finalist.measured = {"nll": 3.0}
    finalist.verdict = "pass" if passes else "fail"


def test_a_finalist_is_verified_but_for_its_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that is faster a minute later, a replay of the speed would find another
    figure."""
    arms = {
        "mine": {
            "role": "form",
            "bytes": 5e5,
            "tpot_ms": {"value": 2.0},
            "ttft_ms": {"value": 9.0},
            "quality": {"mean_nll": 3.3},
        },
        "one": {"role": "teacher", "quality": {"mean_nll": 3.5}},
        "other": {"role": "teacher", "quality": {"mean_nll": 3.0}},
    }
    bench = SimpleNamespace(result={"judged": "mine", "arms": arms})
    monkeypatch.setattr(finals, "open_artifact", lambda *_, **__: bench)
    passed = SimpleNamespace(verdict=SimpleNamespace(status="pass"))
    monkeypatch.setattr(finals.pipeline, "run", lambda *_, **__: passed)
    monkeypatch.setattr(
        finals, "verify", lambda _, *, quality=True, speed=True: int(speed or not quality)
    )
    recipe, finalist = pico(), candidate("asked")
    assert recipe.budget is not None
    finals._measure(
        recipe, {"asked": recipe.resolved()["student"]}, finalist, recipe.budget, tmp_path
    )
    assert (finalist.verdict, finalist.out) == ("pass", None)
    assert finalist.measured == {
        "size": 5e5,
        "tpot_ms": 2.0,
        "ttft_ms": 9.0,
        "nll": 3.3,
        "best_teacher": 3.0,
    }


def test_a_finalist_whose_training_diverged_is_not_called_an_export_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = pico()
    assert recipe.budget is not None
    for error, said in (
        (
            DivergenceError("training of a diverged at step 3: loss nan"),
            "training of a diverged at step 3: loss nan",
        ),
        (
            ParityError("the int8-weight graph is wrong:\n  far off"),
            "not exported: the int8-weight graph is wrong",
        ),
    ):
        monkeypatch.setattr(
            finals.pipeline, "run", lambda *_, error=error, **__: (_ for _ in ()).throw(error)
        )
        finalist = candidate("asked")
        finals._measure(
            recipe, {"asked": recipe.resolved()["student"]}, finalist, recipe.budget, tmp_path
        )
        assert (finalist.out, finalist.verdict) == (said, None)


# What is left -------------------------------------------------------------------------------------


def test_the_recipe_that_is_written_stands_alone(tmp_path: Path) -> None:
    recipe = load_recipe(
        "smollm2/135m-two-experts", overrides=["budget={size_mb: 120, quality: {max_loss: 0.01}}"]
    )
    assert recipe.budget is not None
    base = recipe.resolved()["student"]["base"]
    student = {"kind": "shrink", "base": base, "layers": 20}
    tree = final_recipe(recipe, student, candidate("cut-20", "int4-weight"), recipe.budget)
    (tmp_path / "chosen.yaml").write_text(yaml.safe_dump(tree))
    read = load_recipe(tmp_path / "chosen.yaml")
    assert read.student.kind == "shrink"
    assert read.training.learning_rate == pytest.approx(0.3 * recipe.training.learning_rate)
    assert [form.kind for form in read.export.forms] == ["fp32", "int4-weight"]
    assert (read.gates.max_size_mb, read.gates.max_loss_vs_best_teacher) == (120, 0.01)
    assert read.gates.min_decode_speedup == recipe.gates.min_decode_speedup
    assert read.budget is None
    # By name: on another machine a shipped recipe lies elsewhere.
    assert [t["model"]["recipe"] for t in tree["teachers"]] == [
        "smollm2/expert-speeches",
        "smollm2/expert-scripture",
    ]


def test_a_teacher_recipe_of_ones_own_keeps_its_place(tmp_path: Path) -> None:
    (tmp_path / "expert.yaml").write_text("extends: pico\nname: expert\n")
    teachers = "teachers: [{name: a, model: {kind: recipe, recipe: expert.yaml}}]\n"
    (tmp_path / "mine.yaml").write_text(
        f"extends: pico\nname: mine\n{teachers}budget: {{size_mb: 1}}\n"
    )
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.budget is not None
    tree = final_recipe(recipe, recipe.resolved()["student"], candidate("asked"), recipe.budget)
    assert tree["teachers"][0]["model"]["recipe"] == str(tmp_path / "expert.yaml")


def test_every_bound_of_the_budget_is_a_gate_of_the_recipe_that_is_written() -> None:
    recipe = pico(
        budget={"size_mb": 0.6, "tpot_ms": 5.0, "ttft_ms": 20.0}, gates={"max_tpot_ms": 1.0}
    )
    assert recipe.budget is not None
    tree = final_recipe(recipe, recipe.resolved()["student"], candidate("asked"), recipe.budget)
    gates = parse_recipe(tree).gates
    assert (gates.max_size_mb, gates.max_tpot_ms, gates.max_ttft_ms) == (0.6, 5.0, 20.0)
    assert gates.max_loss_vs_best_teacher is None


def test_what_a_recipe_asks_of_its_export_spoils_no_finalist() -> None:
    """`recover`, `mixed` and separate adapters ask for gates, forms and students that a finalist
    need not have."""
    for override in (
        "export.recover={tokens: 1024}",
        "export.adapters=separate",
        "export.mixed={kind: loss}",
    ):
        given = ["budget.size_mb=1", "export.forms=[fp32, int4-weight]", override]
        recipe = load_recipe("pico", overrides=given)
        assert recipe.budget is not None
        for name, student in language.students(recipe):
            for form in ("int8-weight", "int4-weight"):
                made = parse_recipe(
                    final_recipe(recipe, student, candidate(name, form), recipe.budget)
                ).export
                assert [form.kind for form in made.forms] == ["fp32", form]
                assert (made.recover, made.adapters) == (None, "merged")


def test_a_round_is_no_longer_than_the_training(
    tmp_path: Path, stood_in: list[tuple[str, int]]
) -> None:
    halve(tmp_path, **{"training.tokens": 1536, "search.rungs": [512, 100_000]})
    assert {tokens for _, tokens in stood_in} == {0, 512, 1536}


def test_what_a_form_does_not_have_is_left_out_of_its_recipe(tmp_path: Path) -> None:
    asked = [
        "export={forms: [fp32, int4-weight], mixed: {kind: size, mb: 1}, recover: {tokens: 512}}",
        "budget={size_mb: 1}",
    ]
    recipe = load_recipe("pico", overrides=asked)
    assert recipe.budget is not None
    student = recipe.resolved()["student"]
    for form, mixed in (("int8-weight", "rule"), ("int4-weight", "size")):
        made = parse_recipe(final_recipe(recipe, student, candidate("whole", form), recipe.budget))
        assert made.export.mixed.kind == mixed
        assert made.export.recover is None


def test_the_nearest_misses_its_worst_bound_by_least() -> None:
    small, fast = candidate("small", size=110_000_000), candidate("fast", size=240_000_000)
    small.predicted, fast.predicted = {"tpot_ms": 9.0}, {"tpot_ms": 4.0}
    assert nearest([fast, small], Budget(size_mb=100, tpot_ms=8)) is small
    assert nearest([fast, small], Budget(tpot_ms=5)) is fast


def test_the_nearest_is_chosen_by_the_loss_that_was_measured() -> None:
    a, b, unseen = candidate("a"), candidate("b"), candidate("unseen")
    a.nll, b.nll, unseen.nll = 3.0, 3.5, 2.0  # after a round
    a.measured = {"size": 1e6, "tpot_ms": 4.0, "ttft_ms": 9.0, "nll": 3.3, "best_teacher": 3.0}
    b.measured = a.measured | {"nll": 3.2, "tpot_ms": 4.4}
    assert nearest([a, b, unseen], Budget(tpot_ms=5)) is b
    assert nearest([a, b], Budget(tpot_ms=4)) is a
    quality = Budget(tpot_ms=4.3, quality=QualityBudget(max_loss=0.01))
    assert excess(a, quality) == pytest.approx(3.3 / (3.0 * 1.01))
    assert excess(b, quality) == pytest.approx(3.2 / (3.0 * 1.01))
    assert nearest([a, b, unseen], quality) is b


def test_a_time_that_nobody_measured_is_called_predicted() -> None:
    slow, slower = candidate("slow"), candidate("slower")
    slow.predicted, slower.predicted = {"tpot_ms": 8.0}, {"tpot_ms": 9.0}
    assert missed_bound([slow, slower], Budget(tpot_ms=5)).endswith(
        "the fastest is predicted to take 8.00."
    )
    slow.timed = True
    assert missed_bound([slow, slower], Budget(tpot_ms=5)).endswith("the fastest takes 8.00.")


def test_hours_that_ran_out_are_no_answer() -> None:
    begun, late = candidate("begun"), candidate("late")
    begun.out, late.late = "gates missed", True
    said = missed_bound([begun, late], Budget(tpot_ms=5, hours=2))
    assert (
        said == "Not decided: the 2 hours ran out before 1 of the students was measured; give "
        "budget.hours more."
    )
    assert out_of_time([begun, late]) == [late]


def test_an_adapter_is_tried_as_the_recipe_has_it_and_without_cuts_where_there_are_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {**pico().resolved()["student"], "rank": 3, "alpha": 12}
    students = dict(language.students(pico(student=asked)))
    assert students["asked"]["rank"] == 3
    assert students["asked"]["alpha"] == 12
    assert any(name.startswith("cut-") for name in students)

    def unknown(*_: Any) -> None:
        raise ModelError("student.base: nobody knows what can be cut out of a mamba")

    monkeypatch.setattr(variants, "dimensions", unknown)
    alone = dict(language.students(pico(student=asked)))
    assert alone == {name: s for name, s in students.items() if s["kind"] == "lora"}
    assert "nobody knows what can be cut out of a mamba; nothing is cut" in capsys.readouterr().err


def test_a_form_that_parity_refuses_untrained_is_out_and_the_others_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int4-weight in every shape, int8-weight in one: that one is predicted."""
    pairs = [(name, form) for name in "abc" for form in ("int8-weight", "int4-weight")]

    def export(_: Any, student: dict[str, str], forms: Sequence[str], __: Any) -> None:
        if "int4-weight" in forms or student["name"] == "b":
            raise ParityError(
                f"the {forms[-1]} graph does not compute what the student computes:\n  far off"
            )

    def measure(targets: Sequence[str], **_: Any) -> SimpleNamespace:
        arm = {"role": "target", "tpot_ms": {"value": 2.0}, "ttft_ms": {"value": 4.0}}
        return SimpleNamespace(result={"arms": dict.fromkeys(targets, arm)})

    monkeypatch.setattr(probes, "export_untrained", export)
    monkeypatch.setattr(serve_bench, "measure_targets", measure)
    field, students = [candidate(*pair) for pair in pairs], {name: {"name": name} for name in "abc"}
    recipe = pico()
    assert recipe.budget is not None
    probes.predict_speeds(recipe, students, field, recipe.budget, tmp_path)
    refused = (
        "untrained, not exported: the int4-weight graph does not compute what the student computes"
    )
    assert {(c.form, c.out) for c in field} == {("int8-weight", None), ("int4-weight", refused)}
    found = {c.student: (c.timed, c.predicted["tpot_ms"]) for c in field if c.out is None}
    assert found == {"a": (True, 2.0), "b": (False, pytest.approx(2.0)), "c": (True, 2.0)}
    assert missed_bound([c for c in field if c.out], recipe.budget) == (
        f"No student that is small enough can be exported in int4-weight: {refused}."
    )


def test_a_budget_that_nothing_fits_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    found = search(pico(budget={"size_mb": 0.01}), out=tmp_path / "out")
    assert found.exit_code == 1
    assert found.sentence.startswith(
        "No student is small enough: size_mb 0.01 is asked for, the smallest is planned at 0."
    )
    assert not (tmp_path / "out" / module.CHOSEN).exists()
    assert not (tmp_path / "out" / "healing").exists()
    left = load_recipe(tmp_path / "out" / module.NEAREST)
    assert left.gates.max_size_mb == 0.01
    told = "ts gates are the budget's, which are not kept: it fails unless they are raised"
    assert told in found.sentence
    assert told in left.text
    result = json.loads((tmp_path / "out" / module.RESULT).read_text())
    assert all(c["out"].startswith("planned") for c in result["candidates"])
    with pytest.raises(ArtifactError, match="another recipe or budget"):
        search(pico(budget={"size_mb": 0.02}), out=tmp_path / "out")
    again = search(pico(budget={"size_mb": 0.01}), out=tmp_path / "out")
    assert again == found


def test_a_search_whose_time_was_up_says_so_and_goes_on_with_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healed: list[str] = []

    def heal(*, recipe: Recipe, goes_on: Callable[[int, float], bool], **_: Any) -> None:
        healed.append(recipe.name)
        goes_on(0, 3.0 + len(healed) / 10)

    def measure(_: Any, __: Any, finalist: Candidate, *___: Any) -> None:
        finalist.late, finalist.verdict = False, "pass"
        finalist.measured = {
            "size": 5e5,
            "tpot_ms": 2.0,
            "ttft_ms": 9.0,
            "nll": 3.0,
            "best_teacher": 3.0,
        }

    monkeypatch.setattr(compress, "heal", heal)
    monkeypatch.setattr(compress, "cache_teachers", lambda **_: None)
    monkeypatch.setattr(finals, "_measure", measure)

    def find(hours: float) -> Found:
        recipe = pico(
            budget={"size_mb": 0.6, "hours": hours},
            **{"search.rungs": [512], "search.finalists": 1},
        )
        return search(recipe, out=tmp_path / "out")

    cut = find(1e-9)
    assert cut.exit_code == 3
    assert cut.sentence.startswith("Not decided: the 1e-09 hours ran out before")
    assert "budget.hours" in cut.sentence
    assert "(its gates are the budget's, which were not shown to be kept)" in cut.sentence
    assert find(1e-9) == cut
    assert healed == []
    found = find(1.0)
    assert found.exit_code == 0, found.sentence
    assert len(healed) == len(set(healed)) > 1
    assert not (tmp_path / "out" / module.NEAREST).exists()
    assert find(2.0) == found  # which nothing was left out of


def test_an_undecided_search_measures_its_finalists_again_when_the_bench_has_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healed: list[str] = []
    measured: list[float] = []

    def heal(*, recipe: Recipe, goes_on: Callable[[int, float], bool], **_: Any) -> None:
        healed.append(recipe.name)
        goes_on(0, 3.0 + len(healed) / 10)

    def measure(recipe: Recipe, _: Any, finalist: Candidate, *__: Any) -> None:
        measured.append(recipe.bench.minutes)
        finalist.verdict = "pass" if recipe.bench.minutes > 1 else "undecided"
        finalist.out = None if recipe.bench.minutes > 1 else "measured: 2.0 ms per output token"
        finalist.measured = {
            "size": 5e5,
            "tpot_ms": 2.0,
            "ttft_ms": 9.0,
            "nll": 3.0,
            "best_teacher": 3.0,
        }

    monkeypatch.setattr(compress, "heal", heal)
    monkeypatch.setattr(compress, "cache_teachers", lambda **_: None)
    monkeypatch.setattr(finals, "_measure", measure)
    in_memory: list[Any] = []
    monkeypatch.setattr(module, "_rule_out_memory", lambda *given: in_memory.append(given))
    few = {
        "search.rungs": [512],
        "search.finalists": 1,
        "search.ranks": [8],
        "search.depths": [1.0],
    }
    few |= {"search.widths": [1.0], "search.forms": ["int8-weight"], "budget": {"size_mb": 1.0}}

    def find(**bench: float) -> Found:
        return search(
            pico(**few, **{f"bench.{name}": value for name, value in bench.items()}),
            out=tmp_path / "out",
        )

    first = find(minutes=1.0)
    assert first.exit_code == 3
    assert len(in_memory) == 1
    assert "give bench.minutes more, and only the finalists are measured again" in first.sentence
    assert find(minutes=0.5) == first  # which would decide less
    trained, again = len(healed), find(minutes=2.0)
    assert (again.exit_code, len(healed)) == (0, trained)
    assert measured == [1.0, 1.0, 2.0]  # of the two, one passes
    assert find(minutes=3.0) == again  # which is decided
    with pytest.raises(ArtifactError, match="another recipe or budget"):
        find(minutes=2.0, new_tokens=8)


def test_a_search_of_other_gates_or_other_text_is_another_search(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("of old " * 9000)
    asked: dict[str, Any] = {"budget": {"size_mb": 0.01}, "data.domains": [
        {"name": "mine", "text": {"kind": "files", "paths": [str(text)]}}]}  # fmt: skip
    search(pico(**asked), out=tmp_path / "out")
    with pytest.raises(ArtifactError, match="another recipe or budget"):
        search(pico(**asked, gates={"min_decode_speedup": 2}), out=tmp_path / "out")
    text.write_text("of new " * 9000)
    with pytest.raises(ArtifactError, match="files that have changed since"):
        search(pico(**asked), out=tmp_path / "out")


def test_a_search_knows_what_the_teachers_of_its_teachers_read(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    made = load_recipe("pico").resolved() | {"name": "made"}
    made["data"]["domains"] = [{"name": "mine", "text": {"kind": "files", "paths": [str(text)]}}]
    (tmp_path / "made.yaml").write_text(yaml.safe_dump(made))
    recipe = pico(
        teachers=[
            {"name": "made", "model": {"kind": "recipe", "recipe": str(tmp_path / "made.yaml")}}
        ]
    )
    digests = []
    for written in ("old", "old", "new"):
        text.write_text(written)
        digests.append(state.digest_of(recipe))
    assert digests[0] == digests[1] != digests[2]


def test_a_folder_of_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text").write_text("of mine")
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / state.ASKED).write_text("{")
    for out, said in (
        ("mine", "holds files but no search"),
        ("file", "is a file"),
        ("file/in", "is a file"),
        ("broken", "not what Limbeck writes"),
    ):
        with pytest.raises(ArtifactError, match=said):
            search(pico(), out=tmp_path / out)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["text"]


def test_wrong_input_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for override, said in (
        ("budget={hours: 2}", "a search needs a bound to keep to"),
        ("teachers=[]", "name a teacher"),
        ("student={kind: fresh, config: {model_type: llama}}", "a search cuts a base down"),
        ("search.rungs=[1024, 512]", "each round is longer than the one before"),
        ("search.forms=[]", "search.forms"),
        ("budget.size_gb=1", "did you mean `size_mb`?"),
    ):
        given = ["search", "pico", "--set", "budget.size_mb=1", "--set", override]
        done = CliRunner().invoke(app, given)
        assert done.exit_code == 2
        assert said in done.stderr
    assert not (tmp_path / "runs").exists()


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(EnvironmentalError, match=r"limbeck\[search\]"):
        search(pico(), out=tmp_path / "out")


@pytest.mark.slow
def test_a_search_ends_with_a_student_that_measures_inside_its_budget(tmp_path: Path) -> None:
    budget = {"size_mb": 0.6, "tpot_ms": 50.0}  # a time that no machine misses
    few = {
        "training.tokens": 2048,
        "bench.minutes": 0.05,
        "search.depths": [1.0, 0.5],
        "search.widths": [0.5],
    }
    found = search(pico(budget=budget, **few), out=tmp_path / "out")
    assert found.exit_code == 0, found.sentence
    result = json.loads((tmp_path / "out" / module.RESULT).read_text())
    best = next(c for c in result["candidates"] if f"{c['student']}-{c['form']}" == result["best"])
    assert best["measured"]["size"] <= 0.6e6
    assert best["measured"]["tpot_ms"] <= 50
    chosen = load_recipe(tmp_path / "out" / module.CHOSEN)
    run = json.loads((Path(best["run"]) / "run.json").read_text())
    assert (
        chosen.digest == run["digest"]
    )  # so that `limbeck run chosen.yaml` makes the same student
