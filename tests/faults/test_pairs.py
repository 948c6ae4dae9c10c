"""Two commands at once on one run folder: right results or a clear message, nothing half-read."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
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
from tests.app.test_trust import keys as keys
from tests.factory import Factory

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
