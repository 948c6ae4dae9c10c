"""`limbeck sign` and `limbeck verify --key`: OpenSSF model signatures of what ships.

model-signing does the cryptography, with a key pair of yours and without a network. A run has two
signatures, of its exported folder and of its certificate; an exported or packed folder has one.
Each lies beside what it signs, as NAME.sig, because an artifact has no room for another file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from limbeck.app.given import exported_folder
from limbeck.app.run import RUN
from limbeck.app.trust.pack import CERTIFICATE
from limbeck.contract.artifact import open_artifact
from limbeck.contract.errors import ArtifactError, EnvironmentalError, UserError
from limbeck.contract.files import new_file, open_regular, require_place, unwritable_is_a_user_error
from limbeck.contract.reading import reading

_MOST = 1 << 20  # bytes of a key or a signature; seen: 0.2 kB and 20 kB


def sign(path: Path, key: Path) -> list[Path]:
    """Sign what ships of ``path``, a run or an exported folder; return the signatures.

    ``key`` is a private elliptic-curve key in PEM form. Every file is checked against its hash
    first. Raises `ArtifactError` for damaged files, `UserError` for a key that cannot be used.
    """
    signing, _, hashing = _library()
    signer = _with_key(
        key, lambda: signing.Config().use_elliptic_key_signer(private_key=key)
    ).set_hashing_config(_hashing(hashing))
    made = []
    with unwritable_is_a_user_error(path.parent), reading(path) as require_same:
        open_artifact(exported_folder(path, command="sign"), kind="onnx")
        for signed, signature in _pairs(path):
            require_place(signature)
            # The library would follow a link of that name, and the folder may be a stranger's.
            try:
                with new_file(signature) as half:
                    signer.sign(signed, half)
                    require_same()
            except ValueError as error:  # of a link, which the library does not follow
                raise ArtifactError(f"{signed}: cannot be signed ({error}).") from None
            made.append(signature)
    return made


def require_signed(path: Path, key: Path) -> list[Path]:
    """Raise `ArtifactError` unless what ships of ``path`` is as the owner of ``key`` signed it.

    ``key`` is the public key in PEM form. Returns the signatures that hold.
    """
    _, verifying, hashing = _library()
    verifier = _with_key(
        key, lambda: verifying.Config().use_elliptic_key_verifier(public_key=key)
    ).set_hashing_config(_hashing(hashing))
    held = []
    for signed, signature in _pairs(path):
        if not signature.is_file():
            raise ArtifactError(
                f"{signature}: no signature of {signed.name}; `limbeck sign {path} --key FILE` "
                "makes it, with the private key."
            )
        with open_regular(signature, most=_MOST):
            pass  # the library would wait for a pipe
        try:
            verifier.verify(signed, signature)
        except Exception as error:  # a damaged signature raises errors of many types
            why = str(error).strip() or type(error).__name__
            raise ArtifactError(
                f"{signature}: does not hold for {signed.name} with the key {key.name}: {why}."
            ) from None
        held.append(signature)
    return held


def _pairs(path: Path) -> list[tuple[Path, Path]]:
    """What is signed, and the file of its signature."""
    folder = exported_folder(path, command="sign")
    # A run's `onnx` may be a link, and the library follows none.
    pairs = [(folder.resolve(), folder.absolute().parent / f"{folder.absolute().name}.sig")]
    certificate = path / CERTIFICATE
    if (path / RUN).is_file() and certificate.is_file():
        pairs.append((certificate, path / "certificate.sig"))
    return pairs


def _hashing(hashing: Any) -> Any:
    """Hash every file: the library skips files of git by default."""
    return hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False)


def _with_key(key: Path, make: Callable[[], Any]) -> Any:
    try:
        with open_regular(key, most=_MOST):
            return make()
    except (
        ArtifactError,
        OSError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:  # the last: an RSA key
        raise UserError(
            f"{key}: cannot be used as a key ({error}); expected an elliptic-curve key in PEM "
            "form, such as `openssl ecparam -name prime256v1 -genkey -noout -out private.pem` "
            "and `openssl ec -in private.pem -pubout -out public.pem` write."
        ) from None


def _library() -> tuple[Any, Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise EnvironmentalError(
            f"signatures need model-signing ({error}); pip install 'limbeck[trust]'."
        ) from error
    return signing, verifying, hashing
