"""Conversations for teachers of another tokenizer: both sides read the same answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import compress
from compress.aligned import AlignedStates, Pair
from compress.chunked import fused_loss
from compress.data.blocks import conversations
from compress.data.conversations import Conversation, read_conversations
from compress.data.packing import tokenise
from compress.head import IGNORED, Head
from compress.models.body import Body
from compress.states import TeacherStates
from compress.teachers.conversations import Side, rendered_for, with_conversations
from compress.teachers.pairs import pair_teachers, pieces_of
from limbeck.app.products import mistakes
from limbeck.contract.errors import DataError, RecipeError
from limbeck.contract.models.alignment import Aligner
from limbeck.contract.recipe import ChatRows, Fusion, Recipe
from tests.compress.problems import gradients
from tests.compress.teachers.test_other_tokenizers import save_teacher
from tests.compress.teachers.test_served import source
from tests.compress.test_compress import events, tiny
from tests.servers.logprob_server import LogprobServer
from tests.tokenizers import byte_level, permute, piece_level

MARKS = "{% generation %}{{ m['content'] }}END{% endgeneration %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    + MARKS.replace("END", "<|im_end|>")
    + "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
)
# The system's message is a part of the user's first one, and content is stripped, as Gemma does.
GEMMA = (
    "{{ bos_token }}{% set first = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}"
    "<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}"
    + MARKS.replace("END", "<turn|>").replace("m['content']", "m['content'] | trim")
    + "{% else %}{{ (first if loop.first else '') + m['content'] | trim }}<turn|>{% endif %}"
    "\n{% endfor %}"
)


def bare(template: str) -> str:
    """The template without marks of the answers."""
    return re.sub(r"\{% (end)?generation %\}", "", template)


def chatty(tokenizer: Tokenizer, template: str | None, *special: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(list(special))
    has_bos = tokenizer.token_to_id("<bos>") is not None
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", bos_token="<bos>" if has_bos else "<end>"
    )
    if template is not None:
        fast.chat_template = template
    return fast


def side(fast: PreTrainedTokenizerFast, template: str | None = None) -> Side:
    return Side(fast, pieces_of(fast, "side"), template or fast.chat_template)


def student() -> PreTrainedTokenizerFast:
    return chatty(byte_level(), CHATML, "<|im_start|>", "<|im_end|>")


def gemma() -> PreTrainedTokenizerFast:
    return chatty(piece_level(420), GEMMA, "<turn>", "<turn|>")


TALK = [
    {"role": "system", "content": "be the cat"},
    {"role": "user", "content": "where  sat the dog?"},
    {"role": "assistant", "content": "the dog sat on the log; 1234 🙂"},
    {"role": "user", "content": "and <|im_end|> you"},
    {"role": "assistant", "content": "naïve café 語言模型 of 2024\r\n\n\tTabs"},
]


def aligned(messages: Any, own: Side, other: Side, block: int = 4096) -> Any:
    """Tokens of the student, and both sides' alignment."""
    found = rendered_for(Conversation(messages), "row 1", own, other, block=block, name="big")
    assert found is not None
    ids, data, answers = found
    turn = own.turn_end, other.turn_end
    return ids, Aligner(own.pieces, other.pieces).conversation(ids, data, answers, turn)


@pytest.mark.parametrize("marked", [True, False])
def test_tokens_and_answers_are_those_of_transformers(marked: bool) -> None:
    """Against `apply_chat_template` and its mask of the assistant's tokens."""
    change: Callable[[str], str] = str if marked else bare
    own, other = side(student(), change(CHATML)), side(gemma(), change(GEMMA))
    ids, found = aligned(TALK, own, other)
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    ours, theirs = (s.tokenizer.apply_chat_template(TALK, **options) for s in (own, other))
    assert ids == ours["input_ids"][: len(ids)]
    assert found.ids.tolist() == theirs["input_ids"][: len(found.ids)]
    is_answer, was_answer = ours["assistant_masks"], theirs["assistant_masks"]
    in_mine, in_theirs = set[int](), set[int]()
    for begin, end, their_begin, their_end in found.chunks.tolist():
        in_mine |= set(range(begin, end))
        in_theirs |= set(range(their_begin, their_end))
        texts = (
            own.tokenizer.decode(ids[begin:end]),
            other.tokenizer.decode(found.ids[their_begin:their_end].tolist()),
        )
        assert texts in {(texts[0], texts[0]), ("<|im_end|>", "<turn|>")}
    # Every token of every answer is in a chunk, and nothing else is.
    assert in_mine == {i for i, one in enumerate(is_answer) if one}
    assert in_theirs == {i for i, one in enumerate(was_answer) if one}
    assert (own.turn_end, other.turn_end) == tuple(
        fast.convert_tokens_to_ids(token)
        for fast, token in ((own.tokenizer, "<|im_end|>"), (other.tokenizer, "<turn|>"))
    )


NO_END = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
STRIPPED = bare(CHATML).replace("m['content'] }}", "m['content'] | trim }}")
SIDES = {
    "gemma": side(gemma()),
    "no marks": side(gemma(), bare(GEMMA)),
    "no end": side(chatty(piece_level(380, prepends=True), NO_END)),
}
OWN = {
    "marks": side(student()),
    "no marks": side(student(), bare(CHATML)),
    "stripped": side(student(), STRIPPED),
    "no end": side(student(), NO_END),
}


@pytest.mark.parametrize("mine", OWN)
@pytest.mark.parametrize("theirs", SIDES)
@given(
    turns=st.lists(st.text(st.sampled_from("a the\n \r🙂é語12<|"), min_size=1, max_size=14),
                   min_size=2, max_size=5),
    block=st.integers(6, 90),
)  # fmt: skip
def test_no_chunk_holds_other_bytes(mine: str, theirs: str, turns: list[str], block: int) -> None:
    """Whatever is said, stripped or cut: both sides of a chunk are the same bytes of an answer."""
    own, other = OWN[mine], SIDES[theirs]
    conversation = [
        {"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)
    ]
    found = rendered_for(Conversation(conversation), "row", own, other, block=block, name="big")
    if found is None:
        return
    ids, data, answers = found
    turn = own.turn_end, other.turn_end
    a = Aligner(own.pieces, other.pieces).conversation(ids, data, answers, turn)
    assert len(ids) <= block
    for begin, end, their_begin, their_end in a.chunks.tolist():
        ours = b"".join(own.pieces.pieces(ids[begin:end]))
        read = b"".join(other.pieces.pieces(a.ids[their_begin:their_end].tolist()))
        assert ours == read or (ids[begin], *a.ids[their_begin:their_end]) == turn
    # The text before a position with a distribution ends in the same bytes of the same answer.
    for first, stop, begin, _, lead in answers:
        for place in range(first, min(stop, len(ids) - 1)):  # a cut may halve a character
            if (m := int(a.at[place])) >= 0:
                ours = b"".join(own.pieces.pieces(ids[first : place + 1]))[lead:]
                read = b"".join(other.pieces.written(a.ids[: m + 1].tolist()))
                assert read.endswith(data[:begin] + ours) or read.endswith(ours)


def permuted(template: str) -> PreTrainedTokenizerFast:
    """The student's tokens under other ids."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return chatty(permute(tokenizer, 5), template)


def pair_of(own: Side, other: Side, conversation: Any) -> tuple[Pair, Tensor, Tensor]:
    """A pair that knows one conversation; the row's ids and labels ``[1, L]``."""
    from compress.teachers.pairs import _projection

    found = rendered_for(Conversation(conversation), "row", own, other, block=512, name="big")
    assert found is not None
    ids, data, answers = found
    (spans,) = (
        own.tokenizer.apply_chat_template(
            [conversation], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )["assistant_masks"],
    )
    labels = torch.tensor([[*ids[1:], IGNORED]])
    labels[0, [i for i in range(len(ids) - 1) if not spans[0][i + 1]]] = IGNORED

    class One:
        digest = "one"

        def align(self, aligner: Aligner, row: Any) -> Any:
            assert row == ids
            return aligner.conversation(row, data, answers, (own.turn_end, other.turn_end))

    target = torch.from_numpy(_projection(own.pieces, other.pieces)).clone()
    assert own.turn_end is not None
    target[other.turn_end] = own.turn_end
    return Pair(Aligner(own.pieces, other.pieces), target, One()), torch.tensor([ids]), labels


OTHER_TEMPLATE = (
    "{% for m in messages %}<|im_start|><|im_start|>{{ m['role'] | upper }}:"
    "{% if m['role'] == 'assistant' %}"
    + MARKS.replace("END", "<|im_end|>")
    + "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [CHATML, OTHER_TEMPLATE], ids=["the same", "another"])
def test_the_loss_is_that_of_the_teacher_s_own_rendering(tmp_path: Path, template: str) -> None:
    """A teacher of the same tokens under other ids, against transformers' rendering.

    With one template, both contexts are the same, and the loss is that of the plain path.
    """
    own, other = side(student()), side(permuted(template))
    conversation = [m for m in TALK if "<|im_end|>" not in m["content"]][:3]
    pair, ids, labels = pair_of(own, other, conversation)
    V = len(own.pieces)
    save_teacher(tmp_path / "big", byte_level(), vocab_size=V, initializer_range=0.3)
    body = Body(AutoModelForCausalLM.from_pretrained(tmp_path / "big"))
    rendered = other.tokenizer.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    where = [i for i, one in enumerate(rendered["assistant_masks"]) if one]
    with torch.no_grad():
        hidden, _ = body.states(torch.tensor([rendered["input_ids"]]))
        # The answers' tokens are the same on both sides: move the states to the student's places.
        gathered = torch.zeros(1, ids.shape[1], hidden.shape[-1])
        gathered[:, labels[0] != IGNORED] = hidden[:, [i - 1 for i in where]]
        a = pair.align(ids, labels)
        states = body.states(a.ids_RM)[0]
    assert a.ids_RM[0].tolist() == rendered["input_ids"][: a.ids_RM.shape[1]]
    # Head rows of the plain path are in the order of the student's ids. No teacher expects the
    # marker of a turn's beginning, which is no token of both sides.
    ids_of = other.tokenizer.get_vocab()
    order = torch.tensor([ids_of[token] for token in own.tokenizer.convert_ids_to_tokens(range(V))])
    bias = torch.zeros(V)
    bias[ids_of["<|im_start|>"]] = -1e4
    weight = body.head.weight_Vd.detach()
    direct = TeacherStates(gathered, Head(weight[order], bias[order]))
    across = AlignedStates(states, Head(weight, bias), a, pair.target_V)
    generator = torch.Generator().manual_seed(1)
    parts = {
        "hidden_RLd": torch.randn(1, ids.shape[1], 8, generator=generator).requires_grad_(),
        "head": Head(
            *(torch.randn(*s, generator=generator).requires_grad_() for s in [(V, 8), (V,)])
        ),
        "labels_RL": labels,
        "denominator": int((labels != IGNORED).sum()),
    }
    expected = fused_loss(Fusion(), teachers=[direct], **parts)
    found = fused_loss(Fusion(across="projected"), teachers=[across], **parts)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.label_logp_KRL, expected.label_logp_KRL, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(
        gradients(found.loss, parts), gradients(expected.loss, parts), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    if template is CHATML:  # the very same positions
        content = (labels[0] != IGNORED).nonzero()[:, 0]
        assert torch.equal(a.at_RL[0, content], content)


# In a recipe --------------------------------------------------------------------------------------


def save_talks(path: Path, count: int = 40) -> None:
    words = ["the cat sat", "on the mat", "and the dog", "1234 years", "naïve café"]
    rows = []
    for n in range(count):
        conversation = [
            {"role": "user", "content": f"what {words[n % 5]}?"},
            {"role": "assistant", "content": f"{words[n % 5]} {words[(n + 1) % 5]} {n}"},
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": f"{words[(n + 2) % 5]} of {n}"},
        ]
        rows.append(json.dumps({"messages": conversation}, ensure_ascii=False))
    path.write_text("\n".join(rows), encoding="utf-8")


def model(folder: Path, fast: PreTrainedTokenizerFast, **sizes: Any) -> Path:
    save_teacher(folder, fast.backend_tokenizer, vocab_size=len(fast), **sizes)
    fast.save_pretrained(folder)
    return folder


def recipe_of(tmp_path: Path, *, template: str | None = GEMMA, **over: Any) -> Recipe:
    """A student of ChatML, a teacher of its tokenizer and one of another; chat and plain text."""
    if not (tmp_path / "chat.jsonl").exists():
        save_talks(tmp_path / "chat.jsonl")
    model(tmp_path / "base", student(), seed=1, initializer_range=0.1)
    model(tmp_path / "near", student(), seed=2)
    far = chatty(piece_level(420), template, "<turn>", "<turn|>")
    model(tmp_path / "far", far, hidden_size=48, initializer_range=0.2)
    chat = {"kind": "files", "paths": ["chat.jsonl"], "format": {"kind": "chat"}}
    code = {"name": "code", "text": {"kind": "stdlib", "paths": ["abc.py"]}}
    parts: dict[str, Any] = {
        "teachers": [
            {"name": "near", "model": {"kind": "local", "path": "near"}},
            {"name": "far", "model": {"kind": "local", "path": "far"}},
        ],
        "student": {"base": {"kind": "local", "path": "base"}, "init": "base", "dropout": 0.0},
        "data": {"domains": [{"name": "chat", "text": chat}, code], "block": 64},
        "training": {"tokens": 128 * 8, "batch_tokens": 128},
        "fusion": {"calibration": {"kind": "none"}},
    }
    return tiny(tmp_path, **parts | over)


def losses(recipe: Recipe, out: Path) -> list[float]:
    return [s["loss"] for s in events(compress.distill(recipe=recipe, out=out).path, "step")]


def test_a_student_learns_answers_from_both(tmp_path: Path) -> None:
    training = {"tokens": 128 * 24, "batch_tokens": 128, "evaluate_every": 8, "learning_rate": 1e-2}
    recipe = recipe_of(tmp_path, fusion={"cross_entropy": 1.0}, training=training)
    made = compress.distill(recipe=recipe, out=tmp_path / "student")
    first, *_, last = events(made.path, "evaluate")
    assert last["nll"]["chat"] < first["nll"]["chat"] - 0.1
    coverage = made.result["teachers"]["far"]["coverage"]["chat"]
    assert coverage["bytes"] == pytest.approx(1)
    assert coverage["positions"] > 0.8
    weights = [step["weights"]["chat"]["far"] for step in events(made.path, "step")]
    assert all(weight > 0 for weight in weights)
    assert mistakes(recipe) == []


@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_caches_and_servers_give_the_live_loss(tmp_path: Path, kind: str) -> None:
    cache = {"kind": "topk", "k": 1000} if kind == "topk" else {"kind": kind}
    training = {"tokens": 128 * 2, "batch_tokens": 128}
    plain = {"features": {"weight": 0.0}}
    live = losses(recipe_of(tmp_path, training=training, **plain), tmp_path / "live")
    kept = recipe_of(tmp_path, training=training | {"teacher_cache": cache}, **plain)
    assert losses(kept, tmp_path / "kept") == pytest.approx(
        live, rel=1e-4 if kind == "topk" else 2e-3
    )
    if kind == "topk":
        with LogprobServer(tmp_path / "far") as server:
            far = source(server, tmp_path / "far", top=500)
            teachers = [
                {"name": "near", "model": {"kind": "local", "path": "near"}},
                {"name": "far", "model": far},
            ]
            served = recipe_of(tmp_path, training=training, teachers=teachers, **plain)
            assert losses(served, tmp_path / "served") == pytest.approx(live, rel=1e-4)


def test_a_longer_corpus_changes_the_key(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    folders = {"near": tmp_path / "near", "far": tmp_path / "far"}

    def digest() -> str | None:
        pairs = pair_teachers(tmp_path / "base", folders)
        return with_conversations(recipe, pairs, tmp_path / "base", folders).digest(1)

    before = digest()
    assert before == digest()
    save_talks(tmp_path / "chat.jsonl", 41)
    assert before != digest()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"teacher far: .*far has no chat template, so conversations cannot be rendered"),
        ("{{ raise_exception('no') }}", r"chat.jsonl.*: teacher far: the chat template refuses"),
        (
            "{{ messages[1]['content'] }}",
            r"do not show the same answers of this conversation \(none and 2\)",
        ),
    ],
    ids=["missing", "refuses", "drops"],
)
def test_templates_that_cannot_be_aligned_are_named(
    tmp_path: Path, template: str | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        compress.distill(recipe=recipe_of(tmp_path, template=template), out=tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_tool_calls_are_refused_for_another_tokenizer() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(DataError, match=r"row 1: an answer calls tools .* teacher big would see"):
        aligned(conversation, side(student()), side(gemma()))


@pytest.mark.parametrize("silent", [set(), {0}, {1}, {0, 1}])
def test_a_row_is_found_by_the_answers_that_are_learned(tmp_path: Path, silent: set[int]) -> None:
    """Training cuts a row after its last label, and finds its rendering by what is left."""
    answers = [{"role": "assistant", "content": text} for text in ("a cat", "a dog")]
    marked = [m | {"weight": 0} if n in silent else m for n, m in enumerate(answers)]
    talk = [
        {"role": "user", "content": "q"},
        marked[0],
        {"role": "user", "content": "r"},
        marked[1],
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": talk}))
    form = ChatRows(kind="chat")
    own, other = side(student()), side(gemma())
    ((where, conversation, _),) = read_conversations(tmp_path / "a.jsonl", form)
    found = rendered_for(conversation, where, own, other, block=4096, name="big")
    (tokens,) = tokenise(conversations(tmp_path / "a.jsonl", form, own.tokenizer), own.tokenizer)
    labels = tokens.scored.nonzero()[0]
    if len(silent) == 2:
        assert found is None
        assert not len(labels)
    else:
        assert found is not None
        assert found[0] == tokens.ids[: labels[-1] + 1].tolist()


def test_conversations_without_answers_are_named(tmp_path: Path) -> None:
    rows = [json.dumps({"messages": [{"role": "user", "content": f"hi {n}"}]}) for n in range(40)]
    (tmp_path / "chat.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match="chat: too little text"):
        compress.distill(recipe=recipe_of(tmp_path), out=tmp_path / "student")


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"data": "stream"}, r"data\.packing: teacher far .* set it to document"),
        ({"training": {"tokens": 512, "batch_tokens": 128,
                       "on_policy": {"share": 0.5, "new_tokens": 8}}},
         r"training\.on_policy: teacher far has another tokenizer"),
    ],
)  # fmt: skip
def test_what_is_not_aligned_is_refused_before_the_first_step(
    tmp_path: Path, over: Any, message: str
) -> None:
    recipe = recipe_of(tmp_path)
    if over == {"data": "stream"}:
        data = recipe.data.model_copy(update={"packing": "stream"})
        recipe = recipe.model_copy(update={"data": data})
    else:
        recipe = recipe_of(tmp_path, **over)
    assert any(re.search(message, line) for line in mistakes(recipe))
    with pytest.raises(RecipeError, match=message):
        compress.distill(recipe=recipe, out=tmp_path / "student")
