"""Made-up results of the scenarios (docs/artifacts.md), for tests of what is drawn from them."""

from __future__ import annotations

from typing import Any


def estimate(value: float, spread: float = 0.04, n: int = 6) -> dict[str, Any]:
    return {"value": value, "low": value * (1 - spread), "high": value * (1 + spread), "n": n}


def percentiles(value: float, n: int) -> dict[str, Any]:
    return {
        "n": n,
        "mean": value,
        "p50": value,
        "p90": 1.3 * value,
        "p95": 1.5 * value,
        "p99": 2 * value if n > 473 else None,
    }


def offline() -> list[dict[str, Any]]:
    speeds = {"onnx:int8-weight": 116.0, "onnx:fp32": 36.0, "teacher:speeches": 22.0}
    return [
        {
            "arm": arm,
            "batch": batch,
            "prompt_tokens": 128,
            "new_tokens": 64,
            "n": 12,
            "prompt_tokens_s": estimate(9 * speed * batch**0.2),
            "generated_tokens_s": estimate(speed * batch**0.7),
            "requests_s": estimate(speed * batch**0.6 / 90),
        }
        for arm, speed in speeds.items()
        for batch in (1, 4, 16)
    ]


def cold() -> dict[str, Any]:
    spans = {
        "onnx:int8-weight": ("int8-weight", (0.03, 0.2, 0.31, 0.1, 0.01)),
        "teacher:speeches": ("speeches", (0.03, 5.1, 0.9, 0.3, 0.045)),
    }
    keys = ("start_s", "import_s", "load_s", "first_token_s", "second_token_s")
    return {
        arm: {
            "label": label,
            "n": 6,
            **{key: estimate(span) for key, span in zip(keys, values, strict=True)},
        }
        | {"total_s": estimate(sum(values[:4]))}
        for arm, (label, values) in spans.items()
    }


def server() -> dict[str, Any]:
    def rate(asked: float, share: float, slow: float) -> dict[str, Any]:
        done = min(asked, 5.6)
        return {
            "rate": asked,
            "phase": "double",
            "requests": int(60 * asked),
            "completed": int(60 * asked),
            "failed": 0,
            "duration_s": 60.0,
            "meets": share >= 0.9,
            "share": share,
            "goodput": share * done,
            "requests_s": done,
            "output_tokens_s": 64 * done,
            "prompt_tokens_s": 128 * done,
            "ttft_ms": percentiles(110 * slow, int(60 * asked)),
            "tpot_ms": percentiles(9 * slow, int(60 * asked)),
            "itl_ms": percentiles(9 * slow, int(4000 * asked)),
            "e2el_ms": percentiles(690 * slow, int(60 * asked)),
            "late_ms": percentiles(0.2, int(60 * asked)),
        }

    return {
        "target": {"label": "int8-weight", "kind": "artifact", "model": None},
        "slo": {"ttft_ms": 500.0, "tpot_ms": 20.0, "share": 0.9},
        "arrivals": "poisson",
        "prompt_tokens": 128,
        "new_tokens": 64,
        "highest_rate": {"value": 4.0, "fails_at": 5.0},
        "rates": [
            rate(1, 1.0, 1),
            rate(2, 1.0, 1.2),
            rate(4, 0.95, 1.9),
            rate(5, 0.7, 3.5),
            rate(8, 0.1, 40),
        ],
    }
