"""A Triton model repository with one form: its graph and a configuration for the ONNX Runtime back
end.

The repository holds one model. Triton moves tensors alone, so the tokenizer goes along for clients.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import ArtifactError, UserError
from limbeck.contract.printable import printable
from limbeck.contract.recipe.base import Name

CLIENT = "client"  # folder of what clients need; Triton takes folders with numbers alone
_MOST_BATCH = 32
_LABELS = "labels.txt"


def write_repository(folder: Path, onnx: Artifact, form: str, files: Sequence[str]) -> None:
    """Write the repository of ``form`` to ``folder``; ``files`` are those of the artifact that ship
    with it.

    Raises `UserError` for a GGUF form, and for an adapter that is kept beside its base.
    """
    made = onnx.result["forms"].get(form)
    if made is None:
        raise UserError(f"--layout triton: {form} is no graph; name an ONNX form with --form.")
    if onnx.result["adapter"] is not None:
        raise UserError(
            "--layout triton: Triton cannot load an adapter beside its base; set export.adapters: "
            "merged and export again."
        )
    recipe = onnx.manifest["recipe"]  # a packed folder has none
    name = recipe["resolved"]["name"] if recipe else "student"
    try:  # it becomes a folder, and an artifact may be a stranger's
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise ArtifactError(
            f"{onnx.path}: its recipe has no name for a folder: {name[:60]!r}."
        ) from None
    model = folder / name
    (model / "1").mkdir(parents=True)
    for file in files:
        is_graph = file in made["files"]
        place = model / "1" / Path(file).name if is_graph else model / CLIENT / file
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(onnx.path / file, place)
    classes = onnx.result["classes"] or ()
    if classes:
        labels = "".join(f"{printable(label)}\n" for label in classes)
        (model / _LABELS).write_text(labels, encoding="utf-8")
    graph = Path(made["graph"]).name
    text = _configuration(
        name, model / "1" / graph, on_card=made["provider"] == "cuda", classes=len(classes)
    )
    (model / "config.pbtxt").write_text(text, encoding="utf-8")


def _configuration(name: str, graph: Path, *, on_card: bool, classes: int) -> str:
    """Text of `config.pbtxt`. Triton adds the batch in front of shapes if it may batch itself."""
    import onnx

    found = onnx.load(graph, load_external_data=False).graph
    tensors = {"input": _tensors(found.input), "output": _tensors(found.output)}
    shapes = [shape for of in tensors.values() for _, _, shape in of]
    # A cache of keys and values has another length in each request: nothing to batch.
    batched = all(shape[:1] == [-1] and len(shape) <= 3 for shape in shapes)
    lines = [
        f"name: {json.dumps(name)}",
        'backend: "onnxruntime"',
        f"default_model_filename: {json.dumps(graph.name)}",
        f"max_batch_size: {_MOST_BATCH if batched else 0}",
    ]
    for role, of in tensors.items():
        for tensor, kind, shape in of:
            dims = ", ".join(map(str, shape[1:] if batched else shape))
            has_labels = role == "output" and classes and shape[-1:] == [classes]
            lines += [
                f"{role} {{",
                f"  name: {json.dumps(tensor)}",
                f"  data_type: {kind}",
                f"  dims: [ {dims} ]",
                *([f'  label_filename: "{_LABELS}"'] if has_labels else []),
                "}",
            ]
    lines += ["dynamic_batching { }"] if batched else []
    return "\n".join([*lines, f"instance_group {{ kind: KIND_{'GPU' if on_card else 'CPU'} }}", ""])


def _tensors(values: Any) -> list[tuple[str, str, list[int]]]:
    """Name, Triton's type and shape of each; -1 is any length."""
    import onnx

    found = []
    for value in values:
        tensor = value.type.tensor_type
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
        kind = {"FLOAT": "FP32", "FLOAT16": "FP16", "DOUBLE": "FP64", "BFLOAT16": "BF16"}.get(
            kind, kind
        )
        shape = [d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim]
        found.append((value.name, f"TYPE_{kind}", shape))
    return found
