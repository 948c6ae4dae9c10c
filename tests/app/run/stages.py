"""Stand-ins for the stages, which write tiny artifacts and remember their calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve_bench.judge.findings import Finding

BASE = """
data: {domains: [{name: code, text: {kind: stdlib, paths: [abc.py]}}], block: 32}
student:
  kind: lora
  base:
    kind: random
    config: {model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1}
training: {tokens: 64, batch_tokens: 32}
"""


@dataclass
class Stages:
    """What the stand-ins were asked to do, and what the verdict will be."""

    called: list[tuple[str, str]] = field(default_factory=list)
    made: list[tuple[str, str]] = field(default_factory=list)
    products: dict[str, dict[str, Path]] = field(default_factory=dict)
    status: Any = "pass"


def recipe(name: str, *teachers: str, more: str = "") -> Path:
    """Write a recipe whose teachers are the students of other recipes."""
    listed = ", ".join(
        f"{{name: {t}, model: {{kind: recipe, recipe: {t}.yaml}}}}" for t in teachers
    )
    path = Path(f"{name}.yaml")
    path.write_text(f"name: {name}\n{BASE}\nteachers: [{listed}]\n{more}")
    return path.resolve()


GOOD = {"fp32": {"positions": 9, "max_abs": 1e-5, "kl": 0.0, "top1": 1.0}}


KEPT = Finding("mean loss, nats a token", "2.5", "2.5", "equal to the digit", True)
