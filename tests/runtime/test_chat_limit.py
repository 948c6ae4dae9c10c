"""Chat templates of strangers that compute for ever, where they serve and where they train."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from compress.data import chat as training
from compress.data.conversations import Conversation
from limbeck.contract.errors import DataError
from limbeck.runtime import chat
from tests.pico import make_tokenizer

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
MESSAGES = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "def"}]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "LONGEST", 0.2)


@pytest.mark.parametrize(
    "template", [ENDLESS, "{% for m in messages %}" + ENDLESS * 3 + "{% endfor %}"]
)
def test_a_template_that_never_ends_is_refused_in_any_thread(template: str) -> None:
    started = time.monotonic()
    with pytest.raises(DataError, match=r"Endless: it was still at work after 0\.2 s"):
        chat.render(template, MESSAGES, {})
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(DataError, match="still at work"):
            pool.submit(chat.render, template, MESSAGES, {}).result()
        # The thread works on.
        assert pool.submit(chat.render, "{{ messages[0].content }}", MESSAGES, {}).result() == "abc"
    with pytest.raises(DataError, match=r"notes\.jsonl:3: the chat template fails .* Endless"):
        training.render(Conversation(MESSAGES), make_tokenizer(), template, "notes.jsonl:3")
    assert time.monotonic() - started < 10


def test_a_template_that_ends_is_left_alone() -> None:
    before = threading.active_count()
    for _ in range(50):
        with chat.limited():
            pass
    time.sleep(0.3)
    assert threading.active_count() <= before + 1
