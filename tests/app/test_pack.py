"""`limbeck pack` and `limbeck push`: the folder that leaves this machine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import is_package_available
from typer.testing import CliRunner, Result

from limbeck.app.cli import app
from limbeck.contract.artifact import open_artifact
from limbeck.runtime.decoder import Decoder
from limbeck.runtime.encoder import Encoder
from limbeck.runtime.text import load_text
from tests.factory import Factory
from tests.servers.fake_hub import FakeHub


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def run(tiny: Factory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a student, its export and a certificate."""
    made, folder = tiny.exported(), tmp_path_factory.mktemp("run")
    tiny.copy(made, folder / "onnx")
    tiny.copy(tiny.student(), folder / "student")
    (folder / "run.json").write_text("{}")
    certificate = {"artifact": {"digest": made.digest}}
    (folder / "certificate.json").write_text(json.dumps(certificate))
    return folder


def test_the_packed_folder_holds_one_form_and_runs_as_before(run: Path, tmp_path: Path) -> None:
    done = call("pack", run, "--out", tmp_path / "packed.zip", "--zip")
    assert done.exit_code == 0, done.stderr
    packed = open_artifact(tmp_path / "packed", kind="onnx")  # every hash is checked
    names = {p.relative_to(packed.path).as_posix() for p in packed.path.rglob("*") if p.is_file()}
    assert names == {
        "LICENCES.md",
        "README.md",
        "certificate.json",
        "chat_template.jinja",
        "config.json",
        "genai_config.json",
        "generation_config.json",
        "manifest.json",
        # what transformers.js loads as q8, and optimum as the only graph
        "onnx/model_quantized.onnx",
        "onnx/model_quantized.onnx_data",
        "onnx/model_quantized.onnx_prompt",  # no client takes it for another graph
        "tokenizer.json",
        "tokenizer_config.json",
    }
    with zipfile.ZipFile(tmp_path / "packed.zip") as archive:
        files = {n.removeprefix("packed/") for n in archive.namelist() if not n.endswith("/")}
    assert files == names
    prompt = load_text(run / "onnx").encode("abc")
    assert load_text(packed.path).encode("abc") == prompt
    before = list(Decoder(run / "onnx", threads=1).generate(prompt, 8))
    assert list(Decoder(packed.path, threads=1).generate(prompt, 8)) == before
    verified = call("verify", packed.path)
    assert verified.exit_code == 0, verified.output
    assert "licence" in (packed.path / "LICENCES.md").read_text()


def test_a_packed_encoder_keeps_its_graph(tiny: Factory, tmp_path: Path) -> None:
    """An encoder has one graph, which runs and scores."""
    made = tiny.exported_encoder()
    assert call("pack", made.path, "--out", tmp_path / "packed").exit_code == 0
    texts = ["a b c", "d"]
    found, expected = (
        Encoder(folder, threads=1).encode(texts) for folder in (tmp_path / "packed", made.path)
    )
    assert np.array_equal(found, expected)


def test_a_certificate_of_another_export_is_not_packed(run: Path, tmp_path: Path) -> None:
    """A run may hold two exports, and may be exported again after it was measured."""
    other = tmp_path / "run"
    shutil.copytree(run, other)
    (other / "certificate.json").write_text(json.dumps({"artifact": {"digest": "0" * 64}}))
    assert call("pack", other, "--out", tmp_path / "packed").exit_code == 0
    assert not (tmp_path / "packed" / "certificate.json").exists()


def test_genai_loads_the_packed_folder(run: Path, tmp_path: Path) -> None:
    import onnxruntime_genai

    assert call("pack", run, "--out", tmp_path / "fp32", "--form", "fp32").exit_code == 0
    config = json.loads((tmp_path / "fp32" / "genai_config.json").read_text())
    assert config["model"]["decoder"]["filename"] == "onnx/model.onnx"
    assert not (tmp_path / "fp32" / "certificate.json").exists()  # it is about the shipped form
    onnxruntime_genai.Model(str(tmp_path / "fp32"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--form", "int2"], "no form 'int2'; it has fp32, int8-weight"),
        (["--out", "there"], "there: is already there"),
        (["--out", "z", "--zip"], "z.zip: is already there"),
        (["--out", ".", "--zip"], ".: is already there"),
    ],
)
def test_pack_mistakes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "z.zip").write_text("")
    out = [] if "--out" in arguments else ["--out", "new"]
    done = call("pack", run, *out, *arguments)
    assert done.exit_code == 2
    assert expected in done.stderr
    assert not (tmp_path / "new").exists()


def test_nothing_is_packed_into_an_artifact_or_through_a_link(run: Path, tmp_path: Path) -> None:
    done = call("pack", run, "--out", run / "onnx" / "packed")
    assert (done.exit_code, done.stderr.count("inside the artifact")) == (2, 1)
    open_artifact(run / "onnx")
    (tmp_path / "new.zip").symlink_to(tmp_path / "elsewhere")
    done = call("pack", run, "--out", tmp_path / "new", "--zip")
    assert (done.exit_code, done.stderr.count("new.zip: is already there")) == (2, 1)
    assert not (tmp_path / "elsewhere").exists()


def test_a_clock_before_1980_stops_no_zip(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfile

    def copied(source: Path, target: Path) -> None:
        copy(source, target)
        os.utime(target, (0, 0))

    monkeypatch.setattr(shutil, "copyfile", copied)
    assert call("pack", run, "--out", tmp_path / "new", "--zip").exit_code == 0
    with zipfile.ZipFile(tmp_path / "new.zip") as packed:
        assert packed.getinfo("new/tokenizer.json").date_time == (1980, 1, 1, 0, 0, 0)


def test_a_disk_that_is_full_at_the_zip_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "new"
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "write", full)
        done = call("pack", run, "--out", out, "--zip")
    assert done.exit_code == 2
    assert f"{out}.zip: no space left on the disk" in done.stderr
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".new.zip.0a1b2c3d.writing").touch()  # of a process that was killed
    assert call("pack", run, "--out", out, "--zip").exit_code == 0
    assert not list(tmp_path.glob(".*"))
    with zipfile.ZipFile(f"{out}.zip") as packed:
        assert packed.testzip() is None
        packed.extractall(tmp_path / "unpacked")
    open_artifact(tmp_path / "unpacked" / "new")


# The hub ------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "secret")
        yield hub


def test_push_uploads_what_pack_makes(run: Path, tmp_path: Path, hub: FakeHub) -> None:
    done = call("push", run, "me/pico", "--private")
    assert done.exit_code == 0, done.stderr + str(done.exception)
    assert call("pack", run, "--out", tmp_path / "packed").exit_code == 0
    packed = tmp_path / "packed"
    expected = {
        p.relative_to(packed).as_posix(): p.read_bytes() for p in packed.rglob("*") if p.is_file()
    }
    found = hub.repositories["me/pico"]
    assert hub.private == {"me/pico": True}
    assert found.keys() == expected.keys()
    different = {name for name in found if found[name] != expected[name]}
    assert different <= {"manifest.json"}  # which has the time in it
    assert hub.tokens == {"Bearer secret"}
    assert "me/pico" in done.stdout


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of the client itself
@pytest.mark.parametrize("kind", ["xet", "no xet", "a page for what it lacks", "switched off"])
def test_large_files_go_the_way_that_the_hub_takes_them(
    run: Path, tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The client takes xet wherever hf_xet is installed; hubs within companies often have none."""
    hub.large, hub.page = 1_000, kind.startswith("a page")
    hub.xet = tmp_path / "xet" if kind == "xet" else None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", kind == "switched off")
    assert is_package_available("hf_xet")
    done = call("push", run, "me/pico")
    assert done.exit_code == 0, done.stderr + str(done.exception)
    assert hub.asked_for_xet >= 1 if kind != "switched off" else hub.asked_for_xet == 0
    assert call("pack", run, "--out", tmp_path / "packed").exit_code == 0
    found = hub.repositories["me/pico"]
    sizes = {name: (tmp_path / "packed" / name).stat().st_size for name in found}
    graph = (tmp_path / "packed" / max(sizes, key=sizes.__getitem__)).read_bytes()
    kept = found[max(sizes, key=sizes.__getitem__)]
    if kind == "xet":
        assert kept == hashlib.sha256(graph).hexdigest().encode()
        stored = sum(p.stat().st_size for p in (tmp_path / "xet").rglob("default.*"))
        assert stored > len(graph) / 4
    else:
        assert kept == graph
    assert (kind == "switched off") == constants.HF_HUB_DISABLE_XET


def test_push_that_is_refused(run: Path, hub: FakeHub) -> None:
    hub.refuses = True
    done = call("push", run, "me/pico")
    assert done.exit_code == 2
    assert "the hub refused" in done.stderr
    assert "hf auth login" in done.stderr
    names = ("nobody", "me/pi..co", "me/pico.", "me/pico.git", "me/é", "m/" + "x" * 99)
    for name in names:
        done = call("push", run, name)
        assert done.exit_code == 2
        assert "expected NAMESPACE/NAME" in done.stderr


@pytest.mark.parametrize(
    ("place", "status", "message"),
    [
        ("create", 401, "hf auth login"),
        ("create", 404, "the hub refused"),
        ("create", 500, "try again later"),
        ("preupload", 429, "try again later"),
        ("xet-write-token", 403, "hf auth login"),
        ("xet-write-token", 500, "try again later"),
        ("xet-write-token", None, "cannot be reached"),
        ("commit", 403, "hf auth login"),
        ("commit", 409, "try again later"),
        ("commit", 500, "try again later"),
        ("create", None, "cannot be reached"),
        ("commit", None, "cannot be reached"),
    ],
)
def test_push_that_fails_on_the_way(
    run: Path,
    hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    status: int | None,
    message: str,
) -> None:
    """A line that names the repository and a remedy, and no commit."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.fails[place] = status
    done = call("push", run, "me/pico")
    assert done.exit_code == 2, done.exception
    assert done.stderr.startswith("limbeck: me/pico: the hub ")
    assert message in done.stderr
    assert hub.repositories.get("me/pico", {}) == {}


def test_a_private_push_into_a_public_repository_is_refused(run: Path, hub: FakeHub) -> None:
    hub.repositories["me/pico"], hub.private["me/pico"] = {}, False
    done = call("push", run, "me/pico", "--private")
    assert done.exit_code == 2
    assert "me/pico: it is there already, and public" in done.stderr
    assert hub.repositories["me/pico"] == {}
    assert call("push", run, "me/pico").exit_code == 0


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://hub.invalid"])
def test_push_without_a_hub(run: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    done = call("push", run, "me/pico")
    assert done.exit_code == 2
    assert "cannot be reached" in done.stderr
