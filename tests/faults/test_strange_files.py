"""Pipes, devices, folders and values of strangers in place of what Limbeck expects: one message,
at once, and nothing outside the folder is read or replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from limbeck.app.cli import app
from limbeck.contract.artifact import MANIFEST, Artifact, open_artifact
from limbeck.contract.environment import cache_folder
from limbeck.contract.errors import ArtifactError, EnvironmentalError, ModelError
from limbeck.contract.files import write_atomically
from limbeck.contract.sources.weights import check_weights
from limbeck.runtime.session import open_session, read_adapter
from tests.factory import Factory
from tests.serve_bench.tell.runs import make_run, recipe


def call(*arguments: str | Path, given: bytes | None = None) -> Result:
    """The command's outcome; whatever is no exit of the command line is raised."""
    done = CliRunner().invoke(app, [str(a) for a in arguments], input=given)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def pipe(path: Path) -> Path:
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


@pytest.fixture
def exported(tiny: Factory, tmp_path: Path) -> Path:
    """A copy of an exported student, to be damaged."""
    return Path(shutil.copytree(tiny.exported().path, tmp_path / "onnx"))


def test_writing_replaces_no_device_pipe_or_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for place in (pipe(tmp_path / "pipe"), tmp_path / "folder", Path("."), Path("/dev/null")):
        with pytest.raises(EnvironmentalError, match="a folder, pipe or device; name a file"):
            write_atomically(place, "text")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    with pytest.raises(EnvironmentalError, match="there is no folder"):
        write_atomically(tmp_path / "missing" / "report.json", "text")


@pytest.mark.parametrize("command", [["schema"], ["sbom", "run"]])
def test_out_that_can_be_no_file(tmp_path: Path, command: list[str], tiny: Factory) -> None:
    shutil.copytree(tiny.exported().path, tmp_path / "run" / "onnx")
    shutil.copytree(tiny.exported().path.parent / "student", tmp_path / "run" / "student")
    (tmp_path / "run" / "run.json").write_text("{}")
    command = [str(tmp_path / part) if part == "run" else part for part in command]
    for out in (tmp_path, tmp_path / "missing" / "x.json", pipe(tmp_path / "pipe")):
        assert call(*command, "--out", out).exit_code == 2


def test_a_pipe_in_an_artifact_is_never_opened(exported: Path) -> None:
    pipe(exported / "config.json")
    for verify in (True, False):
        with pytest.raises(ArtifactError, match=r"config\.json: a folder, pipe or device"):
            open_artifact(exported, verify=verify)


def test_pipes_where_models_graphs_and_adapters_are_expected(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    pipe(tmp_path / "tokenizer.json")
    with pytest.raises(ModelError, match=r"tokenizer\.json is a pipe, device or broken link"):
        check_weights(tmp_path)
    with pytest.raises(ArtifactError, match="a folder, pipe or device"):
        open_session(tmp_path / "tokenizer.json")
    with pytest.raises(ArtifactError, match="a folder, pipe or device"):
        read_adapter(tmp_path / "tokenizer.json", base="x", inputs=())


def test_endless_standard_input(exported: Path) -> None:
    done = call("generate", exported, "-", given=b"x" * (17 << 20))
    assert (done.exit_code, "longer than 16 MB" in done.stderr) == (2, True)


def test_a_cache_of_no_such_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", "~nosuchuser/cache")
    with pytest.raises(EnvironmentalError, match="there is no such user here"):
        cache_folder()


@pytest.mark.parametrize("field", ["training.threads", "bench.threads"])
def test_more_threads_than_any_machine_has(field: str) -> None:
    done = call("validate", "pico", "--set", f"{field}=100000")
    assert done.exit_code == 2
    assert "less than or equal to 1024" in done.stderr


def in_files(result: dict[str, Any], name: str) -> None:
    result["forms"][result["shipped"]]["files"].append(name)


def as_graph(result: dict[str, Any], name: str) -> None:
    result["forms"][result["shipped"]]["graph"] = name


def as_gguf(result: dict[str, Any], name: str) -> None:
    result["ggufs"], result["shipped"] = {"q8": {"file": name}}, "q8"


@pytest.mark.parametrize(
    ("place", "command"),
    [(in_files, "pack"), (as_gguf, "pack"), (as_graph, "pack"), (as_graph, "generate")],
)
def test_a_result_names_only_files_of_its_folder(exported: Path, place: Any, command: str) -> None:
    (exported.parent / "mine").write_text("mine")
    whole = (exported / MANIFEST).read_text()
    for name in ("../mine", "/etc/hostname", "manifest.json"):
        manifest = json.loads(whole)
        place(manifest["result"], name)
        (exported / MANIFEST).write_text(json.dumps(manifest))
        more = ["--out", exported.parent / "packed" / "new"] if command == "pack" else ["abc"]
        done = call(command, exported, *more)
        assert (done.exit_code, f"names {name}, no file of this folder" in done.stderr) == (2, True)
    assert {path.name for path in exported.parent.iterdir()} == {exported.name, "mine"}


@pytest.mark.parametrize("name", ["../../there", "/tmp/limbeck-there", "..", "", "a/b", "a\nb"])
def test_a_name_of_a_stranger_is_no_folder(exported: Path, name: str) -> None:
    manifest = json.loads((exported / MANIFEST).read_text())
    manifest["recipe"]["resolved"]["name"] = name
    (exported / MANIFEST).write_text(json.dumps(manifest))
    out = exported.parent / "packed"
    done = call("pack", exported, "--layout", "triton", "--out", out)
    assert (done.exit_code, "its recipe has no name for a folder" in done.stderr) == (2, True)
    assert not out.exists()
    assert not (out / name).exists() or name in ("..", "")


# Values of another kind, in files whose hashes hold -----------------------------------------------


def change(artifact: Path, file: str, harm: Callable[[Any], None]) -> None:
    """Change the JSON in ``file`` of ``artifact``, and put its hash right."""
    content = json.loads((artifact / file).read_text())
    harm(content)
    (artifact / file).write_text(json.dumps(content))
    if file == MANIFEST:
        return
    manifest = json.loads((artifact / MANIFEST).read_text())
    found = (artifact / file).read_bytes()
    digest = hashlib.sha256(found).hexdigest()
    manifest["files"][file] = {"sha256": digest, "bytes": len(found)}
    (artifact / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        (MANIFEST, lambda m: m["result"].pop("judged")),
        (MANIFEST, lambda m: m["result"]["arms"].update(student=1)),
        (MANIFEST, lambda m: m["parents"].clear()),
        (MANIFEST, lambda m: m.update(recipe=None)),
        ("environment.json", lambda e: e["host"].clear()),
        ("environment.json", lambda e: e.update(arms=[])),
        ("quality.json", lambda q: q["arms"]["student"]["speeches"].update(nll=["../x"])),
        ("quality.json", lambda q: q.update(domains={})),
    ],
)
def test_a_report_of_strange_values_is_one_message(
    tmp_path: Path, file: str, harm: Callable[[Any], None]
) -> None:
    run = make_run(tmp_path, recipe())
    change(run / "bench", file, harm)
    done = call("report", run)
    assert done.exit_code == 2
    assert done.stderr.startswith("limbeck: ")
    assert len(done.stderr.splitlines()) == 1


def test_generate_with_strange_values(exported: Path) -> None:
    change(exported, "tokenizer_config.json", lambda c: c.update(eos_token={"x": 1}))
    done = call("generate", exported, "abc")
    assert done.exit_code == 2
    assert "holds values that Limbeck does not write" in done.stderr


def test_a_defect_on_good_values_keeps_its_cause(
    served: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Path) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("limbeck.runtime.text.load_text", broken)
    done = call("generate", served.path, "abc")
    assert done.exit_code == 2
    assert "ZeroDivisionError: a defect (test_strange_files.py, line" in done.stderr
