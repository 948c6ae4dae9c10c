"""Pieces of work on files that are killed at every event: the contract's own, without a model."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from limbeck.app.run import RUN, open_run
from limbeck.contract import files
from limbeck.contract.artifact import MANIFEST, open_artifact, write_artifact
from limbeck.contract.files import new_file, write_atomically
from limbeck.contract.lock import locked, make_once
from limbeck.contract.recipe import Recipe
from tests.faults.killing.events import Case
from tests.pico import pico_recipe


def _write(folder: Path, text: str) -> None:
    with write_artifact(folder / "student", kind="student", key=text, parents={}) as draft:
        (draft.folder / "model").mkdir()
        (draft.folder / "model" / "weights").write_text(text * 1000)
        (draft.folder / "heldout").write_text(text)
        draft.result = {"nll": 1.5}


def _write_new(folder: Path) -> None:
    with locked(folder, wait=False):
        _write(folder, "new")


def _write_old(folder: Path) -> None:
    with locked(folder, wait=False):
        _write(folder, "old")


def _write_without_exchange(folder: Path) -> None:
    files._exchanged = lambda one, other: False  # in a forked process
    _write_new(folder)


def _digest(folder: Path) -> str:
    return open_artifact(folder / "student").digest


def _is_none_or_whole(folder: Path) -> None:
    if (folder / "student").exists():
        open_artifact(folder / "student")


def _is_old_or_new(folder: Path) -> None:
    assert open_artifact(folder / "student").key in ("old", "new")


def _text(folder: Path) -> None:
    write_atomically(folder / "report.json", json.dumps({"text": "new" * 1000}))


def _file(folder: Path) -> None:
    with new_file(folder / "report.json") as half:
        half.write_text(json.dumps({"text": "new" * 1000}))


def _old_text(folder: Path) -> None:
    (folder / "report.json").write_text(json.dumps({"text": "old"}))


def _has_text(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


def _make(folder: Path) -> dict[str, Any]:
    (folder / "weights").write_text("1")
    return {"parameters": 1}


def _cache(folder: Path) -> None:
    make_once(folder / "cache" / "models" / "abc", kind="model", key="abc", parents={}, make=_make)


def _cached(folder: Path) -> str:
    return open_artifact(folder / "cache" / "models" / "abc").digest


def _damaged_cache(folder: Path) -> None:
    """A killed maker's litter of another key, and an artifact of the former format."""
    left = folder / "cache" / "models" / ".def.0a1b2c3d.writing"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    former = folder / "cache" / "models" / "abc"
    former.mkdir()
    (former / MANIFEST).write_text(json.dumps({"format": 1, "kind": "model", "key": "abc"}))
    (former / "weights").write_text("of the former format")


_RECIPE: Recipe = pico_recipe()


def _claim(folder: Path) -> None:
    with open_run(_RECIPE, folder / "run"):
        pass


def _claimed(folder: Path) -> Any:
    return json.loads((folder / "run" / RUN).read_text())


def _former_litter(folder: Path) -> None:
    """What a former version's killed processes left beside its run."""
    run = folder / "run"
    run.mkdir()
    (run / f".{RUN}.4711.writing").write_text("{")
    (run / ".student.writing").mkdir()
    (run / ".student.writing" / "half").write_text("half")


def _is_claimed_or_free(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        assert _claimed(folder)["recipe"] == "pico"


CASES = (
    Case("artifact, new", _write_new, _digest, look=_is_none_or_whole),
    Case("artifact, replaced", _write_new, _digest, prepare=_write_old, look=_is_old_or_new),
    Case("artifact, replaced without exchange", _write_without_exchange, _digest,
         prepare=_write_old, look=_is_none_or_whole),
    Case("text, replaced", _text, _has_text, prepare=_old_text, look=_has_text),
    Case("file, replaced", _file, _has_text, prepare=_old_text, look=_has_text),
    Case("cache", _cache, _cached),
    Case("cache, former and damaged", _cache, _cached, prepare=_damaged_cache),
    Case("run.json", _claim, _claimed, look=_is_claimed_or_free),
    Case("run.json, former litter", _claim, _claimed, prepare=_former_litter,
         look=_is_claimed_or_free),
)  # fmt: skip
