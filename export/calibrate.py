"""What int8-static must know before it rounds: the ranges of activations on calibration text, and where outliers can be moved.

Runs the fp32 graph over blocks of training text. Histograms and thresholds are onnxruntime's; the migration of outliers is that
of SmoothQuant (Xiao et al. 2023): a norm's weights are divided by factors that the next products' weights are multiplied by,
which changes nothing in fp32 and makes the activations between them easier to round.

Shape letters: S tokens, K inputs of a product.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, TensorProto, helper

from export.graph import Graphs
from export.weights import external_array
from limbeck.artifact import available_cores
from limbeck.encoder_recipe import EncoderForm
from limbeck.errors import ArtifactError
from limbeck.heldout import CALIBRATION, load_calibration
from limbeck.progress import task
from limbeck.recipe import Form, Int8StaticForm, Int8TrtForm
from limbeck.runtime import import_onnxruntime

Floats = npt.NDArray[np.float32]
Method = Literal["min-max", "percentile", "entropy"]

# Norms with weights along the last axis, and which inputs those are.
_NORMS = {
    "SimplifiedLayerNormalization": (1,),
    "SkipSimplifiedLayerNormalization": (2,),
    "LayerNormalization": (1, 2),
    "SkipLayerNormalization": (2, 3),
    "RMSNormalization": (1,),
    "Mul": (0, 1),
}
_BINS = {"percentile": 2048, "entropy": 512}
_RARE = 99.999  # percent of the values that a percentile range holds


@dataclass(frozen=True)
class Calibration:
    """Least and largest value of each activation, after each initialiser named in ``factors`` was multiplied."""

    ranges: Mapping[str, tuple[float, float]]
    factors: Mapping[str, Floats] = field(
        default_factory=dict
    )  # [K], along K of a matrix or the whole of a norm's weights


@dataclass(frozen=True)
class Boundary:
    """An activation that a norm makes and that products with constant matrices alone read."""

    norm: tuple[str, ...]  # initialisers ``[K]`` that the activation is proportional to
    matrices: tuple[str, ...]


def calibrate(
    source: Graphs, rows: Sequence[npt.NDArray[np.int64]], activations: Sequence[str], *, method: Method, alpha: float
) -> Calibration:
    """Ranges of ``activations`` of the fp32 graphs over the token ``rows`` ``[S]``, outliers migrated by ``alpha``.

    ``alpha`` is the share of the difficulty that moves into the weights; 0 moves nothing.
    """
    proto = onnx.load(source.last, load_external_data=False)
    boundaries = {name: b for name, b in find_boundaries(proto).items() if name in set(activations)} if alpha else {}
    with tempfile.TemporaryDirectory(dir=source.data.parent) as temporary:
        # Beside the weights, as the weights' location is relative to the graph; a link, so nothing is copied.
        (Path(temporary) / source.data.name).hardlink_to(source.data)
        run = _Run(proto, Path(temporary) / "calibration.onnx", [*activations])
        shifts: dict[str, Floats] = {}
        factors: dict[str, Floats] = {}
        if boundaries:
            largest = _channel_maxima(run, rows, list(boundaries))
            for name, boundary in boundaries.items():
                shift = _factors(proto, source, boundary, largest[name], alpha)
                shifts[name] = shift
                factors |= dict.fromkeys(boundary.norm, np.reciprocal(shift)) | dict.fromkeys(boundary.matrices, shift)
        return Calibration(_ranges(run, rows, activations, shifts, method), factors)


def calibration_for(
    form: Form | EncoderForm, source: Graphs, student: Path, activations: Sequence[str]
) -> Calibration | None:
    """What a static ``form`` must know of ``activations``, measured on the training rows of the ``student`` artifact; none for the others.

    Raises `ArtifactError` for a student that carries no training rows.
    """
    if not isinstance(form, Int8StaticForm | Int8TrtForm):
        return None
    if not (student / CALIBRATION).is_file():
        raise ArtifactError(
            f"{student}: {CALIBRATION} is missing; {form.kind} is calibrated on training text. The student is older than that "
            "form: delete its folder and run the compress stage again, or take the form out of export.forms."
        )
    rows = load_calibration(student / CALIBRATION)
    return calibrate(source, rows, activations, method=form.calibration, alpha=form.smooth)


def find_boundaries(proto: ModelProto) -> dict[str, Boundary]:
    """Activations whose outliers can move from a norm's weights into the products that read it, by name."""
    open_ = {value.name for value in proto.graph.input}  # an adapter's inputs have defaults, but they are no constants
    tensors = {t.name: t for t in proto.graph.initializer if t.name not in open_}
    turned = {n.output[0]: n.input[0] for n in proto.graph.node if n.op_type == "Transpose" and n.input[0] in tensors}
    readers: dict[str, list[Any]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: dict[str, Boundary] = {}
    for node in proto.graph.node:
        places = [at for at in _NORMS.get(node.op_type, ()) if at < len(node.input)]
        weights = [node.input[at] for at in places if len(getattr(tensors.get(node.input[at]), "dims", ())) == 1]
        # A norm written out ends in a product of its weights with what they scale; a product of two activations is none.
        if not weights or (node.op_type != "Mul" and len(weights) < len([at for at in places if node.input[at]])):
            continue
        products = readers.get(node.output[0], [])
        matrices = [turned.get(p.input[1], p.input[1]) for p in products if p.op_type == "MatMul"]
        constant = all(p.op_type == "MatMul" and p.input[0] == node.output[0] for p in products)
        own = all(len(readers[name]) == 1 for name in (*matrices, *weights))
        if products and constant and own and set(matrices) <= set(tensors):
            found[node.output[0]] = Boundary(tuple(weights), tuple(matrices))
    return found


def _factors(proto: ModelProto, source: Graphs, boundary: Boundary, largest_K: Floats, alpha: float) -> Floats:
    """max|x|^alpha / max|w|^(1 - alpha) for each channel, 1 where a channel is always 0."""
    tensors = {t.name: t for t in proto.graph.initializer}
    turned = {n.input[0] for n in proto.graph.node if n.op_type == "Transpose"}
    weights_K = np.zeros_like(largest_K)
    for name in boundary.matrices:
        values = np.abs(external_array(tensors[name], source.data.parent))
        weights_K = np.maximum(weights_K, values.max(axis=0 if name in turned else 1))
    alive = (largest_K > 0) & (weights_K > 0)
    safe_x, safe_w = np.where(alive, largest_K, 1), np.where(alive, weights_K, 1)
    return np.where(alive, safe_x**alpha / safe_w ** (1 - alpha), 1).astype(np.float32)


class _Run:
    """The fp32 graph with some of its activations as outputs."""

    def __init__(self, proto: ModelProto, path: Path, activations: Sequence[str]) -> None:
        ort = import_onnxruntime()
        probe = ModelProto()
        probe.CopyFrom(proto)
        probe.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in activations)
        onnx.save(probe, path)
        options = ort.SessionOptions()
        options.intra_op_num_threads = available_cores()
        options.log_severity_level = 4
        # Fusions across an activation that is asked for would take it away.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs = {v.name: v.shape for v in self._session.get_inputs()}
        self._past = {name: shape for name, shape in inputs.items() if name.startswith("past_key_values.")}
        self._fixed = inputs["attention_mask"] if isinstance(inputs["attention_mask"][0], int) else None

    def __call__(self, ids_S: npt.NDArray[np.int64], activations: Sequence[str]) -> dict[str, Floats]:
        feeds: dict[str, Any] = {
            "input_ids": ids_S[None],
            "attention_mask": np.ones((1, len(ids_S)), np.int64),
            **{name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in self._past.items()},
        }
        if self._fixed is None:
            return dict(zip(activations, self._session.run(list(activations), feeds), strict=True))
        if self._past:
            return self._step_by_step(ids_S, activations)
        whole = {name: np.zeros(self._fixed, np.int64) for name in ("input_ids", "attention_mask")}
        for name, values in whole.items():
            values[:, : len(ids_S)] = feeds[name]
        found = self._session.run(list(activations), whole)
        # The first row without its padding; what is pooled has no tokens.
        return {n: x[:1, : len(ids_S)] if x.ndim == 3 else x[:1] for n, x in zip(activations, found, strict=True)}

    def _step_by_step(self, ids_S: npt.NDArray[np.int64], activations: Sequence[str]) -> dict[str, Floats]:
        """As a call, of a graph that reads one token a run and gives its cache back."""
        assert self._fixed is not None
        columns = self._fixed[1]
        cache = {name: np.zeros(shape, np.float32) for name, shape in self._past.items()}
        parts: list[list[Floats]] = []
        for at, token in enumerate(ids_S[:columns]):
            mask = np.zeros(self._fixed, np.int64)
            mask[:, columns - at - 1 :] = 1
            feeds = {"input_ids": np.full((len(mask), 1), token), "attention_mask": mask, **cache}
            presents = [name.replace("past_key_values", "present") for name in cache]
            found = self._session.run([*activations, *presents], feeds)
            parts.append([x[:1] for x in found[: len(activations)]])
            cache = dict(zip(cache, found[len(activations) :], strict=True))
        return {name: np.concatenate(x, axis=1) for name, x in zip(activations, zip(*parts, strict=True), strict=True)}


def _channel_maxima(run: _Run, rows: Sequence[npt.NDArray[np.int64]], activations: Sequence[str]) -> dict[str, Floats]:
    largest: dict[str, Floats] = {}
    with task("calibrate: channels", len(rows)) as progress:
        for row in rows:
            for name, values in run(row, activations).items():
                most = np.abs(values).reshape(-1, values.shape[-1]).max(axis=0)
                largest[name] = np.maximum(largest.get(name, most), most)
            progress.advance()
    return largest


def _ranges(
    run: _Run,
    rows: Sequence[npt.NDArray[np.int64]],
    activations: Sequence[str],
    shifts: Mapping[str, Floats],
    method: Method,
) -> dict[str, tuple[float, float]]:
    from onnxruntime.quantization.calibrate import HistogramCollector

    collector = HistogramCollector(
        method=method,
        symmetric=False,
        num_bins=_BINS.get(method, 0),
        num_quantized_bins=128,
        percentile=_RARE,
        scenario="same",
    )
    ranges: dict[str, tuple[float, float]] = {}
    with task("calibrate: ranges", len(rows)) as progress:
        for row in rows:
            found = run(row, activations)
            values = {name: x / shifts[name] if name in shifts else x for name, x in found.items()}
            if method == "min-max":
                for name, x in values.items():
                    low, high = ranges.get(name, (0.0, 0.0))
                    ranges[name] = (min(low, float(x.min())), max(high, float(x.max())))
            else:
                with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
                    collector.collect({name: [x] for name, x in values.items()})
            progress.advance()
    if method == "min-max":
        return ranges
    with contextlib.redirect_stdout(io.StringIO()):
        thresholds = collector.compute_collection_result()
    return {name: (min(float(t[0]), 0.0), max(float(t[1]), 0.0)) for name, t in thresholds.items()}
