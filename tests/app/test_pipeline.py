"""The order of the stages and whose folder a run writes to. Stages are stood in for by functions
that write artifacts."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import compress
import export
import serve_bench
from limbeck.app import run as pipeline
from limbeck.app.exports import adopt
from limbeck.app.products import plan_products
from limbeck.app.verify import verify
from limbeck.contract.artifact import Artifact, find_artifact, open_artifact, write_artifact
from limbeck.contract.errors import ArtifactError, EnvironmentalError, ParityError, RecipeError
from limbeck.contract.recipe import Recipe, load_recipe
from limbeck.contract.results.bench import Verdict
from limbeck.contract.sources.places import cache_folder
from limbeck.runtime import session as runtime
from serve_bench.judge.findings import Finding
from serve_bench.tell.report import Report

BASE = """
data: {domains: [{name: code, text: {kind: stdlib, paths: [abc.py]}}], block: 32}
student: {kind: lora, base: {kind: random, config: {model_type: llama}}}
training: {tokens: 64, batch_tokens: 32}
"""


@dataclass
class Stages:
    """What the stand-ins were asked to do, and what the verdict will be."""

    called: list[tuple[str, str]] = field(default_factory=list)
    made: list[tuple[str, str]] = field(default_factory=list)
    products: dict[str, dict[str, Path]] = field(default_factory=dict)
    status: Any = "pass"


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    stages = Stages()

    def work(stage: str, kind: str, out: Path, recipe: Recipe, **parents: Path) -> Artifact:
        stages.called.append((stage, recipe.name))
        digests = {role: open_artifact(path).digest for role, path in parents.items()}
        key = json.dumps([stage, recipe.resolved() if stage == "bench" else recipe.digest, digests])
        if found := find_artifact(out, kind=kind, key=key):
            return found
        stages.made.append((stage, recipe.name))
        with write_artifact(out, kind=kind, key=key, parents=digests, recipe=recipe) as draft:
            (draft.folder / "file").write_text(recipe.name)
            draft.result = {}
        return open_artifact(out)

    def distill(*, recipe: Recipe, out: Path, products: dict[str, Path]) -> Artifact:
        stages.products[recipe.name] = products
        return work("compress", "student", out, recipe, **products)

    def export_student(*, student: Path, out: Path, recipe: Recipe) -> Artifact:
        return work("export", "onnx", out, recipe, student=student)

    def measure(*, onnx: Path, student: Path, out: Path, recipe: Recipe) -> Artifact:
        return work("bench", "bench", out, recipe, onnx=onnx, student=student)

    def write_report(*, run: Path, recipe: Recipe) -> Report:
        stages.called.append(("report", recipe.name))
        return Report(
            run / "report.html",
            run / "report.json",
            Verdict(stages.status, "so it is.", ()),
            "| table |",
        )

    monkeypatch.setattr(compress, "distill", distill)
    monkeypatch.setattr(export, "export_student", export_student)
    monkeypatch.setattr(serve_bench, "bench", measure)
    monkeypatch.setattr(serve_bench, "write_report", write_report)
    monkeypatch.setattr(runtime, "import_onnxruntime", lambda: None)
    return stages


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def recipe(name: str, *teachers: str, more: str = "") -> Path:
    """Write a recipe whose teachers are the students of other recipes."""
    listed = ", ".join(
        f"{{name: {t}, model: {{kind: recipe, recipe: {t}.yaml}}}}" for t in teachers
    )
    path = Path(f"{name}.yaml")
    path.write_text(f"name: {name}\n{BASE}\nteachers: [{listed}]\n{more}")
    return path.resolve()


# Order --------------------------------------------------------------------------------------------


def test_stages_run_in_order_and_the_verdict_is_told(
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
        "== export",
        "== bench",
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


def test_every_mistake_of_every_teacher_is_told_before_anything_runs(stages: Stages) -> None:
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


# Whose folder it is -------------------------------------------------------------------------------


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
def test_a_folder_that_cannot_be_made_is_told(
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


def test_a_full_disk_is_told(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
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


# Verify -------------------------------------------------------------------------------------------

GOOD = {"fp32": {"positions": 9, "max_abs": 1e-5, "kl": 0.0, "top1": 1.0}}
KEPT = Finding("loss, mean", "2.5", "2.5", "equal to the digit", True)


@pytest.fixture
def finished(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(export, "verify_parity", lambda folder: GOOD)
    monkeypatch.setattr(serve_bench, "replay", lambda **_: [KEPT])
    pipeline.run(load_recipe(recipe("alone")), out=Path("out"))
    Path("out/certificate.json").write_text("{}")
    return Path("out")


def test_verify_passes_what_is_unchanged(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert verify(finished) == 0
    out = capsys.readouterr().out
    assert out.count("unchanged") == 3
    assert "fp32  9          1e-05" in out
    assert re.search(r"^loss, mean +2.5 +2.5 +equal to the digit$", out, re.MULTILINE)
    assert out.endswith("\nverified\n")
    assert verify(finished / "onnx") == 0


def test_verify_names_a_changed_file(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "student" / "file").write_text("x")
    assert verify(finished) == 2
    out = capsys.readouterr().out
    assert "file has changed since it was written" in out
    assert out.endswith("NOT verified\n")


def test_verify_sees_an_artifact_made_from_another(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.run(load_recipe(recipe("other")), out=Path("elsewhere"))
    shutil.rmtree(finished / "student")
    shutil.copytree(Path("elsewhere/student"), finished / "student")
    assert verify(finished) == 2
    assert "was made from another student than the one in out/student" in capsys.readouterr().out


def test_verify_tells_a_graph_that_computes_something_else(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def differs(_: Path) -> Any:
        raise ParityError("the fp32 graph does not compute what the student computes")

    monkeypatch.setattr(export, "verify_parity", differs)
    assert verify(finished) == 1
    assert "does not compute" in capsys.readouterr().out


def test_verify_replays_what_it_is_asked_to_and_tells_a_broken_promise(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def replay(**asks: Any) -> list[Finding]:
        asked.append(asks)
        return [KEPT, Finding("ms per output token", "7", "9", "slower than certified", False)]

    monkeypatch.setattr(serve_bench, "replay", replay)
    assert verify(finished, speed=False) == 1
    assert asked == [{"run": finished, "quality": True, "speed": False}]
    assert "certificate: ms per output token slower than certified." in capsys.readouterr().out
    (finished / "certificate.json").unlink()
    assert verify(finished) == 2
    assert "`limbeck report out` writes it again" in capsys.readouterr().out


def test_verify_of_an_unfinished_run_says_what_is_not_there(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(finished / "bench")
    assert verify(finished) == 0
    assert "bench" in capsys.readouterr().out.split("not made yet")[0]
    with pytest.raises(ArtifactError, match="no complete artifact"):
        verify(Path("cache"))
