"""Two commands at once on one run folder: right results or a clear message, nothing half-read."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from limbeck.app.cli import app
from limbeck.contract import files
from limbeck.contract.artifact import MANIFEST, open_artifact, write_artifact
from limbeck.contract.errors import ArtifactError
from limbeck.contract.lock import locked
from limbeck.contract.reading import reading
from tests import forks
from tests.app.test_trust import keys as keys
from tests.factory import Factory
from tests.faults.killing import job

_watch: list[Callable[[str], None]] = []  # at most one; an audit hook cannot be removed


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watch and isinstance(arguments[0], str):
        _watch[0](arguments[0])


sys.addaudithook(_hook)


@dataclass
class Exports:
    """A run folder with an export, and another export that can take its place."""

    run: Path
    other: Path

    def hashes(self) -> list[Mapping[str, str]]:
        """Hash of every file of each export."""
        return [
            {name: str(entry["sha256"]) for name, entry in found.manifest["files"].items()}
            for found in (open_artifact(self.run / "onnx"), open_artifact(self.other))
        ]

    def call_while_replaced(self, *arguments: str | Path, at: int) -> tuple[Result, bool]:
        """Call a command; the export is replaced when its file number ``at`` is opened. Returns
        also whether it came to that.
        """
        count = 0

        def opened(path: str) -> None:
            nonlocal count
            if path.startswith(f"{self.run}/onnx"):
                count += 1
                if count == at + 1:
                    assert files._exchanged(self.other, self.run / "onnx")

        _watch.append(opened)
        try:
            return CliRunner().invoke(app, [str(a) for a in arguments]), count > at
        finally:
            _watch.clear()


@pytest.fixture
def exports(tiny: Factory, tmp_path: Path) -> Exports:
    made, run = tiny.exported(), tmp_path / "run"
    shutil.copytree(made.path.parent / "student", run / "student")
    shutil.copytree(made.path, run / "onnx")
    (run / "run.json").write_text("{}")
    parents = made.manifest["parents"]
    with write_artifact(tmp_path / "other", kind="onnx", key="other", parents=parents) as draft:
        shutil.copytree(made.path, draft.folder, dirs_exist_ok=True)
        (draft.folder / MANIFEST).unlink()
        for name in ("README.md", "config.json", "tokenizer.json"):
            path = draft.folder / name
            path.write_text(path.read_text() + " ")
        draft.result = made.result
    return Exports(run, tmp_path / "other")


def _packed(exports: Exports, out: Path, _: Path) -> dict[str, str]:
    return {n: str(e["sha256"]) for n, e in open_artifact(out).manifest["files"].items()}


def _signed(exports: Exports, _: Path, signature: Path) -> dict[str, str]:
    payload = json.loads(signature.read_text())["dsseEnvelope"]["payload"]
    resources = json.loads(base64.b64decode(payload))["predicate"]["resources"]
    return {entry["name"]: entry["digest"] for entry in resources}


def _of(names: Mapping[str, str], found: Mapping[str, str]) -> Mapping[str, str]:
    return {name: found[name] for name in names if name in found}


_EVERY = 15  # event, in the quick tests


@pytest.mark.parametrize("step", [_EVERY, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("command", "outcome"),
    [("pack", _packed), ("sign", _signed), pytest.param("verify", None, marks=pytest.mark.slow)],
)
def test_an_export_that_is_replaced_at_any_file_is_read_whole_or_not_at_all(
    exports: Exports,
    keys: tuple[Path, Path],
    tmp_path: Path,
    command: str,
    outcome: Callable[[Exports, Path, Path], dict[str, str]] | None,
    step: int,
) -> None:
    out, signature = tmp_path / "out", exports.run / "onnx.sig"
    more: Mapping[str, list[str | Path]] = {
        "pack": ["--out", out],
        "sign": ["--key", keys[0]],
        "verify": ["--no-quality", "--no-speed"],
    }
    refused = at = 0
    came = True
    while came:
        done, came = exports.call_while_replaced(command, exports.run, *more[command], at=at)
        shown = done.stderr + done.stdout
        if done.exit_code:
            assert done.exit_code == 2, (at, done.exception)
            assert "onnx: another process replaced it while it was read here" in shown, (at, shown)
            assert not out.exists(), at
            assert not signature.exists(), at
            refused += 1
        elif outcome is not None:
            made = outcome(exports, out, signature)
            made.pop("genai_config.json", None)  # of a pack, which names its form
            assert any(made == {**made, **_of(made, old)} for old in exports.hashes()), (at, made)
        shutil.rmtree(out, ignore_errors=True)
        signature.unlink(missing_ok=True)
        assert sorted(p.name for p in exports.run.iterdir()) == ["onnx", "run.json", "student"]
        at += step
    assert refused > at / step / 2


def test_the_process_that_replaced_an_artifact_is_named(exports: Exports) -> None:
    with (
        pytest.raises(ArtifactError, match=rf"onnx: process {os.getpid()} replaced it"),
        locked(exports.run, wait=False),
        reading(exports.run),
    ):
        assert files._exchanged(exports.other, exports.run / "onnx")


def test_an_artifact_that_is_made_meanwhile_explains_why_it_was_missing(exports: Exports) -> None:
    """It is no error for who did not miss it."""
    hidden = exports.run.parent / "hidden"
    (exports.run / "onnx").rename(hidden)
    with reading(exports.run):
        hidden.rename(exports.run / "onnx")
    (exports.run / "onnx").rename(hidden)

    def read() -> None:
        with reading(exports.run):
            try:
                open_artifact(exports.run / "onnx")
            finally:
                hidden.rename(exports.run / "onnx")

    with pytest.raises(ArtifactError, match="replaced it while"):
        read()


# Whole commands, as processes ---------------------------------------------------------------------

_OTHER_FORMS = ["--set", "export.forms=[{kind: fp32}, {kind: int8-weight, block_size: 16}]"]
_CALLS = {
    "run": ["run", "recipe.yaml", "--out", "run", *_OTHER_FORMS],
    "export": ["export", "recipe.yaml", "--out", "run", *_OTHER_FORMS],
    "bench": ["bench", "recipe.yaml", "--out", "run", "--set", "bench.new_tokens=5"],
    "serve": ["serve", "run", "--port", "0"],
    "pack": ["pack", "run", "--out", "packed"],
    "sign": ["sign", "run", "--key", "private.pem"],
    "verify": ["verify", "run", "--no-speed"],
    "compare": ["compare", "run", "run"],
    "report": ["report", "run"],
}
_SAID = re.compile(
    r"another run \(process \d+\) is using this folder"
    r"|(process \d+|another process) replaced it while it was read here"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, keys: tuple[Path, Path]) -> Path:
    """A folder with a recipe, its complete run, and a key."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = job.recipe().model_dump(mode="json", exclude_unset=True)
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    shutil.copy(keys[0], folder / "private.pem")
    code, said = _ended(_start(folder, ["run", "recipe.yaml", "--out", "run"]), folder)
    assert code in (0, 1, 3), said
    (folder / "output0" / "run").rename(folder / "run")
    shutil.rmtree(folder / "output0")
    return folder


@dataclass
class _Started:
    process: Any
    output: Path


def _start(folder: Path, arguments: list[str], number: int = 0) -> _Started:
    environment = {"LIMBECK_CACHE": str(folder / "cache")}
    output = folder / f"output{number}"
    return _Started(
        forks.start(_command, folder, output, arguments, environment=environment), output
    )


def _command(folder: Path, output: Path, arguments: list[str]) -> None:
    output.mkdir(exist_ok=True)
    os.chdir(output)
    for path in folder.iterdir():
        if not path.name.startswith("output"):
            (output / path.name).symlink_to(path)
    forks.command(output, *arguments)


def _ended(started: _Started, folder: Path) -> tuple[int, str]:
    started.process.join()
    said = "".join((started.output / name).read_text() for name in ("stdout", "stderr"))
    return started.process.exitcode, said


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 1.0, 4.0])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("run", "export"), ("run", "bench"), ("run", "pack"), ("run", "verify"), ("run", "report"),
        ("export", "serve"), ("export", "sign"), ("bench", "compare"),
    ],
)  # fmt: skip
def test_two_commands_at_once_say_the_truth(
    finished: Path, tmp_path: Path, first: str, second: str, delay: float
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True, symlinks=True)
    one = _start(tmp_path, _CALLS[first], 1)
    time.sleep(delay)
    two = _start(tmp_path, _CALLS[second], 2)
    ends = [_ended(one, tmp_path)]
    if second == "serve":
        until = time.monotonic() + 60
        while two.process.exitcode is None and "http://" not in _said(two):
            assert time.monotonic() < until, _said(two)
            time.sleep(0.1)
        if two.process.exitcode is None:
            os.kill(two.process.pid, signal.SIGTERM)
    ends.append(_ended(two, tmp_path))
    for code, said in ends:
        assert "Traceback" not in said, said
        assert code in (0, 1, 3, 143) or (code == 2 and _SAID.search(said)), (code, said)
    if second == "pack" and ends[1][0] == 0:
        open_artifact(tmp_path / "output2" / "packed")
    assert not [path for path in (tmp_path / "run").rglob(".*") if files.is_temporary(path.name)]
    again = _ended(_start(tmp_path, _CALLS["run"], 3), tmp_path)
    assert again[0] in (0, 1, 3), again
    checked = _start(tmp_path, ["verify", "run", "--no-quality", "--no-speed"], 4)
    assert _ended(checked, tmp_path)[0] == 0, _said(checked)
    print(f"{first} + {second} after {delay:g} s: {[code for code, _ in ends]}")


def _said(started: _Started) -> str:
    try:
        return (started.output / "stderr").read_text() + (started.output / "stdout").read_text()
    except FileNotFoundError:
        return ""
