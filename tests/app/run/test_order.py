"""The order of the stages, and teachers that are made first."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

import compress
import export
from limbeck.app import run as pipeline
from limbeck.app.plan import training_operations
from limbeck.app.products import plan_products
from limbeck.contract.artifact import Artifact, open_artifact
from limbeck.contract.errors import ArtifactError, RecipeError
from limbeck.contract.recipe import Recipe, load_recipe
from limbeck.contract.sources.places import cache_folder
from tests.app.run.stages import Stages, recipe
from tests.encoders import classifier_recipe

# Order --------------------------------------------------------------------------------------------


def test_stages_run_in_order_and_the_verdict_is_reported(
    stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_recipe(recipe("alone"))
    report = pipeline.run(loaded)
    folder = Path(f"runs/alone-{loaded.digest[:8]}")
    assert report.exit_code == 0
    assert [stage for stage, _ in stages.called] == ["compress", "export", "bench", "report"]
    assert [open_artifact(folder / name).kind for name in ("student", "onnx", "bench")] == [
        "student",
        "onnx",
        "bench",
    ]
    out, err = capsys.readouterr()
    assert out == f"| table |\n\nverdict: pass\nreport:  {folder}/report.html\n"
    assert [line for line in err.splitlines() if line.startswith("==")] == [
        "== compress",
        "== export: about 5 s (whole job: about 8 min)",
        "== bench: about 8 min",  # twice the default of bench.minutes
    ]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [(entry["stage"], entry["skipped"]) for entry in log] == [
        ("compress", False),
        ("export", False),
        ("bench", False),
    ]
    assert all(entry["seconds"] >= 0 and entry["started"] for entry in log)


def test_a_second_run_makes_nothing_and_says_so(
    stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_recipe(recipe("alone"))
    pipeline.run(loaded)
    capsys.readouterr()
    before = list(stages.made)
    assert pipeline.run(loaded).exit_code == 0
    assert stages.made == before
    out, err = capsys.readouterr()
    assert "verdict: pass" in out
    assert err.count("already complete") == 3
    log = pipeline.default_folder(loaded) / "log.jsonl"
    assert [json.loads(line)["skipped"] for line in log.read_text().splitlines()] == [False] * 3 + [
        True
    ] * 3


def test_other_gates_measure_again_and_train_nothing(stages: Stages) -> None:
    path = recipe("alone")
    pipeline.run(load_recipe(path))
    stages.made.clear()
    pipeline.run(load_recipe(path, overrides=["gates.max_size_mb=1"]))
    assert [stage for stage, _ in stages.made] == ["bench"]


@pytest.mark.parametrize(("status", "code"), [("pass", 0), ("fail", 1), ("undecided", 3)])
def test_the_exit_code_is_the_verdicts(stages: Stages, status: str, code: int) -> None:
    stages.status = status
    assert pipeline.run(load_recipe(recipe("alone"))).exit_code == code


def test_a_run_that_was_stopped_goes_on(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_recipe(recipe("alone"))

    def stopped(**_: Any) -> Artifact:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export, "export_student", stopped)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(loaded)
    pipeline.run(loaded)
    assert stages.made == [("compress", "alone"), ("export", "alone"), ("bench", "alone")]


# Teachers that are made first ---------------------------------------------------------------------


def test_teachers_are_made_first_once_each_and_handed_on(stages: Stages) -> None:
    recipe("grand")
    recipe("left", "grand")
    recipe("right", "grand")
    loaded = load_recipe(recipe("child", "left", "right"))
    pipeline.run(loaded)
    trained = [name for stage, name in stages.made if stage == "compress"]
    assert trained == ["grand", "left", "right", "child"]
    assert set(stages.products["child"]) == {"left", "right"}
    assert set(stages.products["left"]) == {"grand"}
    left = load_recipe("left.yaml")
    assert (
        stages.products["child"]["left"]
        == cache_folder() / "products" / f"left-{left.digest[:8]}" / "student"
    )
    assert open_artifact(stages.products["child"]["left"]).kind == "student"
    assert [stage for stage, name in stages.made if name != "child"] == ["compress"] * 3


def test_a_teacher_recipe_is_found_beside_the_recipe_that_names_it(
    stages: Stages, tmp_path: Path
) -> None:
    (tmp_path / "inner").mkdir()
    recipe("teacher")
    child = recipe("child", "teacher")
    for path in (tmp_path / "teacher.yaml", child):
        path.rename(tmp_path / "inner" / path.name)
    pipeline.run(load_recipe("inner/child.yaml"))
    assert ("compress", "teacher") in stages.made


def test_recipes_made_from_each_other_are_refused(stages: Stages) -> None:
    recipe("a", "b")
    recipe("b", "c")
    recipe("c", "b")
    with pytest.raises(
        RecipeError, match=r"made from itself \(b -> c -> b\); name another model for one of them"
    ):
        pipeline.run(load_recipe("a.yaml"))
    recipe("self", "self")
    with pytest.raises(
        RecipeError, match=r"teachers\.0 \(self\): teachers\.0: .* \(self -> self\)"
    ):
        plan_products(load_recipe("self.yaml"))
    assert stages.called == []


def test_every_mistake_of_every_teacher_is_reported_before_anything_runs(stages: Stages) -> None:
    recipe("bad", more="fusion: {weigt: 1}\n")
    recipe("hungry")
    Path("hungry.yaml").write_text(Path("hungry.yaml").read_text().replace("abc.py", "gone.py"))
    with pytest.raises(RecipeError) as caught:
        pipeline.run(load_recipe(recipe("child", "bad", "gone", "hungry")))
    text = str(caught.value)
    assert "fusion.weigt: unknown key; did you mean `weight`?" in text
    assert text.count("gone.yaml: no such recipe file") == 1
    assert "hungry: data.domains.0.text: " in text
    assert "gone.py: no such file" in text
    assert stages.called == []
    assert not Path("runs").exists()


# Single stages ------------------------------------------------------------------------------------


def test_single_stages_make_up_a_run(stages: Stages) -> None:
    loaded = load_recipe(recipe("alone"))
    assert pipeline.run_stage("compress", loaded) is None
    assert pipeline.run_stage("export", loaded) is None
    report = pipeline.run_stage("bench", loaded)
    assert report is not None
    assert report.exit_code == 0
    assert [stage for stage, _ in stages.called] == ["compress", "export", "bench", "report"]


@pytest.mark.parametrize(("stage", "needs"), [("export", "compress"), ("bench", "compress")])
def test_a_stage_names_the_command_that_comes_first(
    stages: Stages, tmp_path: Path, stage: str, needs: str
) -> None:
    loaded = load_recipe(recipe("alone"))
    with pytest.raises(
        ArtifactError, match=f"run: limbeck {needs} alone.yaml --out {tmp_path}/here"
    ):
        pipeline.run_stage(stage, loaded, out=tmp_path / "here", reference="alone.yaml")
    assert not (tmp_path / "here").exists()
    assert stages.called == []


def test_a_recovery_by_several_processes_is_refused_before_they_wait_for_each_other(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_recipe(
        recipe("alone"),
        overrides=["export.recover={tokens: 64}", "gates.max_quantization_loss=0.01"],
    )
    pipeline.run_stage("compress", loaded)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        for start in (pipeline.run, lambda loaded: pipeline.run_stage("export", loaded)):
            with pytest.raises(
                RecipeError,
                match=r"export.recover: found 2 processes; .* `limbeck export` .* without torchrun",
            ):
                start(loaded)
    pipeline.run_stage("compress", loaded)
    assert [stage for stage, _ in stages.called] == ["compress", "compress"]


def test_of_several_processes_all_train_and_the_first_does_the_rest(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_recipe(recipe("alone"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert pipeline.run(loaded, out=Path("out")) is None
    assert [stage for stage, _ in stages.called] == ["compress"]
    assert not Path("out/log.jsonl").exists()
    assert pipeline.run_stage("export", loaded, out=Path("out")) is None
    monkeypatch.setenv("RANK", "0")
    assert pipeline.run(loaded, out=Path("first")) is not None
    stages_of_both = ["compress", "compress", "export", "bench", "report"]
    assert [stage for stage, _ in stages.called] == stages_of_both


def test_the_rest_of_a_job_is_in_proportion_to_its_operations_if_all_are_known() -> None:
    assert pipeline._in_proportion(5.0, [10.0, 5.0])(20.0) == 60.0
    for own, rest in ((5.0, [10.0, None]), (None, [10.0])):
        assert pipeline._in_proportion(own, rest)(20.0) is None


def test_a_teacher_cache_is_filled_at_the_url_that_was_named(
    stages: Stages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str | None, dict[str, Path]]] = []

    def fill_cache(*, recipe: Recipe, products: dict[str, Path], **_: Any) -> dict[str, str]:
        asked.append((recipe.store, products))
        return {"left/0": "a", "left/1": "b"}

    monkeypatch.setattr(compress, "fill_cache", fill_cache)
    recipe("left")
    loaded = load_recipe(
        recipe("child", "left"), overrides=["training.teacher_cache={kind: hidden}"]
    )
    pipeline.cache(loaded, ray=None, workers=1)
    pipeline.cache(loaded, ray=None, workers=1, to="file:///shared")
    assert [store for store, _ in asked] == [None, "file:///shared"]
    assert all(open_artifact(products["left"]).kind == "student" for _, products in asked)
    assert capsys.readouterr().out == (
        f"teacher cache: 2 shards in {cache_folder() / 'teachers'}\n"
        "teacher cache: 2 shards in file:///shared\n"
    )
    with pytest.raises(RecipeError, match=r"an encoder's teachers answer once, .* language models"):
        pipeline.cache(classifier_recipe(), ray=None, workers=1)
    none = load_recipe("child.yaml", overrides=["training.teacher_cache={kind: none}"])
    monkeypatch.setattr(pipeline, "make_products", pytest.fail)
    for to in (None, "file:///shared"):
        with pytest.raises(RecipeError, match=r"child: training\.teacher_cache is none.*--set"):
            pipeline.cache(none, ray=None, workers=1, to=to)


def test_report_draws_again_without_the_recipe_file(stages: Stages) -> None:
    path = recipe("alone")
    pipeline.run(load_recipe(path, overrides=["gates.max_size_mb=7"]), out=Path("out"))
    path.unlink()
    assert pipeline.report(Path("out")).exit_code == 0
    assert stages.called[-1] == ("report", "alone")
    for wrong in ("nowhere", "cache"):
        Path("cache").mkdir(exist_ok=True)
        with pytest.raises(ArtifactError):
            pipeline.report(Path(wrong))
    assert list(Path("cache").iterdir()) == []


def test_planning_a_run_shows_no_warning_of_a_library() -> None:
    """peft asks transformers for a deprecated attribute, once for each adapter that is planned."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always", FutureWarning)
        training_operations(load_recipe("pico"))
    assert not [warning for warning in shown if warning.category is FutureWarning]
