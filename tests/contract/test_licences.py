"""Licences are what models and texts say of themselves, and unknown where they say nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from limbeck.contract.artifact import write_artifact
from limbeck.contract.recipe import (
    DatasetText,
    FileText,
    GgufModel,
    LocalModel,
    NpmText,
    OnnxModel,
    PackageModel,
    PackageText,
    RandomModel,
    RecipeModel,
    StdlibText,
)
from limbeck.contract.sources.licences import (
    Licence,
    hub_dataset,
    hub_fields,
    of_all,
    of_model,
    of_student,
    of_text,
)

UNKNOWN = Licence()


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# Card\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: my-terms\n---", "my-terms"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: [mit, Apache-2.0]\n---\n", "mit and Apache-2.0"),
        ("---\nlicense: unknown\n---\n", "unknown"),
        ("---\nlicense: [\n---\n", "unknown"),
        ("# No header\nlicense: mit\n", "unknown"),
        ("---\nlicense: mit\ndate: 2026-13-45\nfrom: 2024-01-02\n---\n", "mit"),
        ("---\nlicense: mit\nx: " + "[" * 3000 + "\n---\n", "unknown"),
        ("---\nlicense: mit\nx: " + "1:" * 400_000 + "1\n---\n", "unknown"),
        (
            "---\nlicense: mit\n"
            + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 10 if n else ''}]\n" for n in range(9))
            + "---\n",
            "unknown",
        ),
        ("---\n" + "\n" * 60_000 + "license: mit\n---\n", "mit"),
        (None, "unknown"),
    ],
)
def test_a_folder_says_it_in_its_card(tmp_path: Path, card: str | None, licence: str) -> None:
    model(tmp_path, card)
    found = of_model(LocalModel(kind="local", path=tmp_path), folder=tmp_path, made=tmp_path)
    assert found == (UNKNOWN if licence == "unknown" else Licence(licence, "its README.md"))


def test_a_gguf_file_says_it_in_its_metadata(tmp_path: Path) -> None:
    for name, fields in {
        "said": {"license": "MIT"},
        "other": {"license": "other", "license.name": "x"},
        "not": {},
    }.items():
        gguf(tmp_path / f"{name}.gguf", fields)
    found = {
        name: of_model(
            GgufModel(kind="gguf", path=Path(f"{name}.gguf")), folder=tmp_path, made=tmp_path
        ).license
        for name in ("said", "other", "not")
    }
    assert found == {"said": "mit", "other": "x", "not": "unknown"}


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ("License-Expression: Apache-2.0\nLicense: ignored", "apache-2.0"),
        ("License: MIT\nClassifier: License :: OSI Approved :: Apache Software License", "mit"),
        (
            "License: a whole\n        text\nClassifier: License :: OSI Approved :: ISC License",
            "ISC License",
        ),
        ("License: UNKNOWN", "unknown"),
        ("Summary: says nothing", "unknown"),
    ],
)
def test_a_package_says_it_in_its_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metadata: str, licence: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "weights-1.0.dist-info").mkdir()
    (tmp_path / "weights-1.0.dist-info/METADATA").write_text(
        f"Metadata-Version: 2.4\nName: weights\nVersion: 1.0\n{metadata}\n"
    )
    gguf(tmp_path / "silent.gguf", {})
    gguf(tmp_path / "said.gguf", {"license": "gemma"})
    source = PackageModel(kind="package", package="weights", path="silent.gguf")
    assert of_model(source, folder=tmp_path, made=tmp_path).license == licence
    assert (
        of_model(
            source.model_copy(update={"path": "said.gguf"}), folder=tmp_path, made=tmp_path
        ).license
        == "gemma"
    )
    text = PackageText(kind="package", package="weights", paths=("*.txt",))
    assert of_text(text, folder=tmp_path).license == licence


def test_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))
    package = tmp_path / "npm/node_modules/@a/b/package.json"
    package.parent.mkdir(parents=True)
    package.write_text(json.dumps({"version": "1.2.3", "license": "Apache-2.0"}))
    npm = NpmText(kind="npm", package="@a/b", version="1.2.3", paths=("*",))
    assert of_text(npm, folder=tmp_path) == Licence("apache-2.0", "package.json of @a/b")
    assert (
        of_text(StdlibText(kind="stdlib", paths=("this.py",)), folder=tmp_path).license == "PSF-2.0"
    )
    assert of_text(FileText(kind="files", paths=("*.txt",)), folder=tmp_path) == UNKNOWN

    saved = DatasetText(kind="datasets", path=Path("saved"))
    info = tmp_path / "saved/train/dataset_info.json"
    info.parent.mkdir(parents=True)
    assert (of_text(saved, folder=tmp_path), hub_dataset(saved, folder=tmp_path)) == (UNKNOWN, None)
    addresses = {
        "hf://datasets/someone/texts@0a1b2c/data/train-00000-of-00001.parquet": {"num_bytes": 1}
    }
    info.write_text(json.dumps({"license": "cc-by-4.0", "download_checksums": addresses}))
    assert of_text(saved, folder=tmp_path) == Licence("cc-by-4.0", "dataset_info.json")
    assert hub_dataset(saved, folder=tmp_path) == "someone/texts"
    (tmp_path / "saved/README.md").write_text("---\nlicense: mit\n---\n")
    assert of_text(saved, folder=tmp_path).license == "mit"


def test_what_is_made_of_several_has_theirs_all_of_them_or_an_unknown_one() -> None:
    mit, apache = Licence("mit", "a"), Licence("apache-2.0", "b")
    assert of_all([mit, Licence("mit", "c")]) == Licence("mit", "a; c")
    assert of_all([mit, apache]).license == "apache-2.0 and mit"
    assert of_all([mit, UNKNOWN]) == of_all([]) == UNKNOWN
    assert hub_fields(mit) == {"license": "mit"}
    assert hub_fields(of_all([mit, apache])) == {
        "license": "other",
        "license_name": "apache-2.0-and-mit",
    }
    assert hub_fields(UNKNOWN) == {"license": "unknown"}


def test_the_student_of_a_recipe_has_that_of_its_base_and_its_teachers(tmp_path: Path) -> None:
    mit = asdict(Licence("mit", "a"))
    for name, teachers in {"mit": [mit], "unknown": [mit, {"name": "old"}]}.items():
        with write_artifact(tmp_path / name, kind="student", key=name, parents={}) as draft:
            (draft.folder / "teachers.json").write_text(json.dumps(teachers))
            draft.result = {"sources": {"base": mit, "texts": {}}}
        source = RecipeModel(kind="recipe", recipe="pico")
        assert of_model(source, folder=tmp_path, made=tmp_path / name / "model").license == name
    assert of_student({"sources": {"base": None}}, [mit]).license == "mit"
    assert of_student({}, [mit]) == UNKNOWN
    assert (
        of_model(RandomModel(kind="random", config={}), folder=tmp_path, made=tmp_path) == UNKNOWN
    )


def model(folder: Path, card: str | None) -> None:
    """What a model folder is recognised by, and its card."""
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("")
    if card is not None:
        (folder / "README.md").write_text(card)


def gguf(path: Path, fields: dict[str, str]) -> None:
    """A GGUF file of metadata alone."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    for name, value in fields.items():
        writer.add_string(f"general.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_an_onnx_file_has_the_licence_of_its_package(tmp_path: Path) -> None:
    like = {"kind": "local", "path": str(tmp_path)}
    for package, licence in (("hypothesis", "mpl-2.0"), (None, "unknown")):
        source = OnnxModel.model_validate(
            {"kind": "onnx", "path": "a.onnx", "package": package, "like": like}
        )
        assert of_model(source, folder=tmp_path, made=tmp_path).license == licence
