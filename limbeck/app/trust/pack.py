"""`limbeck pack` and `limbeck push`: the files that ship, in a folder for clients and the hub.

The packed folder is an artifact of kind `onnx` with one form. The exported folder also holds the
other forms, the twin graphs with all logits, and the cases of the parity check.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.app.given import exported_folder
from limbeck.app.trust.triton import write_repository
from limbeck.contract.artifact import (
    MANIFEST,
    Artifact,
    Draft,
    open_artifact,
    require_outside,
    student_of,
    write_artifact,
)
from limbeck.contract.errors import ArtifactError, EnvironmentalError, UserError
from limbeck.contract.files import (
    disk_full_is_a_user_error,
    new_file,
    read_json,
    temporary_folder,
    unwritable_is_a_user_error,
)
from limbeck.contract.printable import printable
from limbeck.contract.reading import reading
from limbeck.contract.recipe import fingerprint

CERTIFICATE, LICENCES = "certificate.json", "LICENCES.md"
_PARITY = "parity.safetensors"
_CARD = "README.md"


@dataclass(frozen=True)
class Packed:
    """The packed folder."""

    folder: Path
    form: str
    files: int
    megabytes: float
    archive: Path | None


def pack(
    run: Path, *, out: Path, form: str | None = None, as_zip: bool = False, triton: bool = False
) -> Packed:
    """Write one form of the exported student of ``run``, a run or its exported folder, to ``out``.

    The zip lies beside it; ``out`` may be its name. With ``triton`` the folder becomes a Triton
    model repository. Every file of the export is checked against its hash first. Raises
    `ArtifactError` for another folder or an unknown form, `UserError` if ``out`` exists or Triton
    cannot serve the form, `EnvironmentalError` if it cannot be written.
    """
    if as_zip and out.suffix == ".zip":
        out = out.with_suffix("")
    archive = Path(f"{out}.zip") if as_zip else None
    require_outside(out)
    for path in (out, archive):
        if path is not None and os.path.lexists(path):  # also a link that leads nowhere
            raise UserError(f"{path}: is already there; name another with --out.")
    with unwritable_is_a_user_error(out.parent), reading(run) as require_same:
        onnx = open_artifact(exported_folder(run, command="pack"), kind="onnx")
        form = form or str(onnx.result["shipped"])
        known = {**onnx.result["forms"], **onnx.result.get("ggufs", {})}
        if form not in known:
            forms = ", ".join(known)
            raise ArtifactError(f"{onnx.path}: no form {form!r}; it has {forms}.")
        keep = _files(onnx, form)  # refused before a folder is made
        with write_artifact(
            out,
            kind="triton" if triton else "onnx",
            key=fingerprint([onnx.digest, form]),
            parents={**onnx.manifest["parents"], "onnx": onnx.digest},
        ) as draft:
            _fill(draft, onnx, form, keep, triton=triton)
            require_same()
        size = sum(f["bytes"] for f in open_artifact(out, verify=False).manifest["files"].values())
        if archive is not None:
            _zip(out, archive)
    files = 1 + len(open_artifact(out, verify=False).manifest["files"])
    return Packed(out, form, files, (size + (out / MANIFEST).stat().st_size) / 1e6, archive)


def _fill(draft: Draft, onnx: Artifact, form: str, keep: Sequence[str], *, triton: bool) -> None:
    """Copy what ships with ``form``, the files ``keep``, into ``draft``."""
    if triton:
        write_repository(draft.folder, onnx, form, keep)
    else:
        for name in keep:
            (draft.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(onnx.file(name), draft.folder / name)
        _point_at_form(draft.folder, onnx, form)
    if form == onnx.result["shipped"] and certificate_of(onnx):
        shutil.copyfile(onnx.path.parent / CERTIFICATE, draft.folder / CERTIFICATE)
    (draft.folder / LICENCES).write_text(_licences(onnx), encoding="utf-8")
    draft.result = _result(onnx, form)


def _zip(folder: Path, archive: Path) -> None:
    """Write the whole of ``folder`` to ``archive``, or neither of them stays."""
    try:
        with disk_full_is_a_user_error(archive), new_file(archive) as half:
            # Zip files begin in 1980, and a machine's clock may not.
            packed = zipfile.ZipFile(half, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False)
            with packed as file:
                for path in sorted(folder.rglob("*")):
                    file.write(path, path.relative_to(folder.parent))
    except BaseException:
        archive.unlink(missing_ok=True)
        shutil.rmtree(folder)
        raise


def push(run: Path, repository: str, *, form: str | None = None, private: bool = False) -> str:
    """Upload the packed ``run`` to the hub in one commit, and return the commit's address.

    Raises `UserError` for a name that the hub does not accept and for a ``private`` push into a
    public repository, `EnvironmentalError` if the hub cannot be reached or refuses, and the errors
    of `pack`.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        _, _ = repository.split("/")
    except (HFValidationError, ValueError) as error:
        why = f" ({error})" if isinstance(error, HFValidationError) else ""
        raise UserError(
            f"{repository}: expected NAMESPACE/NAME, such as my-name/pico{why}."
        ) from None
    with temporary_folder() as work:
        packed = pack(run, out=work / "packed", form=form)
        api = HfApi(library_name="limbeck")
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            if private and not api.model_info(repository).private:
                raise UserError(
                    f"{repository}: it is there already, and public; make it private in its "
                    "settings on the hub, or push without --private."
                )
            with _transfers(repository):
                done = api.upload_folder(
                    repo_id=repository,
                    folder_path=packed.folder,
                    commit_message=f"Upload the student as {packed.form}",
                )
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            remedy = (
                "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
                if status in (401, 403)
                else "try again later"
            )
            raise EnvironmentalError(
                f"{repository}: the hub refused ({error}); {remedy}."
            ) from None
        except (OSError, HTTPError) as error:
            raise EnvironmentalError(
                f"{repository}: the hub cannot be reached ({error}); check the network or "
                "HF_ENDPOINT."
            ) from None
        except (ValueError, KeyError, RuntimeError) as error:  # no hub's answer, or a lost upload
            why = " ".join(str(error.__cause__ or error).split())
            raise EnvironmentalError(
                f"{repository}: the hub did not take the upload ({type(error).__name__}: {why}); "
                "nothing was committed. Check HF_ENDPOINT and your token, and try again."
            ) from None
    return str(done.commit_url)


@contextmanager
def _transfers(repository: str) -> Iterator[None]:
    """Send large files as the hub takes them: by xet, or by git LFS where it has no xet.

    The client tries xet alone wherever its package is installed. Hubs within a company often have
    none: there it fails, or asks for minutes if their answer is a page.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    kept = has_none = constants.HF_HUB_DISABLE_XET
    if not has_none:
        url = f"{constants.ENDPOINT}/api/models/{repository}/xet-write-token/main"
        answer = get_session().get(url, headers=build_hf_headers())
        if answer.status_code != 404:
            hf_raise_for_status(answer)
        try:
            has_none = "casUrl" not in answer.json()
        except ValueError:
            has_none = True
    constants.HF_HUB_DISABLE_XET = has_none
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = kept


def certificate_of(onnx: Artifact) -> dict[str, Any]:
    """Return the certificate beside an export; empty if it is of another one, or missing.

    A run may have two exports, or be exported again after its certificate was written.
    """
    path = onnx.path.parent / CERTIFICATE
    found = read_json(path) if path.is_file() else None
    artifact = found.get("artifact") if isinstance(found, dict) else None
    is_of_it = isinstance(artifact, dict) and artifact.get("digest") == onnx.digest
    return dict(found) if isinstance(found, dict) and is_of_it else {}


def _files(onnx: Artifact, form: str) -> list[str]:
    """Names of the files that ship with ``form``."""
    forms: Mapping[str, Any] = onnx.result["forms"]
    ggufs = {name: {file["file"]} for name, file in onnx.result.get("ggufs", {}).items()}
    if form in ggufs:  # it holds its tokenizer and configuration
        keep = sorted({*ggufs[form], _CARD})
    else:
        own = {*forms[form]["files"], forms[form]["graph"]} - {_scoring_graph(forms[form])}
        of_forms = {name for each in forms.values() for name in each["files"]}
        of_forms |= {name for files in ggufs.values() for name in files}
        others = {name for name in onnx.manifest["files"] if name not in of_forms}
        keep = sorted(own | (others - {_PARITY}))
    for name in keep:
        onnx.file(name)
    return keep


def _scoring_graph(form: Mapping[str, Any]) -> str | None:
    """The graph that only scores text, or None: that of an encoder also runs."""
    found = form.get("all_logits_graph")
    return None if found is None or found == form["graph"] else str(found)


def _result(onnx: Artifact, form: str) -> dict[str, Any]:
    """The export's result, of one form; its graph that keeps all logits is not packed."""
    ggufs = onnx.result.get("ggufs", {})
    if form in ggufs:
        only = {"forms": {}, "ggufs": {form: ggufs[form]}}
        return {**onnx.result, "shipped": form, **only, "packed": True}
    kept = dict(onnx.result["forms"][form])
    if scoring := _scoring_graph(kept):
        kept["files"] = [name for name in kept["files"] if name != scoring]
        kept["all_logits_graph"] = None
    return {**onnx.result, "shipped": form, "forms": {form: kept}, "ggufs": {}, "packed": True}


def _point_at_form(folder: Path, onnx: Artifact, form: str) -> None:
    """Let GenAI's configuration name the packed graph instead of the shipped one."""
    path = folder / "genai_config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    decoder = config["model"]["decoder"]
    decoder["filename"] = onnx.result["forms"][form]["graph"]
    path.write_text(json.dumps(config, indent=4), encoding="utf-8")


def _licences(onnx: Artifact) -> str:
    """Sources of the student with their licences, as far as each source states one."""
    rows: list[tuple[str, Mapping[str, Any]]] = []
    student = student_of(onnx)
    if (student / MANIFEST).exists():
        made = open_artifact(student, kind="student", verify=False)
        rows = list(ingredients(made))
    lines = [
        "# Licences",
        "",
        "What went into this model, and under which licence, as far as each source states it. "
        "The terms of all of them",
        "apply; look up what is unknown before you pass the model on.",
        "",
        "| what | licence | where it says so |",
        "|---|---|---|",
    ]
    lines += [
        f"| {_cell(what)} | {_cell(str(found.get('license', 'unknown')))} "
        f"| {_cell(str(found.get('said_by', '')))} |"
        for what, found in rows
    ]
    if not rows:
        lines.append("| the student's sources | unknown | the student is not beside the export |")
    return "\n".join(lines) + "\n"


def ingredients(student: Artifact) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """What went into a student, and the licence that each source states."""
    found = student.result.get("sources") or {}
    if base := found.get("base"):
        yield "base model", base
    teachers = student.path / "teachers.json"
    for teacher in json.loads(teachers.read_text("utf-8")) if teachers.is_file() else ():
        yield f"teacher {teacher['name']}", teacher
    for name, text in (found.get("texts") or {}).items():
        yield f"text {name}", text


def _cell(text: str) -> str:
    """A cell of a Markdown table that means itself: licences and names are words of strangers."""
    line = " ".join(printable(text).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", line)
