"""End and first tokens of a model, from all that its folder says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

from export.build.genai import build_genai
from export.folder.clients import write_client_files
from export.folder.ends import end_tokens, first_tokens
from export.graphs import form_files
from export.tasks.language import in_genai
from limbeck.contract.errors import ModelError
from limbeck.contract.sources.models import require_language_model
from limbeck.runtime.text import load_text
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
    for name in ("config.json", "generation_config.json"):  # as training with checkpointing saves
        fields = json.loads((model / name).read_text()) | {"use_cache": False}
        (model / name).write_text(json.dumps(fields))
    assert end_tokens(model) == [256, 257]
    _, genai = build_genai(model, tmp_path, {})
    fp32 = form_files(tmp_path, "fp32")
    write_client_files(model, tmp_path, graphs=[fp32], shipped=fp32, genai=genai)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert [written["eos_token_id"], written["use_cache"]] == [[256, 257], True]
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is True
    written = json.loads((tmp_path / "genai_config.json").read_text())
    assert written["model"]["eos_token_id"] == [256, 257]


TURN = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (TURN, [256, 258]),  # as Qwen's base models, whose files name <|endoftext|> alone
        (SYSTEM + TURN, [256, 258]),
        (TURN.replace("<|turn|>", ""), [256]),
        (TURN.replace("<|turn|>", "{{ eos_token }}"), [256]),
        (TURN.replace("<|turn|>", "{% if not loop.last %}<|turn|>{% endif %}"), [256]),
        ("{{ raise_exception('no') }}", [256]),
    ],
    ids=["turn", "wants a system", "no end", "eos", "between turns", "refuses"],
)
def test_the_token_by_which_only_the_chat_template_ends_a_turn_ends_an_answer(
    tmp_path: Path, template: str, ends: list[int], special: bool
) -> None:
    """Some trainings add it as a token that is not special."""
    model, tokenizer = make_model(tmp_path / "model", vocab_size=261), make_tokenizer()
    tokenizer.add_tokens(["<|turn|>", "<|user|>", "<|assistant|>"], special_tokens=special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)
    assert end_tokens(model) == ends
    if 258 in ends:
        roles = ["system", "user", "assistant"] if "no" in template else ["user", "assistant"]
        talk = [{"role": role, "content": "a"} for role in roles]
        written = tokenizer.apply_chat_template(talk)["input_ids"]
        assert [token for token in written if token in ends] == [258] * len(talk)
    (tmp_path / "out").mkdir()
    fp32 = form_files(tmp_path / "out", "fp32")
    write_client_files(model, tmp_path / "out", graphs=[], shipped=fp32, genai=None)
    assert load_text(tmp_path / "out").stop_ids == set(ends)


@pytest.mark.parametrize(
    ("given", "ends"),
    [(-1, []), (None, []), ([3, 4], [3, 4]), ("3", None), (3.0, None), ([[3]], None), (True, None)],
)
def test_an_end_that_is_no_id_is_named_before_training(
    tmp_path: Path, given: object, ends: list[int] | None
) -> None:
    """transformers keeps it, and stops only where a text is written."""
    model = make_model(tmp_path / "model", vocab_size=261)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    if ends is not None:
        require_language_model(model)
        assert end_tokens(model) == list(dict.fromkeys([*ends, 256]))
        return
    for read in (require_language_model, end_tokens):
        with pytest.raises(ModelError, match=r"generation_config.json: eos_token_id: found .* id"):
            read(model)


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
    # GenAI puts none before a text by itself: the card says what to call.
    assert ("add_special_tokens" in in_genai("fp32", tmp_path)) == bool(first)


@pytest.mark.parametrize(
    ("named", "ends"),
    [("</s>", [3, 1]), ({"content": "</s>"}, [3, 1]), ("<gone>", [3]), (None, [3])],
    ids=["in the vocabulary", "as an entry", "unknown", "none"],
)
def test_an_end_token_may_be_of_the_vocabulary_alone(
    tmp_path: Path, named: object, ends: list[int]
) -> None:
    Tokenizer(WordLevel({"a": 0, "</s>": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert end_tokens(tmp_path) == ends


def test_a_model_without_tokenizer_has_the_end_of_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": [3, 4]}')
    assert end_tokens(tmp_path) == [3, 4]
    assert first_tokens(tmp_path) == []
