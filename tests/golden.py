"""Digests of what a run computed, for proving that a change of the code changed no result.

    python -m tests.golden show RUN             print the digests of a run folder
    python -m tests.golden record RECIPE RUN    save them in tests/golden.json for this processor
    python -m tests.golden check RECIPE RUN     compare a run with the digests of this processor

Weights and figures depend on the processor's instructions and on the number of threads, so both are
part of the key. Another machine has nothing to compare with. Record on the commit before a change,
check on the commit after it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import load_file

RECORDED = Path(__file__).with_suffix(".json")


def signature(run: Path) -> dict[str, Any]:
    """Digests of a run's student tensors and graphs, and its figures of quality."""
    bench = json.loads((run / "bench" / "manifest.json").read_text())["result"]
    return {
        "student": tensors_digest(load_file(run / "student" / "model" / "model.safetensors")),
        "graphs": {p.name: graph_digest(p) for p in sorted((run / "onnx").rglob("*.onnx"))},
        "quality": dict(figures(bench)),
    }


def tensors_digest(tensors: Mapping[str, Any]) -> str:
    """sha256 over name, type, shape and bytes of every tensor, by name."""
    whole = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        whole.update(f"{name} {array.dtype} {array.shape}".encode())
        whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()


def graph_digest(path: Path) -> str:
    """sha256 over a graph's inputs, outputs, nodes and tensors; metadata are left out."""
    graph = onnx.load(path).graph  # external tensors too
    whole = hashlib.sha256()
    for value in (*graph.input, *graph.output, *graph.node):
        whole.update(value.SerializeToString(deterministic=True))
    tensors = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    return hashlib.sha256((whole.hexdigest() + tensors_digest(tensors)).encode()).hexdigest()


def figures(bench: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every figure of quality of a bench result: (arm / where it stands there, value)."""
    for name, arm in sorted(bench["arms"].items()):
        for part in ("quality", "metrics"):
            yield from _numbers(arm.get(part), f"{name}/{part}")


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in sorted(value.items()):
            yield from _numbers(inner, f"{path}/{key}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """One line for each part of ``expected`` that ``found`` lacks or changes; extras are fine."""
    lines = []
    for key, value in expected.items():
        now = found.get(key)
        if isinstance(value, Mapping):
            lines += [f"{key}/{line}" for line in differences(value, now or {})]
        elif now != value:
            lines.append(f"{key}: recorded {value}, found {now}")
    return lines


def machine() -> str:
    """Processor and cores: results are equal to the digit on equal ones alone."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    facts = dict(
        line.split(":", 1) for line in cpuinfo.split("\n\n")[0].splitlines() if ":" in line
    )
    known = {name.strip(): value.strip() for name, value in facts.items()}
    numbers = " ".join(f"{n} {known.get(n, '')}" for n in ("cpu family", "model", "stepping"))
    return f"{known.get('model name', 'unknown')}, {numbers}, {cpuinfo.count('processor')} cores"


def main() -> int:
    command, *rest = sys.argv[1:]
    if command == "show":
        print(json.dumps(signature(Path(rest[0])), indent=1))
        return 0
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    recipe, run = rest
    if command == "record":
        recorded.setdefault(machine(), {})[recipe] = signature(Path(run))
        RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
        return 0
    expected = recorded.get(machine(), {}).get(recipe)
    if expected is None:
        print(f"nothing recorded for {recipe} on {machine()}")
        return 3
    lines = differences(expected, signature(Path(run)))
    print("\n".join(lines) or f"{recipe}: equal to the digit")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
