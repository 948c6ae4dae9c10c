"""How far sound graphs are from torch, and how far broken ones: what parity's limits follow from.

Makes every form of real and random students, measures parity, then puts one fault at a time into
the graph (`tests.benchmarks.broken`) and measures again. Prints a line a graph. The last line is
one JSON object: by form the sound graphs that parity refused (`refused`) and the faults that it did
not see (`unseen`).

    make bench-parity                                        random models, two minutes
    make bench-parity ARGS="smollm2 gemma3 minilm-l6 minilm-l3"   real ones, an hour
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from limbeck.contract.artifact import Artifact, open_artifact
from limbeck.contract.recipe import AnyRecipe
from tests.benchmarks.broken import broken_graphs
from tests.real.students import MODELS, make_student

RANDOM = ("llama", "qwen2", "gpt2", "gemma3_text", "bert", "roberta")
FORMS = ("fp32", "int8-weight", "int8-dynamic", "int8-static", "int4-weight")
Figures = tuple[dict[str, float], list[str]]  # and what parity says against the graph


def student_of(name: str, folder: Path) -> Artifact:
    """A student artifact: the folder of one, a real model's, or a random one."""
    if Path(name).is_dir():
        return open_artifact(Path(name), kind="student", verify=False)
    if name in MODELS:
        return make_student(
            name, "full" if name.startswith("minilm") else "lora", folder / "student"
        )
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


def decoder_figures(form: str, graph: Path, cases: Any) -> Figures:
    """As `export.check.parity.measure_parity`, of the graph of all logits."""
    from export.check import parity, verdict
    from limbeck.runtime.decoder import GraphDecoder

    by_case, nll = parity.compare(GraphDecoder(graph), cases)
    largest = max(float(np.abs(case.logits).max()) for case in cases.values())
    judged = verdict.judge(form, by_case, largest=largest)
    everything = np.concatenate(list(by_case.values()), axis=1)
    found = verdict.summary(everything, verdict.TOLERANCES[form].lead)
    figures = {
        "max_abs": found["max_abs"] / max(largest, 1.0),
        "kl": found["kl"],
        "kl_median": float(np.median(everything[2])),
        "top1_sure": found["top1_sure"],
        "rise": nll["nll"] / nll["nll_torch"] - 1,
    }
    return figures, judged.failures


def encoder_figures(form: str, graph: Path, cases: Any) -> Figures:
    """As `export.check.encoder.measure_encoder_parity`."""
    from export.check.encoder import measure_encoder_parity

    found = measure_encoder_parity(form, graph, cases)
    return {"max_abs": found["max_abs"], "alike": found["alike"]}, found["failures"]


def measure(name: str, forms: list[str]) -> Iterator[dict[str, Any]]:
    """Figures of every sound and broken graph of one model."""
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
        encoder = recipe.task != "causal-lm"
        figures: Callable[..., Figures] = encoder_figures if encoder else decoder_figures
        cases = task.cases if encoder else task.cases["parity.safetensors"]
        for form in recipe.export.graphs:
            with (
                patch("export.check.parity.require_parity"),
                patch("export.tasks.encoder.require_parity"),
            ):
                make_form(form, job)
            if form.kind not in forms:
                continue
            graph = task.files(form.kind).all
            for fault, path in chain([("", graph)], broken_graphs(graph, layers=layers)):
                found, failures = figures(form.kind, path, cases)
                yield {"model": name, "form": form.kind, "fault": fault, **found, "says": failures}


def main() -> None:
    """Measure the models that are asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=RANDOM, help="names, or folders of students")
    parser.add_argument("--forms", nargs="+", default=FORMS)
    asked = parser.parse_args()
    refused: dict[str, list[str]] = {form: [] for form in asked.forms}
    unseen: dict[str, list[str]] = {form: [] for form in asked.forms}
    for name in asked.models:
        for row in measure(name, list(asked.forms)):
            says = row.pop("says")
            figures = "  ".join(f"{k} {v:.3g}" for k, v in row.items() if not isinstance(v, str))
            verdict = "refused" if says else "kept"
            fault = row["fault"]
            print(
                f"{name:12} {row['form']:12} {verdict:8} {figures}  {fault or 'sound'}", flush=True
            )
            if says and not fault:
                refused[row["form"]].append(f"{name}: {says}")
            if fault and not says:
                unseen[row["form"]].append(f"{name}: {fault}")
    print(json.dumps({"refused": refused, "unseen": unseen}))


if __name__ == "__main__":
    main()
