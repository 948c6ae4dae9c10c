"""End and first tokens of a model, from all that its folder says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from export.build.genai import build_genai
from export.folder.clients import write_client_files
from export.folder.ends import end_tokens, first_tokens
from export.graphs import form_files
from tests.pico import make_model, make_tokenizer


def chat_model(folder: Path) -> Path:
    """Its turns end with 257, which its tokenizer names; its generation configuration names 256."""
    model = make_model(folder, num_hidden_layers=1)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 256}))
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|pad|>"
    tokenizer.save_pretrained(model)
    return model


def test_both_configurations_name_every_end_token(tmp_path: Path) -> None:
    model = chat_model(tmp_path / "model")
    assert end_tokens(model) == [256, 257]
    _, genai = build_genai(model, tmp_path, {})
    fp32 = form_files(tmp_path, "fp32")
    write_client_files(model, tmp_path, graphs=[fp32], shipped=fp32, genai=genai)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written["eos_token_id"] == [256, 257]
    written = json.loads((tmp_path / "genai_config.json").read_text())
    assert written["model"]["eos_token_id"] == [256, 257]


@pytest.mark.parametrize(
    ("template", "first"),
    [(None, []), ("<|end|> $A", [256]), ("<|end|> $A <|pad|>", [256]), ("$A <|pad|>", [])],
)
def test_first_tokens_are_those_that_the_tokenizer_puts_before_a_text(
    tmp_path: Path, template: str | None, first: list[int]
) -> None:
    tokenizer = make_tokenizer()
    if template:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=template, special_tokens=[("<|end|>", 256), ("<|pad|>", 257)]
        )
    tokenizer.save_pretrained(tmp_path)
    assert first_tokens(tmp_path) == first
