"""Files that a recipe of a stranger names, and files that lie beside a text of a stranger."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from limbeck.contract.errors import DataError
from limbeck.contract.recipe import DatasetText, FileText, GgufModel, LocalModel
from limbeck.contract.sources import hub
from limbeck.contract.sources.licences import Licence, hub_dataset, of_text
from limbeck.contract.sources.models import model_path
from limbeck.contract.sources.texts import text_files


def files_of(folder: Path, *paths: str) -> list[Path]:
    return text_files(FileText(kind="files", paths=paths), folder=folder)


@pytest.mark.parametrize(
    "path",
    ["/proc/self/environ", "/proc/self/*", "/proc/*/environ", "/proc", "/sys/kernel/mm/**",
     "/dev/../proc/self/status", "link", "up/self/environ", "*"],
)  # fmt: skip
def test_what_the_kernel_shows_is_no_text(tmp_path: Path, path: str) -> None:
    (tmp_path / "link").symlink_to("/proc/self/environ")
    (tmp_path / "up").symlink_to("/proc")
    with pytest.raises(DataError, match=r": in /(proc|sys), where the system .* a file of a disk"):
        files_of(tmp_path, path)


def test_no_path_of_a_recipe_leads_into_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "up").symlink_to("/proc/self")
    for source in (
        LocalModel(kind="local", path=Path("/proc/self")),
        GgufModel(kind="gguf", path=Path("up/environ")),
    ):
        with pytest.raises(DataError, match="in /proc, where the system"):
            model_path(source, folder=tmp_path)
    with pytest.raises(DataError, match="in /proc, where the system"):
        text_files(DatasetText(kind="datasets", path=Path("up")), folder=tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("text")
    (tmp_path / "deep" / "kernel").symlink_to("/proc")  # a walk does not enter it
    assert files_of(tmp_path, "deep") == [tmp_path / "deep" / "a.txt"]


def saved(root: Path, **files: Any) -> DatasetText:
    root.mkdir()
    for name, content in files.items():
        (root / f"{name}.json").write_text(json.dumps(content))
    return DatasetText(kind="datasets", path=Path(root.name))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"state": {"_data_files": [1]}}, "state.json: found '1' where the name"),
        ({"state": {"_data_files": [{}]}}, "state.json: found 'None' where the name"),
        ({"state": {"_data_files": [{"filename": 1}]}}, "state.json: found '1' where"),
        ({"state": {"_data_files": [{"filename": "../../x"}]}}, "state.json: found '../../x' wh"),
        ({"state": {"_data_files": [{"filename": "/etc/passwd"}]}}, "json: found '/etc/passwd'"),
        ({"state": {"_data_files": [{"filename": ".."}]}}, "state.json: found '..' where"),
        ({"state": {"_data_files": [{"filename": "a\0b"}]}}, "state.json: found "),
        ({"dataset_dict": {"splits": [1, 2]}}, "dataset_dict.json: found '1' where the name"),
        ({"dataset_dict": {"splits": ["../x"]}}, "dataset_dict.json: found '../x' where"),
    ],
)
def test_a_dataset_lists_files_of_its_own_folder(
    tmp_path: Path, files: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message.replace(".", r"\.") + ".*save the dataset again"):
        text_files(saved(tmp_path / "set", **files), folder=tmp_path)


def test_odd_descriptions_of_a_dataset_are_named_and_pipes_do_not_hang(tmp_path: Path) -> None:
    for number, odd in enumerate(([1], "x", 5)):
        source = saved(tmp_path / str(number), dataset_info={"download_checksums": odd})
        with pytest.raises(DataError, match=r"dataset_info\.json: download_checksums: .*delete"):
            hub_dataset(source, folder=tmp_path)
    source = saved(tmp_path / "right", dataset_info={"download_checksums": {
        "hf://datasets/owner/name@0f/a.parquet": {}}, "license": "MIT"})  # fmt: skip
    assert hub_dataset(source, folder=tmp_path) == "owner/name"
    os.mkfifo(tmp_path / "right" / "README.md")
    assert of_text(source, folder=tmp_path) == Licence("mit", "dataset_info.json")
    for name in ("dataset_info", "state", "dataset_dict"):
        source = saved(tmp_path / name)
        os.mkfifo(tmp_path / name / f"{name}.json")
        read = hub_dataset if name == "dataset_info" else text_files
        with pytest.raises(DataError, match=r"pipe or device|no dataset"):
            read(source, folder=tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_an_index_that_names_no_files_is_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: Any
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(hub, "cached_config", lambda *_: tmp_path)
    assert hub._cached_snapshot("a/b") is None
