"""The report's part on text that the student wrote during its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve_bench import write_report
from serve_bench.tell import language_page
from serve_bench.tell.own_text import own_text, read_samples
from tests.serve_bench.tell.runs import make_run, read, recipe


def log(steps: int = 40) -> list[dict[str, Any]]:
    """Steps 2, 4, … have own text, of a falling reverse KL and of lengths that differ."""
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        own = None
        if step % 2 == 0:
            own = {"rows": 2, "tokens": 10 * step, "length": 5 * step, "reverse_kl": 1 / step}
            own |= {
                "judged": 8 * step - step // 3,
                "repetition": 0.25,
                "weights": {"speeches": {"a": 0.7, "b": 0.3}},
            }
        seconds = {"generate": 3.0, "teachers": 1.0, "student": 4.0}
        weights = {"speeches": {"a": 0.5 + step / 100, "b": 0.5 - step / 100}}
        row = {"event": "step", "step": step, "own_text": own, "step_seconds": seconds}
        rows.append(row | {"weights": weights})
    return rows


def samples() -> list[dict[str, Any]]:
    return [
        {"step": step, "row": row, "prompt": f"<b>prompt {step}</b>", "text": f"text {step}.{row}"}
        for step in range(2, 41, 2)
        for row in range(2)
    ]


def test_ends_are_means_over_a_tenth_of_the_steps() -> None:
    found = own_text(log(), samples())
    assert found is not None
    assert (found["steps"], found["part"]) == (20, 2)
    assert found["tokens"] == sum(10 * step for step in range(2, 41, 2))
    first, last = ([2, 4], [38, 40])
    judged = sum(8 * step - step // 3 for step in range(2, 41, 2))
    assert found["judged"] == judged / found["tokens"]
    for name, steps in (("first", first), ("last", last)):
        kl = np.average([1 / s for s in steps], weights=[8 * s - s // 3 for s in steps])
        assert found[name]["reverse_kl"] == pytest.approx(kl)
        assert found[name]["length"] == pytest.approx(np.mean([5 * s for s in steps]))
    assert found["seconds"] == pytest.approx({"generate": 3 / 8, "teachers": 1 / 8, "student": 0.5})
    a, b = found["weights"]
    assert (a["place"], a["teacher"], a["own"]) == ("speeches", "a", pytest.approx(0.7))
    assert a["corpus"] == pytest.approx(0.5 + np.mean(range(2, 41, 2)) / 100)
    assert a["corpus"] + b["corpus"] == pytest.approx(1)
    assert [s["step"] for s in found["samples"]["first"]] == [2, 2, 4, 4, 6]
    assert [s["text"] for s in found["samples"]["last"]][-1] == "text 40.1"


def test_nothing_is_told_where_nothing_was_written() -> None:
    assert own_text([row for row in log() if row["own_text"] is None], []) is None


def test_the_page_shows_own_text_and_escapes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = recipe()
    run = make_run(tmp_path, chosen)
    plain = write_report(run=run, recipe=chosen)
    assert "What the student wrote itself" not in read(plain.html).text
    # The artifacts of the run are sealed by their digests.
    monkeypatch.setattr(language_page, "own_text", lambda *_: own_text(log(), samples()))
    report = write_report(run=run, recipe=chosen)
    text = read(report.html).text
    assert "What the student wrote itself" in text
    assert "text 40.1" in text
    assert "0.335" in text  # reverse KL of the first tenth: (1/2 x 16 + 1/4 x 31) / 47
    assert "It is of 76.8 % of the tokens" in text  # 3,227 of 4,200
    assert "<b>prompt" not in report.html.read_text()


def test_samples_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    assert read_samples(path) == []
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples()))
    assert read_samples(path) == samples()
