"""An encoder student → ONNX: one graph of a batch, quantised forms, parity with torch, a folder that clients load.

Inputs are `input_ids` and `attention_mask` `[B, L]`, both dimensions free, padded on the right as tokenizers of encoders pad. A
classifier answers with `logits[B, C]`; a sentence encoder with `last_hidden_state[B, L, d]` and `sentence_embedding[B, d]`, the
mean under the mask, of length 1.

Shape letters: B rows, L tokens, C classes, d width.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from export.build.dynamo import quiet_exporter, split_gemm
from export.build.surgery import Graphs, form_files, relocate, stamp
from export.check.census import require_quantized, take_census, where_nodes_run
from export.check.parity import PARITY, load_arrays, require_parity, save_arrays
from export.folder.card import (
    card_header,
    digests,
    graph_metadata,
    in_torch,
    markdown_table,
    what_went_in,
    write_client_files,
)
from export.round.blocks import Blockwise, block_size_for
from export.round.calibrate import Known, calibration_for
from export.round.quantize import (
    PerChannel,
    Scheme,
    Static,
    calibrated_reads,
    most_of,
    quantize_weights,
    scheme_for,
)
from limbeck.contract.artifact import Artifact, open_artifact, write_artifact
from limbeck.contract.errors import ArtifactError, ModelError
from limbeck.contract.examples import EXAMPLES, Examples, load_examples
from limbeck.contract.loading import load_pretrained, unused_pooler
from limbeck.contract.progress import say
from limbeck.contract.recipe import (
    EncoderForm,
    EncoderRecipe,
    Int8DynamicForm,
    Int8StaticForm,
    StaticShapes,
)
from limbeck.runtime.encoder import COUNTS_FROM_PADDING, GraphEncoder

Cases = Mapping[
    str, Mapping[str, npt.NDArray[Any]]
]  # name -> input_ids and attention_mask [B, L], answers [B, C or d]

_TRACED = {"rows": 2, "tokens": 5}  # sizes 0 and 1 would be taken for constants
_BATCH = 8  # rows of the ragged case
# How far a form may be from torch: largest difference over the largest answer (of unit vectors: over 1), and the least share of
# like answers: the same class where torch's lead is at least `_LEAD`, or the mean cosine of the two vectors.
_TOLERANCES = {
    "fp32": (1e-4, 1.0),
    "int8-weight": (0.25, 0.97),
    "int8-dynamic": (0.25, 0.97),
    "int8-static": (0.25, 0.97),
}
_LEAD = 0.5
_ALIKE = 1e-6  # of a mean cosine that should be 1


def export_encoder(*, student: Artifact, out: Path, recipe: EncoderRecipe, key: str) -> Artifact:
    """Write the ``onnx`` artifact of an encoder's ``student`` artifact to ``out``. See `export.export_student`."""
    model, task = student.path / "model", str(student.result["task"])
    with write_artifact(
        out, kind="onnx", key=key, parents={"student": student.digest}, recipe=recipe
    ) as draft:
        folder = draft.folder
        metadata = {**graph_metadata(recipe, student=student.digest), "limbeck.task": task}
        say("export: building the fp32 graph")
        fp32, width = build_fp32(
            model,
            folder,
            {**metadata, "limbeck.form": "fp32"},
            task=task,
            opset=recipe.export.opset,
            static=recipe.export.shapes if isinstance(recipe.export.shapes, StaticShapes) else None,
        )
        cases = make_cases(_heldout(student.path), model, task=task)
        save_arrays(folder / PARITY, cases)
        forms: dict[str, dict[str, Any]] = {}
        known = Known()
        for form in recipe.export.forms:
            graphs = encoder_files(folder, form.kind)
            scheme, calibration = encoder_scheme(form, width), None
            if scheme:
                say(f"export: quantising to {form.kind}")
                calibration = calibration_for(
                    form, fp32, student.path, calibrated_reads(fp32, scheme), known=known
                )
                quantize_weights(
                    fp32,
                    graphs,
                    scheme=scheme,
                    metadata={**metadata, "limbeck.form": form.kind},
                    calibration=calibration,
                )
            census = take_census(graphs.last)
            require_quantized(form.kind, census)
            parity = measure_encoder_parity(form.kind, graphs.last, cases)
            require_parity(form.kind, parity)
            census["runs_on"] = where_nodes_run(graphs.last)
            forms[form.kind] = {
                "graph": graphs.last.relative_to(folder).as_posix(),
                "files": [
                    path.relative_to(folder).as_posix() for path in (graphs.last, graphs.data)
                ],
                "bytes": graphs.last.stat().st_size + graphs.data.stat().st_size,
                "rounding": asdict(scheme) if scheme else None,
                "smooth": calibration.alpha if calibration else 0.0,
                "parity": parity,
                "census": census,
            }
        shipped = recipe.export.forms[-1].kind
        used = [encoder_files(folder, name) for name in forms]
        write_client_files(
            model, folder, graphs=used, shipped=encoder_files(folder, shipped), genai=None
        )
        if task == "embedding":
            write_sentence_transformers(folder, width=width)
        _write_card(folder, recipe=recipe, student=student, forms=forms, shipped=shipped)
        draft.result = {
            "task": task,
            "shipped": shipped,
            "backend": {"name": "dynamo", "why": "encoders have no other"},
            "shapes": recipe.export.shapes.model_dump(mode="json"),
        }
        draft.result |= {"classes": student.result["classes"], "forms": forms}
    return open_artifact(out, kind="onnx", verify=False)


def encoder_files(folder: Path, form: str) -> Graphs:
    """Where the graph of ``form`` lies; an encoder has no second graph for scoring, so both names are of one."""
    files = form_files(folder, form)
    return replace(files, all=files.last)


# Graph -----------------------------------------------------------------------------------------------------------


class Classifier(torch.nn.Module):
    """A transformers classifier as a function of ids and mask."""

    outputs = ("logits",)

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        """Logits ``[B, C]``."""
        return (self.model(input_ids=input_ids, attention_mask=attention_mask).logits,)


class SentenceEncoder(torch.nn.Module):
    """A transformers encoder with its pooling, as a function of ids and mask."""

    outputs = ("last_hidden_state", "sentence_embedding")

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States ``[B, L, d]`` and unit vectors ``[B, d]``."""
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(states.dtype)
        mean = (states * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return states, torch.nn.functional.normalize(mean, dim=-1)


def load_student(model: Path, *, task: str) -> Classifier | SentenceEncoder:
    """The transformers folder ``model`` in eager fp32, as what the graph is to compute."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    if task == "classification":
        loaded = load_pretrained(
            AutoModelForSequenceClassification, model, what="a classifier", **options
        )
        return Classifier(loaded).eval()
    loaded = load_pretrained(AutoModel, model, what="an encoder", fresh=unused_pooler, **options)
    return SentenceEncoder(loaded).eval()


def build_fp32(
    model: Path,
    folder: Path,
    metadata: Mapping[str, str],
    *,
    task: str,
    opset: int | None = None,
    static: StaticShapes | None = None,
) -> tuple[Graphs, int]:
    """Build the fp32 graph of the transformers folder ``model`` below ``folder``; also returns the hidden width.

    ``opset`` is the ONNX operator set, none the exporter's choice. A ``static`` graph is of one shape. Raises `ModelError` for a model
    that torch cannot export.
    """
    graphs = encoder_files(folder, "fp32")
    graphs.data.parent.mkdir(exist_ok=True)
    student = load_student(model, task=task)
    config = student.model.config
    shape = (static.batch, static.length) if static else (_TRACED["rows"], _TRACED["tokens"])
    free = {0: "batch_size", 1: "sequence_length"}
    with tempfile.TemporaryDirectory(dir=folder) as temporary, quiet_exporter():
        build = Path(temporary) / "model.onnx"
        try:
            with torch.no_grad():
                program = torch.onnx.export(
                    student,
                    (torch.ones(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.int64)),
                    dynamo=True,
                    verbose=False,
                    input_names=["input_ids", "attention_mask"],
                    output_names=list(student.outputs),
                    opset_version=opset,
                    dynamic_shapes=None if static else {"input_ids": free, "attention_mask": free},
                )
            assert program is not None
            program.save(str(build), external_data=True)
        except OSError:
            raise  # the disk, not the architecture
        except Exception as error:  # torch.export and the exporter raise errors of many families
            raise ModelError(
                f"{model}: torch.onnx.export cannot export {type(student.model).__name__} ({type(error).__name__}: "
                f"{str(error)[:300]}). Use a student of an architecture of docs/architectures.md."
            ) from error
        (build.parent / "model.onnx.data").rename(graphs.data)
        proto = onnx.load(build, load_external_data=False)
        relocate(proto, graphs.data.name)
        split_gemm(proto)
        context = int(getattr(config, "max_position_embeddings", 0) or 0)
        context -= config.pad_token_id + 1 if config.model_type in COUNTS_FROM_PADDING else 0
        stamp(proto, {**metadata, "limbeck.context": str(context)})
        onnx.save(proto, graphs.last)
    return graphs, int(config.hidden_size)


def encoder_scheme(form: EncoderForm, width: int) -> Scheme | None:
    """As for decoders, but all products in integers: an encoder's come many rows at a time, where that is the fastest."""
    if isinstance(form, Int8DynamicForm | Int8StaticForm):
        most = most_of(form)
        each = PerChannel(most) if isinstance(form, Int8DynamicForm) else Static(most)
        return Scheme(
            body=each, attention=each, narrow=each, head=Blockwise(8, block_size_for(width))
        )
    return scheme_for(form, width)


# Parity ----------------------------------------------------------------------------------------------------------


def make_cases(
    heldout: Examples, model: Path, *, task: str
) -> dict[str, dict[str, npt.NDArray[Any]]]:
    """Ways to feed an encoder, and torch's answer to each row run by itself without padding: what a batch must not change."""
    order = np.argsort(heldout.lengths, kind="stable")
    ragged = order[np.linspace(0, len(order) - 1, min(_BATCH, len(order))).round().astype(int)]
    longest = heldout.batch(order[-1:])
    one = longest[0][:, :1], longest[1][:, :1]
    wide = tuple(np.pad(a, ((0, 0), (0, 3))) for a in heldout.batch(order[:2]))
    inputs = {"ragged": heldout.batch(ragged), "longest": longest, "one_token": one, "padded": wide}
    student = load_student(model, task=task)
    cases = {}
    with torch.inference_mode():
        for name, (ids, mask) in inputs.items():
            answers = [
                student(
                    torch.from_numpy(row[kept == 1][None]),
                    torch.ones(1, int(kept.sum()), dtype=torch.int64),
                )[-1][0]
                for row, kept in zip(ids, mask, strict=True)
            ]
            cases[name] = {
                "input_ids": ids,
                "attention_mask": mask,
                "answers": torch.stack(answers).numpy(),
            }
    return cases


def measure_encoder_parity(form: str, graph: Path, cases: Cases) -> dict[str, Any]:
    """Differences between the graph of ``form`` and torch's answers, by case and over all rows.

    `alike` is the share of rows with the same class where torch is sure (classification), or the mean cosine (embedding). The
    result names the tolerance and the ``failures``, empty when the form is good enough.
    """
    encoder = GraphEncoder(graph)
    relative, least = _TOLERANCES[form]
    scale = max(1.0, *(float(np.abs(case["answers"]).max()) for case in cases.values()))
    by_case, alike = {}, list[float]()
    for name, case in cases.items():
        expected, found = case["answers"], encoder.run(case["input_ids"], case["attention_mask"])
        likeness = list(_likeness(expected, found, task=encoder.task))
        alike += likeness
        by_case[name] = {
            "max_abs": float(np.abs(expected - found).max()),
            "mean_abs": float(np.abs(expected - found).mean()),
        }
    rows = sum(len(case["answers"]) for case in cases.values())
    limits = {"max_abs": relative * scale, "alike": least}
    summary = {
        "rows": rows,
        "max_abs": max(c["max_abs"] for c in by_case.values()),
        "alike": float(np.mean(alike)) if alike else 1.0,
    }
    failures = [
        f"{name}: max_abs is {c['max_abs']:.3g}, tolerance {limits['max_abs']:.3g}"
        for name, c in by_case.items()
        if not c["max_abs"] <= limits["max_abs"]  # NaN is past every tolerance
    ]
    if not summary["alike"] >= least - _ALIKE:
        failures.append(f"all cases: alike is {summary['alike']:.3g}, tolerance {least:.3g}")
    return {**summary, "tolerance": limits, "cases": by_case, "failures": failures}


def _likeness(expected: npt.NDArray[Any], found: npt.NDArray[Any], *, task: str) -> Iterable[float]:
    if task == "embedding":
        return (float(a @ b) for a, b in zip(expected, found, strict=True))
    ordered = np.sort(expected, axis=1)
    sure = ordered[:, -1] - ordered[:, -2] >= _LEAD
    return (float(same) for same in (expected.argmax(1) == found.argmax(1))[sure])


def verify_encoder(artifact: Artifact) -> dict[str, Any]:
    """Measure every form of an encoder's ``onnx`` artifact again, without torch. See `export.verify_parity`."""
    cases = load_arrays(artifact.path / PARITY)
    measured = {}
    for name, form in artifact.result["forms"].items():
        measured[name] = measure_encoder_parity(name, artifact.path / form["graph"], cases)
        require_parity(name, measured[name])
    return measured


def _heldout(student: Path) -> Examples:
    if not (student / EXAMPLES).is_file():
        raise ArtifactError(
            f"{student}: {EXAMPLES} is missing; parity is measured on held-out examples. Run the compress stage again."
        )
    return load_examples(student / EXAMPLES)


# Text files ------------------------------------------------------------------------------------------------------


def write_sentence_transformers(folder: Path, *, width: int) -> None:
    """What sentence-transformers reads to pool and to normalise as the graph does."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
        {
            "idx": 2,
            "name": "2",
            "path": "2_Normalize",
            "type": "sentence_transformers.models.Normalize",
        },
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n")
    (folder / "1_Pooling").mkdir()
    pooling = {
        "word_embedding_dimension": width,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_cls_token": False,
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling, indent=2) + "\n")


def _write_card(
    folder: Path,
    *,
    recipe: EncoderRecipe,
    student: Artifact,
    forms: Mapping[str, Mapping[str, Any]],
    shipped: str,
) -> None:
    """The model card: the hub's YAML header, then what it is, what was measured, and digests."""
    pipeline = "text-classification" if recipe.task == "classification" else "feature-extraction"
    classes = (
        f" Classes: {', '.join(student.result['classes'])}." if student.result["classes"] else ""
    )
    metrics = {"student": student.result["metrics"]} | {
        f"teacher {name}": report["metrics"] for name, report in student.result["teachers"].items()
    }
    columns = list(student.result["metrics"])
    rows = [[name, *(f"{values[c]:.4f}" for c in columns)] for name, values in metrics.items()]
    parity = [
        [
            f"`{name}`",
            f"{f['bytes'] / 1e6:.1f}",
            f"{f['parity']['max_abs']:.2g}",
            f"{f['parity']['alike']:.4f}",
        ]
        for name, f in forms.items()
    ]
    like = (
        "same class where torch is sure"
        if recipe.task == "classification"
        else "mean cosine with torch's vector"
    )
    teachers = json.loads((student.path / "teachers.json").read_text())
    parts = [
        card_header(
            recipe,
            pipeline=pipeline,
            shipped=shipped,
            student=student.result,
            student_digest=student.digest,
            teachers=teachers,
            measured={recipe.name: student.result["metrics"]},
            names={
                metric: f"{'nats an example' if metric == 'nll' else metric.replace('_', ' ')}, of {in_torch(shipped)}"
                for metric in columns
            },
        ),
        f"# {recipe.name}",
        recipe.description,
        f"Made by Limbeck: distilled, exported to ONNX and shipped as `{shipped}`.{classes} Licences of the base model, the teachers "
        "and the texts apply; look them up before you pass it on.",
        *what_went_in(recipe, student=student.result, teachers=teachers),
        "## On held-out examples",
        markdown_table(["", *columns], rows),
        f"Of {in_torch(shipped)}{', and its teachers' if teachers else ''}. What ships is measured by `limbeck bench`.",
        "## The graphs against the torch student",
        markdown_table(["form", "MB", "largest difference", like], parity),
        *digests(recipe, student=student.digest, parents=student.manifest["parents"]),
    ]
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n")
