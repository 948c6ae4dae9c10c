"""A finished run, made up, and a reader of its page."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.contract.artifact import open_artifact, write_artifact
from limbeck.contract.data.heldout import HELDOUT, save_heldout
from limbeck.contract.recipe import Recipe, parse_recipe
from limbeck.contract.results.bench import Arm
from serve_bench.judge import figures
from serve_bench.judge.figures import Sample
from serve_bench.judge.task import Measured, judge_bench
from serve_bench.tasks import task_of
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
    made_from = {"student": open_artifact(run / "student").digest}
    with write_artifact(run / "onnx", kind="onnx", key="o", parents=made_from) as draft:
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
