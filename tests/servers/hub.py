"""Configurations of the hub models that shipped recipes name, for tests without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from limbeck.contract.sources.places import cache_folder

SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
}
LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "head_dim": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
}
PYTHIA = {
    "model_type": "gpt_neox",
    "vocab_size": 50304,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}


def _sizes(
    width: int, inner: int, layers: int, heads: int, kv: int | None = None, tied: bool | None = None
) -> Any:
    found: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return (
        found
        | ({"num_key_value_heads": kv} if kv else {})
        | ({} if tied is None else {"tie_word_embeddings": tied})
    )


def _gpt2(width: int, layers: int, heads: int) -> Any:
    return {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": {**SMOLLM2, **_sizes(576, 1536, 30, 9, 3)},
    "HuggingFaceTB/SmolLM2-360M-Instruct": {**SMOLLM2, **_sizes(960, 2560, 32, 15, 5)},
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": {**SMOLLM2, **_sizes(2048, 8192, 24, 32, 32)},
    "Qwen/Qwen3-0.6B": {**QWEN3, **_sizes(1024, 3072, 28, 16, tied=True)},
    "Qwen/Qwen3-1.7B": {**QWEN3, **_sizes(2048, 6144, 28, 16, tied=True)},
    "Qwen/Qwen3-4B": {**QWEN3, **_sizes(2560, 9728, 36, 32, tied=True)},
    "Qwen/Qwen3-8B": {**QWEN3, **_sizes(4096, 12288, 36, 32, tied=False)},
    "meta-llama/Llama-3.2-1B-Instruct": {**LLAMA3, **_sizes(2048, 8192, 16, 32, tied=True)},
    "meta-llama/Llama-3.2-3B-Instruct": {**LLAMA3, **_sizes(3072, 8192, 28, 24, tied=True)},
    "meta-llama/Llama-3.1-8B-Instruct": {**LLAMA3, **_sizes(4096, 14336, 32, 32, tied=False)},
    "google/gemma-3-270m-it": {
        **GEMMA3,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
    },
    "google/gemma-3-1b-it": {
        **GEMMA3,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
    },
    "google/gemma-3-1b-pt": {
        **GEMMA3,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
    },
    "openai-community/gpt2": _gpt2(768, 12, 12),
    "openai-community/gpt2-medium": _gpt2(1024, 24, 16),
    "openai-community/gpt2-large": _gpt2(1280, 36, 20),
    "openai-community/gpt2-xl": _gpt2(1600, 48, 25),
    "EleutherAI/pythia-70m-deduped": {**PYTHIA, **_sizes(512, 2048, 6, 8)},
    "EleutherAI/pythia-410m-deduped": {**PYTHIA, **_sizes(1024, 4096, 24, 16)},
    "EleutherAI/pythia-1.4b-deduped": {**PYTHIA, **_sizes(2048, 8192, 24, 16)},
}


def serve(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hub's client find these configurations, written below ``folder``."""

    def download(repo: str, file: str, *, revision: str, cache_dir: Path) -> str:
        assert (file, revision, cache_dir) == ("config.json", "main", cache_folder() / "hub")
        path = folder / repo / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(CONFIGS[repo]))
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
