"""Folders, URLs and models of a hub that are measured without a recipe."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from compress.models.language import model_folder
from limbeck.app.run import bench_targets
from limbeck.contract.artifact import open_artifact, write_artifact
from limbeck.contract.errors import (
    ArtifactError,
    DataError,
    EnvironmentalError,
    LimbeckError,
    ModelError,
    RecipeError,
)
from limbeck.contract.recipe import Bench, HubModel
from limbeck.contract.sources.places import cache_folder
from serve_bench.tasks.targets import find_arm, measure_targets
from tests.pico import make_model
from tests.servers.fake_server import FakeServer

pytestmark = pytest.mark.usefixtures("one_roofline")


@pytest.mark.usefixtures("forked_arms")
def test_arms_without_a_recipe(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [
        "bench.prompt_tokens=8",
        "bench.new_tokens=4",
        "bench.minutes=0.001",
        "bench.min_blocks=3",
        "bench.threads=1",
    ]
    out = tmp_path / "out"
    with FakeServer() as server:
        bench_targets(
            [str(run / "onnx"), f"{run / 'onnx'}#fp32"],
            against=[str(run / "teacher"), server.url],
            out=out,
            overrides=changes,
        )
    result = open_artifact(out, kind="bench").result
    shipped, fp32, teacher, url, twin = result["arms"].values()
    assert (shipped["label"], shipped["runtime"]) == ("onnx int8-weight", "onnxruntime")
    assert (fp32["label"], teacher["label"], teacher["runtime"]) == (
        "onnx fp32",
        "teacher",
        "torch",
    )
    assert (url["runtime"], url["peak_rss_bytes"], url["roofline"]) == ("openai", None, None)
    assert twin["role"] == "twin"
    assert result["judged"] == next(iter(result["arms"]))
    assert set(result["speed_of_shipped_over"]) == set(result["arms"]) - {result["judged"]}
    assert result["verdict"] is None
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == [
        "model",
        "size",
        "runtime",
        "threads",
        "test",
        "tokens/s",
        "95",
        "%",
    ]
    assert "prompt 8" in printed
    assert "as fast as teacher" in printed
    with pytest.raises(ArtifactError, match="holds something else"):
        bench_targets([str(run / "onnx")], against=[], out=run, overrides=[])


def test_what_is_no_target_is_named(run: Path, tmp_path: Path) -> None:
    for target, match in (
        (str(tmp_path / "nothing"), "nothing: no such folder; expected a run"),
        (f"{run / 'onnx'}#int3", "no form 'int3'; it has fp32, int8-weight"),
        (str(tmp_path), "no config.json"),
        (f"{run / 'teacher'}#fp32", "only an exported folder has forms"),
    ):
        with pytest.raises(LimbeckError, match=match):
            measure_targets([target], out=tmp_path / "out", bench=Bench())
    assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError, match="only fields of bench can be set"):
        bench_targets(
            [str(run / "onnx")], against=[], out=tmp_path / "out", overrides=["training.tokens=3"]
        )
    with pytest.raises(RecipeError, match=r"bench\.new_tokens: found 1"):
        bench_targets(
            [str(run / "onnx")], against=[], out=tmp_path / "out", overrides=["bench.new_tokens=1"]
        )


def test_a_run_is_its_export_and_a_student_its_model(run: Path) -> None:
    exported = find_arm(f"{run}#fp32", Bench())
    assert (exported.label, exported.spec["artifact"]) == (f"{run.name} fp32", str(run / "onnx"))
    student = find_arm(str(run / "student"), Bench())
    assert (student.label, student.runtime) == ("student", "torch")
    assert student.spec["model"] == str((run / "student/model").resolve())


@pytest.mark.parametrize("kind", ["bench", "student"])
@pytest.mark.parametrize("result", [{"targets": []}, {}])
def test_only_a_bench_of_targets_is_replaced(
    tmp_path: Path, kind: str, result: dict[str, Any]
) -> None:
    with write_artifact(tmp_path / "out", kind=kind, key="k", parents={}) as draft:
        draft.result = result
    ours = kind == "bench" and bool(result)
    with pytest.raises(LimbeckError, match="no such folder" if ours else "holds something else"):
        measure_targets([str(tmp_path / "nothing")], out=tmp_path / "out", bench=Bench())
    nor_target = "no config.json" if kind == "bench" else "no such folder"  # it holds no model
    with pytest.raises(ModelError, match=nor_target):
        find_arm(str(tmp_path / "out"), Bench())


def test_targets_must_have_the_context_and_a_folder_that_can_be_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = ["bench.prompt_tokens=60", "bench.new_tokens=8"]
    with pytest.raises(
        DataError,
        match=r"come to 68 tokens; .* is 64\. "
        r"Make either smaller, with --set bench\.prompt_tokens=",
    ):
        bench_targets([str(run / "onnx")], against=[], out=tmp_path / "out", overrides=long)

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refused)
    short = ["bench.prompt_tokens=8", "bench.new_tokens=4"]
    with pytest.raises(
        EnvironmentalError,
        match=r"out: cannot be written \(Read-only file system\); name another with --out",
    ):
        bench_targets([str(run / "onnx")], against=[], out=tmp_path / "out", overrides=short)


def test_a_model_of_the_hub_is_kept_in_the_cache_whoever_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def download(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        return str(make_model(tmp_path / "model"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_arm("hub:someone/wise@4f1e", Bench()).label == "hub:someone/wise@4f1e"
    assert (
        model_folder(HubModel(kind="hub", id="someone/wise", revision="4f1e"), folder=tmp_path)
        == tmp_path / "model"
    )
    assert asked[0] == asked[1]
    assert asked[0][1]["cache_dir"] == cache_folder() / "hub"
    monkeypatch.undo()
    for arm in ("hub:someone/wise@4f1e", "hub:not/a/name"):
        with pytest.raises(
            ModelError, match=rf"{arm[4:]}: is not in .*hub and cannot be had from the model hub"
        ):
            find_arm(arm, Bench())
