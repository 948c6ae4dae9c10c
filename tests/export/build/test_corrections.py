"""Fused graphs of architectures that GenAI's builder needs help with, compared with torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM

from export.build.backend import build_graphs
from export.build.choice import choose_backend
from export.check.parity import answer, make_cases, measure_parity
from export.graphs import ROPE, form_files
from export.round.half import cast_to_half
from limbeck.contract.errors import ModelError
from tests.pico import make_model

_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = {"hidden_size": 48, "num_hidden_layers": 3, "layer_types": _SLIDING, "sliding_window": 8}
_CASES = {
    # the root of 48, which scales the embedding, is no number of two digits
    "gemma": ("gemma", {"hidden_size": 48}),
    "gemma2, with both caps": (
        "gemma2",
        {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3, two ropes": (
        "gemma3_text",
        {
            **_GEMMA,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,  # which transformers does not apply
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            },
        },
    ),
    "phi3, with a window": ("phi3", {"sliding_window": 8}),
    "smollm3, a layer without rope": (
        "smollm3",
        {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "attention_bias": True},
    ),
    "ernie4_5": ("ernie4_5", {"use_bias": True}),
}


@pytest.mark.parametrize("case", _CASES)
def test_the_fused_graph_is_torchs_model(tmp_path: Path, case: str) -> None:
    kind, sizes = _CASES[case]
    model = make_model(tmp_path / "model", model_type=kind, **sizes)
    built = build_graphs(model, tmp_path, {}, backend="auto")
    assert built.backend == "genai", built.why
    graph = onnx.load(built.graphs.last, load_external_data=False).graph
    assert any(node.op_type == "GroupQueryAttention" for node in graph.node)
    texts = [np.random.default_rng(7).integers(0, 256, length) for length in (40, 33)]
    cases = answer(make_cases(texts, context=built.context), model)
    found = measure_parity("fp32", built.graphs, cases)
    assert found["failures"] == []
    assert found["max_abs"] < 5e-5


@pytest.mark.parametrize(
    ("kind", "stray"),
    [
        ("ernie4_5", {"compression_ratio": 2.0}),
        ("gemma", {"no_rope_layers": [0, 1]}),
        ("llama", {"no_rope_layers": [0, 1]}),
        ("mistral", {"sliding_window": 8, "layer_types": _SLIDING[:2]}),
        ("phi3", {"sliding_window": 8, "layer_types": _SLIDING[:2]}),
        ("phi3", {"architectures": ["LlamaForCausalLM"]}),
        ("smollm3", {"architectures": None}),
    ],
)
def test_fields_that_transformers_ignores_are_ignored(
    tmp_path: Path, kind: str, stray: dict[str, Any]
) -> None:
    model = make_model(tmp_path / "model", model_type=kind)
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | stray))
    built = build_graphs(model, tmp_path, {}, backend="auto")
    assert built.backend == "genai", built.why
    texts = [np.random.default_rng(7).integers(0, 256, 40)]
    cases = answer(make_cases(texts, context=built.context), model)
    assert measure_parity("fp32", built.graphs, cases)["failures"] == []


@pytest.mark.parametrize("backend", ["auto", "genai", "dynamo"])
@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text"])
def test_attention_in_both_directions_is_refused(kind: str, backend: str) -> None:
    config = {"model_type": kind, "head_dim": 16, "use_bidirectional_attention": True}
    with pytest.raises(ModelError, match="reads the tokens behind it"):
        choose_backend(config, backend=backend)


@pytest.mark.parametrize("kind", ["llama", "llama3", "gemma3_text"])
def test_tables_of_angles_are_computed_as_torch_does(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far positions too, in fp32 and in fp16, and nothing of the tables stays in the weights."""
    monkeypatch.setattr("export.build.rope.LARGE", 0)
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "max_position_embeddings": 4096}
    if kind == "llama3":
        kind, sizes["rope_parameters"] = "llama", {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 512,
        }  # fmt: skip
    if kind == "gemma3_text":
        sizes |= {"layer_types": _SLIDING[:2], "sliding_window": 8}
    model = make_model(tmp_path / "model", model_type=kind, **sizes)
    built = build_graphs(model, tmp_path, {}, backend="genai")
    graph = onnx.load(built.graphs.last, load_external_data=False).graph
    assert not any("_cache" in t.name and not t.name.startswith(ROPE) for t in graph.initializer)
    stored = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters())
    assert built.graphs.data.stat().st_size < 4 * stored + 4096  # a table has 256 kB

    texts = [np.random.default_rng(7).integers(0, 256, length) for length in (40, 33, 900, 900)]
    cases = answer(make_cases(texts[:2], context=4096, more=texts[2:]), model)
    found = measure_parity("fp32", built.graphs, cases)
    assert found["failures"] == []
    rotary = AutoModelForCausalLM.from_pretrained(model).model.rotary_emb
    at = torch.arange(4096)[None]
    options = {"layer_type": "full_attention"} if kind == "gemma3_text" else {}
    want = rotary(torch.zeros(1), at, **options)
    names = [n.output[0] for n in graph.node if n.op_type == "Cast" and "cache" in n.output[0]]
    names = [name for name in names if "local" not in name]
    for name, table in zip(sorted(names), want, strict=True):
        got = onnx.reference.ReferenceEvaluator(_only(graph, name)).run(None, {})[0]
        np.testing.assert_allclose(got, table[0, :, : got.shape[1]], atol=1e-6)

    half = form_files(tmp_path, "fp16")
    cast_to_half(built.graphs, half, metadata={})
    rounded = measure_parity("fp16", half, cases)
    assert rounded["failures"] == []


def _only(graph: onnx.GraphProto, name: str) -> onnx.ModelProto:
    """The part of ``graph`` that computes the table ``name`` from constants."""
    nodes = [node for node in graph.node if any(name in out for out in node.output)]
    constants = [t for t in graph.initializer if t.name.startswith(f"{ROPE}{name}/")]
    value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    made = onnx.helper.make_graph(nodes, "table", [], [value], constants)
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 20)])


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "linear"}}}),
        ("smollm3", {"rope_parameters": {"rope_type": "llama3"}}),
        ("phi3", {"partial_rotary_factor": 0.75}),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}),
    ],
)
def test_what_the_corrections_do_not_cover_goes_to_torchs_exporter(
    kind: str, changed: dict[str, Any]
) -> None:
    assert choose_backend({"model_type": kind, "head_dim": 16})[0] == "genai"
    assert choose_backend({"model_type": kind, "head_dim": 16, **changed})[0] == "dynamo"
