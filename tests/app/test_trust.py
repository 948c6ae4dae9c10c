"""`limbeck sbom`, `limbeck sign` and `limbeck verify --key`, held to the tools of others."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cyclonedx.model.bom import Bom
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from model_signing.signing import Config
from typer.testing import CliRunner, Result

from limbeck.app.cli import app
from limbeck.app.trust.signing import require_signed
from limbeck.contract.artifact import open_artifact
from limbeck.contract.errors import ArtifactError
from tests.factory import Factory


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def write_key(
    private: Path, public: Path, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
) -> None:
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(pem, form))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("keys")
    pair = folder / "private.pem", folder / "public.pem"
    write_key(*pair, ec.generate_private_key(ec.SECP256R1()))
    return pair


@pytest.fixture
def run(tiny: Factory, tmp_path: Path) -> Path:
    """A run folder with a student, its export, and a certificate."""
    made, folder = tiny.exported(), tmp_path / "run"
    shutil.copytree(made.path.parent / "student", folder / "student")
    shutil.copytree(made.path, folder / "onnx")
    (folder / "run.json").write_text("{}")
    certificate = {
        "artifact": {"digest": made.digest},
        "verdict": "pass",
        "sentence": "It is fit to ship.",
        "measured": "2026-11-28T20:46:52+00:00",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "figures": {
            "tpot_ms": {"value": 1.5, "low": 1.25, "high": 2.0, "n": 6},
            "speed_over": {"big": {"value": 3.0, "low": 2.5, "high": 3.5, "n": 6}},
            "quality": {"mean_nll": 4.5},
            "bytes": 740114,
        },
    }
    (folder / "certificate.json").write_text(json.dumps(certificate))
    return folder


def test_the_bill_of_materials_is_valid_and_holds_figures_with_intervals(run: Path) -> None:
    done = call("sbom", run)
    assert done.exit_code == 0, done.output
    text = (run / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document = json.loads(text)
    model = document["metadata"]["component"]
    onnx = open_artifact(run / "onnx", verify=False)
    assert model["hashes"] == [{"alg": "SHA-256", "content": onnx.digest}]
    analysis = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert analysis == [
        {
            "type": "tpot_ms",
            "value": "1.5",
            "confidenceInterval": {"lowerBound": "1.25", "upperBound": "2.0"},
        },
        {
            "type": "speed_over",
            "slice": "big",
            "value": "3.0",
            "confidenceInterval": {"lowerBound": "2.5", "upperBound": "3.5"},
        },
        {"type": "quality", "slice": "mean_nll", "value": "4.5"},
        {"type": "bytes", "value": "740114"},
    ]
    # Read back by the library: what the model depends on has the digests of the student's parents.
    bom = Bom.from_json(document)  # type: ignore[attr-defined]
    digests = {c.name: next(iter(c.hashes)).content for c in bom.components if c.hashes}
    student = open_artifact(run / "student", verify=False)
    assert digests.items() >= student.manifest["parents"].items()
    assert {c.name: c.version for c in bom.components if c.version} == {"torch": "2.13.0"}
    again = call("sbom", run, "--out", run / "again.json")
    assert again.exit_code == 0
    assert (run / "again.json").read_text() == text  # nothing in it depends on the time of writing


def test_a_bill_of_materials_replaces_nothing_else(run: Path) -> None:
    for place, says in (
        (run / "onnx" / "manifest.json", "inside the artifact"),
        (run / "run.json", "is there, and no bill of materials"),
    ):
        before = place.read_bytes()
        done = call("sbom", run, "--out", place)
        assert (done.exit_code, says in done.stderr) == (2, True), done.stderr
        assert place.read_bytes() == before


def test_a_signature_is_not_written_through_a_link(run: Path, keys: tuple[Path, Path]) -> None:
    other = run.parent / "other"
    other.write_text("mine")
    (run / "onnx.sig").symlink_to(other)
    (run / ".onnx.sig.0a1b2c3d.writing").touch()  # of a process that was killed
    assert call("sign", run, "--key", keys[0]).exit_code == 0
    assert other.read_text() == "mine"
    assert not (run / "onnx.sig").is_symlink()
    assert call("verify", run / "onnx", "--key", keys[1]).exit_code == 0
    assert not list(run.glob(".*writing"))


def test_a_link_within_an_export_is_not_signed(run: Path, keys: tuple[Path, Path]) -> None:
    card = run / "onnx" / "README.md"
    card.rename(run / "card")
    card.symlink_to(run / "card")
    done = call("sign", run, "--key", keys[0])
    assert (done.exit_code, "onnx: cannot be signed (Cannot use " in done.stderr) == (2, True)


def test_an_export_without_its_student_has_no_bill_of_materials(run: Path) -> None:
    shutil.rmtree(run / "student")
    done = call("sbom", run)
    assert done.exit_code == 2
    assert "the student that it was made from is not beside it" in done.stderr


def test_signatures_hold_here_and_in_the_tool_of_openssf(
    run: Path, keys: tuple[Path, Path]
) -> None:
    private, public = keys
    done = call("sign", run, "--key", private)
    assert done.exit_code == 0, done.output
    options = ["--signature", str(run / "onnx.sig"), "--public_key", str(public)]
    theirs = [sys.executable, "-m", "model_signing", "verify", "key", str(run / "onnx"), *options]
    assert subprocess.run(theirs, capture_output=True).returncode == 0
    verified = call("verify", run, "--key", public, "--no-quality", "--no-speed")
    assert verified.exit_code == 0, verified.output
    assert verified.stdout.count("holds") == 2
    # A packed folder is signed on its own.
    assert call("pack", run, "--out", run.parent / "packed").exit_code == 0
    assert call("sign", run.parent / "packed", "--key", private).exit_code == 0
    assert call("verify", run.parent / "packed", "--key", public).exit_code == 0


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("change", "does not hold for onnx"),
        ("remove", "does not hold for onnx"),
        ("add", "does not hold for onnx"),
        ("add for git", "does not hold for onnx"),
        ("certificate", "does not hold for certificate.json"),
        ("signature", "does not hold for onnx"),
        ("no signature", "no signature of onnx"),
    ],
)
def test_what_was_changed_after_the_signature_is_refused_by_name(
    run: Path, keys: tuple[Path, Path], harm: str, message: str
) -> None:
    private, public = keys
    assert call("sign", run, "--key", private).exit_code == 0
    config = run / "onnx" / "config.json"
    match harm:
        case "change":
            config.write_bytes(config.read_bytes() + b" ")
        case "remove":
            config.unlink()
        case "add":
            (run / "onnx" / "more.bin").write_bytes(b"x")
        case "add for git":
            (run / "onnx" / ".gitattributes").write_bytes(b"x")
        case "certificate":
            (run / "certificate.json").write_text("{}")
        case "signature":
            (run / "onnx.sig").write_text("{}")
        case "no signature":
            (run / "onnx.sig").unlink()
    done = call("verify", run, "--key", public, "--no-quality", "--no-speed")
    assert done.exit_code == 2
    assert message in done.stderr


def test_every_byte_of_a_signature_and_of_what_it_signs_counts(
    run: Path, keys: tuple[Path, Path]
) -> None:
    """The file of a signature, changed and replaced; then the files that it signs."""
    private, public = keys
    assert call("sign", run, "--key", private).exit_code == 0
    onnx, certificate = run / "onnx.sig", run / "certificate.sig"
    signed = {path: path.read_bytes() for path in (onnx, certificate)}
    bundle = json.loads(signed[onnx])
    envelope = bundle["dsseEnvelope"]
    raw = envelope["signatures"][0]["sig"]
    for path, text in (
        (onnx, signed[certificate]),  # of another file, by the same key
        (certificate, signed[onnx]),
        (onnx, b""),
        (onnx, signed[onnx][:-1]),
        (onnx, signed[onnx][: len(signed[onnx]) // 2]),
        (onnx, b"x" + signed[onnx][1:]),
        (onnx, signed[onnx].replace(raw.encode(), _other_letter(raw, 7).encode())),
        (onnx, json.dumps(_with(bundle, sig=_first_byte(raw))).encode()),
        (onnx, json.dumps(_with(bundle, sig=_last_byte(raw))).encode()),
        (onnx, json.dumps(_with(bundle, sig="")).encode()),
        (onnx, json.dumps(_with(bundle, payload=_first_byte(envelope["payload"]))).encode()),
        (onnx, json.dumps(_with(bundle, payload=_last_byte(envelope["payload"]))).encode()),
    ):
        path.write_bytes(text)
        _is_refused(run, public, path)
        path.write_bytes(signed[path])
    # What was signed: a file more, in a folder more; a link in place of a file, to an equal one.
    more, card = run / "onnx" / "more" / "file", run / "onnx" / "README.md"
    more.parent.mkdir()
    more.write_bytes(b"")
    _is_refused(run, public, onnx)
    shutil.rmtree(more.parent)
    card.rename(run / "card")
    card.symlink_to(run / "card")
    _is_refused(run, public, onnx)
    card.unlink()
    (run / "card").rename(card)
    for path in (run / "certificate.json", run / "onnx" / "manifest.json"):
        text = path.read_bytes()
        for other in (text[:-1], bytes([text[0] ^ 1]) + text[1:], text[:-1] + b"]", b""):
            path.write_bytes(other)
            _is_refused(run, public, certificate if path.parent == run else onnx)
        path.write_bytes(text)
    assert require_signed(run, public) == [onnx, certificate]


def test_a_signature_of_another_run_is_refused(
    run: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "onnx" / "README.md").write_text("another card")
    (other / "onnx" / "manifest.json").unlink()
    (run / "certificate.json").write_text("{}")
    signer = Config().use_elliptic_key_signer(private_key=private)
    signer.sign(other / "onnx", run / "onnx.sig")
    signer.sign(other / "certificate.json", run / "certificate.sig")
    _is_refused(run, public, run / "onnx.sig")
    assert call("sign", run / "onnx", "--key", private).exit_code == 0
    _is_refused(run, public, run / "certificate.sig")


def _is_refused(run: Path, public: Path, signature: Path) -> None:
    with pytest.raises(ArtifactError, match=re.escape(f"{signature}: does not hold for ")):
        require_signed(run, public)


def _with(bundle: Any, **changed: str) -> Any:
    """The bundle with another payload, or another signature of it."""
    envelope = dict(bundle["dsseEnvelope"])
    if "sig" in changed:
        envelope["signatures"] = [{**envelope["signatures"][0], "sig": changed["sig"]}]
    else:
        envelope |= changed
    return bundle | {"dsseEnvelope": envelope}


def _other_letter(base64: str, at: int) -> str:
    """One letter changed, whichever it is: a signature is new in every run."""
    return base64[:at] + ("A" if base64[at] != "A" else "B") + base64[at + 1 :]


def _first_byte(base64: str) -> str:
    content = b64decode(base64)
    return b64encode(bytes([content[0] ^ 1]) + content[1:]).decode()


def _last_byte(base64: str) -> str:
    content = b64decode(base64)
    return b64encode(content[:-1] + bytes([content[-1] ^ 1])).decode()


def test_another_key_and_what_is_no_key_are_refused(
    run: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    assert call("sign", run, "--key", private).exit_code == 0
    other = tmp_path / "other.pem", tmp_path / "other-public.pem"
    write_key(*other, ec.generate_private_key(ec.SECP256R1()))
    done = call("verify", run, "--key", other[1], "--no-quality", "--no-speed")
    assert done.exit_code == 2
    assert "does not hold for onnx with the key other-public.pem" in done.stderr
    write_key(*other, rsa.generate_private_key(65537, 2048))
    os.mkfifo(tmp_path / "pipe")
    for key in (tmp_path / "missing.pem", public, other[0], tmp_path / "pipe", Path("/dev/zero")):
        done = call("sign", run, "--key", key)
        assert done.exit_code == 2
        assert "cannot be used as a key" in done.stderr


def test_signatures_are_neither_read_from_a_pipe_nor_written_to_one(
    run: Path, keys: tuple[Path, Path]
) -> None:
    private, public = keys
    os.mkfifo(run / "onnx.sig")
    for command, key in (("sign", private), ("verify", public)):
        assert call(command, run, "--key", key).exit_code == 2
