"""Rows of chat data with tools and a system text beside their messages, as datasets write them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compress.data.blocks import conversations, load_blocks
from compress.data.documents import documents
from compress.data.packing import tokenise
from compress.data.prompts import first_tokens
from limbeck.contract.errors import DataError
from limbeck.contract.recipe import ChatRows, FileText, Rows
from limbeck.runtime.chat import without_marks
from tests.compress.data.texts import recipe_of, write_rows
from tests.pico import CHAT, make_tokenizer

# As Qwen3's template has it: tools, calls, reasoning of the last turn, and a variable.
MARKED = """{%- if tools %}
    {{- '<|system|># Tools\\n' }}
    {%- for tool in tools %}{{- (tool | tojson) + '\\n' }}{%- endfor %}
    {{- '<|end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|' + message.role + '|>' }}
    {%- if message.role == 'assistant' %}
    {%- generation %}
        {%- if message.reasoning_content and loop.index0 > ns.last %}
            {{- '<think>' + message.reasoning_content + '</think>' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}</tool_call>' }}
        {%- endfor %}
        {{- '<|end|>' }}
    {%- endgeneration %}
    {{- '\\n' }}
    {%- else %}
        {{- message.content + (' in ' + style if style is defined else '') + '<|end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Ünïcode “quotes”",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Röm"}}}
ASKED = [
    {"role": "user", "content": "Rome?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "20"},
    {"role": "assistant", "content": "It is 20."},
]
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SYSTEM = {"role": "system", "content": "Be brief."}


def as_text(messages: list[dict[str, Any]], **call: Any) -> list[dict[str, Any]]:
    """The messages with the arguments of their calls as JSON text, as OpenAI writes them."""
    found = copy.deepcopy(messages)
    for message in found:
        for one in message.get("tool_calls", ()):
            one["function"]["arguments"] = json.dumps(one["function"]["arguments"])
            one.update(call)
    return found


_ONE = as_text(ASKED)[1]["tool_calls"][0]["function"]
LEGACY = [
    ASKED[0],
    {"role": "assistant", "content": None, "function_call": _ONE},
    {"role": "function", "content": "20"},
    ASKED[3],
]  # fmt: skip
FACTORY = [
    {"from": "human", "value": "Rome?"},
    {"from": "function_call", "value": json.dumps(CALL["function"])},
    {"from": "observation", "value": "20"},
    {"from": "gpt", "value": "It is 20."},
]
PARTS = [
    {**turn, "content": [{"type": "text", "text": part} for part in turn["content"]]}
    for turn in TALK
]
REASONED = [
    *ASKED[:1],
    {**ASKED[1], "reasoning_content": "I must look."},
    *ASKED[2:],
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes", "reasoning_content": "I looked."},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".arrow"])
@pytest.mark.parametrize(
    ("row", "messages", "options"),
    [
        ({"tools": [TOOL], "messages": TALK}, TALK, {"tools": [TOOL]}),
        ({"tools": [TOOL], "messages": ASKED}, ASKED, {"tools": [TOOL]}),
        ({"tools": json.dumps([TOOL]), "messages": as_text(ASKED, id="call_1")}, ASKED,
         {"tools": [TOOL]}),
        ({"tools": [json.dumps(TOOL)], "messages": TALK}, TALK, {"tools": [TOOL]}),
        ({"tools": None, "messages": TALK, "id": 7}, TALK, {}),
        ({"tools": "[]", "messages": TALK}, TALK, {}),
        ({"functions": [TOOL["function"]], "messages": LEGACY}, ASKED, {"tools": [TOOL]}),
        ({"tools": json.dumps([TOOL]), "system": "Be brief.", "messages": FACTORY},
         [SYSTEM, *ASKED], {"tools": [TOOL]}),
        ({"system": "", "messages": [SYSTEM, *TALK]}, [SYSTEM, *TALK], {}),
        ({"system_prompt": "Be brief.", "messages": [SYSTEM, *TALK]}, [SYSTEM, *TALK], {}),
        ({"chat_template_kwargs": {"style": "verse"}, "messages": TALK}, TALK, {"style": "verse"}),
        ({"messages": [{**SYSTEM, "role": "developer"}, *TALK]}, [SYSTEM, *TALK], {}),
        ({"messages": PARTS}, TALK, {}),
        ({"messages": json.dumps(TALK)}, TALK, {}),
        ({"tools": [TOOL], "messages": REASONED}, REASONED, {"tools": [TOOL]}),
    ],
    ids=["tools", "calls", "json", "list of json", "null", "empty", "openai's older form",
         "sharegpt", "no system", "same system", "variables", "developer", "parts", "text",
         "reasoning"],
)  # fmt: skip
def test_rows_are_rendered_and_masked_as_transformers_does(
    tmp_path: Path, suffix: str, row: dict[str, Any], messages: Any, options: dict[str, Any]
) -> None:
    """The mask of `apply_chat_template` with a marked template; ours is without the marks."""
    rows = [copy.deepcopy(row)]
    if suffix != ".jsonl" and row["messages"] is ASKED:
        other = copy.deepcopy(ASKED)  # so that Arrow writes null arguments into the first row
        other[1]["tool_calls"][0]["function"]["arguments"] = {"day": "Monday"}
        rows.append({"messages": other})
    tokenizer = make_tokenizer()
    tokenizer.chat_template = MARKED
    theirs = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, **options
    )
    for template in (MARKED, without_marks(MARKED)):
        tokenizer.chat_template = template
        pieces = list(conversations(write_rows(tmp_path / f"a{suffix}", rows), FORM, tokenizer))
        tokens = next(tokenise(pieces, tokenizer))
        assert tokens.ids.tolist() == theirs["input_ids"]
        assert tokens.scored.tolist() == theirs["assistant_masks"]


FORM = ChatRows(kind="chat")
ASSISTANT = "{% if m.role == 'assistant' %}{% generation %}"
PROMPT = "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
# As Qwen3's (with white space) and gpt-oss's: an answer has an opening that its model writes.
OPENED = (
    "{% for m in messages %}<|{{ m.role }}|>" + ASSISTANT + "<think>\n</think>\n{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}{% endif %}" + PROMPT
)
# As GLM's: nothing ends a turn, and the reasoning of earlier turns is left out.
ENDLESS = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<|{{ m.role }}|>"
    + ASSISTANT
    + "<think>{% if loop.index0 > ns.last %}{{ m.reasoning_content }}{% endif %}</think>"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}" + PROMPT
)
THOUGHTS = [
    {"role": "user", "content": "Rome?"},
    {"role": "assistant", "content": "20", "reasoning_content": "I must look."},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes", "reasoning_content": "I looked."},
]


@pytest.mark.parametrize(
    ("template", "messages"),
    [(OPENED, TALK), (OPENED, THOUGHTS), (ENDLESS, TALK), (ENDLESS, THOUGHTS)],
)
def test_what_follows_the_prompt_is_learned_as_the_marks_say(
    tmp_path: Path, template: str, messages: Any
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    theirs = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    tokenizer.chat_template = without_marks(template)
    path = write_rows(tmp_path / "a.jsonl", [{"messages": messages}])
    tokens = next(tokenise(list(conversations(path, FORM, tokenizer)), tokenizer))
    assert tokens.ids.tolist() == theirs["input_ids"]
    assert tokens.scored.tolist() == theirs["assistant_masks"]


def test_what_a_template_does_not_read_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("compress.data.blocks.say", said.append)
    row = {"messages": TALK, "tools": [TOOL], "style": "verse", "source": "web"}
    path = write_rows(tmp_path / "a.jsonl", [row, row])
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT + "{{ style }}"
    assert len(list(conversations(path, FORM, tokenizer))) == 2
    assert ["line 1: the chat template reads style" in line for line in said] == [True, False]
    assert "line 1: the chat template shows no tools" in said[1]


def test_what_answers_have_besides_and_a_template_does_not_show_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("compress.data.blocks.say", said.append)
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    answer = {"role": "assistant", "content": "a", "reasoning_content": "why", "tool_calls": [call]}
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [TALK[0], answer]}])
    tokenizer = make_tokenizer()
    (piece,) = conversations(path, FORM, tokenizer)
    assert piece.text == tokenizer.apply_chat_template([TALK[0], answer], tokenize=False)
    assert [line.partition(";")[0].partition("shows ")[2] for line in said] == [
        "no reasoning",
        "no tool calls",
    ]
    said.clear()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.reasoning_content or '' }}{{ m.content }}"
        "{{ m.tool_calls or '' }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    list(conversations(path, FORM, tokenizer))
    assert said == []


@pytest.mark.parametrize("template", [CHAT, MARKED])
@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"train": False}, {"training": False}], ids=["openai", "axolotl", "old"]
)
@pytest.mark.parametrize("silent", [{0}, {1}, {0, 2}, {0, 1, 2}])
def test_marked_answers_are_context_alone(
    tmp_path: Path, template: str, mark: dict[str, Any], silent: set[int]
) -> None:
    """As OpenAI's fine-tuning and axolotl have it: the text stays, and is not learned."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = without_marks(template)
    turns = [(f"q{n}", f"answer {n}") for n in range(3)]
    messages = []
    for n, (question, answer) in enumerate(turns):
        messages.append({"role": "user", "content": question, "weight": 0})
        own = {"role": "assistant", "content": answer}
        messages.append(own | (mark if n in silent else {"weight": 1}))
    path = write_rows(tmp_path / "a.jsonl", [{"messages": messages}])
    (piece,) = conversations(path, FORM, tokenizer)
    assert piece.text == tokenizer.apply_chat_template(messages, tokenize=False)
    learned = [piece.text[slice(*span)] for span in piece.answers or ()]
    assert [text.split("<|")[0] for text in learned] == [
        answer for n, (_, answer) in enumerate(turns) if n not in silent
    ]


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text", None])
def test_parts_of_text_are_joined(tmp_path: Path, kind: str | None) -> None:
    """Of OpenAI's and Anthropic's interfaces, and of Amazon's, whose parts have no type."""
    parts = [({"type": kind} if kind else {}) | {"text": text} for text in ("one ", "two")]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[:1]}]
    path = write_rows(tmp_path / "a.jsonl", [{"messages": messages}])
    tokenizer = make_tokenizer()
    (piece,) = conversations(path, FORM, tokenizer)
    plain = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "one "}]
    assert piece.text == tokenizer.apply_chat_template(plain, tokenize=False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": "search", "messages": TALK}, "a.jsonl, line 1: tools: found 'search'"),
        ({"tools": [1], "messages": TALK}, "tools: found '.1.'; expected a list of descriptions"),
        ({"tools": [TOOL], "functions": [TOOL], "messages": TALK}, "both tools and functions"),
        ({"system": ["x"], "messages": TALK}, "system: found list; expected text"),
        ({"system": "x", "messages": [SYSTEM, *TALK]}, "a system message and another one beside"),
        ({"chat_template_kwargs": {"tools": 1}, "messages": TALK},
         "chat_template_kwargs: found tools"),
        ({"messages": [{**TALK[1], "weight": 0.5}]}, "message 1 has weight 0.5, but an answer is"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "message 1 has a part of type image_url, but only text is learned"),
        ({"messages": [TALK[0], {"role": "Assistant", "content": "hi"}]},
         "message 2 has the role 'Assistant', which a chat template would write as it is; call it"),
        ({"messages": [{"from": "human", "value": "u"}, {"from": "chatgpt", "value": "hi"}]},
         "message 2 has the role 'chatgpt'"),
        ({"messages": [{"role": "assistant", "tool_calls": "x"}]}, "tool calls that are no list"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
         "without the name of its function"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError, match=message):
        list(conversations(path, FORM, make_tokenizer()))


ASK = [{"role": "user", "content": "hi"}]
SECOND = [*TALK, {"role": "user", "content": "again?"}]
WORSE = [{"role": "assistant", "content": "go away"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("row", "form", "prompt", "answer"),
    [
        ({"prompt": ASK, "chosen": TALK[1:], "rejected": WORSE}, {"field": "chosen"}, ASK,
         TALK[1:]),
        ({"chosen": TALK, "rejected": [*ASK, *WORSE]}, {"field": "chosen"}, ASK, TALK[1:]),
        # UltraFeedback has the prompt twice.
        ({"prompt": "hi", "chosen": TALK, "rejected": TALK}, {"field": "chosen"}, ASK, TALK[1:]),
        ({"prompt": "hi", "chosen": "hello", "rejected": "no"}, {"field": "chosen"}, ASK, TALK[1:]),
        ({"prompt": "hi", "completion": "[1]"}, {"field": "completion"}, ASK,
         [{"role": "assistant", "content": "[1]"}]),
        ({"prompt": SECOND, "completion": WORSE}, {"field": "completion"}, SECOND, WORSE),
        ({"prompt": json.dumps(SECOND), "completion": json.dumps(WORSE)}, {"field": "completion"},
         SECOND, WORSE),
        ({"question": "hi", "answer": "hello"}, {"field": "answer", "prompt": "question"}, ASK,
         TALK[1:]),
        ({"system": "Be brief.", "prompt": "hi", "completion": "hello"}, {"field": "completion"},
         [SYSTEM, *ASK], TALK[1:]),
        # LLaMA-Factory documents this form: the input follows the instruction on a new line.
        ({"instruction": "say", "input": "hi", "output": "hello", "history": [["a", "b"]]},
         {"field": "output", "prompt": "instruction"},
         [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
          {"role": "user", "content": "say\nhi"}], TALK[1:]),
        ({"prompt": "hi", "chosen": ASKED, "tools": [TOOL]}, {"field": "chosen"}, None, ASKED),
    ],
    ids=["preference", "no prompt", "twice", "text", "completion", "turns", "json", "names",
         "system", "alpaca", "whole"],
)  # fmt: skip
def test_an_answer_alone_is_learned_after_its_prompt(
    tmp_path: Path, suffix: str, row: dict[str, Any], form: Any, prompt: Any, answer: Any
) -> None:
    """As TRL does with prompts and completions: nothing of the prompt is learned."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = MARKED
    options: Any = {"return_dict": True, "tools": row.get("tools")}
    whole = tokenizer.apply_chat_template(
        [*(prompt or []), *answer], return_assistant_tokens_mask=True, **options
    )
    start = 0
    if prompt:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
        start = len(ids["input_ids"])
        assert whole["input_ids"][:start] == ids["input_ids"]
    right = [int(at >= start and mask) for at, mask in enumerate(whole["assistant_masks"])]
    path = write_rows(tmp_path / f"a{suffix}", [row])
    for template in (MARKED, without_marks(MARKED)):
        tokenizer.chat_template = template
        found = conversations(path, ChatRows(kind="chat", **form), tokenizer)
        (tokens,) = tokenise(list(found), tokenizer)
        assert tokens.ids.tolist() == whole["input_ids"]
        assert tokens.scored.tolist() == right


def test_no_part_of_a_prompt_is_lost(tmp_path: Path) -> None:
    row = {"question": "who?", "context": "It is he.", "answer": "he"}
    path = write_rows(tmp_path / "a.jsonl", [row])
    form = ChatRows(kind="chat", field="answer", prompt="question")
    with pytest.raises(DataError, match="1: context beside question would not be learned from"):
        list(conversations(path, form, make_tokenizer()))
    for wrong in ({"input": ["x"]}, {"history": ["x"]}):
        row = {"instruction": "say", "output": "x"} | wrong
        path = write_rows(tmp_path / "a.jsonl", [row])
        form = ChatRows(kind="chat", field="output", prompt="instruction")
        with pytest.raises(DataError, match="pairs of texts under history"):
            list(conversations(path, form, make_tokenizer()))


def test_answers_that_are_not_wanted_are_not_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TRL's KTO marks every answer of a prompt as good or bad."""
    rows = [{"prompt": "q", "completion": f"a{n}", "label": n > 1} for n in range(4)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    form = ChatRows(kind="chat", field="completion")
    found = [piece.text for piece in conversations(path, form, make_tokenizer())]
    assert ["a2" in found[0], "a3" in found[1], len(found)] == [True, True, 2]
    assert capsys.readouterr().err.count("label is false; such answers are not learned") == 1


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_answer_as_plain_text_is_refused_where_its_prompt_would_be_lost(
    tmp_path: Path, kind: str
) -> None:
    row = {"prompt": "which of them is long enough for a block?", "chosen": "it", "rejected": "no"}
    write_rows(tmp_path / f"a.{kind}", [row] * 99)
    recipe = recipe_of(tmp_path, f"a.{kind}", text={"format": {"kind": kind, "field": "chosen"}})
    with pytest.raises(DataError, match=r"1: chosen would be learned without its prompt; set fo.*"
                       r"\{kind: chat, field: chosen, prompt: prompt\}"):  # fmt: skip
        load_blocks(recipe, make_tokenizer())
    recipe = recipe_of(tmp_path, f"a.{kind}", text={"format": {"kind": kind, "field": "prompt"}})
    assert load_blocks(recipe, make_tokenizer())


def test_prompts_of_conversations_end_where_the_first_answer_begins(tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "b"},
    ]
    long = [{"role": "user", "content": "x" * 100}, talk[1]]
    write_rows(tmp_path / "a.jsonl", [{"messages": talk}, {"messages": long}])
    tokenizer = make_tokenizer()
    text = FileText(kind="files", paths=("a.jsonl",), format=ChatRows(kind="chat"))
    expected = tokenizer.apply_chat_template(talk[:1], add_generation_prompt=True)["input_ids"]
    most = len(expected)
    found = first_tokens(text, tokenizer, folder=tmp_path, tokens=4, most=most)
    assert found == [expected]  # the long one is left out, and a prompt is never cut
    with pytest.raises(DataError, match=f"whose first answer begins within {most - 1} tokens, in"):
        first_tokens(text, tokenizer, folder=tmp_path, tokens=4, most=most - 1)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_text_in_an_extension_type_of_arrow_is_text(tmp_path: Path, suffix: str) -> None:
    storage = pa.array(['{"a": 1}', "[]"])
    rows = pa.ExtensionArray.from_storage(pa.json_(pa.string()), storage)
    table, path = pa.table({"text": rows}), tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    assert list(documents(path, Rows(kind="rows"))) == ['{"a": 1}', "[]"]
