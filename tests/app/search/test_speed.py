"""What is ruled out unseen: by predicted speed, size and memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from limbeck.app import search as module
from limbeck.app.search import language, probes, state, variants
from limbeck.app.search.candidates import Candidate, Search, fit_speed
from limbeck.app.search.outcome import missed_bound
from limbeck.contract.recipe import Budget, Recipe
from tests.app.search.candidates import candidate, pico


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
    probes.predict_speeds(Search(recipe, {}, field, recipe.budget, folder))
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
        module._rule_out_memory(Search(recipe, students, field, budget, Path()))
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
