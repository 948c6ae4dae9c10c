"""Measure activations before rounding: ranges, second moments, and the outliers to move.

Runs the fp32 graph over blocks of training text. Histograms and thresholds are onnxruntime's;
`export.round.smooth` moves outliers.

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

from export.graphs import Graphs
from export.round.smooth import Boundary, Factors, find_boundaries, find_factors
from limbeck.contract.data.arrays import Floats
from limbeck.contract.data.heldout import CALIBRATION, load_calibration
from limbeck.contract.errors import ArtifactError
from limbeck.contract.machine import available_cores
from limbeck.contract.progress import say, task
from limbeck.contract.recipe import (
    EncoderForm,
    Form,
    Int4WeightForm,
    Int8DynamicForm,
    Int8StaticForm,
    Int8TrtForm,
    Int8WeightForm,
)
from limbeck.runtime.session import import_onnxruntime

Method = Literal["min-max", "percentile", "entropy"]

# default share of the outliers' difficulty that moves into int8 weights
SMOOTH = 0.5
_BINS = {"percentile": 2048, "entropy": 512}
_RARE = 99.999  # percent of the values that a percentile range holds


@dataclass(frozen=True)
class Calibration:
    """Min and max of each activation after ``factors``; by matrix, the sum of x xᵀ ``[K, K]``."""

    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    factors: Factors = field(default_factory=Factors)
    alpha: float = 0.0  # that the factors were made with; 0 where nothing moved
    moments: Mapping[str, Floats] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """Measured activations of a graph, kept for the next form of the same graph and rows."""

    maxima: dict[str, Floats] = field(default_factory=dict)  # largest size by channel, [K]
    moments: dict[str, Floats] = field(default_factory=dict)  # sum of x xᵀ, [K, K]


def calibrate(
    source: Graphs,
    rows: Sequence[npt.NDArray[np.int64]],
    activations: Sequence[str],
    *,
    method: Method,
    alpha: float,
    known: Known | None = None,
) -> Calibration:
    """Ranges of ``activations`` of the fp32 graphs over the token ``rows`` ``[S]``.

    ``alpha`` is the share of the outliers' difficulty that moves into the weights; 0 moves nothing.
    ``known`` keeps the measurements for the next call.
    """
    proto = onnx.load(source.last, load_external_data=False)
    boundaries: Mapping[str, Boundary] = find_boundaries(proto) if alpha else {}
    maxima = (known or Known()).maxima
    unknown = [name for name in boundaries if name not in maxima]
    # In the same folder as the weights, because their location is relative to the graph.
    with tempfile.NamedTemporaryFile(dir=source.data.parent, suffix=".onnx") as probe:
        run = (
            _Run(proto, Path(probe.name), [*activations, *unknown])
            if activations or unknown
            else None
        )
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
    reads: Mapping[str, str],
    *,
    as_they_are: bool = False,
    known: Known | None = None,
) -> Calibration | None:
    """Activations that ``form`` needs, from the ``student`` artifact's training rows; or None.

    ``reads`` gives the activation that each matrix reads. With ``as_they_are`` the weights stay the
    student's own: outliers stay and each weight is rounded to nearest, unless the form says
    otherwise. Recovery needs this, because it trains through that rounding; so does a base that
    serves the adapters of many students. ``known`` is that of `calibrate`.

    Raises `ArtifactError` if the student has no training rows.
    """
    method: Method = "min-max"
    match form:
        case Int8StaticForm() | Int8TrtForm():
            method = form.calibration
        case Int8WeightForm() | Int8DynamicForm():
            pass
        case Int4WeightForm():
            rounds_each_alone = form.algorithm == "rtn" or (form.algorithm is None and as_they_are)
            if not reads or rounds_each_alone:
                return None
            rows = calibration_rows(student, form, "set its algorithm: rtn")
            moments = _moments(source, rows, list(dict.fromkeys(reads.values())), known or Known())
            return Calibration(
                moments={matrix: moments[activation] for matrix, activation in reads.items()}
            )
        case _:
            return None
    activations = list(dict.fromkeys(reads.values()))
    alpha = (0.0 if as_they_are else SMOOTH) if form.smooth is None else form.smooth
    movable = bool(alpha) and bool(
        find_boundaries(onnx.load(source.last, load_external_data=False))
    )
    if form.smooth and not movable:
        say(
            f"export: {form.kind}: smooth moves nothing, as nothing in this graph can be divided "
            "exactly before its products"
        )
    if not movable and not activations:
        return None
    rows = calibration_rows(student, form, "" if activations else "set its smooth: 0")
    return calibrate(
        source, rows, activations, method=method, alpha=alpha if movable else 0.0, known=known
    )


def calibration_rows(
    student: Path, form: Form | EncoderForm, instead: str
) -> list[npt.NDArray[np.int64]]:
    """Token rows of the ``student`` artifact, for activations.

    Raises `ArtifactError` if it has none; ``instead`` names a way to do without.
    """
    if not (student / CALIBRATION).is_file():
        without = f", or {instead}" if instead else ""
        raise ArtifactError(
            f"{student}: {CALIBRATION} is missing; {form.kind} is calibrated on training text. The "
            "student is older than that: delete its folder and run the compress stage "
            f"again{without}, or take the form out of export.forms."
        )
    return load_calibration(student / CALIBRATION)


def _moments(
    source: Graphs, rows: Sequence[npt.NDArray[np.int64]], activations: Sequence[str], known: Known
) -> Mapping[str, Floats]:
    unknown = [name for name in activations if name not in known.moments]
    if unknown:
        proto = onnx.load(source.last, load_external_data=False)
        with tempfile.NamedTemporaryFile(dir=source.data.parent, suffix=".onnx") as probe:
            run = _Run(proto, Path(probe.name), unknown)
            with task("calibrate: moments", len(rows)) as progress:
                for row in rows:
                    for name, values in run(row, unknown).items():
                        x_SK = values.reshape(-1, values.shape[-1])
                        moments_KK = x_SK.T @ x_SK
                        known.moments[name] = known.moments.get(name, np.float32(0)) + moments_KK
                    progress.advance()
    return known.moments


class _Run:
    """The fp32 graph with some activations as outputs."""

    def __init__(self, proto: ModelProto, path: Path, activations: Sequence[str]) -> None:
        ort = import_onnxruntime()
        probe = ModelProto()
        probe.CopyFrom(proto)
        probe.graph.output.extend(
            helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in activations
        )
        onnx.save(probe, path)
        options = ort.SessionOptions()
        options.intra_op_num_threads = available_cores()
        options.log_severity_level = 4
        # A fusion across a requested activation would remove it.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs = {v.name: v.shape for v in self._session.get_inputs()}
        self._past = {
            name: shape for name, shape in inputs.items() if name.startswith("past_key_values.")
        }
        self._fixed = (
            inputs["attention_mask"] if isinstance(inputs["attention_mask"][0], int) else None
        )

    def __call__(
        self, ids_S: npt.NDArray[np.int64], activations: Sequence[str]
    ) -> dict[str, Floats]:
        feeds: dict[str, Any] = {
            "input_ids": ids_S[None],
            "attention_mask": np.ones((1, len(ids_S)), np.int64),
            **{
                name: np.zeros((1, shape[1], 0, shape[3]), np.float32)
                for name, shape in self._past.items()
            },
        }
        if self._fixed is None:
            return dict(zip(activations, self._session.run(list(activations), feeds), strict=True))
        if self._past:
            return self._step_by_step(ids_S, activations)
        whole = {name: np.zeros(self._fixed, np.int64) for name in ("input_ids", "attention_mask")}
        for name, values in whole.items():
            values[:, : len(ids_S)] = feeds[name]
        found = self._session.run(list(activations), whole)
        # The first row without its padding; pooled outputs have no token axis.
        return {
            n: x[:1, : len(ids_S)] if x.ndim == 3 else x[:1]
            for n, x in zip(activations, found, strict=True)
        }

    def _step_by_step(
        self, ids_S: npt.NDArray[np.int64], activations: Sequence[str]
    ) -> dict[str, Floats]:
        """Call a graph that reads one token per run and returns its cache."""
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
        return {
            # Along the tokens, also where rows and tokens are one axis (GPT-2's products).
            name: np.concatenate(x, axis=-2)
            for name, x in zip(activations, zip(*parts, strict=True), strict=True)
        }


def _channel_maxima(
    run: _Run, rows: Sequence[npt.NDArray[np.int64]], activations: Sequence[str]
) -> dict[str, Floats]:
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
            values = {
                name: x / divided[name] if name in divided else x for name, x in found.items()
            }
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
