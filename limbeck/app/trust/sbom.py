"""`limbeck sbom`: a CycloneDX bill of materials (ML-BOM) of a run.

The model that ships, with what went into it: base, teachers, texts, libraries, each with digest and
licence as far as its source states one; and the measured figures with their intervals. The library
writes and validates the document; it has no classes for a model card, so that part is added as the
schema has it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from limbeck.app.given import exported_folder
from limbeck.app.trust.pack import certificate_of, ingredients
from limbeck.contract.artifact import Artifact, open_artifact, require_outside, student_of
from limbeck.contract.errors import ArtifactError, EnvironmentalError, UserError
from limbeck.contract.files import read_json, write_atomically
from limbeck.contract.machine import versions
from limbeck.contract.reading import reading
from limbeck.contract.recipe import fingerprint

_TASKS = {
    "causal-lm": "text-generation",
    "classification": "text-classification",
    "embedding": "feature-extraction",
}
_OUTPUTS = {"causal-lm": "text", "classification": "class", "embedding": "vector"}


def write_sbom(run: Path, out: Path | None = None) -> Path:
    """Write the bill of materials of ``run`` to ``out``, by default ``RUN/sbom.cdx.json``.

    Raises `ArtifactError` for a folder without a student beside its export, and
    `EnvironmentalError` if cyclonedx-python-lib is not installed.
    """
    if out is not None:
        require_outside(out)
        if out.is_file() and not _is_bill(out):
            raise UserError(f"{out}: is there, and no bill of materials; name another file.")
    with reading(run) as require_same:
        onnx = open_artifact(exported_folder(run, command="sbom"), kind="onnx", verify=False)
        folder = student_of(onnx)
        if not (folder / "manifest.json").exists():
            raise ArtifactError(
                f"{onnx.path}: the student that it was made from is not beside it, so its sources "
                "are not known; give the run folder."
            )
        student = open_artifact(folder, kind="student", verify=False)
        text = _document(onnx, student, certificate_of(onnx))
        path = out or folder.parent / "sbom.cdx.json"
        require_same()
        write_atomically(path, text)
    return path


def _is_bill(path: Path) -> bool:
    try:
        found = read_json(path)
    except ArtifactError:
        return False
    return isinstance(found, dict) and found.get("bomFormat") == "CycloneDX"


def _document(onnx: Artifact, student: Artifact, certificate: Mapping[str, Any]) -> str:
    try:
        from cyclonedx.model.bom import Bom
        from cyclonedx.model.component import ComponentType
        from cyclonedx.output.json import JsonV1Dot6
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator
    except ImportError as error:
        raise EnvironmentalError(
            f"limbeck sbom needs cyclonedx-python-lib ({error}); pip install 'limbeck[trust]'."
        ) from error

    recipe = student.manifest["recipe"]
    name = str(recipe["resolved"]["name"] if recipe else student.path.parent.name)
    model = _component(ComponentType.MACHINE_LEARNING_MODEL, name, onnx.digest)
    model.version = onnx.digest[:12]
    model.description = str(certificate.get("sentence", ""))
    files = [
        _component(ComponentType.FILE, file, entry["sha256"])
        for file, entry in onnx.manifest["files"].items()
        if file in onnx.result["forms"][onnx.result["shipped"]]["files"]
    ]
    parents, licences = student.manifest["parents"], dict(ingredients(student))
    parts = [
        _component(
            ComponentType.DATA if what.startswith("text ") else model.type,
            what,
            digest,
            str(licences.get(_named(what), {}).get("license", "")),
        )
        for what, digest in parents.items()
    ]
    libraries = [
        _library(library, version)
        for library, version in (certificate.get("versions") or versions()).items()
        if library != "python"
    ]
    bom = Bom(components=[*parts, *files, *libraries])
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_URL, fingerprint([onnx.digest, student.digest]))
    bom.metadata.component = model
    if measured := certificate.get("measured"):
        bom.metadata.timestamp = datetime.fromisoformat(measured)
    bom.register_dependency(model, [*parts, *files, *libraries])
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    document["metadata"]["component"]["modelCard"] = _card(onnx, student, certificate)
    text = json.dumps(document, indent=2)
    if problem := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise AssertionError(f"the bill of materials breaks CycloneDX's schema: {problem}")
    return text + "\n"


def _component(kind: Any, name: str, digest: str, licence: str = "") -> Any:
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component

    hashes = [HashType(alg=HashAlgorithm.SHA_256, content=digest)] if len(digest) == 64 else []
    return Component(
        type=kind,
        name=name,
        bom_ref=f"{kind.value}/{name}",
        hashes=hashes,
        licenses=_licences(licence),
    )


def _library(name: str, version: str) -> Any:
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    return Component(
        type=ComponentType.LIBRARY,
        name=name,
        version=version,
        bom_ref=f"library/{name}",
        purl=PackageURL(type="pypi", name=name, version=version),
    )


def _licences(licence: str) -> list[Any]:
    from cyclonedx.contrib.license.factories import LicenseFactory

    if not licence or licence == "unknown":
        return []
    return [LicenseFactory().make_from_string(licence)]


def _named(parent: str) -> str:
    """The name that `ingredients` has for one of a student's parents."""
    return "base model" if parent == "base" else parent


def _card(onnx: Artifact, student: Artifact, certificate: Mapping[str, Any]) -> dict[str, Any]:
    """The model card, as the schema's `modelCard` has it."""
    task = str(onnx.result["task"])
    texts = [name for name in student.manifest["parents"] if name.startswith("text ")]
    metrics = [
        {"type": kind, "value": str(figure["value"])}
        | ({"slice": where} if where else {})
        | (
            {
                "confidenceInterval": {
                    "lowerBound": str(figure["low"]),
                    "upperBound": str(figure["high"]),
                }
            }
            if figure.get("low") is not None  # too few blocks give no interval
            else {}
        )
        for kind, where, figure in _figures(certificate.get("figures") or {})
    ]
    config = json.loads((onnx.path / "config.json").read_text(encoding="utf-8"))
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": _TASKS[task],
            "architectureFamily": str(config.get("model_type", "")),
            "modelArchitecture": ", ".join(config.get("architectures") or []),
            "datasets": [{"ref": f"data/{name}"} for name in texts],
            "inputs": [{"format": "text"}],
            "outputs": [{"format": _OUTPUTS[task]}],
        },
        "quantitativeAnalysis": {"performanceMetrics": metrics},
        "properties": [
            {"name": "limbeck:verdict", "value": str(certificate.get("verdict", "not judged"))},
            {"name": "limbeck:form", "value": str(onnx.result["shipped"])},
        ],
    }


def _figures(
    tree: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Kind, place and figure of every number of a certificate; a figure may have an interval."""
    for name, value in tree.items():
        here = (*path, name)
        if isinstance(value, Mapping):
            if "value" in value:
                yield here[0], "/".join(here[1:]), value
            else:
                yield from _figures(value, here)
        elif isinstance(value, int | float):
            yield here[0], "/".join(here[1:]), {"value": value}
