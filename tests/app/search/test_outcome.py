"""The recipe that a search leaves, and what it says where nothing keeps the budget."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import compress
from limbeck.app import search as module
from limbeck.app.cli import app
from limbeck.app.search import finals, language, probes, search, state, variants
from limbeck.app.search.candidates import Candidate, Search
from limbeck.app.search.language import final_recipe
from limbeck.app.search.outcome import (
    PICTURE,
    Found,
    asked_for,
    excess,
    markdown,
    missed_bound,
    nearest,
    out_of_time,
    show,
)
from limbeck.contract.errors import ArtifactError, EnvironmentalError, ModelError, ParityError
from limbeck.contract.recipe import Budget, QualityBudget, Recipe, load_recipe, parse_recipe
from limbeck.contract.recipe.budget import ClassificationBudget, ClassificationQuality
from serve_bench.tasks import targets as benches
from tests.app.search.candidates import candidate, pico

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


def test_bounds_that_are_kept_one_by_one_and_never_together() -> None:
    small, best = candidate("small"), candidate("best")
    small.predicted = best.predicted = {"tpot_ms": 4.0}
    small.out = "loss 3.5 of at most 3.1"
    budget = Budget(size_mb=1, tpot_ms=5)
    assert missed_bound([small, best], budget) == "No student keeps every bound at once."
    small.run = "runs/small"
    assert missed_bound([small, best], budget) == (
        f"No finalist keeps every bound ({small.name}: loss 3.5 of at most 3.1)."
    )


def test_a_budget_in_words() -> None:
    quality = QualityBudget(max_loss=0.02)
    assert asked_for(Budget(size_mb=120, tpot_ms=8, quality=quality)) == (
        "size_mb 120, tpot_ms 8, at most +2.0% loss against the best teacher"
    )
    assert asked_for(
        ClassificationBudget(size_mb=20, quality=ClassificationQuality(max_loss=0.02))
    ) == ("size_mb 20, at most +2.0% loss of the metric against the better teacher")


def test_a_terminal_shows_a_table_and_what_was_measured_in_bold(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown = io.StringIO()
    shown.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", shown)
    for name in ("TERM", "COLORTERM", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    table = markdown([["student", "size"], ["whole", "**1.5 MB**"], ["cut [red]", "0.9 MB"]])
    show(Found(tmp_path, table, "Whole it is.", 0))
    said = shown.getvalue()
    assert "│ whole     │ \x1b[1m1.5 MB\x1b[0m │" in said
    assert "│ cut [red] │ 0.9 MB │" in said
    assert said.endswith(f"\nWhole it is.\npicture: {tmp_path / PICTURE}\n")
    assert "**" not in said


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
    monkeypatch.setattr(benches, "measure_targets", measure)
    field, students = [candidate(*pair) for pair in pairs], {name: {"name": name} for name in "abc"}
    recipe = pico()
    assert recipe.budget is not None
    probes.predict_speeds(Search(recipe, students, field, recipe.budget, tmp_path))
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
    said = "ts gates are the budget's, which are not kept: it fails unless they are raised"
    assert said in found.sentence
    assert said in left.text
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

    def measure(_: Search, finalist: Candidate, __: Path) -> None:
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

    def measure(asked: Search, finalist: Candidate, _: Path) -> None:
        recipe = asked.recipe
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


def test_wrong_input_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
