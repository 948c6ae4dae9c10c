"""Artifacts: nothing half-written is ever taken for complete, and no change goes unseen."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from limbeck.contract import artifact
from limbeck.contract.artifact import (
    MANIFEST,
    Artifact,
    find_artifact,
    open_artifact,
    write_artifact,
)
from limbeck.contract.data.heldout import save_calibration
from limbeck.contract.errors import ArtifactError, EnvironmentalError
from limbeck.contract.files import file_digest, folder_digest, write_atomically
from tests.pico import pico_recipe


def make(
    path: Path, *, key: str = "k", text: str = "one", result: dict[str, Any] | None = None
) -> Artifact:
    with write_artifact(
        path, kind="student", key=key, parents={"base": "b"}, recipe=pico_recipe()
    ) as draft:
        (draft.folder / "inner").mkdir()
        (draft.folder / "inner" / "a.txt").write_text(text)
        (draft.folder / "b.txt").write_text("two")
        draft.result = result if result is not None else {"nll": 1.5}
    return open_artifact(path)


def test_what_is_written_is_what_is_opened(tmp_path: Path) -> None:
    made = make(tmp_path / "deep" / "student")
    assert (made.kind, made.key, made.result) == ("student", "k", {"nll": 1.5})
    assert set(made.manifest["files"]) == {"inner/a.txt", "b.txt"}
    assert made.manifest["files"]["b.txt"] == {
        "sha256": file_digest(made.path / "b.txt"),
        "bytes": 3,
    }
    assert made.manifest["recipe"]["resolved"]["name"] == "pico"
    assert made.manifest["parents"] == {"base": "b"}
    assert {"python", "numpy"} <= set(made.manifest["versions"])
    assert {"processor", "flags", "cores", "memory_bytes"} <= set(made.manifest["host"])
    assert [p.name for p in made.path.parent.iterdir()] == ["student"]


def test_a_changed_file_is_refused_by_name(tmp_path: Path) -> None:
    made = make(tmp_path / "student")
    (made.path / "inner" / "a.txt").write_text("eno")
    with pytest.raises(ArtifactError, match=r"inner/a\.txt has changed"):
        open_artifact(made.path)
    with pytest.raises(ArtifactError, match=r"inner/a\.txt has changed"):
        find_artifact(made.path, kind="student", key="another key")
    assert open_artifact(made.path, verify=False).key == "k"


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    made = make(tmp_path / "student")
    (made.path / "b.txt").unlink()
    with pytest.raises(ArtifactError, match=r"b\.txt is missing"):
        open_artifact(made.path, verify=False)


def test_an_extra_file_is_refused_by_name(tmp_path: Path) -> None:
    made = make(tmp_path / "student")
    (made.path / "inner" / "c.bin").symlink_to("/dev/null")
    with pytest.raises(ArtifactError, match=r"inner/c\.bin is not part of this artifact"):
        open_artifact(made.path)


@pytest.mark.parametrize("manifest", ["", "{", "[]", '{"kind": "student"}', "\x00\xff"])
def test_a_broken_manifest_is_refused(tmp_path: Path, manifest: str) -> None:
    made = make(tmp_path / "student")
    (made.path / MANIFEST).write_bytes(manifest.encode("latin-1"))
    with pytest.raises(ArtifactError, match="not a manifest"):
        open_artifact(made.path)


def test_another_kind_and_another_format_are_refused(tmp_path: Path) -> None:
    made = make(tmp_path / "student")
    with pytest.raises(ArtifactError, match="found a student artifact, expected onnx"):
        open_artifact(made.path, kind="onnx")
    manifest = json.loads((made.path / MANIFEST).read_text()) | {"format": 99}
    (made.path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="format 99"):
        open_artifact(made.path)


def test_find_gives_only_what_was_made_from_the_same_key(tmp_path: Path) -> None:
    assert find_artifact(tmp_path / "student", kind="student", key="k") is None
    made = make(tmp_path / "student")
    found = find_artifact(made.path, kind="student", key="k")
    assert found is not None
    assert found.digest == made.digest
    assert find_artifact(made.path, kind="student", key="another") is None


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with write_artifact(tmp_path / "student", kind="student", key="k", parents={}) as draft:
            (draft.folder / "half").write_text("…")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_no_artifact_and_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / ".student.writing"
    left.mkdir()
    (left / "stale").write_text("half")
    with pytest.raises(ArtifactError, match="no complete artifact"):
        open_artifact(tmp_path / "student")
    made = make(tmp_path / "student")
    assert "stale" not in made.manifest["files"]
    assert not left.exists()


def test_an_interrupted_replacement_keeps_the_old_one(tmp_path: Path) -> None:
    made = make(tmp_path / "student")

    def interrupted() -> None:
        with write_artifact(made.path, kind="student", key="new", parents={}):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert open_artifact(made.path).digest == made.digest


def test_a_new_artifact_replaces_the_old_one_whole(tmp_path: Path) -> None:
    made = make(tmp_path / "student")
    with write_artifact(made.path, kind="student", key="new", parents={}) as draft:
        (draft.folder / "only").write_text("x")
        draft.result = {}
    assert set(open_artifact(made.path).manifest["files"]) == {"only"}
    assert [p.name for p in tmp_path.iterdir()] == ["student"]


def test_everyone_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with write_artifact(tmp_path / "student", kind="student", key="k", parents={}) as draft:
            save_calibration(draft.folder / "calibration.safetensors", [])
            (draft.folder / "link").symlink_to("calibration.safetensors")
            draft.result = {}
    finally:
        os.umask(before)
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "student").iterdir()
    }
    assert modes == dict.fromkeys(("calibration.safetensors", "link", MANIFEST), 0o640)


def test_a_result_is_required(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="without a measured result"):
        with write_artifact(tmp_path / "student", kind="student", key="k", parents={}):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_reported_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentalError, match="no space left on the disk; free some room"):
        make(tmp_path / "student")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_that_a_library_wrapped_is_seen_through(tmp_path: Path) -> None:
    def wrapped() -> None:
        with write_artifact(tmp_path / "student", kind="student", key="k", parents={}):
            raise RuntimeError("io error: No space left on device (os error 28)")

    with pytest.raises(EnvironmentalError, match="no space left"):
        wrapped()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_atomically(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentalError):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_the_digest_is_of_the_content_not_of_time_place_or_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(tmp_path / "a")
    monkeypatch.setattr(artifact, "host", lambda: {"processor": "another"})
    monkeypatch.setattr(artifact, "versions", lambda: {"python": "4"})
    second = make(tmp_path / "b")
    manifest = json.loads((second.path / MANIFEST).read_text()) | {
        "created": "1999-01-01T00:00:00+00:00"
    }
    (second.path / MANIFEST).write_text(json.dumps(manifest))
    assert first.digest == open_artifact(second.path).digest
    assert first.digest == "ce626846cbfbaef38078686d1917b8b3c82afc218ea18b9dbcf2bb6816c119db"
    assert make(tmp_path / "c", text="other").digest != first.digest
    assert make(tmp_path / "d", key="other").digest != first.digest


def test_notes_are_checked_but_do_not_enter_the_digest(tmp_path: Path) -> None:
    def make_at(path: Path, seconds: int) -> Artifact:
        with write_artifact(path, kind="student", key="k", parents={}) as draft:
            (draft.folder / "weights").write_text("1")
            (draft.folder / "log.jsonl").write_text(f'{{"seconds": {seconds}}}')
            (draft.folder / "tensorboard").mkdir()
            (draft.folder / "tensorboard" / "events").write_text(str(seconds))
            draft.result = {"seconds": seconds}
        return open_artifact(path)

    first, second = make_at(tmp_path / "a", 1), make_at(tmp_path / "b", 2)
    assert first.digest == second.digest
    (second.path / "tensorboard" / "events").write_text("3")
    with pytest.raises(ArtifactError, match="tensorboard/events has changed"):
        open_artifact(second.path)


def test_a_former_format_is_made_anew_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make(tmp_path / "student")
    manifest = json.loads((made.path / MANIFEST).read_text()) | {"format": 1}
    del manifest["files"]
    (made.path / MANIFEST).write_text(json.dumps(manifest))
    assert find_artifact(made.path, kind="student", key="k") is None
    assert capsys.readouterr().err == (
        f"{made.path}: made by a former version of Limbeck (format 1); it is made anew.\n"
    )
    with pytest.raises(ArtifactError, match=rf"limbeck run RECIPE --out {tmp_path}` makes it anew"):
        open_artifact(made.path)
    manifest["format"] = 3
    (made.path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="a newer version of Limbeck"):
        find_artifact(made.path, kind="student", key="k")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("key", 3),
        ("parents", ["a"]),
        ("parents", {"base": None}),
        ("result", []),
        ("recipe", {"text": "x"}),
        ("versions", {"python": 3}),
        ("host", None),
        ("created", "yesterday"),
        ("files", {"b.txt": "abc"}),
        ("files", {"b.txt": {"sha256": "abc", "bytes": 3}}),
        ("files", {"b.txt": {"sha256": "0" * 64, "bytes": -1}}),
        ("files", {"b.txt": {"sha256": "0" * 64, "bytes": True}}),
        ("more", 1),
    ],
)
def test_a_field_of_another_kind_is_named(tmp_path: Path, field: str, value: Any) -> None:
    made = make(tmp_path / "student")
    manifest = json.loads((made.path / MANIFEST).read_text())
    (made.path / MANIFEST).write_text(json.dumps(manifest | {field: value}))
    with pytest.raises(ArtifactError, match=rf"manifest\.json: {field}[.:].*delete the folder"):
        open_artifact(made.path)
    if field in manifest:
        del manifest[field]
        (made.path / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(ArtifactError, match=rf"manifest\.json: {field}: Field required"):
            find_artifact(made.path, kind="student", key="k")


def test_what_would_block_or_is_no_file_is_refused(tmp_path: Path) -> None:
    made = make(tmp_path / "student")
    (made.path / "b.txt").unlink()
    os.mkfifo(made.path / "b.txt")
    with pytest.raises(ArtifactError, match=r"b\.txt: a folder, pipe or device"):
        open_artifact(made.path)
    (made.path / "b.txt").unlink()
    (made.path / "b.txt").symlink_to("/dev/zero")
    with pytest.raises(ArtifactError, match=r"b\.txt: a folder, pipe or device"):
        open_artifact(made.path)
    (made.path / MANIFEST).unlink()
    os.mkfifo(made.path / MANIFEST)
    with pytest.raises(ArtifactError, match=r"manifest\.json: a folder, pipe or device"):
        find_artifact(made.path, kind="student", key="k")
    (made.path / MANIFEST).unlink()
    (made.path / MANIFEST).mkdir()
    with pytest.raises(ArtifactError, match=r"manifest\.json: a folder, pipe or device"):
        open_artifact(made.path)
    (made.path / MANIFEST).rmdir()
    (made.path / MANIFEST).symlink_to(made.path / MANIFEST)
    with pytest.raises(ArtifactError, match="Too many levels of symbolic links"):
        find_artifact(made.path, kind="student", key="k")


def test_a_copy_is_the_same_artifact(tmp_path: Path) -> None:
    made = make(tmp_path / "student")
    shutil.copytree(made.path, tmp_path / "copy")
    assert open_artifact(tmp_path / "copy").digest == made.digest


def test_folder_digest_sees_names_and_content(tmp_path: Path) -> None:
    for name, file, text in (("a", "x", "1"), ("b", "x", "1"), ("c", "y", "1"), ("d", "x", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    digests = [folder_digest(tmp_path / name) for name in "abcd"]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
