"""Random configurations and adapters: our loss is that of transformers and peft, or a refusal."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest

from limbeck.contract.errors import ModelError, ParityError
from tests.architectures import SIZES
from tests.wild.cases.configurations import CASES, Outcome, draw_case, outcomes
from tests.wild.cases.exports import exported

# The first cases: every architecture of docs/architectures.md, and one other.
QUICK = range(len(SIZES) + 1)


def run(folder: Path, numbers: Sequence[int]) -> list[Outcome]:
    found = []
    with warnings.catch_warnings():  # of transformers and peft, on odd configurations
        warnings.simplefilter("ignore")
        for number in numbers:
            found += outcomes(draw_case(number), folder / str(number))
    return found


def wrong(found: Sequence[Outcome]) -> list[str]:
    return [f"case {o.case.number}: {o}" for o in found if o.verdict.isupper()]


def test_twelve_random_configurations_give_the_loss_of_transformers(tmp_path: Path) -> None:
    assert len(QUICK) == 12
    found = run(tmp_path, QUICK)
    assert wrong(found) == []
    equal = {o.case.config["model_type"] for o in found if o.verdict == "equal"}
    assert equal >= SIZES.keys()


@pytest.mark.slow
def test_two_hundred_random_configurations_give_the_loss_of_transformers(tmp_path: Path) -> None:
    found = run(tmp_path, range(CASES))
    assert wrong(found) == []
    counts = collections.Counter(o.verdict for o in found)
    assert counts["equal"] > 0.8 * len(found), counts


def test_a_difference_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the factor of the logits, and without the probe that would refuse such a model."""
    monkeypatch.setattr("compress.models.body._FACTORS", ())
    monkeypatch.setattr("compress.models.body.require_equal", lambda *_, **__: None)
    number = next(n for n in range(CASES) if draw_case(n).config.get("logits_scaling") == 4.0)
    assert "DIFFERENT" in {outcome.verdict for outcome in run(tmp_path, [number])}


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (ParityError("fp32: KL 1"), "PARITY"),
        (ModelError("no builder"), "refused"),
        (KeyError("weight"), "CRASH"),
    ],
)
def test_an_export_that_fails_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, verdict: str
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr("tests.wild.cases.exports.export_student", fail)
    found, _, what = exported(1, tmp_path)
    assert found == verdict
    assert str(error) in what
