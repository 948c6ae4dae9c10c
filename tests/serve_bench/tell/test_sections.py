"""Pictures of the scenarios and the list of every figure, from made-up results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from serve_bench import write_report
from serve_bench.tell import charts, sections
from tests import scenarios
from tests.serve_bench.tell.runs import make_run, read, recipe


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report's figures."""
    run = make_run(tmp_path_factory.mktemp("run"), recipe())
    return write_report(run=run, recipe=recipe()).json


@pytest.fixture
def data(written: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(written.read_text())
    return found | {
        "offline": scenarios.offline(),
        "cold": scenarios.cold(),
        "server": scenarios.server(),
    }


def test_nothing_is_drawn_of_what_was_not_measured(data: dict[str, Any]) -> None:
    alone = {key: value for key, value in data.items() if key not in ("offline", "cold", "server")}
    assert (sections.offline(alone), sections.server(alone), sections.cold(alone)) == (
        [],
        None,
        None,
    )
    assert not any(
        "offline" in row["what"] or "cold" in row["what"] for row in sections.rows(alone)
    )


def test_pictures_name_their_arms(data: dict[str, Any]) -> None:
    (cell,) = sections.offline(data)
    assert cell["title"] == "prompts of 128 tokens, 64 new"
    assert all(f">{label}<" in cell["picture"] for label in ("int8-weight", "fp32", "speeches"))
    server, cold = sections.server(data), sections.cold(data)
    assert server is not None
    assert cold is not None
    assert all(f">{label}<" in server for label in ("within the SLO", "completed", "asked"))
    assert all(
        f">{label}<" in cold for label in ("start", "import", "load", "first token", "6.33", "0.64")
    )
    for picture in (cell["picture"], server, cold):
        assert re.match(r'<svg class="chart"[^>]* role="img" aria-label="[^"]+">', picture)
        assert "#010" not in picture


def test_the_page_shows_every_scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"offline": scenarios.offline(), "cold": scenarios.cold(), "server": scenarios.server()}
    monkeypatch.setattr("serve_bench.tasks.language.scenarios.summary", lambda *_: found)
    chosen = recipe()
    html = write_report(run=make_run(tmp_path, chosen), recipe=chosen).html
    page = read(html)
    assert len(page.images) == 8 + 3
    for text in (
        "Batches",
        "Under load",
        "The highest rate that does is 4.00 requests/s; 5.00 does not.",
        "From a cold start",
    ):
        assert text in page.text
    assert html.read_text().count('<span class="mark fail">missed</span>') == 2


def test_the_loss_is_followed_from_the_best_teacher_to_what_ships(data: dict[str, Any]) -> None:
    steps = sections.loss_steps(data)
    assert [step["step"] for step in steps] == ["", "distilling", "rounding"]
    arms = {arm["label"]: arm["quality"] for arm in data["arms"].values() if arm["quality"]}
    best = min(
        (a for a in data["arms"].values() if a["role"] == "teacher"),
        key=lambda a: a["quality"]["mean_nll"],
    )
    assert [step["nll"]["mean"] for step in steps] == pytest.approx(
        [best["quality"]["mean_nll"], arms["fp32"]["mean_nll"], arms["int8-weight"]["mean_nll"]]
    )
    assert steps[0]["change"]["mean"] is None
    assert steps[2]["change"]["mean"] == pytest.approx(
        data["nll_rise_of_shipped_over"]["onnx:fp32"]["value"]
    )
    # After a recovery the fp32 graph is of another student; the steps tell of the one that was
    # distilled.
    domains = steps[1]["nll"].keys() - {"mean"}
    told = {"fp32": dict.fromkeys(domains, 2.0), "form": dict.fromkeys(domains, 2.5)}
    data["onnx"]["recovery"] = {"before": told, "after": {"form": dict.fromkeys(domains, 2.25)}}
    steps = sections.loss_steps(data)
    assert [step["step"] for step in steps] == ["", "distilling", "rounding", "recovery"]
    assert steps[2]["change"] == dict.fromkeys([*sorted(domains), "mean"], pytest.approx(0.25))
    assert steps[3]["change"]["mean"] == pytest.approx(-0.1)
    del data["onnx"]["recovery"]
    data["shipped"] = "fp32"
    assert sections.loss_steps(data) == []


def test_the_best_teacher_may_be_behind_a_server() -> None:
    def arm(label: str, role: str, nll: float) -> dict[str, Any]:
        domains = {"prose": {"nll": nll}}
        return {"label": label, "role": role, "quality": {"mean_nll": nll, "domains": domains}}

    arms = {"teacher:here": arm("here", "teacher", 3.0), "onnx:fp32": arm("fp32", "form", 2.8),
            "onnx:int8-weight": arm("int8-weight", "form", 2.9)}  # fmt: skip
    data = {"shipped": "int8-weight", "onnx": {}, "arms": arms}
    assert sections.loss_steps(data)[0]["label"] == "here, the best teacher"
    steps = sections.loss_steps(data, [arm("far", "teacher", 2.0)])
    assert steps[0]["label"] == "far, the best teacher"
    assert steps[1]["change"]["mean"] == pytest.approx(0.4)


def test_every_figure_is_a_row(data: dict[str, Any]) -> None:
    rows = {(row["arm"], row["what"]): row for row in sections.rows(data)}
    assert rows["int8-weight", "size on disk"]["value"] == pytest.approx(143.4)
    decode = rows["speeches", "decode speed of int8-weight over it"]
    assert (decode["unit"], decode["value"]) == (
        "×",
        data["speed_of_shipped_over"]["teacher:speeches"]["tpot"]["value"],
    )
    loss = rows["fp32", "rise of loss of int8-weight over it"]
    assert (loss["unit"], loss["value"]) == ("%", pytest.approx(0.06))
    assert loss["low"] < loss["value"] < loss["high"] or loss["low"] == pytest.approx(loss["high"])
    assert rows["int8-weight", "offline, batch 4, prompt 128, new 64: generated"][
        "value"
    ] == pytest.approx(116 * 4**0.7)
    assert rows["speeches", "cold: total"]["value"] == pytest.approx(6.33)
    assert rows["int8-weight", "server at 4/s: goodput"]["n"] == 240
    assert ("int8-weight", "server at 4/s: TTFT, p99") not in rows  # n too small
    assert rows["int8-weight", "loss, speeches"]["n"] == 12 * 255


def test_hills_hold_every_value() -> None:
    svg = charts.ridges(
        [
            charts.Values("a", "form", [1.0] * 50 + [40.0], 1.0),
            charts.Values("b", "teacher", [2.0] * 9, 2.0),
        ],
        title="hills",
        x="ms",
    )
    assert ">a<" in svg
    assert ">b<" in svg
    assert 'aria-label="hills"' in svg
