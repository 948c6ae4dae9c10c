"""Adapters whose files lack something, or say what no adapter says: refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from limbeck.contract.errors import ModelError
from limbeck.contract.models.adapters import attach
from tests.pico import make_tokenizer
from tests.wild.cases.adapters import (
    load,
    make_adapter,
    make_base,
    our_logits,
    peft_logits,
    teacher,
)


@pytest.mark.parametrize(
    ("saved", "other"), [("embed_tokens", "lm_head"), ("lm_head", "model.embed_tokens")]
)
def test_new_rows_of_a_tied_pair_are_not_those_of_a_saved_copy(
    tmp_path: Path, saved: str, other: str
) -> None:
    """With LoRA on a module that is saved too, peft's file has only the copy that was trained."""
    base = make_base(tmp_path / "base", tied=True)
    config = LoraConfig(target_modules=["q_proj", saved], modules_to_save=[saved])
    adapter = make_adapter(base, tmp_path / "adapter", config, rows=260)
    ids = torch.tensor([[1, 258, 259, 2]])  # with new tokens
    logits = [peft_logits(base, adapter, ids, rows=260) for _ in range(2)]
    assert not torch.equal(*logits)  # peft draws the rows of the other at each load
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(ModelError, match=f"new rows of {other} are not in it"):
        our_logits([teacher("one", base, adapter)])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"target_modules": "(("}, r"error: missing \).* Name the base"),
        ({"rank_pattern": {"((": 8}}, r"error: missing \).* Name the base"),
        ({"r": 10**9}, "a rank in it is larger than each of the tensors in adapter_model"),
        ({"rank_pattern": {"q_proj": 10**9}}, "a rank in it is larger than each of the tensors"),
        ({"trainable_token_indices": [10**9]}, "IndexError.* Name the base"),
        # peft would look for modules named by its letters.
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', expected a list of names"),
    ],
)
def test_a_configuration_that_peft_cannot_take_is_named(
    tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    base = make_base(tmp_path / "base", tied=True)
    adapter = make_adapter(base, tmp_path / "adapter", LoraConfig(target_modules=["q_proj"]))
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ModelError, match=says):
        attach(load(base), adapter)
