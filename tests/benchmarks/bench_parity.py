"""How far sound graphs are from torch, and how far broken ones: what parity's limits follow from.

Makes every form of real and random students, measures parity, then puts one fault at a time into
the graph (`tests.benchmarks.broken`) and measures again. Prints a line a graph. The last line is
one JSON object: by form the sound graphs that parity refused (`refused`) and the faults that it did
not see (`unseen`).

    make bench-parity                             random models
    make bench-parity ARGS="runs/NAME/student"    the student of a run, such as the demo's
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from export.check.weights import WeightError, weight_errors
from export.graphs import Graphs
from limbeck.contract.artifact import Artifact, open_artifact
from limbeck.contract.recipe import AnyRecipe
from tests.benchmarks.broken import broken_graphs

RANDOM = ("llama", "qwen2", "gpt2", "gemma3_text", "bert", "roberta")
FORMS = ("fp32", "int8-weight", "int8-dynamic", "int8-static", "int4-weight")


def student_of(name: str, folder: Path) -> Artifact:
    """A student artifact: the folder of one, or a random one of an architecture."""
    if Path(name).is_dir():
        return open_artifact(Path(name), kind="student", verify=False)
    from tests.architectures import BASES
    from tests.encoders import CONFIGS, make_encoder_student
    from tests.pico import make_model
    from tests.pico import make_student as wrap

    if name in CONFIGS:
        student = make_encoder_student(folder / "student", name, task="embedding")
        with_random_vectors(student.path / "model")
        return student
    model = make_model(folder / "model", model_type=name, **BASES[name])
    with_random_vectors(model)
    return wrap(folder / "student", model)


def with_random_vectors(model: Path) -> None:
    """Change biases and norms of a random model, which begin as 0 and 1: a fault must show."""
    from safetensors.numpy import load_file, save_file

    draw, file = np.random.default_rng(0), model / "model.safetensors"
    tensors = load_file(file)
    vectors = {name: values for name, values in tensors.items() if values.ndim == 1}
    for name, values in vectors.items():
        tensors[name] = values + draw.normal(0, 0.3, values.shape).astype(values.dtype)
    save_file(tensors, file, metadata={"format": "pt"})


def recipe_for(student: Artifact, forms: list[str]) -> AnyRecipe:
    """Any recipe of the student's task that exports ``forms``."""
    from tests.encoders import embedding_recipe
    from tests.pico import pico_recipe

    encoder = student.result.get("task", "causal-lm") == "embedding"
    names = ["fp32", *(f for f in forms if f != "fp32" and (not encoder or f != "int4-weight"))]
    return (embedding_recipe if encoder else pico_recipe)(export={"forms": names})


def figures_of(parity: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a decoder's or an encoder's parity that its limits bound."""
    names = ("kl", "top1_sure", "alike")
    figures = {"max_abs": parity["max_abs"], **{n: parity[n] for n in names if n in parity}}
    if "nll" in parity:
        figures["rise"] = parity["nll"] / parity["nll_torch"] - 1
    return figures


def worst(errors: list[WeightError]) -> dict[str, float]:
    """The largest error of weights and activations by kind."""
    found: dict[str, float] = {}
    for e in errors:
        found[e.kind] = max(found.get(e.kind, 0.0), e.error)
    return found


@contextmanager
def lenient() -> Iterator[Any]:
    """Parity that raises nothing, without greedy answers; gives what weights are checked with."""
    with (
        patch("export.check.parity.require_parity"),
        patch("export.tasks.encoder.require_parity"),
        patch("export.tasks.language.answer_greedily", return_value={}),
        patch("export.forms.require_weights") as checked,
    ):
        yield checked


def measure(name: str, forms: list[str], *, run: bool) -> Iterator[dict[str, Any]]:
    """Figures of every sound and broken graph of one model; ``run`` runs the broken ones too."""
    from export.forms import Job, make_form
    from export.tasks import task_of

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        student = student_of(name, folder)
        recipe = recipe_for(student, forms)
        config = json.loads((student.path / "model/config.json").read_text())
        layers = config.get("num_hidden_layers", config.get("n_layer"))
        export = folder / "onnx"
        export.mkdir()
        task: Any = task_of(recipe.task)(recipe, student, export, {})
        built = task.build()
        task.answer(built)
        job = Job(task, student, export, built)
        for form in recipe.export.graphs:
            if form.kind == "fp32" and form.kind not in forms:
                continue
            with lenient() as checked:
                made, _ = make_form(form, job)
            # Scheme and calibration of a rounded form.
            rounding = checked.call_args.args[3:] if checked.call_args else None
            sound = task.files(form.kind)
            yield {
                "model": name,
                "form": form.kind,
                "fault": "",
                **judged(built, sound, rounding, made.parity),
            }
            for fault, path in broken_graphs(sound.all, layers=layers):
                broken = replace(sound, last=path, all=path)
                parity = None
                if run or rounding is None:
                    with lenient():
                        parity = task.check(form.kind, broken, "cpu").parity
                yield {
                    "model": name,
                    "form": form.kind,
                    "fault": fault,
                    **judged(built, broken, rounding, parity),
                }


def judged(
    built: Any, graphs: Graphs, rounding: Any, parity: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Figures of a graph's weights and answers, and what both say against it."""
    errors = list(weight_errors(built.graphs, graphs.last, *rounding)) if rounding else []
    says = [e.name for e in errors if not e.error <= e.limit]
    says += parity["failures"] if parity is not None else []
    return {**(figures_of(parity) if parity else {}), **worst(errors), "says": says}


def main() -> None:
    """Measure the models that are asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=RANDOM, help="names, or folders of students")
    parser.add_argument("--forms", nargs="+", default=FORMS)
    parser.add_argument("--run", action="store_true", help="also run rounded graphs with faults")
    asked = parser.parse_args()
    refused: dict[str, list[str]] = {form: [] for form in asked.forms}
    unseen: dict[str, list[str]] = {form: [] for form in asked.forms}
    for name in asked.models:
        for row in measure(name, list(asked.forms), run=asked.run):
            says = row.pop("says")
            figures = "  ".join(f"{k} {v:.3g}" for k, v in row.items() if not isinstance(v, str))
            verdict = "refused" if says else "kept"
            fault = row["fault"]
            print(
                f"{Path(name).name:12} {row['form']:12} {verdict:8} {figures}  {fault or 'sound'}",
                flush=True,
            )
            if says and not fault:
                refused[row["form"]].append(f"{name}: {says}")
            if fault and not says:
                unseen[row["form"]].append(f"{name}: {fault}")
    print(json.dumps({"refused": refused, "unseen": unseen}))


if __name__ == "__main__":
    main()
