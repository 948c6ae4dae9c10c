"""Held-out loss over size: SmolLM2-135M cut down and healed, against fresh models.

The demo's two experts teach; a fresh model has the same shape as the cut one. Every arm sees the
same tokens from one `hidden` teacher cache. `shrunk` cuts to the size at once; `iterative` goes by
way of the larger sizes, with a share of the tokens at each. Runs stay below `--runs`, so that an
interrupted series continues. The last line is one JSON object; `--picture FILE` draws it.

    make bench-pruning ARGS="--tokens 24576 --threads 2"
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from limbeck.app import run as pipeline
from limbeck.contract.artifact import open_artifact
from limbeck.contract.recipe import load_recipe

RECIPE = "smollm2/135m-two-experts"
SHAPES: dict[str, dict[str, int]] = {  # named by millions of parameters; what is not named is kept
    "135": {"layers": 30},  # all of it, healed as the others are
    "100": {"layers": 20},
    "80": {"layers": 15},
    "60": {"layers": 12, "intermediate_size": 1024},
    "40": {"layers": 16, "intermediate_size": 768, "kv_heads": 2, "hidden_size": 384},
}
ITERATIVE = {"80": ("100", "80"), "60": ("100", "80", "60")}
LAYERS, GROUP = 30, 3  # of the base; query heads a key/value head


def distilled(
    name: str, student: dict[str, Any], *, tokens: int, rate: float, options: argparse.Namespace
) -> Path:
    """Folder of the student artifact of one arm."""
    recipe = load_recipe(
        RECIPE,
        overrides=[
            f"name=pruning-{name}",
            f"student={json.dumps(student)}",
            f"training.tokens={tokens}",
            f"training.learning_rate={rate}",
            f"training.threads={options.threads}",
            "training.teacher_cache=hidden",
            "gates={}",
        ],
    )
    folder: Path = options.runs / name
    pipeline.run_stage("compress", recipe, out=folder)
    return folder / "student"


def fresh_config(shape: dict[str, int], *, vocabulary: int) -> dict[str, Any]:
    """A llama of the shape that a cut of the base has."""
    heads = shape.get("kv_heads", 3)
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "head_dim": 64,
        "num_hidden_layers": shape.get("layers", LAYERS),
        "hidden_size": shape.get("hidden_size", 576),
        "intermediate_size": shape.get("intermediate_size", 1536),
        "num_attention_heads": GROUP * heads,
        "num_key_value_heads": heads,
    }


def main() -> None:
    """Run what is missing, then print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", default=",".join(SHAPES))
    parser.add_argument("--arms", default="shrunk,iterative,fresh")
    parser.add_argument("--runs", type=Path, default=Path("runs/pruning"))
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    if options.tokens < 512 * max(map(len, ITERATIVE.values())):
        parser.error("--tokens: every size on the way needs a step of 512 tokens")
    options.runs.mkdir(parents=True, exist_ok=True)
    base = load_recipe(RECIPE).resolved()["student"]["base"]
    found: dict[str, dict[str, Any]] = {}
    for size in options.sizes.split(","):
        for arm in options.arms.split(","):
            if arm == "iterative" and size not in ITERATIVE:
                continue
            if arm == "fresh":
                student: dict[str, Any] = {
                    "kind": "fresh",
                    "config": fresh_config(SHAPES[size], vocabulary=49152),
                }
                out = distilled(
                    f"fresh-{size}", student, tokens=options.tokens, rate=1e-3, options=options
                )
            else:
                stations = ITERATIVE[size] if arm == "iterative" else (size,)
                source, out = base, Path()
                for station in stations:
                    share = options.tokens // len(stations) // 512 * 512
                    student = {"kind": "shrink", "base": source, **SHAPES[station]}
                    name = f"{arm}-{size}" + (f"-at-{station}" if station != size else "")
                    out = distilled(name, student, tokens=share, rate=3e-4, options=options)
                    source = {"kind": "local", "path": str((out / "model").resolve())}
            result = open_artifact(out, kind="student", verify=False).result
            found[f"{arm}-{size}"] = {
                "parameters": result["parameters"]["total"],
                "nll": {domain: round(nll, 4) for domain, nll in result["nll"].items()},
                "mean_nll": round(result["mean_nll"], 4),
                "seconds": result["seconds"],
            }
            print(arm, size, found[f"{arm}-{size}"], file=sys.stderr)
    if options.picture:
        draw(found, options.picture)
    print(json.dumps({"tokens": options.tokens, "arms": found}))


def draw(found: dict[str, dict[str, Any]], picture: Path) -> None:
    """Held-out loss over parameters, one line an arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for arm in dict.fromkeys(name.rpartition("-")[0] for name in found):
        points = sorted(
            (v["parameters"] / 1e6, v["mean_nll"]) for n, v in found.items() if n.startswith(arm)
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=arm)
    axes.set(xlabel="parameters, millions", ylabel="held-out loss, nats a token")
    axes.legend()
    figure.savefig(picture)


if __name__ == "__main__":
    main()
