"""What lies beside the weights of an adapter: its configuration, its tokenizer, its template."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import compress
from compress.aligned import AlignedStates
from compress.teachers.conversations import with_conversations
from compress.teachers.live import TeacherFolder, Teachers, teacher_folders
from compress.teachers.pairs import pair_teachers
from limbeck.app.init.inputs import teacher_source
from limbeck.app.products import mistakes
from limbeck.contract.errors import ModelError
from limbeck.contract.models.adapters import attach
from limbeck.contract.recipe import FreshStudent, Recipe
from limbeck.contract.sources.digests import adapter_digest, input_digests
from limbeck.contract.sources.teacher_tokens import compare_tokenizers
from tests.compress.teachers.test_conversations import CHATML, GEMMA, chatty, save_talks, student
from tests.compress.test_compress import TINY, tiny
from tests.pico import make_tokenizer
from tests.tokenizers import byte_level
from tests.wild.cases.adapters import (
    load,
    make_adapter,
    make_base,
    our_logits,
    peft_logits,
    peft_model,
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


def recipe_with(root: Path, own: PreTrainedTokenizerFast, *, rows: int = 0, **over: Any) -> Recipe:
    """A student of ChatML; its teacher is an adapter on its base, with the tokenizer ``own``."""
    base = make_base(root / "base", tied=True, vocab_size=332, max_position_embeddings=128)
    student().save_pretrained(base)
    adapter = make_adapter(base, root / "adapter", LoraConfig(target_modules=["q_proj"]), rows=rows)
    own.save_pretrained(adapter)
    save_talks(root / "chat.jsonl")
    chat = {"kind": "files", "paths": ["chat.jsonl"], "format": {"kind": "chat"}}
    model = {"kind": "local", "path": "base"}
    parts: dict[str, Any] = {
        "teachers": [{"name": "t", "model": model, "adapter": "adapter"}],
        "student": {"kind": "lora", "base": model, "init": "base"},
        "data": {"domains": [{"name": "chat", "text": chat}], "block": 128},
        "features": {"weight": 0.0},
        "training": {"tokens": 512, "batch_tokens": 128},
    }
    return tiny(root, **parts | over)


def with_turns() -> PreTrainedTokenizerFast:
    """The student's tokenizer, and two more tokens that a template of its own writes."""
    return chatty(byte_level(), GEMMA, "<|im_start|>", "<|im_end|>", "<turn>", "<turn|>")


TALK = [
    {"role": "user", "content": "what the cat sat?"},
    {"role": "assistant", "content": "the cat sat on the mat 0"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "and the dog of 0"},
]


@pytest.mark.parametrize("rows", [0, 334], ids=["a template", "a template with new tokens"])
def test_an_adapter_reads_conversations_in_its_own_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    own = with_turns() if rows else student()
    own.chat_template = GEMMA if rows else CHATML.replace("|im_start|>", "|im_start|> ")
    recipe = recipe_with(tmp_path, own, rows=rows)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    (found,) = map(str, compare_tokenizers(recipe))
    assert "reads conversations in its own chat template, not in the student's" in found
    assert ("added tokens '<turn>', '<turn|>'" in found) == bool(rows)
    (folder,) = teacher_folders(recipe, {})
    assert isinstance(folder, TeacherFolder)
    tokenizers = {"t": folder.tokenizer}
    pairs = pair_teachers(base, tokenizers, plain=False, chats="document")
    pairs = with_conversations(recipe, pairs, base, tokenizers)
    assert pairs.same_tokens == (True,)
    loaded = Teachers(
        [folder], device=torch.device("cpu"), compute_dtype=torch.float32, pairs=pairs.pairs
    )

    def asked(ids: list[int]) -> AlignedStates:
        ((states,), _) = loaded.states(torch.tensor([ids]))
        assert isinstance(states, AlignedStates)
        return states

    mine, theirs = (AutoTokenizer.from_pretrained(one) for one in (base, adapter))
    whole = mine.apply_chat_template(TALK)["input_ids"]
    end = len(whole) - whole[::-1].index(mine.convert_tokens_to_ids("<|im_end|>"))
    states = asked(whole[:end])
    right = theirs.apply_chat_template(TALK)["input_ids"]
    read = states.alignment.texts[0]
    assert read == right[: len(read)]
    assert len(right) - len(read) <= 1  # the line's end behind the last turn
    model = peft_model(base, adapter, rows=rows)
    hidden = model(input_ids=torch.tensor([read]), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(states.hidden_RMd, hidden, rtol=1e-4, atol=1e-4)
    # What is no conversation of the recipe is read as it is.
    plain = mine("the cat sat on 12")["input_ids"]
    assert asked(plain).alignment.texts == [plain]


def test_a_student_of_an_adapter_with_a_template_keeps_its_base_s(tmp_path: Path) -> None:
    """Rows with tool calls are read in the student's template, because the same tokens allow it."""
    own = student()
    own.chat_template = CHATML.replace("|im_start|>", "|im_start|> ")
    model = {"kind": "local", "path": "base"}
    recipe = recipe_with(tmp_path, own, student={"kind": "lora", "base": model, "init": "merge"})
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    row = [TALK[0], {"role": "assistant", "content": "a", "tool_calls": [call]}]
    with (tmp_path / "chat.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"messages": row}))
    assert mistakes(recipe) == []
    made = compress.distill(recipe=recipe, out=tmp_path / "student")
    assert made.result["start"]["merge"] == "average of t (1)"
    assert made.result["teachers"]["t"]["coverage"]["chat"]["positions"] == 1
    saved = AutoTokenizer.from_pretrained(made.path / "model")
    assert saved.chat_template == CHATML


def test_a_fresh_student_has_the_tokenizer_of_its_adapter(tmp_path: Path) -> None:
    config = {name: value for name, value in TINY.items() if name != "vocab_size"}
    recipe = recipe_with(tmp_path, with_turns(), rows=334)
    fresh = FreshStudent(kind="fresh", config=config)
    recipe = recipe.model_copy(update={"student": fresh})
    made = compress.distill(recipe=recipe, out=tmp_path / "student")
    saved = AutoTokenizer.from_pretrained(made.path / "model")
    assert (saved.chat_template, len(saved)) == (GEMMA, 334)


def test_conversations_in_a_stream_are_read_in_the_student_s_template(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, with_turns(), rows=334)
    data = recipe.data.model_copy(update={"packing": "stream"})
    recipe = recipe.model_copy(update={"data": data})
    assert "reads conversations in the student's chat template, not in its own" in str(
        *compare_tokenizers(recipe)
    )
    assert mistakes(recipe) == []


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"eos_token": "<|im_end|>"}, "ends a text with <|im_end|>, but reads the student's <end>"),
        ({"pad_token": "<|im_end|>"}, "the student's tokenizer$"),
        ({"padding_side": "left", "model_max_length": 8}, "the student's tokenizer$"),
    ],
    ids=["end", "padding", "side"],
)
def test_another_end_of_an_adapter_is_said(
    tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    code = {"name": "code", "text": {"kind": "stdlib", "paths": ["abc.py"]}}
    recipe = recipe_with(tmp_path, student(), data={"domains": [code], "block": 64})
    path = tmp_path / "adapter" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert re.search(says.replace("|", r"\|"), str(*compare_tokenizers(recipe)))


def test_a_student_made_before_the_tokenizer_was_read_is_made_again(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, student())
    folder = tmp_path / "adapter"
    assert input_digests(recipe, products={})["adapter t"] != adapter_digest(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    assert input_digests(recipe, products={})["adapter t"] == adapter_digest(folder)


def test_a_template_without_its_tokenizer_is_named(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, student())
    (tmp_path / "adapter" / "tokenizer.json").unlink()
    assert any("adapter: has a chat template, but not the" in line for line in mistakes(recipe))
    with pytest.raises(ModelError, match="Copy the tokenizer"):
        teacher_folders(recipe, {})


def test_an_adapter_with_its_base_s_configuration_beside_it_is_an_adapter(tmp_path: Path) -> None:
    """As axolotl leaves it. With the weights of a model there too, it is a model."""
    base = make_base(tmp_path / "base", tied=True)
    adapter = make_adapter(base, tmp_path / "adapter", LoraConfig(target_modules=["q_proj"]))
    (adapter / "config.json").write_bytes((base / "config.json").read_bytes())
    make_tokenizer().save_pretrained(adapter)
    found = teacher_source(str(adapter), {})
    assert found == {"model": {"kind": "local", "path": str(base)}, "adapter": str(adapter)}
    (ours,) = our_logits([teacher("one", base, Path(found["adapter"]))])
    torch.testing.assert_close(ours, peft_logits(base, adapter), rtol=1e-4, atol=1e-4)
    (adapter / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    assert teacher_source(str(adapter), {})["model"]["path"] == str(adapter)


def test_an_adapter_that_one_of_several_processes_saved_is_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    adapter = make_adapter(base, tmp_path / "adapter", LoraConfig(target_modules=["q_proj"]))
    file = adapter / "adapter_model.safetensors"
    save_file({name: torch.zeros(0) for name in load_file(file)}, file)
    with pytest.raises(ModelError, match=r"lora_A.weight is empty: .* ZeRO-3"):
        attach(load(base), adapter)
