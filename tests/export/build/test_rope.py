"""The builder for each kind of rotary embedding: chosen by rule, compared with torch's logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from export.build.backend import build_graphs
from export.build.choice import choose_backend, rope_kinds
from export.build.surgery import attention_windows
from export.check.parity import answer, make_cases, measure_parity
from export.gguf.architecture import architecture, whole_config
from limbeck.contract.errors import ModelError
from tests.pico import make_model

ROPES: dict[str, dict[str, Any]] = {
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 24,
        "short_factor": [1.0 + at / 4 for at in range(8)],
        "long_factor": [2.0 + at for at in range(8)],
    },
}


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("llama3", "genai"),
        ("dynamic", "genai"),
        ("yarn", "dynamo"),
        pytest.param("linear", "dynamo", marks=pytest.mark.slow),
        pytest.param("longrope", "dynamo", marks=pytest.mark.slow),
    ],
)
def test_auto_takes_the_builder_that_computes_what_torch_does(
    tmp_path: Path, kind: str, backend: str
) -> None:
    rope = {"rope_theta": 10000.0, "rope_type": kind, **ROPES[kind]}
    model = make_model(tmp_path / "model", num_hidden_layers=1, rope_parameters=rope)
    draw = np.random.default_rng(7)
    texts = [draw.integers(0, 256, length) for length in (40, 33)]
    built = build_graphs(model, tmp_path, {}, backend="auto")
    assert built.backend == backend, built.why
    cases = answer(make_cases(texts, context=built.context), model)
    found = measure_parity("fp32", built.graphs, cases)
    assert found["failures"] == []
    # Beyond the original context, longrope's factors for one row depend on the rows beside it.
    assert built.context == (24 if kind == "longrope" else 64)


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", ["rope_type", "type"])
def test_the_kind_is_read_from_either_generations_configuration(key: str, name: str) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    assert choose_backend(config)[0] == "genai"
    with pytest.raises(ModelError, match=r"phi3 with rope of kind dynamic cannot be exported"):
        choose_backend(config | {"model_type": "phi3", key: {name: "dynamic"}})
    for kind in ("llama3", "dynamic", "yarn", "linear", "longrope"):
        given = config | {key: {name: kind}}
        assert rope_kinds(given) == {kind}
        backend, why = choose_backend(given)
        assert backend == ("genai" if kind in ("llama3", "dynamic") else "dynamo")
        assert backend == "genai" or kind in why
    both = {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {name: "linear"}}
    assert rope_kinds(both) == {"linear"}  # as transformers reads it
    assert choose_backend(config | {"head_dim": 24})[0] == "dynamo"
    assert choose_backend(config | {"model_type": "phi"})[0] == "dynamo"


@pytest.mark.parametrize("place", ["rope_parameters", "beside"])
def test_a_partial_rope_goes_to_torchs_exporter(place: str) -> None:
    """onnxruntime's kernel refuses what GenAI's builder makes of it."""
    share = {"partial_rotary_factor": 0.5}
    config = {"model_type": "llama", "head_dim": 16}
    config |= {"rope_parameters": share} if place == "rope_parameters" else share
    name, why = choose_backend(config)
    assert (name, why) == (
        "dynamo",
        "auto: GenAI's builder is not right for a partial_rotary_factor",
    )
    with pytest.raises(ModelError, match="partial_rotary_factor cannot be exported by GenAI"):
        choose_backend(config, backend="genai")
    assert choose_backend(config | {"rope_parameters": None, "partial_rotary_factor": 1.0})[0] == (
        "genai"
    )


def test_a_window_that_the_architecture_does_not_have_is_ignored(tmp_path: Path) -> None:
    """As transformers ignores it: conversions of mistral and gemma leave it in a llama's file."""
    plain = make_model(tmp_path / "plain")
    stray = make_model(tmp_path / "stray", sliding_window=4, hidden_activation="gelu")
    assert json.loads((stray / "config.json").read_text())["sliding_window"] == 4
    ids = torch.arange(40).reshape(1, -1)
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
            for folder in (stray, plain)
        )
    assert torch.equal(ours, theirs)
    assert attention_windows(stray) == attention_windows(plain) == [-1, -1]
    real = make_model(tmp_path / "real", model_type="mistral", sliding_window=4)
    assert attention_windows(real) == [4, 4]
    config = json.loads((stray / "config.json").read_text())
    architecture(whole_config(config))  # llama.cpp runs it too
    config["model_type"] = "mistral"
    with pytest.raises(ModelError, match="window"):
        architecture(whole_config(config))


def test_fields_of_other_architectures_change_no_graph(tmp_path: Path) -> None:
    """transformers ignores them in a llama; GenAI's builder would obey each."""
    stray = {
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 2.0,
        "hidden_activation": "gelu",
        "num_local_experts": 2,
        "sliding_window": 4,
    }
    model = make_model(tmp_path / "model", num_hidden_layers=1, **stray)
    built = build_graphs(model, tmp_path, {}, backend="genai")
    texts = [np.arange(length) for length in (40, 33)]
    cases = answer(make_cases(texts, context=built.context), model)
    found = measure_parity("fp32", built.graphs, cases)
    assert found["failures"] == []


def test_a_rope_of_each_layer_type_counts() -> None:
    ropes = {
        "sliding_attention": {"rope_type": "default"},
        "full_attention": {"rope_type": "dynamic"},
    }
    config = {"model_type": "gemma3_text", "rope_parameters": ropes}
    assert rope_kinds(config) == {"default", "dynamic"}
    with pytest.raises(ModelError, match="rope of kind dynamic cannot be exported"):
        choose_backend(config)


def test_a_builder_that_the_recipe_names_is_held_to_the_same_rule() -> None:
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    with pytest.raises(ModelError, match=r"kind yarn .* GenAI's builder.*export\.backend to auto"):
        choose_backend(config | {"rope_scaling": {"type": "yarn"}}, backend="genai")
    dynamic = config | {"rope_parameters": {"rope_type": "dynamic"}}
    with pytest.raises(ModelError, match=r"kind dynamic .*torch\.export cannot trace it"):
        choose_backend(dynamic, backend="dynamo")
    assert choose_backend(dynamic, backend="genai") == ("genai", "the recipe names it")
