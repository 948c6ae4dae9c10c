"""Student → ONNX: one decoder graph with its cache, quantised forms, parity with torch, a folder that clients load.

Importing this package is cheap; torch, onnx and onnxruntime are imported when a function is called.
"""

from __future__ import annotations

import ctypes
import gc
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.contract.artifact import Artifact, find_artifact, open_artifact, write_artifact
from limbeck.contract.errors import ArtifactError
from limbeck.contract.machine import sums_overflow
from limbeck.contract.progress import say
from limbeck.contract.recipe import (
    AnyRecipe,
    Form,
    MixedByRule,
    Provider,
    Recipe,
    StaticShapes,
    fingerprint,
)

if TYPE_CHECKING:
    from export.build.backend import Built
    from export.build.surgery import Graphs
    from export.check.parity import Case
    from export.round.calibrate import Calibration, Known
    from export.round.quantize import Scheme

__all__ = ["export_student", "verify_parity"]

_STAGE = 8  # raise it when the same student and recipe would give other files


def export_student(*, student: Path, out: Path, recipe: AnyRecipe) -> Artifact:
    """Write the ``onnx`` artifact of the ``student`` artifact to ``out``: the deployable folder of docs/artifacts.md.

    Returns the artifact that is already there when it was made from the same student and the same `export:` part of
    the recipe. Raises `ArtifactError` when ``student`` is no student artifact, `ModelError` for an architecture the graph
    builder does not know, `ParityError` when a form differs from the student by more than its tolerance, `QualityError` when a
    quantised form is not; nothing is kept then. ``out`` is replaced when it holds an older export.
    """
    source = open_artifact(student, kind="student")
    gates = [
        recipe.gates.max_size_mb,
        recipe.gates.max_quantization_loss,
    ]  # `mixed` and `recover` may look at them
    asked = recipe.export.model_dump(mode="json") | (
        {"gates": gates} if isinstance(recipe, Recipe) and _looks_at_gates(recipe) else {}
    )
    # Codes of 7 or 8 bits, where that is the machine's choice: on another kind of machine the forms are made again.
    if any(getattr(form, "reduce_range", False) is None for form in recipe.export.forms):
        asked["sums_overflow"] = sums_overflow()
    key = fingerprint({"stage": _STAGE, "export": asked, "student": source.digest})
    if found := find_artifact(out, kind="onnx", key=key):
        return found

    from limbeck.runtime.session import import_onnxruntime

    import_onnxruntime()  # before any work: a machine without it, or with two builds of it, is told so
    if not isinstance(recipe, Recipe):
        from export.encoders import export_encoder

        return export_encoder(student=source, out=out, recipe=recipe, key=key)
    from export.build.backend import build_graphs
    from export.build.surgery import form_files
    from export.check.greedy import answer_greedily, first_differences
    from export.check.parity import PARITY, PARITY_BASE, answer, make_cases, save_cases, thin
    from export.folder.card import graph_metadata, write_card, write_client_files
    from export.round.calibrate import Known
    from limbeck.runtime.decoder import GraphDecoder

    model, provider = student / "model", recipe.export.provider
    # What the graph is made of: the merged student, or the base that its adapter sits on.
    base = _base(source) if recipe.export.adapters == "separate" else None
    with write_artifact(
        out, kind="onnx", key=key, parents={"student": source.digest}, recipe=recipe
    ) as draft:
        folder = draft.folder
        metadata = graph_metadata(recipe, student=source.digest)
        say("export: building the fp32 graph")
        built = build_graphs(
            base or model,
            folder,
            {**metadata, "limbeck.form": "fp32"},
            backend=recipe.export.backend,
            provider=provider,
            opset=recipe.export.opset,
            static=recipe.export.shapes if isinstance(recipe.export.shapes, StaticShapes) else None,
        )
        say(f"export: built by {built.backend} ({built.why})")
        release_memory()
        heldout = _heldout_rows(student)
        texts = {name: rows[0] for name, rows in heldout.items()}
        more = [row for rows in heldout.values() for row in rows[1:]]
        cases = make_cases(list(texts.values()), context=built.context, more=more)
        adapter: Path | None = None
        kept_apart: dict[str, Any] | None = None
        if base is None:
            checks = {PARITY: answer(cases, model)}
        else:
            adapter, kept_apart = _keep_apart(built.graphs, base, student / "adapter", folder)
            checks = {
                PARITY: answer(cases, base, adapter=student / "adapter"),
                PARITY_BASE: answer(cases, base),
            }
        release_memory()
        for name, answered in checks.items():
            save_cases(folder / name, thin(answered))
        forms: dict[str, dict[str, Any]] = {}
        schemes: dict[str, Scheme | None] = {}
        job = _Job(
            recipe, source, folder, metadata, built, list(texts.values()), checks, adapter, Known()
        )
        for form in recipe.export.forms:
            forms[form.kind], schemes[form.kind] = _make_form(form, job)
            here = parity_provider(forms[form.kind]["provider"])
            decoder = GraphDecoder(
                form_files(folder, form.kind).last, provider=here, adapter=adapter
            )
            if form.kind == "fp32":
                answers = answer_greedily(decoder, texts, stop_ids=_stop_ids(model))
            forms[form.kind]["greedy"] = first_differences(decoder, answers)
            del decoder
            release_memory()
        shipped = recipe.export.forms[-1].kind
        backend = {"name": built.backend, "why": built.why}
        used = [form_files(folder, name) for name in forms]
        write_client_files(
            model,
            folder,
            graphs=used,
            shipped=form_files(folder, shipped),
            genai=built.genai,
            provider=provider,
        )
        teachers = (
            json.loads((student / "teachers.json").read_text())
            if (student / "teachers.json").is_file()
            else []
        )
        recovery = _for_recovery(recipe, source, built.graphs, folder, shipped, schemes[shipped])
        write_card(
            folder,
            recipe=recipe,
            student=source.result,
            student_digest=source.digest,
            parents=source.manifest["parents"],
            teachers=teachers,
            forms=forms,
            shipped=shipped,
            backend=backend,
            adapter=kept_apart,
            heldout=recovery["heldout"][shipped] if recovery else None,
        )
        draft.result = {
            **recovery,
            "shipped": shipped,
            "backend": backend,
            "shapes": recipe.export.shapes.model_dump(mode="json"),
            "adapter": kept_apart,
            "forms": forms,
        }
    return open_artifact(out, kind="onnx", verify=False)


def verify_parity(folder: Path) -> dict[str, Any]:
    """Measure every form of the ``onnx`` artifact at ``folder`` again, on this machine, without torch.

    Returns the parity result by form name, on the positions that travel with the artifact. Raises `ArtifactError` for a
    changed folder and `ParityError` past tolerance.
    """
    from export.check.parity import PARITY, PARITY_BASE, load_cases, measure_parity, require_parity

    artifact = open_artifact(folder, kind="onnx")
    if not (folder / PARITY).is_file():
        raise ArtifactError(
            f"{folder}: {PARITY} is missing; delete the folder and export the student again."
        )
    if "task" in artifact.result:
        from export.encoders import verify_encoder

        return verify_encoder(artifact)
    kept_apart = artifact.result.get("adapter")
    adapters = (
        {PARITY: folder / kept_apart["file"], PARITY_BASE: None} if kept_apart else {PARITY: None}
    )
    measured: dict[str, Any] = {}
    for name, form in artifact.result["forms"].items():
        where = parity_provider(form.get("provider", "cpu"))
        for file, adapter in adapters.items():
            parity = measure_parity(
                name,
                folder / form["graph"],
                folder / form["all_logits_graph"],
                load_cases(folder / file),
                provider=where,
                adapter=adapter,
            )
            require_parity(name, parity)
            measured.setdefault(name, parity)
    return measured


@dataclass(frozen=True)
class _Job:
    """What the making of every form needs."""

    recipe: Recipe
    student: Artifact
    folder: Path
    metadata: Mapping[str, str]  # of every graph
    built: Built
    texts: Sequence[Any]  # rows of held-out tokens
    checks: Mapping[str, Mapping[str, Case]]  # torch's answers, by the file that keeps them
    adapter: Path | None  # where it is kept apart
    known: Known


def _make_form(form: Form, job: _Job) -> tuple[dict[str, Any], Scheme | None]:
    """Write the graphs of ``form`` and measure them: what the artifact's result says of it, and how it was rounded.

    Raises `QualityError` and `ParityError` as `export_student` does.
    """
    from export.build.surgery import form_files
    from export.check.census import require_quantized, take_census, where_nodes_run
    from export.check.parity import PARITY, PARITY_BASE, measure_parity, require_parity
    from export.round.mixed import more_bits_everywhere

    graphs = form_files(job.folder, form.kind)
    provider: Provider = "cpu" if form.kind == "fp32" else job.recipe.export.provider
    scheme, mixed = _choose_scheme(form, job)
    half = form.kind == "fp16" or provider == "cuda"
    if form.kind != "fp32":
        say(f"export: making {form.kind}{' in fp16' if half and scheme else ''}")
    calibration = _calibrate(form, job, scheme) if scheme else None
    stamped = {**job.metadata, "limbeck.form": form.kind}
    _make(
        form, scheme, job.built.graphs, graphs, half=half, metadata=stamped, calibration=calibration
    )
    census = take_census(graphs.last)
    require_quantized(
        form.kind, census, more_bits=mixed is not None and more_bits_everywhere(mixed)
    )
    here, parities = parity_provider(provider), {}
    for name, cases in job.checks.items():
        adapter = job.adapter if name == PARITY else None
        parities[name] = measure_parity(
            form.kind, graphs.last, graphs.all, cases, provider=here, adapter=adapter
        )
        require_parity(form.kind, parities[name])
    census["runs_on"] = where_nodes_run(graphs.last, provider=here)
    apart = (job.adapter,) if job.adapter else ()
    return {
        "provider": provider,
        "graph": graphs.last.relative_to(job.folder).as_posix(),
        "all_logits_graph": graphs.all.relative_to(job.folder).as_posix(),
        "files": [path.relative_to(job.folder).as_posix() for path in (*graphs.files, *apart)],
        # What runs: the graph and its weights. The all-logits twin is for scoring and is not counted.
        "bytes": sum(path.stat().st_size for path in (graphs.last, graphs.data, *apart)),
        "rounding": asdict(scheme) if scheme else None,
        "smooth": calibration.alpha if calibration else 0.0,
        "algorithm": ("gptq" if calibration else "rtn") if form.kind == "int4-weight" else None,
        "mixed": mixed,
        "number_type": "fp16" if half else "fp32",
        "parity": parities[PARITY],
        "parity_base": parities.get(PARITY_BASE),
        "census": census,
    }, scheme


def _choose_scheme(form: Form, job: _Job) -> tuple[Scheme | None, dict[str, Any] | None]:
    """How ``form`` is rounded, and, where matrices differ in their bits, what that was chosen by."""
    from export.round.mixed import choose_bits, same_bits
    from export.round.quantize import scheme_for
    from limbeck.contract.heldout import HELDOUT, load_heldout

    scheme, recipe = scheme_for(form, job.built.width), job.recipe
    if form.kind != "int4-weight" or scheme is None or isinstance(recipe.export.mixed, MixedByRule):
        return scheme, None
    if learnt := job.student.result.get("recovery", {}).get("mixed"):
        return same_bits(scheme, learnt)
    chosen = choose_bits(
        recipe.export.mixed,
        recipe.gates,
        scheme=scheme,
        graphs=job.built.graphs,
        model=job.student.path / "model",
        texts=job.texts,
        heldout=load_heldout(job.student.path / HELDOUT),
        calibrate=partial(_calibrate, form, job),
    )
    release_memory()
    return chosen


def _calibrate(form: Form, job: _Job, scheme: Scheme) -> Calibration | None:
    """What ``form`` must know to round as ``scheme`` says; see `export.round.calibrate.calibration_for`."""
    from export.round.calibrate import calibration_for
    from export.round.quantize import calibrated_reads

    asked, fp32 = job.recipe.export, job.built.graphs
    as_they_are = asked.recover is not None or asked.adapters == "separate"
    reads = calibrated_reads(fp32, scheme)
    return calibration_for(
        form, fp32, job.student.path, reads, as_they_are=as_they_are, known=job.known
    )


def _make(
    form: Form,
    scheme: Scheme | None,
    source: Graphs,
    target: Graphs,
    *,
    half: bool,
    metadata: dict[str, str],
    calibration: Calibration | None,
) -> None:
    """Write the graphs of ``form`` to ``target``: the fp32 ones of ``source`` with rounded weights, in fp16, or both."""
    from export.build.surgery import form_files
    from export.round.half import cast_to_half
    from export.round.quantize import quantize_weights

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


def _base(student: Artifact) -> Path:
    """The base that the adapter of a LoRA ``student`` sits on."""
    base = student.result.get("base")
    if not base or not (student.path / "adapter").is_dir():
        raise ArtifactError(
            f"{student.path}: no adapter in it, which export.adapters: separate would keep; only LoRA students have one."
        )
    if not (Path(base) / "config.json").is_file():
        raise ArtifactError(
            f"{base}: the base of the adapter in {student.path} is gone; run the compress stage again, or set export.adapters: merged."
        )
    return Path(base)


def _keep_apart(
    graphs: Graphs, base: Path, adapter: Path, folder: Path
) -> tuple[Path, dict[str, Any]]:
    """Give the base's fp32 ``graphs`` inputs for ``adapter`` and write what fills them; its file, and what there is to say of it."""
    from export.folder.adapters import (
        ADAPTER,
        add_adapter_inputs,
        base_number,
        read_updates,
        write_adapter,
    )

    say("export: keeping the adapter apart from its base")
    number = base_number(graphs)
    values = add_adapter_inputs(graphs, read_updates(base, adapter), base=number)
    write_adapter(folder / ADAPTER, values, base=number)
    return folder / ADAPTER, {
        "file": ADAPTER,
        "base": number,
        "bytes": (folder / ADAPTER).stat().st_size,
    }


def parity_provider(provider: Provider) -> Provider:
    """Where parity is measured: on the provider the form is made for where this machine has it, else on the CPU.

    The CPU computes every form: what it has no kernel for, it casts. The arithmetic then differs from the target's.
    """
    from limbeck.runtime.session import providers

    return provider if provider in providers() else "cpu"


def _looks_at_gates(recipe: Recipe) -> bool:
    return recipe.export.recover is not None or not isinstance(recipe.export.mixed, MixedByRule)


def _for_recovery(
    recipe: Recipe,
    source: Artifact,
    fp32: Graphs,
    folder: Path,
    shipped: str,
    scheme: Scheme | None,
) -> dict[str, Any]:
    """What `export.recover` needs to know of the shipped form: its held-out loss beside fp32's, and how it rounds the student.

    Of a student that was recovered, also whether that helped: then it ships.
    """
    from export.build.surgery import form_files
    from export.check.heldout import heldout_losses, per_token, relative_rise
    from export.round.origin import origins, rounding_of
    from export.round.quantize import matrices_of
    from limbeck.contract.heldout import HELDOUT, load_heldout, mean_nll

    if recipe.export.recover is None or scheme is None:
        return {}
    heldout = load_heldout(source.path / HELDOUT)
    by_block = {
        name: heldout_losses(form_files(folder, name).all, heldout) for name in ("fp32", shipped)
    }
    losses = {name: per_token(nats, heldout) for name, nats in by_block.items()}
    matrices = matrices_of(fp32, scheme)
    recovery = source.result.get("recovery")
    # What rounding costs is told from the student that was distilled; recovery moves the fp32 weights for the form's sake.
    distilled = recovery["before"]["fp32"] if recovery else losses["fp32"]
    rise, bound = relative_rise(losses[shipped], distilled), recipe.gates.max_quantization_loss
    assert bound is not None
    say(
        f"export: {shipped} loses {rise:+.2%} of held-out loss to rounding; {bound:.2%} are allowed"
    )
    found = {
        "heldout": losses,
        "blocks": by_block,
        "rise": rise,
        "needs_recovery": rise > bound,
        "parameters": rounding_of(matrices, origins(matrices, fp32, source.path / "model")),
    }
    if recovery:
        before, after = mean_nll(recovery["before"]["form"]), mean_nll(losses[shipped])
        say(
            f"export: recovery took the held-out loss of {shipped} from {before:.4f} to {after:.4f} nats a token"
        )
        found["recovery"] = {
            **recovery,
            "after": {"fp32": losses["fp32"], "form": losses[shipped]},
            "blocks": {"distilled": recovery["distilled"], "shipped": by_block[shipped]},
            "ships": after < before,
        }
    return found


def release_memory() -> None:
    """Hand memory that was let go of back to the system: the C library keeps it, and each phase here needs the model once more."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def _stop_ids(model: Path) -> set[int]:
    path = model / "generation_config.json"
    found = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    return {found} if isinstance(found, int) else set(found or ())


def _heldout_rows(student: Path) -> dict[str, list[Any]]:
    """Rows of held-out tokens by domain, the longest first."""
    from limbeck.contract.heldout import HELDOUT, load_heldout

    if not (student / HELDOUT).is_file():
        raise ArtifactError(
            f"{student}: {HELDOUT} is missing; parity is measured on held-out text. Run the compress stage again."
        )
    return {
        name: [
            blocks.input_ids[row, : blocks.lengths[row]].astype("int64")
            for row in (-blocks.lengths).argsort(kind="stable")
        ]
        for name, blocks in load_heldout(student / HELDOUT).items()
    }
