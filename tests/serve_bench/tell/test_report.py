"""The report: drawn from a hand-made run folder, self-contained, and saying what the raw samples
say.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limbeck.contract.artifact import open_artifact, write_artifact
from limbeck.contract.data.heldout import HELDOUT, save_heldout
from limbeck.contract.errors import ArtifactError
from limbeck.contract.recipe import Recipe, parse_recipe
from limbeck.contract.results.bench import Arm
from serve_bench import write_report
from serve_bench.judge import figures, language
from serve_bench.judge.figures import Sample
from serve_bench.judge.task import Measured, judge_bench, read_bench
from serve_bench.tasks import task_of
from serve_bench.tell import bubbles as bubbles_of
from serve_bench.tell import charts
from serve_bench.tell.drawing import spread
from serve_bench.tell.numbers import significant
from tests.pico import make_blocks

VOID = {"meta", "link", "br", "img", "hr", "input", "path", "use"}
PARENTS = {"base": "ab" * 32, "teacher speeches": "c0ffee" * 10, "teacher scripture": "c0ffee" * 10}
DOMAINS = {"speeches": (3.02, 3.41, 2.95), "scripture": (2.74, 2.41, 2.44)}


def recipe(**over: Any) -> Recipe:
    """The demo's shape, without its packages."""
    domains = [{"name": n, "text": {"kind": "stdlib", "paths": ["abc.py"]}} for n in DOMAINS]
    teachers = [
        {"name": n, "model": {"kind": "hub", "id": f"someone/{n}-135m", "revision": "4f1e"}}
        for n in DOMAINS
    ]
    return parse_recipe(
        {
            "name": "two-experts",
            "description": "Two domain experts into one INT8 student.",
            "teachers": teachers,
            "data": {"domains": domains, "block": 256},
            "student": {
                "kind": "lora",
                "base": {"kind": "hub", "id": "someone/base-135m", "revision": "4f1e"},
                "rank": 16,
            },
            "training": {"tokens": 40960, "batch_tokens": 512},
            "gates": {"min_decode_speedup": 3, "max_quantization_loss": 0.01, "max_size_ratio": 0.5}
            | {"max_loss_vs_best_teacher": 0},
        }
        | over
    )


def make_run(
    run: Path, chosen: Recipe, *, blocks: int = 6, teachers: bool = True, noise: float = 0.02
) -> Path:
    """Artifacts of a run with made-up but plausible figures: 135M parameters, two experts."""
    draw = np.random.default_rng(7)
    names = list(DOMAINS) if teachers else []
    with write_artifact(
        run / "student", kind="student", key="s", parents=PARENTS, recipe=chosen
    ) as draft:
        (draft.folder / "teachers.json").write_text(
            json.dumps(
                [
                    {
                        "name": n,
                        "model": f"/gone/{n}",
                        "adapter": None,
                        "quantize": "none",
                        "dtype": "fp32",
                    }
                    | {"temperature": 1.04, "digest": "c0ffee" * 10}
                    for n in names
                ]
            )
        )
        (draft.folder / "log.jsonl").write_text(
            "\n".join(json.dumps(row) for row in training_log(names, draw))
        )
        draft.result = {
            "nll": {"speeches": 2.95, "scripture": 2.44},
            "mean_nll": 2.695,
            "teachers": {},
            "tokens": 40960,
            "steps": 80,
            "best_step": 80,
            "seconds": 412.0,
            "parameters": {"trained": 4_884_480, "total": 134_515_008},
        }
    with write_artifact(run / "onnx", kind="onnx", key="o", parents={}) as draft:
        (draft.folder / "model.onnx").write_text("a graph")
        parity = {"positions": 1204, "max_abs": 6.1e-5, "kl": 2.1e-9, "top1": 1.0}
        census = {
            "operators": {"MatMul float": 211, "GroupQueryAttention": 30},
            "bytes": {"float": 538_000_000},
        }
        census |= {"float_matrices": []}
        small = {
            "operators": {"MatMulNBits 8-bit block 64": 211},
            "bytes": {"uint8": 134_000_000, "float": 8_500_000},
        }
        small |= {
            "float_matrices": [
                {
                    "operator": "Gemm",
                    "shape": [9, 9],
                    "count": 2,
                    "share": 0.004,
                    "why": "no kernel",
                }
            ]
        }
        small |= {"float_products": [{"operator": "MatMul", "count": 60, "why": "no weights"}]}
        small |= {
            "runs_on": {
                "CUDAExecutionProvider": {"MatMulNBits": 211},
                "CPUExecutionProvider": {"Shape": 3},
            }
        }
        same = [{"text": "speeches", "tokens": 64, "same": 64, "lead": None}]
        part = [{"text": "speeches", "tokens": 64, "same": 21, "lead": 0.0432}]
        cost = {
            "parameters": ["layers.0.q", "layers.0.k"],
            "kl": 0.0125,
            "extra_bytes": 4096,
            "bits": 8,
        }
        draft.result = {
            "shipped": "int8-weight",
            "backend": {"name": "genai", "why": "auto: the builder knows LlamaForCausalLM"},
            "forms": {
                "fp32": {
                    "bytes": 538_200_000,
                    "files": [],
                    "parity": parity,
                    "census": census,
                    "greedy": same,
                },
                "int8-weight": {
                    "bytes": 143_400_000,
                    "files": ["model.onnx"],
                    "parity": parity | {"max_abs": 0.61, "kl": 8e-4, "top1": 0.988},
                    "census": small,
                    "greedy": part,
                    "mixed": {"sensitivity": [cost]},
                },
            },
            "ggufs": {
                "gguf-q8_0": {
                    "file": "gguf/x.Q8_0.gguf",
                    "bytes": 145_100_000,
                    "runtime": "llama.cpp",
                    "rise": 0.0031,
                    "parity": parity | {"kl": 7e-4},
                }
            },
        }
    from limbeck.contract.artifact import open_artifact

    parents = {role: open_artifact(run / role).digest for role in ("student", "onnx")}
    with write_artifact(
        run / "bench", kind="bench", key="b", parents=parents, recipe=chosen
    ) as draft:
        write_bench(draft, chosen, names, draw, blocks, noise)
    return run


def training_log(names: list[str], draw: np.random.Generator) -> list[dict[str, Any]]:
    """A log as `compress` writes it."""
    rows: list[dict[str, Any]] = [evaluation(0, 3.31, 3.02)]
    for step in range(1, 81):
        decay, jitter = math.exp(-step / 18), draw.normal(0, 0.05, 4)
        share = 0.5 + 0.25 * (1 - decay)
        weights = (
            {
                d: {n: round(float(share if n == d else 1 - share), 4) for n in names}
                for d in DOMAINS
            }
            if names
            else {}
        )
        rows.append(
            {
                "event": "step",
                "step": step,
                "tokens": 512 * step,
                "loss": 1.1 + 0.8 * decay + jitter[0],
                "cross_entropy": 2.6 + 0.6 * decay + jitter[1],
                "fusion": 0.31 + 0.3 * decay + jitter[2] / 5 if names else None,
                "features": 0.06 + 0.1 * decay + jitter[3] / 20 if names else None,
                "weights": weights,
            }
        )
        if step % 10 == 0:
            rows.append(evaluation(512 * step, 2.95 + 0.36 * decay, 2.44 + 0.58 * decay))
    return rows


def evaluation(tokens: int, speeches: float, scripture: float) -> dict[str, Any]:
    return {
        "event": "evaluate",
        "step": tokens // 512,
        "tokens": tokens,
        "nll": {"speeches": speeches, "scripture": scripture},
        "mean_nll": (speeches + scripture) / 2,
    }


def write_bench(
    draft: Any,
    chosen: Recipe,
    names: list[str],
    draw: np.random.Generator,
    blocks: int,
    noise: float,
) -> None:
    seconds = {f"teacher:{n}": (0.31, 0.0442 + 0.0009 * i) for i, n in enumerate(names)} | {
        "student": (0.305, 0.0445),
        "onnx:fp32": (0.182, 0.0281),
        "onnx:int8-weight": (0.098, 0.0086),
        "onnx:int8-weight:twin": (0.098, 0.0086),
    }
    sizes = {
        "onnx:int8-weight": 143_400_000,
        "onnx:int8-weight:twin": 143_400_000,
        "onnx:fp32": 538_200_000,
    }
    roles = {
        "student": "student",
        "onnx:fp32": "form",
        "onnx:int8-weight": "form",
        "onnx:int8-weight:twin": "twin",
    }
    labels = {
        "onnx:fp32": "fp32",
        "onnx:int8-weight": "int8-weight",
        "onnx:int8-weight:twin": "int8-weight (copy)",
    }
    arms = [
        Arm(
            name,
            labels.get(name, name.removeprefix("teacher:")),
            roles.get(name, "teacher"),  # type: ignore[arg-type]
            "onnxruntime" if name.startswith("onnx") else "torch",
            sizes.get(name, 538_100_000),
            {},
        )
        for name in seconds
    ]
    save_heldout(draft.folder / HELDOUT, make_blocks())
    rows = []
    for block in range(blocks):
        for position, name in enumerate([*seconds, *reversed(seconds)]):
            ttft, tpot = seconds[name]
            gaps = tpot * np.exp(draw.normal(0, noise, chosen.bench.new_tokens - 1))
            at = ttft * math.exp(draw.normal(0, noise)) + np.concatenate([[0], np.cumsum(gaps)])
            rows.append(
                {
                    "event": "sample",
                    "arm": name,
                    "block": block,
                    "position": position,
                    "at": at.tolist(),
                }
            )
    (draft.folder / figures.SAMPLES).write_text("\n".join(json.dumps(row) for row in rows))
    quality: dict[str, Any] = {
        "vocabulary": 49152,
        "mixture_of": [f"teacher:{n}" for n in names],
        "same_choice": {},
        "domains": {d: {"labels": [255] * 12, "utf8_bytes": [1050] * 12} for d in DOMAINS},
        "arms": {},
    }
    for arm in arms:
        if not arm.scored:
            continue
        quality["arms"][arm.id] = {}
        for domain, (left, right, student) in DOMAINS.items():
            nll = {"teacher:speeches": left, "teacher:scripture": right}.get(
                arm.id, student * (1.0006 if "int8" in arm.id else 1)
            )
            across = np.random.default_rng(3).normal(0, 0.08, 12)
            quality["arms"][arm.id][domain] = {
                "nll": (255 * (nll + across - across.mean())).tolist(),
                "kl": [255 * 0.11] * 12 if names else [None] * 12,
                "top1": [201] * 12 if names else [None] * 12,
            }
    (draft.folder / figures.QUALITY).write_text(json.dumps(quality))
    torch_arm = {"peak_rss_bytes": 1_240_000_000, "load_s": 0.9, "import_s": 5.1, "steady": True}
    onnx_arm = {"peak_rss_bytes": 262_000_000, "load_s": 0.31, "import_s": 0.2, "steady": True}
    environment = {
        "host": {
            "system": "Linux 6.1",
            "processor": "AMD EPYC 9B14",
            "flags": ["avx2", "avx512_vnni"],
            "cores": 2,
            "memory_bytes": 16_000_000_000,
        },
        "threads": 2,
        "versions": {"python": "3.11.2", "torch": "2.13.0", "onnxruntime": "1.32.0"},
        "governor": None,
        "limits": {"cpus": 2.0, "memory_bytes": None},
        "before": {"load_average": [0.31, 0.4, 0.5]},
        "after": {"load_average": [2.1, 1.4, 0.8]},
        "blocks": blocks,
        "timed_s": 131.2,
        "stopped": "decided",
        "arms": {
            arm.id: (torch_arm if arm.runtime == "torch" else onnx_arm)
            | {
                "facts": {
                    "library": "torch 2.13.0" if arm.runtime == "torch" else "onnxruntime 1.32.0"
                }
            }
            for arm in arms
        },
    }
    (draft.folder / figures.ENVIRONMENT).write_text(json.dumps(environment))
    reference = task_of(chosen).reference("int8-weight", arms)
    samples = [Sample.of(row) for row in rows]
    measured = Measured(rows, samples, environment, quality, reference, {})
    draft.result = judge_bench(measured, task_of(chosen)).result.as_json()


class Page(HTMLParser):
    """Open tags must close, ids must differ; collects what points outside."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [
            v for k, v in attrs if k in ("src", "href", "xlink:href", "action", "srcset") and v
        ]
        if found.get("id"):
            self.ids.append(found["id"] or "")
        if tag == "svg":
            self.images.append(found)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text())
    page.close()
    assert page.stack == []
    return page


def test_after_a_recovery_rounding_is_held_against_the_student_before_it(tmp_path: Path) -> None:
    chosen = recipe()
    bench = make_run(tmp_path, chosen) / "bench"
    found = read_bench(open_artifact(bench), task_of(chosen))
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


def test_report_is_one_file_that_needs_nothing_else(tmp_path: Path) -> None:
    chosen = recipe()
    report = write_report(run=make_run(tmp_path, chosen), recipe=chosen)
    page, text = read(report.html), report.html.read_text()
    assert [link for link in page.links if not link.startswith(("#", "data:"))] == []
    assert "http" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.S)
    assert "@import" not in text
    assert "url(" not in re.sub(r"url\(#", "", text)
    assert len(page.ids) == len(set(page.ids))
    assert len(page.images) == 8  # trade, three of latency, terms, held-out, weights of two domains
    assert all(image["role"] == "img" and image["aria-label"] for image in page.images)
    assert "#010" not in text  # every stand-in colour became a variable of the page


def test_report_says_what_the_samples_say(tmp_path: Path) -> None:
    chosen = recipe()
    report = write_report(run=make_run(tmp_path, chosen), recipe=chosen)
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


def test_report_shows_what_rounding_did(tmp_path: Path) -> None:
    chosen = recipe()
    text = read(write_report(run=make_run(tmp_path, chosen), recipe=chosen).html).text
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


def test_drawing_twice_gives_the_same_page(tmp_path: Path) -> None:
    chosen = recipe()
    run = make_run(tmp_path, chosen)
    first = write_report(run=run, recipe=chosen).html.read_text()
    assert write_report(run=run, recipe=chosen).html.read_text() == first


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
    pattern = (
        r'<text style="[^"]*font-size: 9.5px; text-anchor: (\w+)'
        r'[^>]*x="([-\d.]+)" y="([-\d.]+)"[^>]*>([^<]*MB)</text>'
    )
    found = re.findall(pattern, svg)
    assert len(found) == 5
    boxes = []
    for anchor, x, y, text in found:
        width = 5.3 * len(text)
        left = float(x) - {"start": 0, "middle": width / 2, "end": width}[anchor]
        boxes.append((left, float(y) - 8, left + width, float(y) + 2))
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


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
        for label in bubbles_of.place_labels(bubbles):
            near = label.distances[label.own] == min(label.distances)
            assert near or label.needs_line
            nearest += near
    assert nearest >= 25  # of 30; the others' bubbles lie within larger ones


def test_the_stroke_of_a_row_is_the_median_of_the_table() -> None:
    """Raw samples and block means have other medians on a noisy machine; the picture shows the
    table's.
    """
    dots = charts.Dots("a", "form", [1.0, 1.0, 1.0, 9.0], 3.0)
    svg = charts.strip([dots], title="t", x="ms")
    assert "stroke-width: 2" in svg
    other = charts.strip([charts.Dots("a", "form", dots.values, 1.0)], title="t", x="ms")
    assert svg != other


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


def test_line_labels_keep_their_distance() -> None:
    places = spread([1.0, 1.01, 1.02, 3.0], gap=0.2, low=0.0, high=4.0)
    assert places == sorted(places)
    assert all(b - a >= 0.2 - 1e-6 for a, b in itertools.pairwise(places))
    assert places[3] == 3.0
