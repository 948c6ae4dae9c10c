"""Files that a recipe of a stranger names, and files that lie beside a text of a stranger."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from limbeck.contract.errors import DataError, ModelError
from limbeck.contract.recipe import DatasetText, EmbeddingTeacher, FileText, GgufModel, LocalModel
from limbeck.contract.sources import hub
from limbeck.contract.sources.encoders import require_pooling
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


def test_the_only_split_of_a_dataset_is_taken(tmp_path: Path) -> None:
    source = saved(tmp_path / "one", dataset_dict={"splits": ["train"]})
    saved(tmp_path / "one/train", state={"_data_files": [{"filename": "a.arrow"}]})
    (tmp_path / "one/train/a.arrow").write_bytes(b"rows")
    assert text_files(source, folder=tmp_path) == [tmp_path / "one/train/a.arrow"]
    two = saved(tmp_path / "two", dataset_dict={"splits": ["train", "test"]})
    with pytest.raises(DataError, match="several splits and none chosen; set split to one of: tr"):
        text_files(two, folder=tmp_path)


def test_a_selection_of_rows_is_not_read_as_all_rows(tmp_path: Path) -> None:
    state = {"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}
    with pytest.raises(DataError, match="a selection that an old `datasets` wrote; load it and"):
        text_files(saved(tmp_path / "some", state=state), folder=tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pooling_mode": "cls"}, "it pools token states by cls .*; set pooling: cls"),
        ({"pooling_mode": "max"}, "pools token states by max; Limbeck knows mean and cls"),
        ({"pooling_mode": "mean"}, None),
        ({"pooling_mode_cls_token": True}, "it pools token states by cls .*; set pooling: cls"),
        ({}, "a way that its config.json does not name"),
    ],
)
def test_how_a_sentence_encoder_pools_is_read_in_the_old_and_the_new_form(
    tmp_path: Path, config: dict[str, Any], message: str | None
) -> None:
    modules = [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(config))
    model = LocalModel(kind="local", path=tmp_path)
    teacher = EmbeddingTeacher(name="t", model=model)
    if message is None:
        require_pooling(tmp_path, teacher)
    else:
        with pytest.raises(ModelError, match=message):
            require_pooling(tmp_path, teacher)
