"""The search for encoders: what differs from that for language models, and one from budget to
chosen recipe."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import compress
from limbeck.app import search as module
from limbeck.app.cli import app
from limbeck.app.search import encoders, finals, probes, rounds, search, state, storage, variants
from limbeck.app.search.candidates import Candidate, Search, fit_speed
from limbeck.app.search.outcome import excess, figures_of, markdown, nearest, rows
from limbeck.app.search.state import Clock
from limbeck.contract.errors import ArtifactError, DivergenceError, ModelError, RecipeError
from limbeck.contract.recipe import (
    ClassificationBudget,
    EmbeddingBudget,
    EncoderRecipe,
    load_any_recipe,
)
from tests.encoders import classifier_recipe, embedding_recipe, source

BASE = source(seed=3, num_hidden_layers=4)
TEACHERS = [
    {"name": name, "model": source(seed=seed, id2label={"0": "code", "1": "prose"})}
    for seed, name in enumerate("ab", 1)
]
BUDGET: dict[str, Any] = {"size_mb": 0.6, "latency_ms": 50.0}


def classifiers(**over: Any) -> EncoderRecipe:
    """Two random classifiers, and a base of four layers that is cut."""
    given = {"teachers": TEACHERS, "student": {"kind": "full", "base": BASE}, "budget": BUDGET}
    return classifier_recipe(**given | over)


def sentences(**over: Any) -> EncoderRecipe:
    return embedding_recipe(**{"student": {"kind": "full", "base": BASE}, "budget": BUDGET} | over)


def candidate(
    student: str, form: str = "int8-dynamic", *, size: int = 100, layers: int = 4
) -> Candidate:
    return Candidate(student, form, student, size, layers)


def test_of_equally_good_students_the_fastest_is_chosen_then_the_smallest() -> None:
    budget = ClassificationBudget(size_mb=1.0)
    slow, fast, smaller, better = (
        candidate(name) for name in ("slow", "fast", "smaller", "better")
    )
    for c, accuracy, latency, size in (
        (slow, 0.95, 3.0, 50),
        (fast, 0.95, 2.0, 100),
        (smaller, 0.95, 2.0, 90),
        (better, 0.96, 4.0, 200),
    ):
        c.measured = {"accuracy": accuracy, "latency_ms": latency, "size": float(size)}
    assert module.chosen([slow, fast], budget) is fast
    assert module.chosen([fast, smaller], budget) is smaller
    assert module.chosen([slow, fast, smaller, better], budget) is better


# What is looked among -----------------------------------------------------------------------------


def test_the_base_is_looked_at_whole_and_cut() -> None:
    recipe = classifiers(search={"depths": [1.0, 0.5, 0.25], "widths": [1.0, 0.5]})
    students = dict(encoders.students(recipe))
    assert list(students) == ["whole", "cut-2x128", "cut-1x128", "cut-4x64", "cut-2x64", "cut-1x64"]
    assert students["whole"] == {"kind": "full", "base": recipe.resolved()["student"]["base"]}
    assert (students["cut-2x64"]["layers"], students["cut-2x64"]["intermediate_size"]) == (2, 64)
    for name, student in students.items():
        assert variants.variant(recipe, student=student).student.kind == (
            "full" if name == "whole" else "shrink"
        )


def test_a_student_that_is_cut_is_tried_as_the_recipe_has_it() -> None:
    asked = {
        "kind": "shrink",
        "base": BASE,
        "layers": 3,
        "kv_heads": 2,
        "hidden_size": 32,
        "calibration_examples": 4,
    }
    students = dict(
        encoders.students(
            classifiers(student=asked, search={"depths": [1.0, 0.5], "widths": [1.0]})
        )
    )
    assert list(students) == ["cut-4x128", "cut-2x128", "asked"]
    assert {s["hidden_size"] for s in students.values()} == {32}  # of all
    again = dict(
        encoders.students(classifiers(student=asked, search={"depths": [0.75], "widths": [1.0]}))
    )
    assert list(again) == ["cut-3x128"]  # which is the one that was asked for


def test_a_base_that_cannot_be_cut_is_tried_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> None:
        raise ModelError("student.base: nobody knows what can be cut out of a mamba")

    monkeypatch.setattr(variants, "dimensions", unknown)
    assert list(dict(encoders.students(classifiers()))) == ["whole"]
    with pytest.raises(ModelError, match="mamba"):
        list(encoders.students(classifiers(student={"kind": "shrink", "base": BASE})))


@pytest.mark.parametrize("make", [classifiers, sentences])
def test_what_is_planned_too_large_is_ruled_out(make: Any) -> None:
    recipe = make(
        search={"depths": [1.0, 0.25], "widths": [1.0], "forms": ["int8-weight", "int8-static"]}
    )
    field = encoders.sized(recipe, dict(encoders.students(recipe)))
    assert {c.name for c in field} == {
        f"{student}-{form}"
        for student in ("whole", "cut-1x128")
        for form in ("int8-weight", "int8-static")
    }
    sizes = {c.name: c.size for c in field}
    assert sizes["cut-1x128-int8-static"] < sizes["whole-int8-static"]
    work = {c.student: c.work for c in field}
    assert work["whole"] == pytest.approx(4 * work["cut-1x128"], rel=0.05)  # but for the head
    bound = (sizes["cut-1x128-int8-static"] + sizes["whole-int8-static"]) / 2e6
    module._rule_out_sizes(field, recipe.budget.model_copy(update={"size_mb": bound}))
    assert {c.name: c.out is None for c in field} == {
        c.name: c.size <= bound * 1e6 * 1.02 for c in field
    }


def test_times_grow_with_operations_and_not_with_the_embeddings() -> None:
    """Two forms of other cost an operation, in files whose size is nearly all vocabulary."""
    cost = {"int8-weight": 3.0, "int8-dynamic": 1.0}
    field = [
        Candidate(f"s{n}", form, f"s{n}", 12_000_000 + n * 1000, layers, work=work)
        for form in cost
        for n, (layers, work) in enumerate([(1, 1.0), (3, 2.0), (6, 6.0), (6, 4.0)])
    ]

    def law(c: Candidate) -> float:
        return 0.2 + 0.1 * c.layers + cost[c.form] * (c.work or 0)

    fitted = fit_speed(field, [law(c) for c in field])
    unseen = Candidate("t", "int8-dynamic", "t", 12_000_000, 2, work=1.5)
    assert fitted(unseen) == pytest.approx(law(unseen), rel=1e-6)
    assert fitted.error == pytest.approx(0, abs=1e-6)


def test_what_is_too_slow_is_ruled_out_and_the_rest_predicted(tmp_path: Path) -> None:
    field = [
        Candidate(f"s{n}", "int8-dynamic", f"s{n}", 1000, n, work=float(n))
        for n in (2, 4, 6, 8, 10)
    ]
    times = {f"s{n}-int8-dynamic": {"latency_ms": float(n)} for n in (2, 6, 10)}
    (tmp_path / state.TIMING).write_text(json.dumps(times))
    recipe = classifiers(budget={"latency_ms": 7.1}, search={"probes": 3})
    assert recipe.budget is not None
    models = probes.predict_speeds(Search(recipe, {}, field, recipe.budget, tmp_path))
    assert list(models) == ["latency_ms"]
    assert {c.student: c.out for c in field if c.out} == {
        "s8": "predicted latency 8.00 ms",
        "s10": "timed latency 10.00 ms",
    }


# Rounds -------------------------------------------------------------------------------------------

LOSSES = {"a": 0.3, "b": 0.4, "c": 0.35, "d": 0.5}


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Students and examples that were trained; what they came to is made up."""
    found: list[tuple[str, int]] = []

    def distill(*, recipe: EncoderRecipe, out: Path, **_: Any) -> SimpleNamespace:
        out.mkdir(parents=True)
        name = recipe.name.rpartition("-")[2]
        assert [path.name for path in (tmp_path / "healing").iterdir()] == [
            name
        ]  # nothing is kept of the others
        found.append((name, recipe.training.examples))
        loss = LOSSES[name] - recipe.training.examples / 1e3
        metrics = {
            "accuracy": 0.9,
            "macro_f1": 1 - LOSSES[name] / 2,
            "nll": loss,
            "spearman": 1 - loss,
        }
        return SimpleNamespace(result={"metrics": metrics})

    monkeypatch.setattr(compress, "distill", distill)
    monkeypatch.setattr(rounds, "WAIT", 0.01)
    return found


def halve(recipe: EncoderRecipe, folder: Path) -> dict[str, Candidate]:
    field = [candidate(name) for name in LOSSES]
    students = {name: recipe.resolved()["student"] for name in LOSSES}
    clock = Clock(folder / state.SPENT)
    with storage.opened(None, folder, name="students", seed=0) as shared:
        asked = Search(recipe, students, field, recipe.budget, folder)
        rounds.halve(asked, clock, shared, until=float("inf"))
    return {c.student: c for c in field}


def test_each_round_is_a_training_of_its_own(
    tmp_path: Path, trained: list[tuple[str, int]]
) -> None:
    recipe = classifiers(
        search={"rungs": [20, 1000], "finalists": 1},
        bench={"batches": [1], "lengths": [8], "metric": "macro_f1"},
    )
    field = halve(recipe, tmp_path)
    assert trained == [
        ("a", 16),
        ("b", 16),
        ("c", 16),
        ("d", 16),
        ("a", 64),
        ("c", 64),
    ]  # whole steps, and at most all
    assert field["d"].out == "behind after 16 examples"
    assert (field["a"].nll, field["a"].tokens) == (pytest.approx(0.3 - 0.064), 64)
    assert field["a"].metric == {"macro_f1": pytest.approx(0.85)}
    assert field["a"].out is None
    assert not (tmp_path / "healing").exists()
    trained.clear()
    assert halve(recipe, tmp_path) == field  # and nothing is trained twice
    assert trained == []


def test_sentence_encoders_are_halved_by_their_rank_correlation(
    tmp_path: Path, trained: list[tuple[str, int]]
) -> None:
    field = halve(sentences(search={"rungs": [32], "finalists": 4}), tmp_path)
    assert field["a"].nll == pytest.approx(0.3 - 0.032)
    assert field["a"].metric == {"spearman": pytest.approx(0.7 + 0.032)}


def test_an_encoder_that_diverges_is_out(
    tmp_path: Path, trained: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    distill = compress.distill

    def diverging(*, recipe: EncoderRecipe, **given: Any) -> Any:
        if recipe.name.endswith("-a"):
            raise DivergenceError("at step 3")
        return distill(recipe=recipe, **given)

    monkeypatch.setattr(compress, "distill", diverging)
    field = halve(classifiers(search={"rungs": [32], "finalists": 4}), tmp_path)
    assert (field["a"].out, field["b"].out) == ("diverged", None)


class Killed(BaseException):
    """A process that ends in the middle."""


def test_an_encoder_whose_process_was_killed_is_taken_up_again(
    tmp_path: Path, trained: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    distill, recipe = compress.distill, classifiers(search={"rungs": [32], "finalists": 4})

    def killed(*, recipe: EncoderRecipe, **given: Any) -> Any:
        if recipe.name.endswith("-b"):
            raise Killed
        return distill(recipe=recipe, **given)

    with monkeypatch.context() as patch:
        patch.setattr(compress, "distill", killed)
        with pytest.raises(Killed):
            halve(recipe, tmp_path)
    assert trained == [("a", 32)]
    field = halve(recipe, tmp_path)
    assert sorted(trained) == [(name, 32) for name in LOSSES]  # and a is not trained again
    assert all(c.out is None for c in field.values())


# What is left -------------------------------------------------------------------------------------


def test_the_recipe_that_is_written_stands_alone(tmp_path: Path) -> None:
    over = [
        "budget={size_mb: 16, latency_ms: 3, quality: {max_loss: 0.01}}",
        "export.forms=[fp32, {kind: int8-weight, block_size: 16}]",
    ]
    recipe: Any = load_any_recipe("minilm/spam-two-classifiers", overrides=over)
    base = recipe.resolved()["student"]["base"]
    student = {"kind": "shrink", "base": base, "layers": 3}
    tree = encoders.final_recipe(recipe, student, candidate("cut-3", "int8-weight"), recipe.budget)
    (tmp_path / "chosen.yaml").write_text(yaml.safe_dump(tree))
    read: Any = load_any_recipe(tmp_path / "chosen.yaml")
    assert read.task == "classification"
    assert [(form.kind, getattr(form, "block_size", None)) for form in read.export.forms][1] == (
        "int8-weight",
        16,
    )
    assert (read.gates.max_size_mb, read.gates.max_latency_ms, read.gates.max_metric_loss) == (
        16,
        3,
        0.01,
    )
    assert read.gates.max_quantization_loss is None
    assert read.gates.min_throughput_ratio == recipe.gates.min_throughput_ratio
    assert read.budget is None
    assert [teacher["model"]["recipe"] for teacher in tree["teachers"]] == [
        "minilm/spam-l6",
        "minilm/spam-l3",
    ]


def test_paths_of_onnx_files_become_absolute_but_for_those_in_packages() -> None:
    like = {"kind": "package", "package": "p", "version": "1", "path": "like"}
    given = {"kind": "onnx", "path": "old.onnx", "like": like}
    recipe = classifiers(student={"kind": "full", "base": given})
    assert recipe.budget is not None
    for package, absolute in ((None, True), ("p", False)):
        student = {"kind": "full", "base": given | {"package": package, "version": None}}
        tree = encoders.final_recipe(recipe, student, candidate("whole"), recipe.budget)
        assert Path(tree["student"]["base"]["path"]).is_absolute() == absolute
        assert tree["student"]["base"]["like"]["path"] == "like"


def test_a_metric_is_missed_as_the_gate_says() -> None:
    a, b = candidate("a"), candidate("b")
    a.measured = {"size": 1e6, "latency_ms": 2.0, "accuracy": 0.90, "best_teacher": 0.95}
    b.measured = a.measured | {"accuracy": 0.94, "latency_ms": 2.2}
    budget = ClassificationBudget.model_validate({"latency_ms": 2.1, "quality": {"max_loss": 0.02}})
    assert excess(a, budget) == pytest.approx(0.95 * 0.98 / 0.90)
    assert excess(b, budget) == pytest.approx(2.2 / 2.1)
    assert (
        nearest([a, b], ClassificationBudget(latency_ms=3)) is b
    )  # inside every bound: the better one
    assert nearest([a, b], ClassificationBudget(latency_ms=2)) is a
    a.measured["accuracy"] = 0.95 * 0.981
    assert excess(a, budget) == 1
    a.measured["accuracy"] = -0.1  # a rank correlation may be
    assert excess(a, budget) == float("inf")


def test_the_table_speaks_of_sequences_and_of_the_metric() -> None:
    field = [candidate("chosen"), candidate("healed"), candidate("seen")]
    field[0].measured = {"size": 2e6, "latency_ms": 1.5, "spearman": 0.9123, "best_teacher": 0.95}
    field[1].metric, field[1].nll, field[1].tokens = {"spearman": 0.8}, 0.2, 512
    field[1].predicted = {"latency_ms": 2.0}
    head, _, *lines = markdown(rows(field, field[0], EmbeddingBudget(size_mb=3))).splitlines()
    assert head == "| student | form | size | ms a sequence | spearman | outcome |"
    assert "| **2.000 MB** | **1.50** | **0.9123** |" in lines[0]
    assert "| 2.00 (predicted) | 0.8000 after 512 |" in lines[1]
    assert figures_of(field[0]) == "2.000 MB, 1.50 ms a sequence, spearman 0.9123, measured"
    assert field[0].loss == pytest.approx(1 - 0.9123)


@pytest.mark.parametrize("make", [classifiers, sentences])
def test_a_budget_that_nothing_fits_is_said_before_anything_is_trained(
    make: Any, tmp_path: Path
) -> None:
    found = search(make(budget={"size_mb": 0.01}), out=tmp_path / "out")
    assert found.exit_code == 1
    assert found.sentence.startswith(
        "No student is small enough: size_mb 0.01 is asked for, the smallest is planned at 0."
    )
    assert not (tmp_path / "out" / module.CHOSEN).exists()
    assert not (tmp_path / "out" / "healing").exists()
    left: Any = load_any_recipe(tmp_path / "out" / module.NEAREST)
    assert (left.gates.max_size_mb, left.gates.max_latency_ms) == (0.01, None)
    with pytest.raises(ArtifactError, match="another recipe or budget"):
        search(make(budget={"size_mb": 0.02}), out=tmp_path / "out")
    assert search(make(budget={"size_mb": 0.01}), out=tmp_path / "out") == found


def test_the_figures_of_a_finalist_are_those_of_the_shipped_form() -> None:
    cells = [(2, 16, 0.003), (1, 8, 0.001), (1, 16, 0.002)]
    grid = [{"batch": b, "length": n, "seconds": {"value": s}} for b, n, s in cells]
    arms = {
        "teacher:a": {"metrics": {"accuracy": 0.95, "macro_f1": 0.7}},
        "onnx:int8-static": {
            "bytes": 5e5,
            "grid": grid,
            "metrics": {"accuracy": 0.9, "macro_f1": 0.8},
        },
    }
    bench = {
        "metric": "macro_f1",
        "shipped": "int8-static",
        "best_teacher": "teacher:a",
        "arms": arms,
    }
    assert encoders.measured(bench) == {
        "size": 5e5,
        "latency_ms": 2.0,
        "macro_f1": 0.8,
        "best_teacher": 0.7,
    }


def test_each_form_of_a_student_is_measured_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipes of two forms are of one digest, so that the second run may begin with the first
    one's student."""
    recipe = classifiers()
    assert recipe.budget is not None
    student = {"kind": "shrink", "base": recipe.resolved()["student"]["base"], "layers": 2}
    made = [
        finals.parse_any_recipe(
            encoders.final_recipe(recipe, student, candidate("cut-2", form), recipe.budget)
        )
        for form in ("int8-weight", "int8-dynamic")
    ]
    assert made[0].digest == made[1].digest
    assert made[0].resolved()["export"] != made[1].resolved()["export"]


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"budget": {"hours": 2}}, "a search needs a bound to keep to"),
        ({"teachers": []}, "name a teacher"),
        (
            {"student": {"kind": "fresh", "config": {"model_type": "bert"}}},
            "use full or shrink, with a base",
        ),
        ({"search": {"rungs": [64, 32]}}, "each round is longer than the one before"),
        ({"search": {"forms": ["int4-weight"]}}, r"search\.forms\.0"),
        ({"search": {"hidden": [0.5]}}, r"search\.hidden: unknown key"),
        ({"budget": {"tpot_ms": 1}}, r"budget\.tpot_ms: unknown key"),
        (
            {"bench": {"batches": [8]}},
            r"budget\.latency_ms: this is the time of one sequence; add 1 to",
        ),
        (
            {"budget": {"size_mb": 1, "quality": {"metric": "macro_f1", "max_loss": 0}}},
            r"budget\.quality\.metric: found 'macro_f1', but bench\.metric is 'accuracy'; make",
        ),
    ],
)
def test_wrong_input_is_reported(over: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        search(classifiers(**over), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def run_cli(recipe: EncoderRecipe, folder: Path, *arguments: str) -> Any:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.resolved()))
    return CliRunner().invoke(
        app, ["search", str(folder / "recipe.yaml"), "--out", str(folder / "out"), *arguments]
    )


def test_the_command_takes_encoders(tmp_path: Path) -> None:
    done = run_cli(classifiers(), tmp_path, "--set", "budget.size_mb=0.01")
    assert done.exit_code == 1, done.stderr
    assert "No student is small enough" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("make", [classifiers, sentences])
def test_a_search_ends_with_an_encoder_that_measures_inside_its_budget(
    make: Any, tmp_path: Path
) -> None:
    space = {
        "depths": [1.0, 0.5, 0.25],
        "widths": [1.0],
        "rungs": [32],
        "finalists": 1,
        "probes": 2,
    }
    recipe = make(search=space)
    sizes = {c.name: c.size for c in encoders.sized(recipe, dict(encoders.students(recipe)))}
    bound = (sizes["cut-2x128-int8-dynamic"] + sizes["whole-int8-dynamic"]) / 2e6
    bench = {"batches": [1, 2], "lengths": [8, 16], "minutes": 0.01, "min_blocks": 6, "threads": 1}
    recipe = make(budget={"size_mb": bound, "latency_ms": 50.0}, search=space, bench=bench)
    found = search(recipe, out=tmp_path / "out")
    assert found.exit_code == 0, found.sentence
    result = json.loads((tmp_path / "out" / module.RESULT).read_text())
    best = next(c for c in result["candidates"] if f"{c['student']}-{c['form']}" == result["best"])
    assert best["measured"]["size"] <= 1e6 * bound
    assert best["measured"]["latency_ms"] <= 50
    assert {
        c["student"] for c in result["candidates"] if c["out"] and c["out"].startswith("planned")
    } >= {"whole"}
    assert all(
        c["timed"] for c in result["candidates"] if c["student"] == "cut-1x128" and not c["out"]
    )
    chosen: Any = load_any_recipe(tmp_path / "out" / module.CHOSEN)
    run = json.loads((Path(best["run"]) / "run.json").read_text())
    assert (
        chosen.digest == run["digest"]
    )  # so that `limbeck run chosen.yaml` makes the same student
    assert (chosen.gates.max_size_mb, chosen.gates.max_latency_ms) == (bound, 50)
    assert search(recipe, out=tmp_path / "out") == found
