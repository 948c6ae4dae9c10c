"""Opening a graph with onnxruntime: the package, providers, session options, adapter files.

Decoders and encoders open their sessions here, so both run with the same options.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from limbeck.contract.errors import ArtifactError, EnvironmentalError
from limbeck.contract.files import open_regular
from limbeck.contract.machine import available_cores, sums_overflow
from limbeck.contract.progress import say
from limbeck.contract.recipe import Provider

_SPIN = 100  # microseconds; docs/experiments/decoder.md has the measurements
PROVIDERS: Mapping[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


def import_onnxruntime() -> Any:
    """Return the onnxruntime module.

    Raises `EnvironmentalError` when it is missing, or when two builds share one folder.
    """
    builds = [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)]
    if len(builds) == 2:
        raise EnvironmentalError(
            "onnxruntime and onnxruntime-gpu are both installed. They write into the same folder, "
            "so neither can be trusted. Run: pip uninstall -y onnxruntime onnxruntime-gpu, "
            "then pip install 'limbeck[cpu]' or pip install 'limbeck[gpu]'."
        )
    try:
        import onnxruntime
    except ImportError as error:
        if builds:
            raise EnvironmentalError(
                f"{builds[0]} is installed but cannot be imported ({error}); install it again."
            ) from error
        raise EnvironmentalError(
            "onnxruntime is not installed, expected one build of it; "
            "run: pip install 'limbeck[cpu]' (or 'limbeck[gpu]' for CUDA)."
        ) from None
    return onnxruntime


def providers() -> list[Provider]:
    """Execution providers of the installed onnxruntime, by the names that recipes use."""
    available = import_onnxruntime().get_available_providers()
    return [name for name, theirs in PROVIDERS.items() if theirs in available]


def asked_for(provider: Provider) -> list[str]:
    """Providers to open a session with. Nodes that TensorRT does not take stay on CUDA."""
    return [PROVIDERS[provider], *([PROVIDERS["cuda"]] if provider == "tensorrt" else [])]


def open_session(
    graph: Path,
    *,
    threads: int | None = None,
    provider: Provider = "cpu",
    memory_pattern: bool = True,
    dequantizes: bool = False,
) -> Any:
    """Open the graph file and return its ``InferenceSession``.

    ``threads`` defaults to every core this process may use. Switch ``memory_pattern`` off where
    input shapes differ at every run: onnxruntime would plan memory for each shape anew.
    ``dequantizes`` is for a graph that turns its weights into fp32 as it runs: each matrix is made
    just before its product and freed after it.
    Raises `EnvironmentalError` when the provider is missing or cannot start, `ArtifactError` when
    onnxruntime cannot open the file.
    """
    with open_regular(graph):
        pass  # onnxruntime would wait for a pipe
    ort = import_onnxruntime()
    name, available = PROVIDERS[provider], ort.get_available_providers()
    if name not in available:
        remedy = (
            "install it again."
            if provider == "cpu"
            else "run: pip install 'limbeck[gpu]' on a machine with an NVIDIA card."
        )
        raise EnvironmentalError(
            f"onnxruntime {ort.__version__} has no {name} here, only {', '.join(available)}; "
            + remedy
        )
    options = _options(ort, threads=threads, memory_pattern=memory_pattern)
    switched_off = []
    if dequantizes:
        # By default onnxruntime keeps all matrices until the run ends: 3 times the file.
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        switched_off = ["ConstantFolding"]  # which would make them when the graph is opened
    try:
        session = ort.InferenceSession(
            str(graph), options, providers=asked_for(provider), disabled_optimizers=switched_off
        )
    except Exception as error:  # onnxruntime's errors share no base class
        raise ArtifactError(
            f"{graph}: onnxruntime cannot open it ({error}); export the student again."
        ) from error
    if (started := session.get_providers()[0]) != name:  # onnxruntime only logs this
        raise EnvironmentalError(
            f"onnxruntime {ort.__version__} could not start {name} and took {started} instead; "
            "look at `nvidia-smi` and at the CUDA and cuDNN that pip install 'limbeck[gpu]' brings."
        )
    warn_of_overflow(session.get_modelmeta().custom_metadata_map)
    return session


def _options(ort: Any, *, threads: int | None, memory_pattern: bool) -> Any:
    """Session options of every graph."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = memory_pattern
    options.log_severity_level = 4
    # Threads may spin within a run, where the next operator is microseconds away, but not for
    # long: beside a busy process they would take each other's time. Between runs they must sleep.
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def warn_of_overflow(metadata: Mapping[str, str]) -> None:
    """Warn when 8-bit weights overflow this processor's sums: answers are then wrong."""
    if metadata.get("limbeck.integer_weights") == "8 bits" and sums_overflow():
        say(
            f"warning: {metadata.get('limbeck.form', 'this form')} has 8-bit weights, which "
            "overflow on this processor (x86 without VNNI). Its answers may be wrong. `limbeck "
            "verify` says how far. Export it with reduce_range: true, or ship int8-weight."
        )


def read_adapter(path: Path, *, base: str | None, inputs: Collection[str]) -> dict[str, Any]:
    """Values of the adapter file at ``path``, by graph input.

    ``base`` is the base that the graph was made for, ``inputs`` are the inputs that it lets an
    adapter fill. Raises `ArtifactError` when the file is not an adapter or belongs to another base.
    """
    try:
        with open_regular(path):  # onnxruntime would wait for a pipe
            adapter = import_onnxruntime().AdapterFormat.read_adapter(str(path))
    except Exception as error:  # onnxruntime's errors share no base class
        raise ArtifactError(
            f"{path}: onnxruntime cannot read it as an adapter ({error}); expected an "
            ".onnx_adapter file that `limbeck export` wrote with export.adapters: separate."
        ) from error
    if base is None:
        raise ArtifactError(
            f"{path}: this graph takes no adapter; "
            "export its student with export.adapters: separate."
        )
    values: dict[str, Any] = adapter.get_parameters()
    fits = set(values) <= set(inputs)
    if str(adapter.get_model_version()) != base or not fits:
        raise ArtifactError(
            f"{path}: made for base {adapter.get_model_version()}, this graph is of base {base}"
            f"{'' if fits else ' and takes other inputs'}; "
            "open it with the base of its own student."
        )
    return values


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
