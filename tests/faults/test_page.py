"""The page of errors says what the code says."""

from __future__ import annotations

from tests.faults.page import PAGE, page


def test_the_page_of_errors_is_what_the_code_answers() -> None:
    assert PAGE.read_text() == page(), "run: python -m tests.faults.page"
