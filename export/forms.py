"""One form of the student: its graphs and the measurements that decide if it is kept."""

from __future__ import annotations

import ctypes
import gc
import tempfile
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from export.build.backend import Built
from export.check.census import require_quantized, take_census, where_nodes_run
from export.check.parity import provider_here
from export.check.weights import require_weights
from export.graphs import Graphs, form_files
from export.round.calibrate import Calibration, Known, calibration_for
from export.round.half import cast_to_half
from export.round.matrices import calibrated_reads
from export.round.mixed import more_bits_everywhere
from export.round.quantize import quantize_weights
from export.round.scheme import Scheme
from export.tasks.base import AnyForm, Task
from limbeck.contract.artifact import Artifact
from limbeck.contract.progress import say
from limbeck.contract.recipe import Provider
from limbeck.contract.results.onnx import ExportedForm


@dataclass(frozen=True)
class Job:
    """What the making of every form needs."""

    task: Task
    student: Artifact
    folder: Path
    built: Built
    known: Known = field(default_factory=Known)


def make_form(form: AnyForm, job: Job) -> tuple[ExportedForm, Scheme | None]:
    """Write the graphs of ``form`` and measure them; also returns how it was rounded.

    Raises `QualityError` when matrices stayed in float, and `ParityError` when weights or answers
    are past tolerance.
    """
    task, graphs = job.task, job.task.files(form.kind)
    provider: Provider = "cpu" if form.kind == "fp32" else task.provider
    scheme, mixed = task.scheme(form, job.built, partial(_calibrate, form, job))
    half = form.kind == "fp16" or provider == "cuda"
    if form.kind != "fp32":
        say(f"export: making {form.kind}{' in fp16' if half and scheme else ''}")
    calibration = _calibrate(form, job, scheme) if scheme else None
    metadata = {**task.metadata, "limbeck.form": form.kind}
    _write(form, scheme, job.built.graphs, graphs, half, metadata, calibration)
    census = take_census(graphs.last)
    more_bits = mixed is not None and more_bits_everywhere(mixed)
    require_quantized(form.kind, census, more_bits=more_bits)
    if scheme:
        known = calibration or Calibration()
        require_weights(form.kind, job.built.graphs, graphs, scheme, known)
    here = provider_here(provider)
    checked = task.check(form.kind, graphs, here)
    census["runs_on"] = where_nodes_run(graphs.last, provider=here)
    apart = (task.adapter,) if task.adapter else ()
    made = ExportedForm(
        provider=provider,
        graph=graphs.last.relative_to(job.folder).as_posix(),
        all_logits_graph=graphs.all.relative_to(job.folder).as_posix(),
        prompt_graph=graphs.prompt.relative_to(job.folder).as_posix() if graphs.prompt else None,
        files=tuple(p.relative_to(job.folder).as_posix() for p in (*graphs.files, *apart)),
        bytes=sum(path.stat().st_size for path in (*graphs.running, *apart)),
        rounding=asdict(scheme) if scheme else None,
        smooth=calibration.alpha if calibration else 0.0,
        algorithm=("gptq" if calibration else "rtn") if form.kind == "int4-weight" else None,
        mixed=mixed,
        number_type="fp16" if half else "fp32",
        parity=checked.parity,
        parity_base=checked.base,
        census=census,
        greedy=tuple(checked.greedy),
    )
    return made, scheme


def release_memory() -> None:
    """Give freed memory back to the system; the C library would keep it."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def _calibrate(form: AnyForm, job: Job, scheme: Scheme) -> Calibration | None:
    """What ``form`` must know of activations; see `export.round.calibrate.calibration_for`."""
    fp32 = job.built.graphs
    reads = calibrated_reads(fp32, scheme)
    as_they_are = job.task.keeps_weights
    return calibration_for(
        form, fp32, job.student.path, reads, as_they_are=as_they_are, known=job.known
    )


def _write(
    form: AnyForm,
    scheme: Scheme | None,
    source: Graphs,
    target: Graphs,
    half: bool,
    metadata: dict[str, str],
    calibration: Calibration | None,
) -> None:
    """Write ``target``: the fp32 graphs of ``source`` with rounded weights, in fp16, or both."""
    with tempfile.TemporaryDirectory(dir=target.data.parent) as temporary:
        made = source
        if scheme:
            made = form_files(Path(temporary), form.kind) if half else target
            made.data.parent.mkdir(exist_ok=True)
            quantize_weights(
                source, made, scheme=scheme, metadata=metadata, calibration=calibration
            )
        if half:
            cast_to_half(made, target, metadata=metadata)
