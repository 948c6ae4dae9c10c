"""Mistakes that no single field of a recipe shows: one line each, with its remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from limbeck.contract.errors import RecipeError
from limbeck.contract.recipe.bench import Bench
from limbeck.contract.recipe.distillation import (
    EntropyWeights,
    FittedCalibration,
    FixedCalibration,
    FreshStudent,
    LoraStudent,
    MergeStudent,
    PosteriorWeights,
    StaticWeights,
)
from limbeck.contract.recipe.encoder import ClassificationRecipe, EmbeddingRecipe, EncoderRecipe
from limbeck.contract.recipe.export import NO_KERNEL, MixedByLoss, MixedByRule, StaticShapes
from limbeck.contract.recipe.inputs import ServerModel, Teacher
from limbeck.contract.recipe.language import Recipe


def bench_contradictions(bench: Bench) -> Iterator[str]:
    """Check the `bench:` of a language model."""
    yield from _repeated(
        {
            "bench.scenarios": [s.kind for s in bench.scenarios],
            "bench.runtimes": [r.kind for r in bench.runtimes],
        }
    )
    if bench.scenario("single") is None:
        yield (
            "bench.scenarios: single is missing; timing gates and the noise floor come from it: "
            "add it"
        )


def language_contradictions(recipe: Recipe) -> Iterator[str]:
    """Check the recipe of a language model."""
    yield from _repeated(
        {
            "teachers": [t.name for t in recipe.teachers],
            "data.domains": [d.name for d in recipe.data.domains],
            "export.forms": [f.kind for f in recipe.export.forms],
        }
    )
    yield from _training(recipe)
    yield from _on_policy(recipe)
    yield from _served(recipe)
    yield from _first_form([f.kind for f in recipe.export.forms])
    yield from _export(recipe)
    yield from _separate_adapters(recipe)
    yield from _static_shapes(recipe)
    yield from _kernels(recipe)
    yield from _mixed(recipe)
    yield from _recovery(recipe)
    yield from _fusion(recipe)
    yield from _priors(recipe)
    yield from _start(recipe)
    yield from bench_contradictions(recipe.bench)
    for gate in ("max_loss_vs_best_teacher", "min_decode_speedup"):
        yield from _teacher_gate(recipe, gate)


def classification_contradictions(recipe: ClassificationRecipe) -> Iterator[str]:
    """Check the recipe of a classifier."""
    yield from _encoder(recipe)
    metric = recipe.budget.quality.metric if recipe.budget and recipe.budget.quality else None
    if metric not in (None, recipe.bench.metric):
        yield (
            f"budget.quality.metric: found {metric!r}, but bench.metric is "
            f"{recipe.bench.metric!r}; make them the same, or leave it out"
        )


def embedding_contradictions(recipe: EmbeddingRecipe) -> Iterator[str]:
    """Check the recipe of a sentence encoder."""
    yield from _encoder(recipe)
    if recipe.training.batch < 3 and recipe.fusion.relational:
        yield (
            f"training.batch: found {recipe.training.batch}; similarities within a batch need at "
            "least 3 examples"
        )


def _encoder(recipe: EncoderRecipe) -> Iterator[str]:
    yield from _repeated(
        {
            "teachers": [t.name for t in recipe.teachers],
            "data": [name for _, name, _ in recipe.groups()],
            "export.forms": [f.kind for f in recipe.export.forms],
        }
    )
    yield from _first_form([f.kind for f in recipe.export.forms])
    shapes = recipe.export.shapes
    if isinstance(shapes, StaticShapes):
        longest = max(recipe.data.max_tokens, *recipe.bench.lengths)
        yield from _too_short(shapes, longest, "data.max_tokens and bench.lengths")
    if isinstance(recipe.student, FreshStudent) and not recipe.teachers:
        yield _FRESH.format(other="full")
    if recipe.training.examples < recipe.training.batch:
        yield (
            f"training.examples: found {recipe.training.examples}; it should be at least one step "
            f"(training.batch = {recipe.training.batch})"
        )
    weights = recipe.fusion.weights
    yield from _static_weights(weights, {t.name for t in recipe.teachers})
    if isinstance(weights, EntropyWeights) and weights.control == "shuffled":
        yield (
            "fusion.weights.control: shuffled permutes the positions of a text, and an example "
            "has one; use inverted"
        )
    for gate in ("min_throughput_ratio", "max_metric_loss"):
        yield from _teacher_gate(recipe, gate)
    bounds = {
        "gates.max_latency_ms": recipe.gates.max_latency_ms,
        "budget.latency_ms": recipe.budget.latency_ms if recipe.budget else None,
    }
    for where, bound in bounds.items():
        if bound is not None and 1 not in recipe.bench.batches:
            yield f"{where}: this is the time of one sequence; add 1 to bench.batches"


_FRESH = (
    "student.kind: a fresh student takes its tokenizer from the first teacher; "
    "name a teacher, or use kind: {other}"
)


# Parts of both ------------------------------------------------------------------------------------


def _repeated(names: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for where, found in names.items():
        for name in sorted({n for n in found if found.count(n) > 1}):
            yield f"{where}: {name!r} is there {found.count(name)} times; give each its own name"


def _first_form(forms: Sequence[str]) -> Iterator[str]:
    if forms[0] != "fp32":
        yield (
            f"export.forms.0: found {forms[0]!r}; put fp32 first, every other form is made from it"
        )


def _too_short(shapes: StaticShapes, longest: int, readers: str) -> Iterator[str]:
    if shapes.length < longest:
        yield (
            f"export.shapes.length: found {shapes.length}; {readers} need {longest}: "
            "raise it to that, or lower those"
        )


def _static_weights(weights: object, teachers: set[str]) -> Iterator[str]:
    """Check weights that are given by teacher name."""
    if not isinstance(weights, StaticWeights):
        return
    if set(weights.values) != teachers:
        yield (
            f"fusion.weights.values: found {sorted(weights.values)}; "
            f"name each teacher once: {sorted(teachers)}"
        )
    elif not sum(weights.values.values()) > 0:
        yield "fusion.weights.values: all are 0; give at least one teacher a weight"


def _priors(recipe: Recipe) -> Iterator[str]:
    """Check prior weights of teachers, which are given by domain."""
    if not isinstance(weights := recipe.fusion.weights, PosteriorWeights):
        return
    known = {"teacher": [t.name for t in recipe.teachers]}
    known["domain"] = [d.name for d in recipe.data.domains]
    for domain, values in weights.prior.items():
        where = f"fusion.weights.prior.{domain}"
        for kind, names in (("domain", [domain]), ("teacher", values)):
            for name in sorted(set(names) - set(known[kind])):
                yield f"{where}: no {kind} {name!r}; the {kind}s are {', '.join(known[kind])}"
        if not sum(values.values()) > 0:
            yield f"{where}: all are 0; give at least one teacher a weight"


def _teacher_gate(recipe: Recipe | EncoderRecipe, gate: str) -> Iterator[str]:
    if getattr(recipe.gates, gate) is not None and not recipe.teachers:
        yield f"gates.{gate}: there are no teachers to compare with; remove it or name teachers"


# Language models ----------------------------------------------------------------------------------


def _training(recipe: Recipe) -> Iterator[str]:
    training, block = recipe.training, recipe.data.block
    if training.batch_tokens % block:
        below = max(training.batch_tokens // block, 1) * block
        yield (
            f"training.batch_tokens: found {training.batch_tokens}; it should be a multiple of "
            f"data.block ({block}), for example {below}"
        )
    if (training.tokens is None) == (training.minutes is None):
        yield "training: give the budget once, as `tokens` or as `minutes`"
    if training.minutes is not None and training.teacher_cache.kind != "none":
        yield (
            "training.minutes: a teacher cache must know its text beforehand; "
            "give the budget as `tokens`"
        )
    if training.tokens is not None and training.tokens < training.batch_tokens:
        yield (
            f"training.tokens: found {training.tokens}; it should be at least one step "
            f"(training.batch_tokens = {training.batch_tokens})"
        )
    if training.teacher_cache.kind == "topk":
        where = "training.teacher_cache: topk"
        if recipe.features.weight and recipe.local_teachers:
            yield f"{where} keeps no hidden states; set features.weight: 0, or use `hidden`"
        if recipe.fusion.calibration.kind != "none":
            yield (
                f"{where} keeps the distributions of uncalibrated teachers; "
                "set fusion.calibration: {kind: none}, or use `hidden`"
            )
        if recipe.fusion.temperature != 1:
            yield f"{where} is kept at temperature 1; set fusion.temperature: 1, or use `hidden`"


def _on_policy(recipe: Recipe) -> Iterator[str]:
    """Check the text that the student writes itself."""
    own, where = recipe.training.on_policy, "training.on_policy"
    if own is None or not own.share:
        return
    if not recipe.teachers:
        yield f"{where}: only teachers can judge own text; name teachers, or leave it out"
    elif not recipe.fusion.weight:
        yield (
            f"{where}: own text is learnt from the teachers alone, and fusion.weight is 0; raise "
            "fusion.weight, or leave on_policy out"
        )
    if recipe.training.teacher_cache.kind != "none":
        yield (
            f"{where}: a teacher cache cannot know own text beforehand; set "
            "training.teacher_cache: none, or leave on_policy out"
        )
    if own.prompts.tokens >= recipe.data.block:
        yield (
            f"{where}.prompts.tokens: found {own.prompts.tokens}; it should be below data.block "
            f"({recipe.data.block}), so that there is room to write"
        )


def _served(recipe: Recipe) -> Iterator[str]:
    """Check the teachers behind a server. Their `topk` cache holds plain distributions."""
    names = set()
    for index, teacher in enumerate(recipe.teachers):
        if not isinstance(teacher.model, ServerModel):
            continue
        names.add(teacher.name)
        for key in sorted({"adapter", "quantize", "dtype"} & teacher.model_fields_set):
            default = Teacher.model_fields[key].default
            if getattr(teacher, key) != default:
                yield f"teachers.{index}.{key}: the server loads this model; leave {key} out"
    if not names:
        return
    who = f"teacher {sorted(names)[0]} is behind a server"
    if recipe.fusion.temperature != 1:
        yield f"fusion.temperature: {who}, which answers at temperature 1; set it to 1"
    calibration = recipe.fusion.calibration
    fixed = calibration.values if isinstance(calibration, FixedCalibration) else {}
    if calibration.kind != "none" and any(fixed.get(name) != 1 for name in names):
        yield (
            f"fusion.calibration: {who}, which answers uncalibrated; use {{kind: none}}, or "
            "{kind: fixed} with 1 for it"
        )
    if recipe.training.minutes is not None:
        yield (
            f"training.minutes: {who} and reads all text beforehand; give the budget as `tokens`"
        )
    if recipe.gates.min_decode_speedup is not None and not recipe.local_teachers:
        yield (
            "gates.min_decode_speedup: a teacher behind a server is not timed; remove it, or name "
            "a teacher that runs here"
        )


def _export(recipe: Recipe) -> Iterator[str]:
    export = recipe.export
    if export.opset is not None and export.backend != "dynamo":
        yield (
            f"export.opset: {export.backend} leaves no choice, since GenAI's builder has its own "
            "operator set; use backend: dynamo"
        )
    if export.provider == "tensorrt" and export.backend == "genai":
        yield (
            "export.backend: TensorRT has no kernel for the fused attention of GenAI's graphs; "
            "use dynamo, or auto"
        )


def _separate_adapters(recipe: Recipe) -> Iterator[str]:
    export, student, where = recipe.export, recipe.student, "export.adapters:"
    if export.adapters != "separate":
        return
    if not isinstance(student, LoraStudent):
        yield f"{where} a {student.kind} student has no adapter; use merged, or student.kind: lora"
    elif student.dora:
        yield (
            f"{where} DoRA is more than a low-rank update; use merged, or set student.dora: false"
        )
    if any(form.kind == "int8-static" for form in export.forms):
        yield (
            f"{where} int8-static is calibrated on one student, and its base should serve many; "
            "use int8-dynamic, which needs no calibration, or merged"
        )
    if export.provider != "cpu":
        yield f"{where} adapters are fp32, and only the provider cpu has fp32 forms; use merged"
    if export.recover is not None or not isinstance(export.mixed, MixedByRule):
        yield (
            f"{where} mixed and recover round the merged student, not its base; "
            "use merged, or leave both out"
        )
    if moved := [f.kind for f in export.forms if getattr(f, "smooth", None)]:
        yield (
            f"{where} smoothing fits the base to one student; "
            f"leave smooth out of {moved[0]}, or use merged"
        )


def _static_shapes(recipe: Recipe) -> Iterator[str]:
    export, shapes, where = recipe.export, recipe.export.shapes, "export.shapes:"
    if not isinstance(shapes, StaticShapes):
        return
    if export.backend != "dynamo":
        yield (
            f"{where} {export.backend} leaves no choice, since GenAI's builder only makes graphs "
            "of dynamic shapes; use backend: dynamo"
        )
    if (
        export.adapters == "separate"
        or export.recover is not None
        or not isinstance(export.mixed, MixedByRule)
    ):
        yield (
            f"{where} adapters, mixed and recover need graphs of dynamic shapes; "
            "use dynamic, or leave them out"
        )
    longest = max(recipe.data.block, recipe.bench.prompt_tokens + recipe.bench.new_tokens)
    yield from _too_short(shapes, longest, "data.block and bench.prompt_tokens + bench.new_tokens")
    for kind in ("offline", "server"):
        if recipe.bench.scenario(kind) is not None:
            yield (
                f"bench.scenarios: {kind} runs batches of changing size, which a static graph "
                "cannot; remove it"
            )


def _kernels(recipe: Recipe) -> Iterator[str]:
    export = recipe.export
    for index, form in enumerate(export.forms):
        refused = NO_KERNEL.get((export.provider, form.kind))
        reference = form.kind == "fp32" and (len(export.graphs) > 1 or export.backend == "dynamo")
        if refused and not reference:
            why, instead = refused
            yield (
                f"export.forms.{index}: {export.provider} has no kernel for {form.kind} ({why}); "
                f"use {instead}, or change export.provider"
            )


def _start(recipe: Recipe) -> Iterator[str]:
    """Check the start of the student."""
    student, names = recipe.student, {t.name for t in recipe.local_teachers}
    merges = isinstance(student, MergeStudent)
    if not names and (merges or getattr(student, "init", None) == "merge"):
        yield "student: there are no teachers here to merge; name teachers, or use init: base"
    if isinstance(student, LoraStudent) and student.init == "merge" and student.quantize != "none":
        yield (
            f"student.init: a base in {student.quantize} cannot take merged weights; "
            "use quantize: none, or init: base"
        )
    if isinstance(student, MergeStudent):
        for name in sorted(set(student.weights or {}) - names):
            yield (
                f"student.weights.{name}: there is no teacher of this name; "
                f"the teachers are {', '.join(sorted(names))}"
            )
        if recipe.export.recover is not None:
            yield "export.recover: a merge is not trained; leave it out, or use student.kind: lora"


def _mixed(recipe: Recipe) -> Iterator[str]:
    mixed, gates = recipe.export.mixed, recipe.gates
    if isinstance(mixed, MixedByRule):
        return
    if all(form.kind != "int4-weight" for form in recipe.export.forms):
        yield (
            f"export.mixed: found {mixed.kind!r}, which chooses between 4 and 8 bits; "
            "add int4-weight to export.forms"
        )
    if (
        isinstance(mixed, MixedByLoss)
        and mixed.rise is None
        and gates.max_quantization_loss is None
    ):
        yield (
            "export.mixed: there is no loss to keep to; "
            "set `rise` there, or gates.max_quantization_loss"
        )


def _recovery(recipe: Recipe) -> Iterator[str]:
    where, graphs = "export.recover:", recipe.export.graphs
    if recipe.export.recover is None or not graphs:
        return
    shipped = graphs[-1]
    if recipe.gates.max_quantization_loss is None:
        yield f"{where} nothing says when it is needed; set gates.max_quantization_loss"
    if shipped.kind not in ("int8-weight", "int8-dynamic", "int4-weight"):
        yield (
            f"{where} found {shipped.kind!r} as the form to ship; "
            "put int8-weight, int8-dynamic or int4-weight last"
        )
    elif getattr(shipped, "smooth", None):
        yield f"{where} the training rounds unsmoothed weights; leave smooth out of {shipped.kind}"
    elif getattr(shipped, "algorithm", None) == "gptq":
        yield (
            f"{where} the training rounds weights to nearest, and gptq does not; "
            "leave algorithm out of int4-weight"
        )


def _fusion(recipe: Recipe) -> Iterator[str]:
    teachers = {t.name for t in recipe.teachers}
    if isinstance(recipe.student, FreshStudent) and not teachers:
        yield _FRESH.format(other="lora")
    if isinstance(recipe.student, FreshStudent) and recipe.gates.max_forgetting is not None:
        yield "gates.max_forgetting: a fresh student has no base to forget; leave it out"
    calibration = recipe.fusion.calibration
    if isinstance(calibration, FittedCalibration) and calibration.bounds[0] > calibration.bounds[1]:
        yield (
            f"fusion.calibration.bounds: found {list(calibration.bounds)}; the lower bound is first"
        )
    if isinstance(calibration, FixedCalibration) and set(calibration.values) != teachers:
        yield (
            f"fusion.calibration.values: found {sorted(calibration.values)}; "
            f"name each teacher once: {sorted(teachers)}"
        )
    yield from _static_weights(recipe.fusion.weights, teachers)


# Processes that share a step ----------------------------------------------------------------------


def require_share_for_all(recipe: Recipe, *, processes: int, sharded: bool) -> None:
    """Raise `RecipeError` unless every process gets blocks of every step.

    When ``sharded``, all need the same number of forward passes too: FSDP gathers the parameters in
    every forward pass, from all processes.
    """
    config, block = recipe.training, recipe.data.block
    if sharded and config.on_policy is not None and config.on_policy.share:
        raise RecipeError(
            "training.on_policy: a student whose parameters are sharded (FSDP) cannot write; start "
            "the processes without sharding, or leave on_policy out."
        )
    rows = config.batch_tokens // block
    most, fewest = (
        -(-count // config.micro_batch) for count in (-(-rows // processes), rows // processes)
    )
    if rows >= processes and (most == fewest or not sharded):
        return
    why = (
        f"the {rows} blocks of a step cannot be shared by {processes} processes"
        if rows < processes
        else f"of the {rows} blocks of a step some of {processes} processes would run {most} "
        f"micro-batches and others {fewest}"
    )
    fits = max(rows // processes, 1) * processes * block
    raise RecipeError(
        f"training.batch_tokens: found {config.batch_tokens} with data.block {block}: {why}; make "
        f"it a multiple of {processes * block}, for example {fits}, or start fewer processes."
    )


def require_equal_shares(recipe: EncoderRecipe, *, processes: int) -> None:
    """Raise `RecipeError` unless every process gets an equal part of every step."""
    batch = recipe.training.batch
    if batch % processes:
        fits = -(-batch // processes) * processes
        raise RecipeError(
            f"training.batch: found {batch}; {processes} processes share each step evenly, so make "
            f"it a multiple of {processes}, for example {fits}."
        )
