"""Chat templates of strangers that take too much, where they serve and where they train."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from compress.data import chat as training
from compress.data.conversations import Conversation
from limbeck.contract.errors import DataError
from limbeck.runtime import chat
from tests.pico import make_tokenizer

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
MESSAGES = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "def"}]
TOO_LONG = r"it was still at work after 0\.4 s"
TOO_LARGE = "it took more memory than it may"


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    chat.render("", MESSAGES, {})  # imports count as the template's time
    monkeypatch.setattr(chat, "LONGEST", 0.4)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (ENDLESS, TOO_LONG),
        ("{{ 9**(9**9) }}", TOO_LONG),  # within C, where no thread can end it
        ("{% set n = messages|length + 7 %}{{ n**(n**n) }}", TOO_LONG),
        ("{{ ([range(1000)|list] * 9999)|sum(start=[]) }}", TOO_LONG),
        ("{{ ('a' * 3000000000)|length }}", TOO_LARGE),
        ("{{ 'a'|center(2000000000) }}", TOO_LARGE),
    ],
)
def test_a_template_that_takes_too_much_is_refused_in_any_thread(template: str, why: str) -> None:
    started = time.monotonic()
    with pytest.raises(DataError, match=why):
        chat.render(template, MESSAGES, {})
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(DataError, match=why):
            pool.submit(chat.render, template, MESSAGES, {}).result()
        # The thread works on.
        assert pool.submit(chat.render, "{{ messages[0].content }}", MESSAGES, {}).result() == "abc"
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(("template", "why"), [(ENDLESS, TOO_LONG), ("{{ 9**(9**9) }}", TOO_LONG)])
def test_so_it_is_where_it_trains(template: str, why: str) -> None:
    with pytest.raises(DataError, match=rf"notes\.jsonl:3: the chat template fails .*{why}"):
        training.Chat(Conversation(MESSAGES), make_tokenizer(), template, "notes.jsonl:3").render()


@pytest.mark.parametrize("levels", [2000, 100_000])
def test_values_nested_too_deeply_are_refused(levels: int) -> None:
    deep: list[Any] = []
    for _ in range(levels):
        deep = [deep]
    with pytest.raises(DataError, match="the values are nested too deeply"):
        chat.render("{{ messages }}", [{"content": deep}], {})


def test_a_template_that_is_nested_too_deeply_is_refused() -> None:
    deep = "{% if 1 %}" * 2000 + "{% endif %}" * 2000
    with pytest.raises(DataError, match="RecursionError"):
        chat.render(deep, MESSAGES, {})
    with pytest.raises(DataError, match="the model's chat template is nested too deeply"):
        chat.variables(deep)
