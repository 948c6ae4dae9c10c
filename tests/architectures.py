"""Which architectures the export handles, proven on tiny random models: student, every form, parity, greedy text.

`make architectures` writes docs/architectures.md from what passes here; a slow test asserts that the file is up to date.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from export import export_student
from limbeck.errors import LimbeckError
from limbeck.runtime import Decoder
from tests.encoders import classifier_recipe, embedding_recipe, make_encoder_student
from tests.pico import make_model, make_student, pico_recipe

DOCUMENT = Path(__file__).parent.parent / "docs" / "architectures.md"
# Small blocks: random weights have no redundancy that would forgive large ones.
WEIGHT8, WEIGHT4 = ({"kind": form, "block_size": 16} for form in ("int8-weight", "int4-weight"))
FORMS = ("fp32", WEIGHT8, "int8-dynamic", "int8-static", WEIGHT4)
ENCODER_FORMS = ("fp32", WEIGHT8, "int8-dynamic", "int8-static")
CARDS = (
    ("cuda", "fp16"),
    ("tensorrt", "int8-trt"),
)  # forms that the CPU has no kernels for, and whom they are made for
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "granite": {"logits_scaling": 2.0, "attention_multiplier": 0.25, "residual_multiplier": 0.7},
    "phi3": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
    "gpt_neox": {"intermediate_size": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
HEAD = """# Architectures

Made by `make architectures`: for each, a tiny random model goes through `export_student` with `backend: auto` and every form; parity with
torch holds in all cases (ragged batches padded on either side among them), and 16 greedy tokens equal torch's. Forms for a card are
checked as far as a CPU can: their graphs are built for that provider and pass parity in onnxruntime's CPU arithmetic, where fp16 products are
cast to fp32; that a card has a kernel for each operator is not shown here (docs/gpu.md). Do not edit.

| model type | class | backend | passes | for a card, on a CPU |
|---|---|---|---|---|
"""


def document() -> str:
    """The whole text of docs/architectures.md as this code proves it; takes minutes."""
    with tempfile.TemporaryDirectory() as folder:
        decoders = [prove(Path(folder), kind) for kind in SIZES]
        encoders = [
            prove_encoder(Path(folder), kind, task) for kind in ENCODERS for task in ("classification", "embedding")
        ]
        return HEAD + "".join(f"{row}\n" for row in decoders) + ENCODER_HEAD + "".join(f"{row}\n" for row in encoders)


def prove(folder: Path, model_type: str) -> str:
    """Export a tiny model of ``model_type`` below ``folder`` and return its row of the table."""
    root = folder / model_type
    root.mkdir()
    model = make_model(root / "model", model_type=model_type, **SIZES[model_type])
    make_student(root / "student", model)
    prompt = np.random.default_rng(5).integers(0, 256, 12).tolist()
    expected, name = greedy(root / "student" / "model", prompt)
    exports: dict[str, list[Any]] = {"cpu": list(FORMS)} | {card: ["fp32", form] for card, form in CARDS}
    passed: dict[str, list[str]] = {}
    backend = ""
    for provider, forms in exports.items():
        recipe = pico_recipe(export={"forms": forms, "provider": provider})
        try:
            exported = export_student(student=root / "student", out=root / provider, recipe=recipe)
        except LimbeckError as error:
            passed[provider] = [f"not for {provider}: {str(error).splitlines()[0]}"]
            continue
        passed[provider] = list(exported.result["forms"])
        if provider == "cpu":
            backend = exported.result["backend"]["name"]
            found = list(Decoder(exported.path, form="fp32").generate(prompt, 16))
            assert found == expected, f"{model_type}: {found} instead of {expected}"
    cards = ", ".join(form for card, _ in CARDS for form in passed[card] if form != "fp32")
    return f"| {model_type} | {name} | {backend} | {', '.join(passed['cpu'])} | {cards} |"


ENCODERS = ("bert", "distilbert", "roberta")
ENCODER_HEAD = """
Encoders, through torch's exporter: parity with torch holds for a ragged batch, padding, one token and the longest text.

| model type | task | class | passes |
|---|---|---|---|
"""


def prove_encoder(folder: Path, model_type: str, task: str) -> str:
    """Export a tiny encoder of ``model_type`` for ``task`` below ``folder`` and return its row of the table."""
    root = folder / f"{model_type}-{task}"
    root.mkdir()
    student = make_encoder_student(root / "student", model_type, task=task)
    name = json.loads((student.path / "model" / "config.json").read_text())["architectures"][0]
    make = classifier_recipe if task == "classification" else embedding_recipe
    recipe = make(export={"forms": list(ENCODER_FORMS)})
    try:
        exported = export_student(student=student.path, out=root / "onnx", recipe=recipe)
    except LimbeckError as error:
        return f"| {model_type} | {task} | {name} | nothing: {str(error).splitlines()[0]} |"
    return f"| {model_type} | {task} | {name} | {', '.join(exported.result['forms'])} |"


def greedy(model: Path, prompt: list[int], count: int = 16) -> tuple[list[int], str]:
    """The ``count`` likeliest tokens, one after the other, that torch puts after ``prompt``, and the model's class."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(loaded(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :], type(loaded).__name__


if __name__ == "__main__":
    DOCUMENT.write_text(document())
