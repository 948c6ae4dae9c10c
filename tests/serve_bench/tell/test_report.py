"""The report: drawn from a hand-made run folder, self-contained, and saying what the raw samples
say.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from limbeck.contract.artifact import open_artifact, write_artifact
from limbeck.contract.errors import ArtifactError
from serve_bench import write_report
from serve_bench.judge import language
from serve_bench.judge.task import read_bench
from serve_bench.tasks import task_of
from serve_bench.tell import bubbles as bubbles_of
from serve_bench.tell.drawing import spread, ticks
from serve_bench.tell.numbers import short, significant
from serve_bench.tell.report import Report, warnings
from serve_bench.tell.sections import source_text
from tests.serve_bench.tell.runs import make_run, read, recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the recipe as it is."""
    return make_run(tmp_path_factory.mktemp("run"), recipe())


@pytest.fixture(scope="module")
def report(run: Path) -> Report:
    """Its report."""
    return write_report(run=run, recipe=recipe())


def test_after_a_recovery_rounding_is_held_against_the_student_before_it(run: Path) -> None:
    found = read_bench(open_artifact(run / "bench"), task_of(recipe()))
    quality = found.quality
    plain = language.evidence(found.samples, quality, found.reference)
    assert plain.rise_over_fp32 is not None
    assert (plain.rise_over_fp32.value, plain.recovered) == (pytest.approx(0.0006), False)
    fp32 = quality["arms"]["onnx:fp32"]
    names = list(reversed(list(fp32)))  # found by name, not by place
    quality["recovery"] = {
        "distilled": {name: [0.99 * nats for nats in fp32[name]["nll"]] for name in names},
        "shipped": {name: [1.0006 * nats for nats in fp32[name]["nll"]] for name in names},
    }
    recovered = language.evidence(found.samples, quality, found.reference)
    assert recovered.rise_over_fp32 is not None
    assert (recovered.rise_over_fp32.value, recovered.recovered) == (
        pytest.approx(1.0006 / 0.99 - 1),
        True,
    )


def test_report_is_one_file_that_needs_nothing_else(report: Report) -> None:
    page, text = read(report.html), report.html.read_text()
    assert [link for link in page.links if not link.startswith(("#", "data:"))] == []
    assert "http" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.S)
    assert "@import" not in text
    assert "url(" not in re.sub(r"url\(#", "", text)
    assert len(page.ids) == len(set(page.ids))
    assert len(page.images) == 8  # trade, three of latency, terms, held-out, weights of two domains
    assert all(image["role"] == "img" and image["aria-label"] for image in page.images)
    assert "#010" not in text  # every stand-in colour became a variable of the page


def test_report_says_what_the_samples_say(report: Report) -> None:
    data = json.loads(report.json.read_text())
    assert (report.verdict.status, report.exit_code, data["verdict"], data["exit_code"]) == (
        "pass",
        0,
        "pass",
        0,
    )
    assert "fit to ship: it meets all 4 gates" in read(report.html).text
    shipped = data["arms"]["onnx:int8-weight"]
    assert shipped["tpot_ms"]["value"] == pytest.approx(8.6, rel=0.01)
    over = data["speed_of_shipped_over"]["teacher:speeches"]["tpot"]
    assert over["value"] == pytest.approx(44.2 / 8.6, rel=0.01)
    assert 3 < over["low"] <= over["value"] <= over["high"]
    assert data["nll_rise_of_shipped_over"]["onnx:fp32"]["value"] == pytest.approx(0.0006)
    # Mean of the domains: experts 2.88 and 2.91, student 2.695 · 1.0006.
    assert data["nll_rise_of_shipped_over"]["teacher:speeches"]["value"] == pytest.approx(
        2.695 * 1.0006 / 2.88 - 1
    )
    assert data["digests"]["bench"]
    table = report.table.splitlines()
    assert table[0].startswith("**pass**: two-experts, as int8-weight, is fit to ship")
    assert sum(line.startswith("|") for line in table) == 2 + 6
    assert len({line.count("|") for line in table if line.startswith("|")}) == 1


def test_report_shows_what_rounding_did(report: Report) -> None:
    text = read(report.html).text
    assert "21 of 64, then 0.0432" in text
    assert "211 nodes run on CUDAExecutionProvider." in text
    assert "3 nodes run on CPUExecutionProvider: 3 Shape." in text
    assert "145.1 MB, read back by llama.cpp; held-out loss +0.31 %" in text
    assert "Still in float: 2 Gemm 9×9 (0.4 %, no kernel); 60 MatMul (no weights)." in text
    assert "layers.0.q, layers.0.k" in text
    assert "Where the loss comes from" in text
    assert all(step in text for step in ("distilling", "rounding"))


def test_report_judges_by_the_recipe_it_is_given(tmp_path: Path) -> None:
    run = make_run(tmp_path, recipe())
    assert write_report(run=run, recipe=recipe(gates={"min_decode_speedup": 6})).exit_code == 1
    assert write_report(run=run, recipe=recipe(gates={"min_decode_speedup": 5.14})).exit_code == 3
    report = write_report(run=run, recipe=recipe(gates={}))
    assert report.exit_code == 0
    assert "sets no gates" in read(report.html).text


def test_report_without_teachers_or_log(tmp_path: Path) -> None:
    chosen = recipe(teachers=[], gates={"max_size_mb": 150})
    run = make_run(tmp_path, chosen, teachers=False)
    report = write_report(run=run, recipe=chosen)
    assert "No teachers" in read(report.html).text
    assert "KL to mixture" not in read(report.html).text
    assert report.exit_code == 0


def test_report_escapes_what_it_shows(tmp_path: Path) -> None:
    chosen = recipe(description="<script>alert(1)</script>")
    report = write_report(run=make_run(tmp_path, chosen), recipe=chosen)
    assert "<script>alert" not in report.html.read_text()
    assert "&lt;script&gt;alert(1)" in report.html.read_text()


def test_report_refuses_a_bench_of_other_artifacts(tmp_path: Path) -> None:
    chosen = recipe()
    run = make_run(tmp_path, chosen)
    with write_artifact(run / "onnx", kind="onnx", key="another", parents={}) as draft:
        draft.result = {}
    with pytest.raises(ArtifactError, match="did not measure"):
        write_report(run=run, recipe=chosen)


def test_drawing_twice_gives_the_same_page(run: Path, report: Report) -> None:
    first = report.html.read_text()
    assert write_report(run=run, recipe=recipe()).html.read_text() == first


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (5.139, "5.14"),
        (0.02291, "0.0229"),
        (143.4, "143"),
        (1240.4, "1240"),
        (2.1e-9, "2.1e−09"),
        (None, "–"),
    ],
)
def test_three_significant_digits(value: float | None, text: str) -> None:
    assert significant(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1072.4, "1072"), (999.7, "1000"), (1000, "1000"), (99.96, "100"), (0.25, "0.25"), (5, "5")],
)
def test_no_label_of_a_picture_has_an_exponent(value: float, text: str) -> None:
    assert short(value) == text
    bubble = bubbles_of.Bubble("scripture", "teacher", 8.9, 3.06, value, True)
    svg = bubbles_of.quality_against_speed([bubble], title="trade", x="speed", y="loss")
    assert f">scripture, {text} MB</text>" in svg


def test_labels_of_a_picture_do_not_overlap() -> None:
    bubbles = [
        bubbles_of.Bubble(name, role, speed, nll, size, name == "int8-weight")
        for name, role, speed, nll, size in (
            ("speeches", "teacher", 22.6, 2.88, 538),
            ("scripture", "teacher", 22.2, 2.91, 538),
            ("student", "student", 22.5, 2.695, 538),
            ("fp32", "form", 35.6, 2.695, 538),
            ("int8-weight", "form", 116, 2.697, 143),
        )
    ]
    svg = bubbles_of.quality_against_speed(bubbles, title="trade", x="speed", y="loss")
    boxes = _text_boxes(svg)
    assert len(boxes) == 6  # and "better", in the corner


def _text_boxes(svg: str) -> list[tuple[float, float, float, float]]:
    """Boxes of the labels in a picture, by their anchors; no two of them overlap."""
    pattern = (
        r'<text style="[^"]*font-size: 9.5px; text-anchor: (\w+)'
        r'[^>]*x="([-\d.]+)" y="([-\d.]+)"[^>]*>([^<]*MB|better[^<]*)</text>'
    )
    boxes = []
    for anchor, x, y, text in re.findall(pattern, svg):
        width = 5.3 * len(text)
        left = float(x) - {"start": 0, "middle": width / 2, "end": width}[anchor]
        boxes.append((left, float(y) - 8, left + width, float(y) + 2))
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    return boxes


@pytest.mark.parametrize("speed", [400.0, 500.0, 600.0, 700.0])
def test_a_label_is_clear_of_the_word_in_the_corner(speed: float) -> None:
    bubbles = [
        bubbles_of.Bubble("slow", "teacher", 50.0, 5.5, 2.5, False),
        bubbles_of.Bubble("fp32", "form", speed, 4.7, 2.6, False),
        bubbles_of.Bubble("int8", "form", 750.0, 4.7, 0.7, True),
    ]
    svg = bubbles_of.quality_against_speed(bubbles, title="trade", x="speed", y="loss")
    assert len(_text_boxes(svg)) == 4


def test_the_front_is_what_nothing_beats_in_both() -> None:
    # Speed and loss: slow and good, fast and worse, beaten by both, and a copy of the best that is
    # no better for its last digits.
    points = [(10.0, 2.0), (50.0, 2.5), (20.0, 2.6), (9.0, 1.9999), (50.0, 2.7)]
    assert bubbles_of.pareto(points) == [0, 1]
    assert bubbles_of.pareto([(1.0, 3.0)]) == [0]


def test_a_label_is_nearest_to_its_own_bubble() -> None:
    """Bubbles that crowd: a label is nearer to its own bubble than to any other, or a line joins
    the two.
    """
    draw, nearest = np.random.default_rng(5), 0
    for _ in range(6):
        bubbles = [
            bubbles_of.Bubble(f"arm {i}", "form", speed, loss, size, i == 0)
            for i, (speed, loss, size) in enumerate(
                zip(
                    np.exp(draw.uniform(3, 4.2, 5)),
                    draw.uniform(2.9, 3.1, 5),
                    draw.uniform(90, 540, 5),
                    strict=True,
                )
            )
        ]
        with mpl.rc_context(bubbles_of.STYLE):
            figure, axes, corners = bubbles_of._trade(bubbles, "x", "y")
            labels = bubbles_of._label_bubbles(figure, axes, bubbles, corners)
        for label in labels:
            near = label.distances[label.own] == min(label.distances)
            assert near or label.needs_line
            nearest += near
    assert nearest >= 25  # of 30; the others' bubbles lie within larger ones


@pytest.mark.parametrize(("name", "column"), [("TTFT", 0), ("TPOT", 1)])
def test_the_strokes_of_the_picture_are_the_medians_of_the_table(
    tmp_path: Path, name: str, column: int
) -> None:
    """Both are read out of the page of a noisy run, whose raw samples have other medians."""
    chosen = recipe()
    report = write_report(run=make_run(tmp_path, chosen, noise=0.5), recipe=chosen)
    page, data = report.html.read_text(), json.loads(report.json.read_text())
    (svg,) = re.findall(rf'<svg[^>]*aria-label="{name} of every generation.*?</svg>', page, re.S)
    marks = re.findall(r'text-anchor: middle[^>]* x="([\d.]+)" y="[\d.]+">([\d.]+)</text>', svg)
    (x0, v0), *_, (x1, v1) = [(float(x), np.log(float(value))) for x, value in marks]
    strokes = re.findall(r'<path d="M ([\d.]+) [^>]*stroke-width: 2;', svg)
    drawn = [float(np.exp(v0 + (float(x) - x0) * (v1 - v0) / (x1 - x0))) for x in strokes]
    (table,) = re.findall(r'aria-label="Speed">.*?<tbody>(.*?)</tbody>', page, re.S)
    cells = [re.findall(r'<td class="n">([\d.]+)', row) for row in table.split("</tr>")[:-1]]
    written = [float(row[column]) for row in cells]
    assert len(drawn) == len(written) == len(data["arms"])
    assert drawn == pytest.approx(written, rel=0.01)  # three digits of the table
    samples = read_bench(open_artifact(tmp_path / "bench"), task_of(chosen)).samples
    raw = [
        1e3 * np.median([getattr(s, name.lower()) for s in samples if s.arm == arm])
        for arm in data["arms"]
    ]
    assert raw != pytest.approx(written, rel=0.01)


@pytest.mark.parametrize(("cores", "busy"), [(1.1, True), (0.1, False)])
def test_only_the_work_of_others_makes_a_machine_busy(cores: float, busy: bool) -> None:
    """The load average is high in both: this run has just trained."""
    others = {"cores": cores, "of": 2, "programs": {"ffmpeg": cores}}
    before = {"load_average": [1.9, 1.9, 1.9], "other_work": others}
    notes = warnings({"environment": {"before": before}, "disturbed": False, "over_budget": None})
    assert bool(notes) == busy
    assert all("other programs took 1.1 of 2 cores (ffmpeg 1.1)" in note for note in notes)


def test_random_stand_ins_are_never_fit_to_ship(tmp_path: Path) -> None:
    base = {"kind": "random", "config": {"model_type": "llama"}}
    chosen = recipe(student={"kind": "lora", "base": base, "rank": 16})
    report = write_report(run=make_run(tmp_path, chosen), recipe=chosen)
    data = json.loads(report.json.read_text())
    assert (data["stand_in"], report.verdict.status, report.exit_code) == (True, "pass", 0)
    assert "it runs here; this says nothing of quality" in report.verdict.sentence
    page = read(report.html).text
    assert "fit to ship" not in page
    assert "random stand-in for a teacher" in page
    assert "| speeches (random stand-in)" in report.table
    assert "| int8-weight (random stand-in, shipped)" in report.table


def test_line_labels_keep_their_distance() -> None:
    places = spread([1.0, 1.01, 1.02, 3.0], gap=0.2, low=0.0, high=4.0)
    assert places == sorted(places)
    assert all(b - a >= 0.2 - 1e-6 for a, b in itertools.pairwise(places))
    assert places[3] == 3.0


def test_line_labels_stay_inside_the_picture_if_there_is_room() -> None:
    assert spread([3.9, 3.95, 4.0], gap=0.5, low=0.0, high=4.0) == pytest.approx([3.0, 3.5, 4.0])
    assert spread([0.0, 0.1], gap=0.5, low=0.0, high=4.0) == pytest.approx([0.0, 0.5])
    crowded = spread([1.0] * 20, gap=0.5, low=0.0, high=4.0)  # no room: apart, and outside
    assert crowded[0] < 0
    assert crowded[-1] > 4


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [
        (1, 100, [1, 2, 5, 10, 20, 50, 100]),
        (1, 1000, [1, 3, 10, 30, 100, 300, 1000]),
        (1, 10_000, [1, 10, 100, 1000, 10_000]),
        (1e-4, 1e4, [1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100, 1e3, 1e4]),
    ],
)
def test_a_logarithmic_axis_is_not_crowded(low: float, high: float, found: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(found)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"kind": "hub", "id": "a/b", "revision": "4f1e"}, "a/b @ 4f1e"),
        ({"kind": "package", "package": "w", "version": "1.0", "path": "m.gguf"}, "w 1.0: m.gguf"),
        ({"kind": "package", "package": "w", "version": None, "paths": ["a", "b"]}, "w: a, b"),
        ({"kind": "recipe", "recipe": "smollm2/expert-law"}, "student of smollm2/expert-law"),
        ({"kind": "server", "model": "m", "url": "http://x/v1"}, "m behind http://x/v1"),
    ],
)
def test_a_source_in_words(source: dict[str, Any], words: str) -> None:
    assert source_text(source) == words
