"""The arms of a language model's bench."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import ArtifactError
from limbeck.contract.recipe import (
    Bench,
    CompiledRuntime,
    EncoderBench,
    GenaiRuntime,
    OpenAiRuntime,
)
from limbeck.contract.results.bench import Arm, Role
from limbeck.contract.sources.models import context_of


def list_arms(*, onnx: Artifact, student: Artifact, bench: Bench | None = None) -> list[Arm]:
    """All arms: teachers and student in torch, every form, a copy of the shipped form, and extras.

    Raises `ArtifactError` if a teacher's folder is gone.
    """
    bench, arms = bench or Bench(), list[Arm]()
    measured: Mapping[str, Any] = student.result.get("teachers", {})
    shipped = str(onnx.result["shipped"])
    device = bench.device or provider_of(onnx, shipped)
    for teacher in teachers_of(student):
        folders = [Path(teacher[key]) for key in ("model", "adapter") if teacher.get(key)]
        spec = {key: teacher.get(key) for key in ("model", "adapter", "quantize", "dtype")} | {
            "device": device
        }
        if bench.torch_dtype is not None:
            spec["dtype"] = bench.torch_dtype
        arms.append(
            Arm(
                f"teacher:{teacher['name']}",
                teacher["name"],
                "teacher",
                "torch",
                weights_on_disk(*folders),
                spec,
                _token_rate(measured.get(teacher["name"], {})),
            )
        )
    model = student.path / "model"
    plain = {"model": str(model), "dtype": bench.torch_dtype or "fp32", "device": device}
    arms.append(Arm("student", "student", "student", "torch", weights_on_disk(model), plain))
    arms += [form_arm(onnx, name) for name in onnx.result["forms"]]
    arms.append(form_arm(onnx, shipped, twin=True))
    for extra in bench.runtimes:
        match extra:
            case GenaiRuntime():
                size = int(onnx.result["forms"][shipped]["bytes"])
                spec = {"artifact": str(onnx.path), "device": provider_of(onnx, shipped)}
                arms.append(
                    Arm("genai", f"{shipped}, genai", "extra", "onnxruntime-genai", size, spec)
                )
            case CompiledRuntime():
                size = weights_on_disk(model)
                arms.append(
                    Arm("compiled", "student, compiled", "extra", "torch-compile", size, plain)
                )
            case OpenAiRuntime():
                arms.append(
                    Arm(
                        "openai",
                        extra.url,
                        "extra",
                        "openai",
                        0,
                        extra.model_dump(exclude={"kind"}),
                    )
                )
    return arms


def _token_rate(teacher: Mapping[str, Any]) -> float | None:
    """Mean over domains of a teacher's tokens for each of the student's; None if they are equal."""
    domains: Mapping[str, Mapping[str, float]] = teacher.get("coverage") or {}
    rates = [found["tokens"] for found in domains.values()]
    return math.fsum(rates) / len(rates) if rates else None


def teachers_of(student: Artifact) -> list[dict[str, Any]]:
    """Entries of teachers.json, but for teachers behind a server, which are not run here.

    Raises `ArtifactError` when the folder of a teacher is gone.
    """
    entries = json.loads((student.path / "teachers.json").read_text("utf-8"))
    found: list[dict[str, Any]] = [entry for entry in entries if "server" not in entry]
    for teacher in found:
        for key in ("model", "adapter"):
            if teacher.get(key) and not Path(teacher[key]).is_dir():
                raise ArtifactError(
                    f"{teacher[key]}: the folder of teacher {teacher['name']} is gone, so the "
                    "student cannot be measured against it; run the recipe again, which makes it."
                )
    return found


def provider_of(onnx: Artifact, form: str) -> str:
    """The execution provider that a form was made for."""
    return str(onnx.result["forms"][form].get("provider", "cpu"))


def form_arm(onnx: Artifact, form: str, *, twin: bool = False) -> Arm:
    """A form of an ``onnx`` artifact under onnxruntime; ``twin``: the copy that shows noise."""
    spec = {"artifact": str(onnx.path), "form": form, "device": provider_of(onnx, form)}
    name, label, role = (
        (f"onnx:{form}:twin", f"{form} (copy)", "twin") if twin else (f"onnx:{form}", form, "form")
    )
    return Arm(
        name, label, cast(Role, role), "onnxruntime", int(onnx.result["forms"][form]["bytes"]), spec
    )


def weights_on_disk(*folders: Path) -> int:
    """Bytes of the safetensors files in some folders."""
    return sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))


def require_context(arms: Sequence[Arm], bench: Bench | EncoderBench, student: Path) -> None:
    """Raise `DataError` if the bench's longest work does not fit into the shortest context.

    Graphs have the context of the transformers folder ``student``; a server's is unknown.
    """
    for arm in arms:
        if arm.runtime != "openai":
            folder = Path(arm.spec["model"]) if arm.runtime.startswith("torch") else student
            bench.require_context(context_of(folder), arm.label)
