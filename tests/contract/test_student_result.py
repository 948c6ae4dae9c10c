"""The typed result of a student: one level on disk, and nothing of another task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from limbeck.contract.artifact import Artifact
from limbeck.contract.errors import ArtifactError
from limbeck.contract.results.student import (
    EncoderFigures,
    LanguageFigures,
    Parameters,
    StudentResult,
    TeacherResult,
)

LANGUAGE = StudentResult(
    task="causal-lm",
    teachers={"a": TeacherResult(1.25, nll={"x": 2.0}, mean_nll=2.0)},
    steps=3,
    seconds=1.5,
    precision="fp32",
    device="cpu",
    parameters=Parameters(total=10, trained=2),
    shrink=None,
    sources={"base": None, "texts": {}},
    language=LanguageFigures(nll={"x": 2.5}, mean_nll=2.5, tokens=96, best_step=2, base=None),
)
CLASSIFIER = replace(
    LANGUAGE,
    task="classification",
    teachers={"a": TeacherResult(0.5, metrics={"accuracy": 0.9})},
    language=None,
    encoder=EncoderFigures(
        metrics={"accuracy": 0.8}, classes=("no", "yes"), examples={"train": 8, "heldout": 2}
    ),
)


def artifact(result: dict[str, Any]) -> Artifact:
    return Artifact(Path("runs/x/student"), {"kind": "student", "result": result})


@pytest.mark.parametrize("result", [LANGUAGE, CLASSIFIER], ids=["language", "classifier"])
def test_what_is_written_is_read_back(result: StudentResult) -> None:
    written = result.to_json()
    assert StudentResult.of(artifact(written)) == result
    assert written["task"] == result.task
    assert ("nll" in written) == (result.language is not None)
    assert ("metrics" in written) == (result.encoder is not None)
    assert None not in written["teachers"]["a"].values()


@pytest.mark.parametrize("field", ["task", "parameters", "teachers", "nll", "tokens"])
def test_a_missing_field_is_named_with_the_remedy(field: str) -> None:
    written = {name: value for name, value in LANGUAGE.to_json().items() if name != field}
    with pytest.raises(ArtifactError, match=rf"student: its manifest .*{field}.*train the student"):
        StudentResult.of(artifact(written))
