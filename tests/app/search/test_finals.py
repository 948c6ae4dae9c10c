"""What is measured at the end, and in which order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from limbeck.app.search import finals, state
from limbeck.app.search.candidates import Search
from limbeck.app.search.outcome import draw, pareto_front
from limbeck.app.search.state import Clock
from limbeck.contract.errors import DivergenceError, ParityError
from limbeck.contract.recipe import Budget
from tests.app.search.candidates import LOSSES, _measured, candidate, pico


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
        finals, "_measure", lambda _, c, __: _measured(measured, c, c.student == "b")
    )
    recipe = pico(**{"search.finalists": 1})
    assert recipe.budget is not None
    asked, clock = Search(recipe, {}, field, recipe.budget, tmp_path), Clock(tmp_path / state.SPENT)
    finals.measure_finalists(asked, clock)
    assert measured == ["a", "c", "b"]
    assert field[-1].out == "not among the finalists"
    measured.clear()
    for c in field:
        c.measured, c.verdict = {}, None
    spent = recipe.budget.model_copy(update={"hours": 1e-9})
    finals.measure_finalists(replace(asked, budget=spent), Clock(tmp_path / state.SPENT))
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
        asked = Search(two, {}, field, spent, tmp_path)
        finals.measure_finalists(asked, Clock(tmp_path / state.SPENT))
        assert measured == expected
        assert next(c.out for c in field if c.student == "d") == "no time left to measure it"


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
    students = {"asked": recipe.resolved()["student"]}
    search = Search(recipe, students, [finalist], recipe.budget, tmp_path)
    finals._measure(search, finalist, tmp_path)
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
        students = {"asked": recipe.resolved()["student"]}
        search = Search(recipe, students, [finalist], recipe.budget, tmp_path)
        finals._measure(search, finalist, tmp_path)
        assert (finalist.out, finalist.verdict) == (said, None)
