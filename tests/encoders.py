"""Tiny random encoders for tests: byte-level tokenizer, recipes, students of both tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.contract.artifact import Artifact, open_artifact, write_artifact
from limbeck.contract.data.examples import EXAMPLES, Examples, save_examples
from limbeck.contract.data.heldout import CALIBRATION, save_calibration
from limbeck.contract.recipe import EncoderRecipe, parse_any_recipe

CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
    },
    "roberta": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
    },
    "distilbert": {"dim": 64, "n_heads": 4, "n_layers": 2, "hidden_dim": 128},
}
# Every form of an encoder, in blocks that divide the tiny widths.
SMALL = ["fp32", {"kind": "int8-weight", "block_size": 16}, "int8-static", "int8-dynamic"]
QUICK = {
    "training": {
        "examples": 64,
        "batch": 8,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "threads": 1,
    },
    "bench": {
        "batches": [1, 2],
        "lengths": [8, 16],
        "minutes": 0.01,
        "min_blocks": 3,
        "threads": 1,
    },
}
CLASSES = [
    {"name": "code", "text": {"kind": "stdlib", "paths": ["[a-f]*.py"]}},
    {
        "name": "prose",
        "text": {
            "kind": "stdlib",
            "paths": ["pydoc_data/topics.py"],
            "format": {"kind": "python-strings", "min_chars": 200},
        },
    },
]


def source(model_type: str = "bert", *, seed: int = 0, **sizes: Any) -> dict[str, Any]:
    """A random encoder as a recipe names it."""
    config = {
        "model_type": model_type,
        "max_position_embeddings": 64,
        **CONFIGS[model_type],
        **sizes,
    }
    return {"kind": "random", "seed": seed, "config": config}


def classifier_recipe(**over: Any) -> EncoderRecipe:
    """Plain fine-tuning of a tiny classifier; ``over`` replaces whole sections."""
    tree = {
        "task": "classification",
        "name": "pico-classes",
        "data": {"classes": CLASSES, "max_tokens": 40, "heldout": {"every": 3}},
        "student": {"kind": "full", "base": source()},
    }
    return _checked(tree | QUICK | over)


def embedding_recipe(**over: Any) -> EncoderRecipe:
    """Two random sentence encoders into one of a layer."""
    tree = {
        "task": "embedding",
        "name": "pico-sentences",
        "teachers": [
            {"name": "a", "model": source(seed=1)},
            {"name": "b", "model": source("distilbert", seed=2)},
        ],
        "data": {
            "domains": [{"name": "code", "text": {"kind": "stdlib", "paths": ["json/*.py"]}}],
            "piece_chars": 80,
            "most": 60,
            "max_tokens": 24,
        },
        "student": {"kind": "shrink", "base": source(), "layers": 1, "calibration_examples": 4},
    }
    return _checked(tree | QUICK | over)


def _checked(tree: dict[str, Any]) -> EncoderRecipe:
    recipe = parse_any_recipe(tree)
    assert isinstance(recipe, EncoderRecipe)
    return recipe


def make_examples(*, rows: int = 12, width: int = 20, seed: int = 0) -> Examples:
    """Random ragged examples of two groups."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(2, width + 1, rows).astype(np.int32)
    ids = draw.integers(1, 256, (rows, width)).astype(np.int32) * (
        np.arange(width) < lengths[:, None]
    )
    return Examples(ids.astype(np.int32), lengths, (np.arange(rows) % 2).astype(np.int32))


def make_encoder_student(path: Path, model_type: str, *, task: str, scale: float = 0.2) -> Artifact:
    """A random student artifact of a task; ``scale`` spreads the weights so that answers differ."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    from compress.models.language import byte_tokenizer

    tokenizer = byte_tokenizer()
    sizes = source(model_type)["config"] | {
        "vocab_size": len(tokenizer),
        "pad_token_id": 0,
        "initializer_range": scale,
    }
    torch.manual_seed(0)
    classes = ["no", "yes", "maybe"] if task == "classification" else None
    if classes:
        config = AutoConfig.for_model(**sizes, num_labels=3, id2label=dict(enumerate(classes)))
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        model = AutoModel.from_config(AutoConfig.for_model(**sizes))
    with write_artifact(path, kind="student", key=f"pico {path}", parents={}) as draft:
        model.save_pretrained(draft.folder / "model")
        tokenizer.save_pretrained(draft.folder / "model")
        save_examples(draft.folder / EXAMPLES, make_examples())
        rows = make_examples(seed=1)
        save_calibration(
            draft.folder / CALIBRATION,
            [r[:n] for r, n in zip(rows.input_ids, rows.lengths, strict=True)],
        )
        (draft.folder / "teachers.json").write_text(json.dumps([]))
        metrics = {"accuracy": 0.5, "macro_f1": 0.5, "nll": 0.7} if classes else {"spearman": 0.5}
        draft.result = {"task": task, "classes": classes, "metrics": metrics, "teachers": {}}
    return open_artifact(path)
