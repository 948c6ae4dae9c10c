"""What must be known before rounding: the ranges of activations on calibration text, and how far outliers are moved.

Runs the fp32 graph over blocks of training text. Histograms and thresholds are onnxruntime's; `export.smooth` moves outliers.

Shape letters: S tokens, K inputs of a product.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, TensorProto, helper

from export.graph import Graphs
from export.smooth import Boundary, Factors, find_boundaries, find_factors
from limbeck.artifact import available_cores
from limbeck.encoder_recipe import EncoderForm
from limbeck.errors import ArtifactError
from limbeck.heldout import CALIBRATION, load_calibration
from limbeck.progress import say, task
from limbeck.recipe import Form, Int8DynamicForm, Int8StaticForm, Int8TrtForm, Int8WeightForm
from limbeck.runtime import import_onnxruntime

Floats = npt.NDArray[np.float32]
Method = Literal["min-max", "percentile", "entropy"]

SMOOTH = 0.5  # share of the outliers' difficulty that moves into int8 weights where a recipe does not say
_BINS = {"percentile": 2048, "entropy": 512}
_RARE = 99.999  # percent of the values that a percentile range holds


@dataclass(frozen=True)
class Calibration:
    """Least and largest value of each activation, once ``factors`` are applied."""

    ranges: Mapping[str, tuple[float, float]]
    factors: Factors = field(default_factory=Factors)
    alpha: float = 0.0  # that the factors were made with; 0 where nothing moved


def calibrate(
    source: Graphs,
    rows: Sequence[npt.NDArray[np.int64]],
    activations: Sequence[str],
    *,
    method: Method,
    alpha: float,
    maxima: MutableMapping[str, Floats] | None = None,
) -> Calibration:
    """Ranges of ``activations`` of the fp32 graphs over the token ``rows`` ``[S]``, outliers migrated by ``alpha``.

    ``alpha`` is the share of the difficulty that moves into the weights; 0 moves nothing. ``maxima`` keeps the largest value by
    channel of what outliers can leave, ``[K]`` by activation, for the next form of the same graphs and rows.
    """
    proto = onnx.load(source.last, load_external_data=False)
    boundaries: Mapping[str, Boundary] = find_boundaries(proto) if alpha else {}
    maxima = {} if maxima is None else maxima
    unknown = [name for name in boundaries if name not in maxima]
    # Beside the weights, as the weights' location is relative to the graph.
    with tempfile.NamedTemporaryFile(dir=source.data.parent, suffix=".onnx") as probe:
        run = _Run(proto, Path(probe.name), [*activations, *unknown]) if activations or unknown else None
        if run and unknown:
            maxima.update(_channel_maxima(run, rows, unknown))
        factors, divided = Factors(), dict[str, Floats]()
        if boundaries:
            factors, divided = find_factors(source, proto, boundaries, maxima, alpha=alpha)
        return Calibration(
            _ranges(run, rows, activations, divided, method) if run and activations else {},
            factors,
            alpha if boundaries else 0.0,
        )


def calibration_for(
    form: Form | EncoderForm,
    source: Graphs,
    student: Path,
    activations: Sequence[str],
    *,
    as_they_are: bool = False,
    maxima: MutableMapping[str, Floats] | None = None,
) -> Calibration | None:
    """What ``form`` must know of the ``activations`` whose ranges it needs, and of outliers, measured on the training rows of
    the ``student`` artifact; none for a form that needs nothing. Outliers stay where they are where the weights must be the
    student's own, ``as_they_are``, unless the form says otherwise: for recovery, which trains through their rounding, and for a base
    that serves the adapters of many students. ``maxima`` is that of `calibrate`.

    Raises `ArtifactError` for a student that carries no training rows.
    """
    match form:
        case Int8StaticForm() | Int8TrtForm():
            method = form.calibration
        case Int8WeightForm() | Int8DynamicForm():
            method = "min-max"
        case _:
            return None
    alpha = (0.0 if as_they_are else SMOOTH) if form.smooth is None else form.smooth
    movable = bool(alpha) and bool(find_boundaries(onnx.load(source.last, load_external_data=False)))
    if form.smooth and not movable:
        say(
            f"export: {form.kind}: smooth moves nothing, as nothing in this graph can be divided exactly before its products"
        )
    if not movable and not activations:
        return None
    if not (student / CALIBRATION).is_file():
        without = ", or set its smooth: 0" if not activations else ""
        raise ArtifactError(
            f"{student}: {CALIBRATION} is missing; {form.kind} is calibrated on training text. The student is older than "
            f"that: delete its folder and run the compress stage again{without}, or take the form out of export.forms."
        )
    rows = load_calibration(student / CALIBRATION)
    return calibrate(source, rows, activations, method=method, alpha=alpha if movable else 0.0, maxima=maxima)


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
    divided: Mapping[str, Floats],
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
            values = {name: x / divided[name] if name in divided else x for name, x in found.items()}
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
