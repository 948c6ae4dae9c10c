"""Adapters that add tokens to a tied base: rows that no file holds are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from limbeck.contract.errors import ModelError
from tests.pico import make_tokenizer
from tests.wild.cases.adapters import make_adapter, make_base, our_logits, peft_logits, teacher


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
