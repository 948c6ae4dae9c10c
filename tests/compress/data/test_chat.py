"""Conversations: which tokens are scored, and which rows are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

import compress
from compress.data.blocks import conversations, labels_of, load_blocks
from compress.data.chat import Chat
from compress.data.conversations import Conversation
from compress.data.documents import documents
from compress.data.packing import Piece, tokenise
from compress.models.language import byte_tokenizer
from limbeck.contract.data.heldout import HELDOUT, load_heldout
from limbeck.contract.errors import DataError
from limbeck.contract.recipe import ChatRows, ParquetRows, Rows, parse_recipe
from tests.compress.data.texts import recipe_of, write_rows
from tests.pico import CHAT, make_model, make_tokenizer

GENERATION = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ eos_token }}{% endfor %}"
)


TRIMMED = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{{ m['content'] | trim }} {{ eos_token }}\n{% endfor %}"
)


WITHOUT_THOUGHT = CHAT.replace("message['content']", "message['content'].split('</think>')[-1]")


def chat(*turns: str) -> list[dict[str, str]]:
    return [
        {"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)
    ]


def answers_of(piece: Piece, tokenizer: Any) -> list[str]:
    tokens = next(tokenise([piece], tokenizer))
    assert sum(end - start for start, end in tokens.answers) == tokens.scored.sum()
    return [tokenizer.decode(tokens.ids[start:end].tolist()) for start, end in tokens.answers]


@pytest.mark.parametrize("trims", [False, True])  # as tokenizers of Pythia and RoBERTa do
@pytest.mark.parametrize("template", [CHAT, GENERATION])
@settings(deadline=None)  # another process may hold the processor
@given(turns=st.lists(st.text(max_size=12), min_size=1, max_size=5))
@example(turns=["a", " b  "])
def test_exactly_the_answers_are_scored(template: str, trims: bool, turns: list[str]) -> None:
    tokenizer = make_tokenizer()
    if trims:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.chat_template = template
    text, spans = Chat(Conversation(chat(*turns)), tokenizer, template, "here").render()
    end = "<|end|>" if template is CHAT else ""
    expected = [turn + end for turn in turns[1::2]]
    assert [text[a:b] for a, b in spans] == [e for e in expected if e]
    assert answers_of(Piece(text, tuple(spans)), tokenizer) == [e for e in expected if e]


@pytest.mark.parametrize(
    ("template", "turns", "expected"),
    [
        (TRIMMED, ("assistant", " assistant ", "a", "user"), ["assistant <|end|>", "user <|end|>"]),
        (CHAT, ("✓ 👩‍🚀", "é\n\n👩‍🚀"), ["é\n\n👩‍🚀<|end|>"]),
        (
            WITHOUT_THOUGHT,
            ("why", "<think>hm</think>because", "so", "yes"),
            ["because<|end|>", "yes<|end|>"],
        ),
        (
            "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
            ("a", "b", "a", "b"),
            ["b", "b"],
        ),
    ],
    ids=["trimmed", "unicode", "thought left out", "no special tokens"],
)
def test_answers_are_what_the_template_made_of_them(
    template: str, turns: tuple[str], expected: list[str]
) -> None:
    tokenizer = make_tokenizer()
    text, spans = Chat(Conversation(chat(*turns)), tokenizer, template, "here").render()
    assert answers_of(Piece(text, tuple(spans)), tokenizer) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('no system role') }}",
            "here: the chat template refuses this conversation: no system role",
        ),
        (
            "{{ messages[0]['content'] + 1 }}",
            "here: the chat template fails on this conversation: TypeError: ",
        ),
        (
            "{% for m in messages %}{{ m['content'] | upper }}{{ m['content'] }}{% endfor %}",
            "here: .*cannot be separated from",
        ),
        (
            "{{ messages[0]['content'] }}",
            "here: .* cannot be separated from the rest. Put {% generation %}",
        ),
        (
            "{% if messages | length < 2 %}{{ raise_exception('Conversation roles must alternate') "
            "}}{% endif %}{{ messages[0]['content'] }}{{ add_generation_prompt }}",
            r"here: .* from the rest \(of a part of it: .*: Conversation roles must alternate\.\)",
        ),
    ],
)
def test_templates_that_hide_the_answers_are_refused(template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Chat(Conversation(chat("a", "b")), make_tokenizer(), template, "here").render()


# Each asks for an answer in other words than it writes around one.
THINKS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)


@pytest.mark.parametrize("turns", [("a", "b"), ("a", "b", "c", "d")])
def test_a_prompt_that_begins_an_answer_which_the_text_lacks(turns: tuple[str, ...]) -> None:
    """The answer is what follows the part of the prompt that the text has."""
    tokenizer = make_tokenizer()
    text, spans = Chat(Conversation(chat(*turns)), tokenizer, THINKS, "here").render()
    assert [text[a:b] for a, b in spans] == [f"{turn}<|end|>" for turn in turns[1::2]]
    assert all(text[:a].endswith("<|assistant|>") for a, _ in spans)


def test_a_tokenizer_without_special_tokens_has_no_token_behind_an_answer() -> None:
    plain = Tokenizer.from_str(make_tokenizer().backend_tokenizer.to_str())
    tree = json.loads(plain.to_str()) | {"added_tokens": []}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(tree)))
    assert not tokenizer.added_tokens_decoder
    template = "{% for m in messages %}{{ m.content }}<|end|>\n{% endfor %}"
    text, spans = Chat(Conversation(chat("a", "b")), tokenizer, template, "here").render()
    assert [text[a:b] for a, b in spans] == ["b"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[1].content | length }}: {% for m in messages %}{{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content | length }}\n{% endfor %}",
    ],
    ids=["before", "behind"],
)
def test_text_around_an_answer_that_depends_on_it_is_refused(template: str) -> None:
    """It cannot be known whether such text is part of the answer."""
    with pytest.raises(DataError, match=r"here: .* cannot be separated from the rest"):
        Chat(Conversation(chat("a", "b")), make_tokenizer(), template, "here").render()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".arrow"])
def test_chat_blocks_hold_one_conversation_and_say_what_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    said: list[str] = []
    monkeypatch.setattr("compress.data.blocks.say", said.append)
    short = [{"messages": chat(f"question {i}", f"answer {i}")} for i in range(7)]
    long = [
        {"messages": chat("x" * 100, "never seen")},
        {"messages": chat("q", "a" * 100, "more", "never seen")},
    ]
    write_rows(
        tmp_path / f"a{suffix}", [*short, *long, {"messages": chat("a question without an answer")}]
    )
    recipe = recipe_of(
        tmp_path, f"a{suffix}", text={"format": {"kind": "chat"}}, block=64, heldout={"every": 4}
    )
    blocks = load_blocks(recipe, make_tokenizer())[0]
    decode = make_tokenizer().decode
    learnt = [
        decode(ids[scored == 1].tolist())
        for ids, scored in zip(blocks.train_ids, blocks.train_scored, strict=True)
    ]
    assert learnt[:-1] == [f"answer {i}<|end|>" for i in (0, 1, 2, 4, 5, 6)]
    assert set(learnt[-1]) == {"a"}
    (heldout,) = blocks.heldout.scored
    assert decode(blocks.heldout.input_ids[0][heldout == 1].tolist()) == "answer 3<|end|>"
    assert blocks.heldout.utf8_bytes.tolist() == [len("answer 3")]
    assert (
        "of 10 answers, 2 lie past the first 64 tokens of their conversation and were dropped, "
        "1 were cut short" in said[-1]
    )
    labels = labels_of(blocks.train_ids, blocks.train_scored)
    assert decode(labels[0][labels[0] >= 0].tolist()) == "answer 0<|end|>"
    stream = load_blocks(
        recipe_of(
            tmp_path,
            f"a{suffix}",
            text={"format": {"kind": "chat"}},
            block=64,
            heldout={"every": 4},
            packing="stream",
        ),
        make_tokenizer(),
    )
    assert stream[0].train_lengths[0] == 64


def test_chat_without_a_usable_answer_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"messages": chat("x" * 40, "y")}] * 8)
    recipe = recipe_of(tmp_path, "a.jsonl", text={"format": {"kind": "chat"}}, heldout={"every": 2})
    with pytest.raises(
        DataError,
        match=r"0 training and 0 held-out blocks with an answer from 8 conversations, 8 answers",
    ):
        load_blocks(recipe, make_tokenizer())
    with pytest.raises(DataError, match=r"no chat template.*chat_template\.jinja"):
        load_blocks(recipe, byte_tokenizer())


GOOD = {"messages": chat("q", "a")}


@pytest.mark.parametrize(
    ("name", "rows", "form", "message"),
    [
        ("a.parquet", [{"text": "x"}], ParquetRows(kind="parquet", field="body"),
         r"a.parquet: no column 'body' \(found: text"),
        ("a.parquet", [{"text": "x"}, {"text": None}], ParquetRows(kind="parquet"),
         "a.parquet, row 2: the text under 'text' is null"),
        ("a.jsonl", [{"text": "x"}], ParquetRows(kind="parquet"), "a.jsonl: not a Parquet file"),
        ("a.arrow", [{"text": "x"}], Rows(kind="rows", field="body"),
         "a.arrow: no column 'body'"),
        ("a.jsonl", [GOOD, {"text": "x"}], ChatRows(kind="chat"),
         r"a.jsonl, line 2: .*'messages' \(found: text\)"),
        ("a.jsonl", [GOOD, {"messages": "x"}], ChatRows(kind="chat"),
         "a.jsonl, line 2: expected a list of messages, found str"),
        ("a.jsonl", [{"messages": []}], ChatRows(kind="chat"),
         "a.jsonl, line 1: .* found an empty list"),
        ("a.jsonl", [{"messages": ["x"]}], ChatRows(kind="chat"),
         "line 1: message 1 has no text under 'role'"),
        ("a.jsonl", [{"messages": [{"role": "assistant", "content": "a", "weight": 2}]}],
         ChatRows(kind="chat"), "line 1: message 1 has weight 2, but an answer is learned"),
        ("a.parquet", [GOOD, {"messages": [{"role": "user", "content": None}]}],
         ChatRows(kind="chat"), "a.parquet, row 2: message 1 has no text under 'content'"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(
    tmp_path: Path, name: str, rows: list[Any], form: Any, message: str
) -> None:
    path = write_rows(tmp_path / name, rows)
    with pytest.raises(DataError, match=message):
        list(
            conversations(path, form, make_tokenizer())
            if isinstance(form, ChatRows)
            else documents(path, form)
        )


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json"])
def test_sharegpt_is_read_as_the_messages_that_it_means(tmp_path: Path, suffix: str) -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    turns = [{"role": role, "content": f"text of {role}"} for role in names]
    share = [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]
    path = write_rows(tmp_path / f"a{suffix}", [{"conversations": share}])
    plain = write_rows(tmp_path / "b.jsonl", [{"messages": turns}])
    tokenizer = make_tokenizer()
    (found,) = conversations(path, ChatRows(kind="chat", field="conversations"), tokenizer)
    assert [found] == list(conversations(plain, ChatRows(kind="chat"), tokenizer))


def test_a_student_learns_the_answers_of_a_chat_and_nothing_else(tmp_path: Path) -> None:
    """One answer to ever new questions: it is learnt, and the NLL is that of the answers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    teacher = make_model(tmp_path / "teacher", scale=0.05)
    draw = np.random.default_rng(0)
    rows = [
        {"messages": chat("".join(map(chr, draw.integers(97, 123, 12))), "yes, of course")}
        for _ in range(48)
    ]
    write_rows(tmp_path / "set" / "train.parquet", rows)
    tree = {
        "name": "chat",
        "teachers": [{"name": "a", "model": {"kind": "local", "path": str(teacher)}}],
        "data": {
            "domains": [{"name": "d", "text": {
                "kind": "datasets", "path": "set", "split": "train", "format": {"kind": "chat"},
            }}],
            "block": 64,
            "heldout": {"every": 6, "blocks": 4},
        },
        "student": {"kind": "fresh", "config": {
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 1, "num_attention_heads": 2,
        }},
        "fusion": {"weight": 0.1, "cross_entropy": 1.0},
        "training": {
            "tokens": 64 * 4 * 20, "batch_tokens": 256, "learning_rate": 3e-2, "threads": 1,
            "precision": "fp32",
        },
    }  # fmt: skip
    recipe = parse_recipe(tree)
    recipe._folder = tmp_path
    artifact = compress.distill(recipe=recipe, out=tmp_path / "student")
    steps = [json.loads(line) for line in (artifact.path / "log.jsonl").read_text().splitlines()]
    losses = [step["cross_entropy"] for step in steps if step["event"] == "step"]
    assert losses[-1] < 0.5 * losses[0]
    answer = len("yes, of course") + 1
    assert artifact.result["tokens"] == 20 * 4 * answer
    blocks = load_heldout(artifact.path / HELDOUT)["d"]
    assert blocks.labels == 4 * answer
    model = AutoModelForCausalLM.from_pretrained(artifact.path / "model")
    ids = torch.from_numpy(blocks.input_ids).long()
    with torch.no_grad():
        logp = torch.log_softmax(model(ids).logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    nll = -float(logp[torch.from_numpy(blocks.scored[:, 1:]) == 1].mean())
    assert artifact.result["mean_nll"] == pytest.approx(nll, rel=1e-4)
    assert (artifact.path / "model" / "chat_template.jinja").read_text() == CHAT
