"""The table of a finished bench of targets, for a terminal."""

from __future__ import annotations

import json

from limbeck.contract.artifact import Artifact
from limbeck.contract.results.bench import Interval
from serve_bench.judge.figures import ENVIRONMENT
from serve_bench.measure.live import plain, row


def of_artifact(bench: Artifact) -> str:
    """The table of a ``bench`` artifact of language models, and the ratios that it found."""
    result, environment = bench.result, json.loads((bench.path / ENVIRONMENT).read_text("utf-8"))
    sizes, found = environment["fairness"], []
    for arm in result["arms"].values():
        label = arm["label"] + ("" if arm["steady"] else " (not steady)")
        threads = "" if arm["runtime"] == "openai" else str(environment["threads"])
        for test, key in (
            (f"prompt {sizes['prompt_tokens']}", "prompt_tokens_s"),
            (f"decode {sizes['new_tokens']}", "decode_tokens_s"),
        ):
            speed = _interval(arm[key])
            found.append(row(label, arm["bytes"], arm["runtime"], threads, test, speed))
    lines, judged = [plain(found, "tokens/s"), ""], result["arms"][result["judged"]]["label"]
    for name, ratio in result["speed_of_shipped_over"].items():
        over = _interval(ratio["tpot"])
        span = f" ({over.low:.2f}–{over.high:.2f})" if over.bounded else ""
        other = result["arms"][name]["label"]
        lines.append(f"{judged} generates {over.value:.2f}×{span} as fast as {other}")
    return "\n".join(lines)


def _interval(found: dict[str, float | None]) -> Interval:
    value, low, high = found["value"], found["low"], found["high"]
    assert value is not None
    infinite = float("inf")
    n = int(found["n"] or 0)
    return Interval(value, -infinite if low is None else low, infinite if high is None else high, n)
