"""Which architectures go the whole way, proven on tiny random models: distilled student, every
form, parity, greedy text.

`make architectures` writes docs/architectures.md from what passes here; a slow test asserts that
the file is up to date.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

import compress
from compress.models.shrink import FAMILIES
from export import export_student
from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import LimbeckError
from limbeck.contract.recipe import Recipe
from limbeck.runtime.decoder import Decoder, GraphDecoder
from tests import ROOT
from tests.encoders import CONFIGS, classifier_recipe, embedding_recipe, source
from tests.pico import make_model, make_student, pico_recipe

DOCUMENT = ROOT / "docs" / "architectures.md"
# Small blocks: random weights have no redundancy that would forgive large ones.
WEIGHT8, WEIGHT4 = ({"kind": form, "block_size": 16} for form in ("int8-weight", "int4-weight"))
FORMS = ("fp32", WEIGHT8, "int8-dynamic", "int8-static", WEIGHT4)
PROMPT = np.random.default_rng(5).integers(0, 256, 12).tolist()
ENCODER_FORMS = ("fp32", WEIGHT8, "int8-dynamic", "int8-static")
CARDS = (
    ("cuda", "fp16"),
    ("tensorrt", "int8-trt"),
)  # forms that the CPU has no kernels for, and whom they are made for
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    # 64 wide: at 32 a scale a tensor misses one in ten of the clear first choices of this very
    # model, not of those of other seeds.
    "qwen3": {"tie_word_embeddings": True, "hidden_size": 64, "intermediate_size": 96},
    "mistral": {"sliding_window": 8},
    "granite": {"logits_scaling": 2.0, "attention_multiplier": 0.25, "residual_multiplier": 0.7},
    "phi3": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
    "gpt_neox": {"intermediate_size": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
# Models that a student is cut out of or adapts: three layers, so that two can be kept of unlike
# ones.
_WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = _WIDE | {"num_key_value_heads": 2, "head_dim": 16}
BASES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED | SIZES["llama"],
    "qwen2": _GROUPED | SIZES["qwen2"],
    "qwen3": _GROUPED | SIZES["qwen3"],
    "mistral": _GROUPED | SIZES["mistral"],
    "granite": _GROUPED | SIZES["granite"],
    "phi3": _GROUPED,
    "smollm3": _GROUPED | {"no_rope_layers": [1, 0, 1]},
    "gemma3_text": _GROUPED
    | {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt2": {"n_embd": 64, "n_inner": 96, "n_head": 4, "n_layer": 3, "n_positions": 64},
    "gpt_neox": _WIDE,
    "opt": _WIDE | {"ffn_dim": 96, "word_embed_proj_dim": 64},
}
# Further architectures, which are not cut: two teachers of each make a LoRA student.
FURTHER: dict[str, dict[str, Any]] = {
    "cohere2": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "logit_scale": 0.5,
    },
    "ernie4_5": {},
    "gemma": {},
    "gemma2": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 24,
    },
    "glm4": {"partial_rotary_factor": 0.5},
    "nemotron": {"partial_rotary_factor": 0.5},
    "olmo2": {},
    "phi": {"partial_rotary_factor": 0.5},
    "stablelm": {"partial_rotary_factor": 0.25, "use_qkv_bias": True},
    "starcoder2": {"sliding_window": 8},
}
BASES_OF_ALL = BASES | {kind: _GROUPED | sizes for kind, sizes in FURTHER.items()}
STUDENTS = ("lora", "shrink")
HEAD = """# Architectures

Made by `make architectures`; do not edit. Every row is proven on tiny models of random weights.
The column *weights* names the models of **real weights** that went the whole way too, in
`make test-real` or a shipped recipe.

- A model goes through `export_student` with `backend: auto` and every form. Parity with torch holds
  in all cases, ragged batches padded on either side among them, and 16 greedy tokens equal torch's.
- Each other form continues the same prompt with the tokens that its graph for scoring puts first.
- The same holds of two students that `compress.distill` made of two random teachers in a few steps:
  a LoRA student, merged, and one cut in layers, neurons, heads and width.
- Forms for a card are checked as far as a CPU can, on the plain model: their graphs are built for
  that provider and pass parity in onnxruntime's CPU arithmetic, where fp16 products are cast to
  fp32. That a card has a kernel for each operator is not shown here (docs/gpu.md).
- Encoders, below, have the forms fp32, int8-weight, int8-dynamic and int8-static only.

| model type | class | weights | backend | plain model | LoRA student | shrunk student | a card |
|---|---|---|---|---|---|---|---|
"""
FURTHER_HEAD = """
Further decoders, of random weights, as two teachers and a LoRA student. `shrink` does not know
them. Others that transformers loads can teach: what their models compute is compared with what the
loss reads when they are loaded. Models for pictures and text teach what they say without a picture:
Gemma 3, Mistral Small 3, Qwen2-VL to Qwen3-VL, LLaVA, SmolVLM, Idefics 3, InternVL and LFM2-VL.
`validate` refuses students whose graph cannot be written, such as these, LFM2, Falcon-H1, mixtures
of experts and state-space models.

| model type | class | backend | LoRA student |
|---|---|---|---|
"""
# By architecture, or architecture and task: models that tests/real or a shipped recipe takes
# through the whole chain.
REAL_WEIGHTS = {
    "llama": "SmolLM2-135M",
    "gemma3_text": "Gemma-3-270M, up to parity and loss of every form",
    "bert classification": "all-MiniLM-L6-v2, paraphrase-MiniLM-L3-v2",
    "bert embedding": "all-MiniLM-L6-v2, paraphrase-MiniLM-L3-v2",
}


def document() -> str:
    """The whole text of docs/architectures.md as this code proves it; takes minutes."""
    with (
        tempfile.TemporaryDirectory() as name,
        patch.dict(os.environ, LIMBECK_CACHE=f"{name}/cache"),
    ):
        folder = Path(name)
        decoders = [prove(folder, kind) for kind in SIZES]
        further = [prove_further(folder, kind) for kind in FURTHER]
        encoders = [
            prove_encoder(folder, kind, task)
            for kind in ENCODERS
            for task in ("classification", "embedding")
        ]
        return (
            HEAD
            + "".join(f"{row}\n" for row in decoders)
            + FURTHER_HEAD
            + "".join(f"{row}\n" for row in further)
            + ENCODER_HEAD
            + "".join(f"{row}\n" for row in encoders)
        )


def prove(folder: Path, model_type: str) -> str:
    """Export a tiny model of ``model_type`` and its students below ``folder`` and return their row
    of the table.
    """
    root = folder / model_type
    root.mkdir()
    model = make_model(root / "model", model_type=model_type, **SIZES[model_type])
    make_student(root / "student", model)
    name = json.loads((root / "student/model/config.json").read_text())["architectures"][0]
    plain = export_and_compare(
        root / "student", root / "cpu", pico_recipe(export={"forms": list(FORMS)})
    )
    lora, shrunk = (prove_student(root / kind, model_type, kind) for kind in STUDENTS)
    backend = plain.result["backend"]["name"]
    assert {student.result["backend"]["name"] for student in (lora, shrunk)} == {backend}, (
        model_type
    )
    proven = " | ".join(", ".join(exported.result["forms"]) for exported in (plain, lora, shrunk))
    cards = ", ".join(prove_card(root, provider, form) for provider, form in CARDS)
    return f"| {model_type} | {name} | {weights(model_type)} | {backend} | {proven} | {cards} |"


def prove_further(folder: Path, model_type: str) -> str:
    """Distil and export a LoRA student of ``model_type`` below ``folder``, and return its row."""
    exported = prove_student(folder / model_type, model_type, "lora", ("fp32", WEIGHT8))
    config = json.loads((folder / model_type / "student/model/config.json").read_text())
    facts = exported.result
    return (
        f"| {model_type} | {config['architectures'][0]} | {facts['backend']['name']} | "
        f"{', '.join(facts['forms'])} |"
    )


def weights(key: str) -> str:
    """The kinds of weights that an architecture, or a task of it, was tried with."""
    return f"real weights ({REAL_WEIGHTS[key]})" if key in REAL_WEIGHTS else "random weights"


def prove_card(root: Path, provider: str, form: str) -> str:
    """Export the plain student below ``root`` for a card; the form that passes, or why there is
    none.
    """
    recipe = pico_recipe(export={"forms": ["fp32", form], "provider": provider})
    try:
        exported = export_student(student=root / "student", out=root / provider, recipe=recipe)
    except LimbeckError as error:
        return f"not for {provider}: {str(error).splitlines()[0]}"
    require_generation(exported, form, PROMPT)
    return ", ".join(exported.result["forms"].keys() - {"fp32"})


def prove_student(
    folder: Path, model_type: str, kind: str, forms: Sequence[Any] = FORMS
) -> Artifact:
    """Distil two random teachers of ``model_type`` into a student of ``kind`` in ``folder``, and
    export it.
    """
    recipe = distillation(model_type, kind, forms)
    student = compress.distill(recipe=recipe, out=folder / "student")
    assert student.result["best_step"] > 0, (
        f"{model_type}: the best student of kind {kind} is the untrained one"
    )
    return export_and_compare(student.path, folder / "onnx", recipe)


def distillation(model_type: str, kind: str, forms: Sequence[Any] = FORMS) -> Recipe:
    """A few steps on real text, from two random teachers of ``model_type`` into a student of a
    third.
    """
    # Spread, so that logits differ; opt has its own name for it.
    spread = {"init_std" if model_type == "opt" else "initializer_range": 0.2}
    config = {"model_type": model_type, **BASES_OF_ALL[model_type], **spread}
    one, two, base = ({"kind": "random", "config": config, "seed": seed} for seed in (1, 2, 0))
    sizes = {"rank": 4} if kind == "lora" else {**cut(model_type), "calibration_blocks": 4}
    return pico_recipe(
        teachers=[{"name": "one", "model": one}, {"name": "two", "model": two}],
        data={
            "domains": [{"name": "code", "text": {"kind": "stdlib", "paths": ["abc.py"]}}],
            "block": 32,
            "heldout": {"every": 4, "piece_chars": 128, "blocks": 4},
        },
        student={"kind": kind, "base": base, **sizes},
        training={
            "tokens": 512,
            "batch_tokens": 64,
            "learning_rate": 1e-2,
            "precision": "fp32",
            "threads": 1,
        },
        export={"forms": list(forms)},
    )


def cut(model_type: str) -> dict[str, int]:
    """Sizes of a student cut out of `BASES`; where the head size is hidden / heads, width and heads
    go together.
    """
    heads = 3 if FAMILIES[model_type].head_size_is_fixed else 1
    return {
        "layers": 2,
        "intermediate_size": 64,
        "kv_heads": heads,
        "hidden_size": 48,
        "round_to": 16,
    }


def export_and_compare(student: Path, out: Path, recipe: Recipe) -> Artifact:
    """Export the artifact ``student`` to ``out``, and assert that the fp32 graph goes on from a
    prompt as torch does, other forms as they score.
    """
    exported = export_student(student=student, out=out, recipe=recipe)
    expected, name = greedy(student / "model", PROMPT)
    found = list(Decoder(exported.path, form="fp32").generate(PROMPT, 16))
    assert found == expected, f"{name}: {found} instead of {expected}"
    for form in exported.result["forms"].keys() - {"fp32"}:
        require_generation(exported, form, PROMPT)
    return exported


def require_generation(exported: Artifact, form: str, prompt: list[int], count: int = 4) -> None:
    """Assert that ``form`` goes on from ``prompt`` by the tokens that its all-logits graph puts
    first, whatever provider it is made for.

    A step and a whole text sum in another order: two choices nearer to each other than that are
    both first.
    """
    facts = exported.result["forms"][form]
    last, every = (
        GraphDecoder(exported.path / facts[graph]) for graph in ("graph", "all_logits_graph")
    )
    found = list(last.generate(prompt, count))
    scores = every.score([[*prompt, *found]])[0, len(prompt) - 1 : -1]
    assert np.isfinite(scores).all()
    behind = scores.max(axis=1) - scores[np.arange(count), found]
    assert (behind <= 1e-3 * np.abs(scores).max()).all(), (
        f"{exported.path}: {form} generates {found}, behind by {behind}"
    )


ENCODERS = ("bert", "distilbert", "roberta")
ENCODER_HEAD = """
Encoders, through torch's exporter, distilled from two teachers of the architecture: all of a base
trained (`full`), and cut in layers, neurons, heads and width (`shrink`); LoRA is for language
models.
Parity with torch holds for a ragged batch, padding, one token and the longest text.
Of random weights, fp32 graphs of ALBERT, CamemBERT, DeBERTa-v2, ELECTRA, ERNIE, Llama, ModernBERT,
MPNet, Nomic BERT, Qwen 3, RemBERT and XLM-RoBERTa equal torch's too. `validate` tries the graph of
any other encoder student on a small random model, and refuses one that differs.

| model type | task | class | weights | full student | shrunk student |
|---|---|---|---|---|---|
"""


def prove_encoder(folder: Path, model_type: str, task: str) -> str:
    """Distil and export encoders of ``model_type`` for ``task`` below ``folder`` and return their
    row of the table.
    """
    root = folder / f"{model_type}-{task}"
    # Twice as wide as elsewhere: of a narrower one the head, which stays in fp32, weighs too much.
    wide = {
        name: size if "layers" in name else 2 * size for name, size in CONFIGS[model_type].items()
    }
    bases = [source(model_type, seed=seed, initializer_range=0.2, **wide) for seed in range(3)]
    full: dict[str, Any] = {"kind": "full", "base": bases[0]}
    shrunk = {
        "layers": 1,
        "intermediate_size": 128,
        "kv_heads": 6,
        "hidden_size": 96,
        "calibration_examples": 4,
    }
    make = classifier_recipe if task == "classification" else embedding_recipe
    models = (
        bases[1:]
        if task == "embedding"
        else [classifier(root / f"teacher{i}", bases[i]) for i in (1, 2)]
    )
    teachers = [
        {"name": name, "model": model} for name, model in zip(("one", "two"), models, strict=True)
    ]
    proven = []
    for student in (full, {**full, "kind": "shrink", **shrunk}):
        recipe = make(teachers=teachers, student=student, export={"forms": list(ENCODER_FORMS)})
        distilled = compress.distill(recipe=recipe, out=root / student["kind"] / "student")
        exported = export_student(
            student=distilled.path, out=root / student["kind"] / "onnx", recipe=recipe
        )
        proven.append(", ".join(exported.result["forms"]))
    name = json.loads((distilled.path / "model" / "config.json").read_text())["architectures"][0]
    tried = weights(f"{model_type} {task}")
    return f"| {model_type} | {task} | {name} | {tried} | {' | '.join(proven)} |"


def classifier(folder: Path, base: dict[str, Any]) -> dict[str, Any]:
    """A teacher of `classifier_recipe`, as a recipe names it: ``base`` fine-tuned in ``folder``."""
    tuned = compress.distill(
        recipe=classifier_recipe(student={"kind": "full", "base": base}), out=folder
    )
    return {"kind": "local", "path": str(tuned.path / "model")}


def greedy(model: Path, prompt: list[int], count: int = 16) -> tuple[list[int], str]:
    """The ``count`` likeliest tokens, one after the other, that torch puts after ``prompt``, and
    the model's class.
    """
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
