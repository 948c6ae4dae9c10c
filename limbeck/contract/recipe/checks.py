"""Mistakes that no single field of a language model's recipe shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from limbeck.contract.recipe.distillation import (
    FittedCalibration,
    FixedCalibration,
    FreshStudent,
    LoraStudent,
    StaticWeights,
)
from limbeck.contract.recipe.export import (
    NO_KERNEL,
    MixedByLoss,
    MixedByRule,
    MixedBySize,
    StaticShapes,
)

if TYPE_CHECKING:
    from limbeck.contract.recipe import Recipe


def contradictions(recipe: Recipe) -> Iterator[str]:
    """Mistakes that no single field shows."""
    for where, names in (
        ("teachers", [t.name for t in recipe.teachers]),
        ("data.domains", [d.name for d in recipe.data.domains]),
        ("export.forms", [str(f.kind) for f in recipe.export.forms]),
        ("bench.scenarios", [str(s.kind) for s in recipe.bench.scenarios]),
        ("bench.runtimes", [str(r.kind) for r in recipe.bench.runtimes]),
    ):
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield f"{where}: {name!r} stands there {names.count(name)} times; give each its own name"
    if recipe.training.batch_tokens % recipe.data.block:
        below = max(recipe.training.batch_tokens // recipe.data.block, 1) * recipe.data.block
        yield (
            f"training.batch_tokens: found {recipe.training.batch_tokens}; it should be a multiple of "
            f"data.block ({recipe.data.block}), for example {below}"
        )
    if (recipe.training.tokens is None) == (recipe.training.minutes is None):
        yield "training: give the budget once, as `tokens` or as `minutes`"
    if recipe.training.minutes is not None and recipe.training.teacher_cache.kind != "none":
        yield "training.minutes: a teacher cache has to know its text beforehand; give the budget as `tokens`"
    if recipe.training.teacher_cache.kind == "topk":
        if recipe.features.weight and recipe.teachers:
            yield "training.teacher_cache: topk keeps no hidden states to align; set features.weight: 0, or use `hidden`"
        if recipe.fusion.calibration.kind != "none":
            yield "training.teacher_cache: topk keeps what an uncalibrated teacher said; set fusion.calibration: {kind: none}, or use `hidden`"
        if recipe.fusion.temperature != 1:
            yield "training.teacher_cache: topk is kept at temperature 1; set fusion.temperature: 1, or use `hidden`"
    if recipe.training.tokens is not None and recipe.training.tokens < recipe.training.batch_tokens:
        yield (
            f"training.tokens: found {recipe.training.tokens}; it should be at least one step "
            f"(training.batch_tokens = {recipe.training.batch_tokens})"
        )
    if recipe.export.forms[0].kind != "fp32":
        yield f"export.forms.0: found {recipe.export.forms[0].kind!r}; put fp32 first, every other form is made from it"
    if recipe.export.opset is not None and recipe.export.backend != "dynamo":
        yield f"export.opset: {recipe.export.backend} leaves no choice, GenAI's builder has an operator set of its own; use backend: dynamo"
    if recipe.export.provider == "tensorrt" and recipe.export.backend == "genai":
        yield "export.backend: TensorRT has no kernel for the fused attention of GenAI's graphs; use dynamo, or auto"
    if recipe.export.adapters == "separate":
        if not isinstance(recipe.student, LoraStudent):
            yield f"export.adapters: a {recipe.student.kind} student has no adapter; use merged, or student.kind: lora"
        elif recipe.student.dora:
            yield "export.adapters: DoRA changes more than low-rank updates can say; use merged, or set student.dora: false"
        if any(form.kind == "int8-static" for form in recipe.export.forms):
            yield (
                "export.adapters: the ranges of int8-static are those of one student, and its base is to serve many; "
                "use int8-dynamic, whose ranges are each token's own, or merged"
            )
        if recipe.export.provider != "cpu":
            yield "export.adapters: adapters are fp32 and the forms for other providers than cpu are not; use merged"
        if recipe.export.recover is not None or not isinstance(recipe.export.mixed, MixedByRule):
            yield "export.adapters: mixed and recover round the merged student, not its base; use merged, or leave both out"
    shapes = recipe.export.shapes
    if isinstance(shapes, StaticShapes):
        if recipe.export.backend != "dynamo":
            yield f"export.shapes: {recipe.export.backend} leaves no choice, GenAI's builder makes graphs of free shapes alone; use backend: dynamo"
        if (
            recipe.export.adapters == "separate"
            or recipe.export.recover is not None
            or not isinstance(recipe.export.mixed, MixedByRule)
        ):
            yield "export.shapes: adapters, mixed and recover feed graphs of free shapes; use dynamic, or leave them out"
        longest = max(recipe.data.block, recipe.bench.prompt_tokens + recipe.bench.new_tokens)
        if shapes.length < longest:
            yield (
                f"export.shapes.length: found {shapes.length}; make it {longest} or more, which data.block and bench.prompt_tokens + "
                "bench.new_tokens read, or make those smaller"
            )
        for kind in ("offline", "server"):
            if recipe.bench.scenario(kind) is not None:
                yield f"bench.scenarios: {kind} runs batches that change in size, which a static graph cannot; take it out"
    provider = recipe.export.provider
    for index, form in enumerate(recipe.export.forms):
        refused = NO_KERNEL.get((provider, form.kind))
        reference = form.kind == "fp32" and (
            len(recipe.export.forms) > 1 or recipe.export.backend == "dynamo"
        )
        if refused and not reference:
            why, instead = refused
            yield f"export.forms.{index}: {provider} has no kernel for {form.kind} ({why}); use {instead}, or change export.provider"
    forms, mixed = [form.kind for form in recipe.export.forms], recipe.export.mixed
    if not isinstance(mixed, MixedByRule) and "int4-weight" not in forms:
        yield f"export.mixed: found {mixed.kind!r}, which chooses between 4 and 8 bits; add int4-weight to export.forms"
    if isinstance(mixed, MixedBySize) and mixed.mb is None and recipe.gates.max_size_mb is None:
        yield "export.mixed: no size to keep to; give `mb` there, or gates.max_size_mb"
    if (
        isinstance(mixed, MixedByLoss)
        and mixed.rise is None
        and recipe.gates.max_quantization_loss is None
    ):
        yield "export.mixed: no loss to keep to; give `rise` there, or gates.max_quantization_loss"
    moved = [f.kind for f in recipe.export.forms if getattr(f, "smooth", None)]
    if moved and recipe.export.adapters == "separate":
        yield f"export.adapters: a base whose outliers are moved serves one student only; leave smooth out of {moved[0]}, or use merged"
    if recipe.export.recover is not None:
        if recipe.gates.max_quantization_loss is None:
            yield "export.recover: nothing says when it is needed; set gates.max_quantization_loss"
        if forms[-1] not in ("int8-weight", "int8-dynamic", "int4-weight"):
            yield f"export.recover: found {forms[-1]!r} as the form to ship; put int8-weight, int8-dynamic or int4-weight last"
        elif getattr(recipe.export.forms[-1], "smooth", None):
            yield f"export.recover: training rounds the weights as they are, not smoothed; leave smooth out of {forms[-1]}"
        elif getattr(recipe.export.forms[-1], "algorithm", None) == "gptq":
            yield "export.recover: training rounds weights to nearest, as gptq does not; leave algorithm out of int4-weight"
    if isinstance(recipe.student, FreshStudent) and not recipe.teachers:
        yield "student.kind: a fresh student takes its tokenizer from the first teacher; name a teacher, or use kind: lora"
    calibration = recipe.fusion.calibration
    if isinstance(calibration, FittedCalibration) and calibration.bounds[0] > calibration.bounds[1]:
        yield f"fusion.calibration.bounds: found {list(calibration.bounds)}; the least comes first"
    if isinstance(calibration, FixedCalibration) and set(calibration.values) != {
        t.name for t in recipe.teachers
    }:
        yield f"fusion.calibration.values: found {sorted(calibration.values)}; name each teacher once: {sorted(t.name for t in recipe.teachers)}"
    yield from static_weights(recipe.fusion.weights, {t.name for t in recipe.teachers})
    if recipe.bench.scenario("single") is None:
        yield "bench.scenarios: single is missing; timing gates and the noise floor come from it: add it"
    if recipe.gates.max_loss_vs_best_teacher is not None and not recipe.teachers:
        yield "gates.max_loss_vs_best_teacher: there are no teachers to compare with; remove it or name teachers"
    if recipe.gates.min_decode_speedup is not None and not recipe.teachers:
        yield "gates.min_decode_speedup: there are no teachers to compare with; remove it or name teachers"


def static_weights(weights: object, teachers: set[str]) -> Iterator[str]:
    """What is wrong with weights given by teacher's name; nothing is with the other kinds."""
    if not isinstance(weights, StaticWeights):
        return
    if set(weights.values) != teachers:
        yield f"fusion.weights.values: found {sorted(weights.values)}; name each teacher once: {sorted(teachers)}"
    elif not sum(weights.values.values()) > 0:
        yield "fusion.weights.values: all are 0; give at least one teacher a weight"
