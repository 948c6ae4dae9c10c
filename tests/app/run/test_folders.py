"""Whose folder a run is, and what a kill in the middle leaves."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compress
import export
from limbeck.app import run as pipeline
from limbeck.app.exports import adopt
from limbeck.contract.artifact import Artifact, find_artifact, open_artifact, write_artifact
from limbeck.contract.errors import ArtifactError, DataError, EnvironmentalError, ParityError
from limbeck.contract.recipe import Recipe, load_recipe
from tests.app.run.stages import Stages, recipe
from tests.factory import Factory


def test_a_folder_of_another_recipe_is_refused(stages: Stages) -> None:
    first, second = load_recipe(recipe("first")), load_recipe(recipe("second"))
    pipeline.run(first, out=Path("out"))
    with pytest.raises(ArtifactError) as caught:
        pipeline.run(second, out=Path("out"))
    for expected in (
        f"found first ({first.digest[:8]})",
        f"expected second ({second.digest[:8]})",
        "another folder",
    ):
        assert expected in str(caught.value)
    assert open_artifact(Path("out/student")).manifest["recipe"]["resolved"]["name"] == "first"


def test_a_folder_of_a_run_that_made_nothing_is_free_again(stages: Stages) -> None:
    """Its recipe is corrected after a mistake that the first stage has found."""
    first, second = load_recipe(recipe("first")), load_recipe(recipe("second"))
    with pytest.raises(DataError), pipeline.open_run(first, Path("out")):
        raise DataError("too little text")
    pipeline.run(second, out=Path("out"))
    assert json.loads(Path("out/run.json").read_text())["digest"] == second.digest
    with pytest.raises(ArtifactError, match="belongs to another recipe: found second"):
        pipeline.run(first, out=Path("out"))


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(stages: Stages) -> None:
    loaded = load_recipe(recipe("alone"))
    Path("photos").mkdir()
    Path("photos/cat.jpg").write_text("meow")
    Path("file").write_text("")
    for out, expected in (
        ("photos", "holds files but no run"),
        ("file", "is a file"),
        ("file/in", "file is a file"),
    ):
        with pytest.raises(ArtifactError, match=expected):
            pipeline.run(loaded, out=Path(out))
    assert [p.name for p in Path("photos").iterdir()] == ["cat.jpg"]


@pytest.mark.parametrize("claim", ["{", "[]", "{}"])
def test_a_broken_claim_is_refused(stages: Stages, claim: str) -> None:
    Path("out").mkdir()
    Path("out/run.json").write_text(claim)
    with pytest.raises(ArtifactError, match=r"run\.json: not what Limbeck writes"):
        pipeline.run(load_recipe(recipe("alone")), out=Path("out"))


def test_an_empty_folder_is_taken(stages: Stages) -> None:
    Path("out").mkdir()
    pipeline.run(load_recipe(recipe("alone")), out=Path("out"))
    assert json.loads(Path("out/run.json").read_text())["recipe"] == "alone"


def test_two_runs_cannot_share_a_folder(stages: Stages) -> None:
    loaded = load_recipe(recipe("alone"))
    pipeline.run(loaded, out=Path("out"))
    with Path("out/.lock").open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write(f"{os.getpid()}\n")
        held.flush()
        for again in (
            lambda: pipeline.run(loaded, out=Path("out")),
            lambda: pipeline.report(Path("out")),
        ):
            with pytest.raises(
                ArtifactError, match=r"another run \(process \d+\) is using this folder"
            ):
                again()
    pipeline.run(loaded, out=Path("out"))


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_made_is_reported(
    stages: Stages, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    loaded = load_recipe(recipe("alone"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refused)
        with pytest.raises(
            EnvironmentalError, match=rf"out: cannot be written \({os.strerror(code)}\)"
        ):
            pipeline.run(loaded, out=Path("out"))


def test_a_full_disk_is_reported(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> Artifact:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "export_student", full)
    with pytest.raises(EnvironmentalError, match="out/onnx-plain: no space left on the disk"):
        pipeline.run(load_recipe(recipe("alone")), out=Path("out"))


@pytest.mark.parametrize(
    ("before", "after", "ships"),
    [
        ({"ships": False}, {"ships": True}, "student-recovered"),
        ({"ships": True}, {"ships": False}, "student"),
        ({"ships": True}, {"needed": False}, "student"),
    ],
    ids=["recovered one ships", "first one ships again", "none is needed any more"],
)
def test_a_kill_at_any_step_of_an_export_leaves_the_old_or_the_new_one(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, Any], after: dict[str, Any], ships: str
) -> None:
    """Every change of a name on disk is a step; the run is stopped before each of them in turn.

    The steps inside an artifact's own writing are tested with the artifact.
    """
    says: dict[str, Any] = {}
    steps, inside = 0, False

    def export_student(*, student: Path, out: Path, recipe: Recipe) -> None:
        nonlocal inside
        key, inside = json.dumps([student.name, says]), True
        if find_artifact(out, kind="onnx", key=key) is None:
            with write_artifact(out, kind="onnx", key=key, parents={}) as draft:
                (draft.folder / "graph").write_text(student.name)
                draft.result = {
                    "needs_recovery": says.get("needed", True),
                    "recovery": {"ships": says.get("ships", False)},
                }
        inside = False

    monkeypatch.setattr(export, "export_student", export_student)
    monkeypatch.setattr(compress, "recover", lambda **_: None)
    loaded = load_recipe(recipe("alone"))

    def shipped(run: Path) -> tuple[str, str]:
        artifact = open_artifact(run / "onnx")
        return (run / "onnx" / "graph").read_text(), artifact.key

    def attempt(run: Path, last: int) -> bool:
        """Export, stopped before the step after ``last``; whether it came to its end."""
        nonlocal steps
        steps = 0

        def stop_at(step: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **options: Any) -> Any:
                nonlocal steps
                steps += not inside
                if not inside and steps > last:
                    raise KeyboardInterrupt
                return step(*args, **options)

            return counted

        with monkeypatch.context() as patch:
            for name in ("symlink_to", "replace", "rename", "unlink"):
                patch.setattr(Path, name, stop_at(getattr(Path, name)))
            try:
                pipeline._stage("export", loaded, run, None)
            except KeyboardInterrupt:
                return False
        return True

    last, finished = 0, False
    while not finished:
        run = Path(f"run-{last}")
        run.mkdir()
        says.clear()
        says |= before
        pipeline._stage("export", loaded, run, None)
        old = shipped(run)
        says.clear()
        says |= after
        finished = attempt(run, last)
        new = (ships, json.dumps([ships, says]))
        assert shipped(run) in (old, new, (old[0], json.dumps([old[0], says])))
        for _ in range(2):
            pipeline._stage("export", loaded, run, None)
            assert shipped(run) == new
            assert not [p.name for p in run.iterdir() if p.name.startswith(".")]
        last += 1
    assert last > 2


def test_a_failing_export_replaces_the_recovered_export_of_an_earlier_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    says: dict[str, Any] = {"needs_recovery": True, "recovery": {"ships": True}}

    def export_student(*, student: Path, out: Path, recipe: Recipe) -> None:
        with write_artifact(out, kind="onnx", key=str(says), parents={}) as draft:
            draft.result = dict(says)
        if "failed" in says:
            raise ParityError("int8-weight does not compute what the student computes")

    monkeypatch.setattr(export, "export_student", export_student)
    monkeypatch.setattr(compress, "recover", lambda **_: None)
    run, loaded = Path("run"), load_recipe(recipe("alone"))
    run.mkdir()
    pipeline._stage("export", loaded, run, None)
    assert os.readlink(run / "onnx") == "onnx-recovered"
    says["failed"] = {"int8-weight": "why"}
    with pytest.raises(ParityError):
        pipeline._stage("export", loaded, run, None)
    assert open_artifact(run / "onnx").result["failed"] == says["failed"]


def test_a_bench_of_an_export_with_other_settings_is_refused(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(**_: Any) -> Artifact:
        raise ParityError("the fp32 graph does not compute what the student computes")

    path = recipe("alone")
    pipeline.run(load_recipe(path), out=Path("out"))
    changed = load_recipe(path, overrides=["export.forms=[fp32]"])
    with monkeypatch.context() as patch:
        patch.setattr(export, "export_student", fails)
        with pytest.raises(ParityError):
            pipeline.run_stage("export", changed, out=Path("out"))
    with pytest.raises(ArtifactError, match=r"out/onnx: was exported with other settings"):
        pipeline.run_stage("bench", changed, out=Path("out"))
    assert pipeline.run_stage("bench", load_recipe(path), out=Path("out")) is not None


@pytest.fixture(scope="module")
def exported(tiny: Factory) -> Artifact:
    """A real export, made before a test puts stand-ins in the place of the stages."""
    return tiny.exported()


def test_a_bench_of_an_export_whose_shipped_form_failed_is_refused(
    exported: Artifact, stages: Stages
) -> None:
    why = {"int8-weight": "int8-weight: mean KL is 9"}
    path = recipe("alone", more="export: {forms: [fp32, int8-weight]}\n")
    loaded = load_recipe(path)
    pipeline.run_stage("compress", loaded, out=Path("out"))
    with write_artifact(Path("out/onnx"), kind="onnx", key="k", parents={}, recipe=loaded) as draft:
        draft.result = exported.result | {"failed": why, "shipped": "fp32"}
    with pytest.raises(ParityError, match=r"^int8-weight: mean KL is 9\nKept in out/onnx: fp32"):
        pipeline.run_stage("bench", loaded, out=Path("out"))
    assert [stage for stage, _ in stages.called] == ["compress"]


def test_exports_of_the_former_layout_are_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("onnx", "recovered"), ("onnx-unrecovered", "plain")):
        (Path("run") / name).mkdir(parents=True)
        (Path("run") / name / "graph").write_text(text)
    adopt(Path("run"))
    assert {p.name for p in Path("run").iterdir()} == {"onnx", "onnx-plain", "onnx-recovered"}
    assert os.readlink("run/onnx") == "onnx-plain"
    assert Path("run/onnx-recovered/graph").read_text() == "recovered"
    Path("run/onnx").unlink()
    Path("run/onnx").mkdir()
    with pytest.raises(ArtifactError, match=r"found a folder, expected a link"):
        adopt(Path("run"))
