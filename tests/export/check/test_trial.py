"""Encoders that cannot be exported are refused before the training, by validate too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from export.build.encoder import load_student
from export.check.trial import PROVEN, require_encoder_graph, try_graph
from limbeck.app.products import mistakes
from limbeck.contract.errors import ModelError
from limbeck.contract.recipe import DynamicShapes
from tests.encoders import CONFIGS, classifier_recipe, embedding_recipe

DYNAMIC = DynamicShapes(kind="dynamic")
_SIZES: dict[str, Any] = CONFIGS["bert"] | {"max_position_embeddings": 66, "pad_token_id": 1}
_OWN: dict[str, dict[str, Any]] = {
    "distilbert": CONFIGS["distilbert"] | {"pad_token_id": 1, "max_position_embeddings": 66},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0,
                   "position_biased_input": False, "position_buckets": 8, "share_att_key": True},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "albert": {"embedding_size": 32}, "electra": {"embedding_size": 32},
    "rembert": {"input_embedding_size": 32}, "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
}  # fmt: skip


def recipe_of(kind: str, task: str, **fields: Any) -> Any:
    config = {"model_type": kind, **CONFIGS["bert"], "max_position_embeddings": 64, **fields}
    base = {"kind": "random", "config": config}
    make = classifier_recipe if task == "classification" else embedding_recipe
    over = {"teachers": [{"name": "a", "model": base}]} if task == "embedding" else {}
    return make(student={"kind": "full", "base": base}, **over)


@pytest.mark.parametrize(
    ("kind", "task", "says"),
    [
        ("fnet", "embedding", "FNetModel answers a text otherwise when it is padded"),
        ("longformer", "embedding", "torch.onnx.export cannot export LongformerModel (TorchExp"),
    ],
)
def test_validate_refuses_a_student_without_a_graph(kind: str, task: str, says: str) -> None:
    more = {"attention_window": 8} if kind == "longformer" else {}
    (found,) = mistakes(recipe_of(kind, task, **more), timed=False)
    assert found.startswith(f"student.base: {kind} cannot be exported: {says}")
    assert "docs/architectures.md" in found
    assert not {"\n", "\x1b"} & set(found)


def test_a_graph_that_answers_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.check.trial.PROVEN", ())
    config = {"model_type": "bert", "vocab_size": 258, **_SIZES}
    require_encoder_graph(config, task="classification", opset=None, shapes=DYNAMIC)

    loaded: list[Any] = []

    def other(model: Path, *, task: str) -> Any:
        """First the model for the graph, then another one as what torch says."""
        loaded.append(load_student(model, task=task))
        loaded[-1].model.classifier.bias.data += len(loaded) - 1
        return loaded[-1]

    monkeypatch.setattr("export.build.encoder.load_student", other)
    with pytest.raises(ModelError, match="bert cannot be exported: its graph does not compute"):
        require_encoder_graph(config, task="classification", opset=None, shapes=DYNAMIC)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "embedding"])
@pytest.mark.parametrize("kind", PROVEN)
def test_architectures_that_are_not_tried_have_graphs(tmp_path: Path, kind: str, task: str) -> None:
    sizes = {"vocab_size": 258, "initializer_range": 0.2}
    config = AutoConfig.for_model(kind, **sizes | _OWN.get(kind, {}) | (
        {} if kind == "distilbert" else _SIZES))  # fmt: skip
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if task == "classification" else AutoModel
    auto.from_config(config).save_pretrained(tmp_path / "model")
    assert try_graph(tmp_path / "model", tmp_path, task=task, opset=None, shapes=DYNAMIC) == []
