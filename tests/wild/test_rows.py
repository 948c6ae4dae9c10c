"""Every case that users reported comes out right, in the table that `make test-wild` prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.wild.cases.fresh import fresh
from tests.wild.cases.row import Row
from tests.wild.cases.rows import rows


@pytest.mark.filterwarnings("ignore")  # of transformers and peft, on what they get wrong
def test_every_reported_case_is_equal_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    found = list(rows(tmp_path))
    assert [row for row in found if row.verdict.isupper()] == []
    assert len(found) >= 381
    assert sum(row.verdict == "equal" for row in found) == 305


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_stranger_configurations_weights_and_adapters_are_equal_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = list(fresh(tmp_path))
    assert [row for row in found if row.verdict.isupper()] == []
    assert (len(found), sum(row.verdict == "equal" for row in found)) == (143, 69)


def test_a_wrong_answer_is_seen() -> None:
    assert Row("a", "5.5580", "8.0140").verdict == "DIFFERENT"
    assert Row("a", "IndexError", "-", "named").verdict == "WRONG"
