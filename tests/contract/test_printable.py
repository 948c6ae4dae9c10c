"""Text of strangers does not command the terminal."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.contract.errors import RecipeError
from limbeck.contract.printable import printable
from limbeck.contract.progress import say, task

_ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eexe\u2028\ud800"
_WRITTEN_OUT = r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202eexe\u2028\ud800"


def test_control_characters_are_written_out() -> None:
    assert printable(_ESCAPE) == _WRITTEN_OUT
    assert printable("Größe: 3 µs\n\t日本語") == "Größe: 3 µs\n\t日本語"


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_what_is_printable_has_no_control_character(text: str) -> None:
    shown = printable(text)
    assert all(unicodedata.category(c) not in ("Cc", "Cs") for c in shown if c not in "\n\t")
    assert printable(shown) == shown
    shown.encode()


def test_errors_and_progress_show_nothing_raw(capsys: pytest.CaptureFixture[str]) -> None:
    assert str(RecipeError(f"{_ESCAPE}: no such key")) == f"{_WRITTEN_OUT}: no such key"
    say(_ESCAPE)
    with task(_ESCAPE, 1) as work:
        work.advance()
    assert capsys.readouterr().err.splitlines()[0] == _WRITTEN_OUT
