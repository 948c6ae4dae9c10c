"""Parts of the report beyond the main tables: pictures of the scenarios, and every figure in one
list of rows.

Knows the bench artifact's result (docs/artifacts.md); a scenario that was not measured gives
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from limbeck.contract.data.evals import TITLES
from limbeck.contract.data.heldout import mean_nll
from serve_bench.tell import charts
from serve_bench.tell.numbers import significant

COLD_PARTS = {
    "start_s": "start",
    "import_s": "import",
    "load_s": "load",
    "first_token_s": "first token",
}


def offline(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A picture for each prompt and answer length: tokens a second over the batch, by arm."""
    cells: dict[tuple[int, int], dict[str, list[tuple[float, float, float, float]]]] = {}
    for cell in data.get("offline") or ():
        estimate, label = cell["generated_tokens_s"], data["arms"][cell["arm"]]["label"]
        point = (cell["batch"], estimate["value"], *_bounds(estimate))
        cells.setdefault((cell["prompt_tokens"], cell["new_tokens"]), {}).setdefault(
            label, []
        ).append(point)
    return [
        {
            "title": f"prompts of {prompt} tokens, {new} new",
            "picture": charts.ranges(
                {label: sorted(points) for label, points in series.items()},
                title=(
                    f"Generated tokens a second over the batch, prompts of {prompt} tokens and "
                    f"{new} new ones"
                ),
                x="rows of a batch (logarithmic)",
                y="generated tokens/s",
            ),
        }
        for (prompt, new), series in sorted(cells.items())
    ]


def server(data: Mapping[str, Any]) -> str | None:
    """Goodput and completed requests over the rate asked."""
    rates = (data.get("server") or {}).get("rates") or ()
    if len(rates) < 2:
        return None
    series = {
        name: sorted((r["rate"], r[key], r[key], r[key]) for r in rates)
        for name, key in (("within the SLO", "goodput"), ("completed", "requests_s"))
    }
    return charts.ranges(
        series,
        diagonal="asked",
        title="Goodput and throughput of the server over the rate asked",
        x="requests/s asked (logarithmic)",
        y="requests/s",
    )


def cold(data: Mapping[str, Any]) -> str | None:
    """From the start of a process to its first token, part by part."""
    arms = data.get("cold") or {}
    if not arms:
        return None
    rows = [
        (found["label"], [found[part]["value"] for part in COLD_PARTS]) for found in arms.values()
    ]
    return charts.stacks(
        rows,
        list(COLD_PARTS.values()),
        title="Seconds from the start of a process to its first token, by arm",
        x="seconds from nothing to the first token",
    )


def number(value: str, unit: str, label: str, note: str = "") -> dict[str, str]:
    """One of the numbers at the top of the page."""
    return {"value": value, "unit": unit, "label": label, "note": note}


def size_and_memory(
    shipped: Mapping[str, Any], ready: str = ""
) -> tuple[dict[str, str], dict[str, str]]:
    """The two of these numbers that every task has; ``ready`` ends the note on the start."""
    size = number(significant(shipped["bytes"] / 1e6), "MB", "on disk, graph and weights")
    memory = number(
        significant(shipped["peak_rss_bytes"] / 1e6),
        "MB",
        "peak memory of the process",
        f"ready {significant(shipped['load_s'])} s after opening{ready}",
    )
    return size, memory


def loss_steps(
    data: Mapping[str, Any], served: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Held-out loss from the best teacher to what ships, and what each step between them did:
    distilling, rounding, recovery.

    ``served`` are teachers that are no arms. Fewer than two steps are no story and give nothing.
    """
    arms = [arm for arm in data["arms"].values() if arm["role"] == "teacher" and arm["quality"]]
    best = min([*arms, *served], key=lambda arm: float(arm["quality"]["mean_nll"]), default=None)
    shipped = data["arms"][f"onnx:{data['shipped']}"]
    places = [] if best is None else [("", f"{best['label']}, the best teacher", _nll(best))]
    if recovery := data["onnx"].get("recovery"):
        places.append(
            ("distilling", "student, fp32 graph, before recovery", recovery["before"]["fp32"])
        )
        places.append(
            ("rounding", f"{data['shipped']}, before recovery", recovery["before"]["form"])
        )
        places.append(("recovery", f"{data['shipped']}, shipped", recovery["after"]["form"]))
    elif data["shipped"] != "fp32" and "onnx:fp32" in data["arms"]:
        places.append(("distilling", "student, fp32 graph", _nll(data["arms"]["onnx:fp32"])))
        places.append(("rounding", f"{data['shipped']}, shipped", _nll(shipped)))
    if len(places) < 3:
        return []
    found: list[dict[str, Any]] = []
    for step, label, nll in places:
        now = {**nll, "mean": mean_nll(nll)}
        then = found[-1]["nll"] if found else {}
        change = {name: now[name] / then[name] - 1 if then else None for name in now}
        found.append({"step": step, "label": label, "nll": now, "change": change})
    return found


def _nll(arm: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(found["nll"]) for name, found in arm["quality"]["domains"].items()}


def against_memory(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Arms whose decoding was held against the machine's memory bandwidth."""
    return {name: arm for name, arm in data["arms"].items() if arm.get("roofline")}


def energy(data: Mapping[str, Any]) -> dict[str, Any]:
    """Joules per token by label, or the reason why they are unknown."""
    found = {arm["label"]: arm["energy"] for arm in data["arms"].values() if arm.get("energy")}
    measured = {label: e for label, e in found.items() if e["joules_per_token"] is not None}
    return {
        "measured": measured,
        "why": next((e["why"] for e in found.values() if e.get("why")), None),
    }


def rows(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every figure: arm, quantity, unit, value, interval, n."""
    return named_rows(_rows(data))


def named_rows(found: Iterable[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Figures with names for their parts; those without a value are left out."""
    return [
        {"arm": arm, "what": what, "unit": unit, "value": value, "low": low, "high": high, "n": n}
        for arm, what, unit, value, low, high, n in found
        if value is not None
    ]


_TIMES = (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT"), ("e2el_ms", "end-to-end latency"))


def _rows(data: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    shipped = data["shipped"]
    for name, arm in data["arms"].items():
        label = arm["label"]
        for key, what, unit in (
            *((key, what, "ms") for key, what in _TIMES),
            ("decode_tokens_s", "decode speed", "tokens/s"),
            ("prompt_tokens_s", "prompt speed", "tokens/s"),
        ):
            if arm.get(key):
                yield label, what, unit, *estimate(arm[key])
        for key, what in (("itl_ms", "gaps between tokens"), ("ttft_percentiles_ms", "TTFT")):
            found = arm.get(key) or {}
            for percentile in (p for p in found if p.startswith("p")):
                n = found.get("n", arm["n"])
                yield label, f"{what}, {percentile}", "ms", found[percentile], None, None, n
        for what, value in (("size on disk", arm["bytes"]), ("peak memory", arm["peak_rss_bytes"])):
            yield label, what, "MB", None if value is None else value / 1e6, None, None, 1
        for what, key in (("load", "load_s"), ("import of libraries", "import_s")):
            yield label, what, "s", arm.get(key), None, None, 1
        yield from _quality_rows(label, arm.get("quality"), data["heldout"])
        yield from _evaluation_rows(label, arm.get("evals"))
        for metric, what in (("tpot", "decode speed"), ("ttft", "TTFT speed")):
            if over := data["speed_of_shipped_over"].get(name, {}).get(metric):
                yield label, f"{what} of {shipped} over it", "×", *estimate(over)
        if rise := data["nll_rise_of_shipped_over"].get(name):
            what, percent = f"rise of loss of {shipped} over it", {**rise, **_percent(rise)}
            yield label, what, "%", *estimate(percent)
    yield from _scenario_rows(data)


def _scenario_rows(data: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    for cell in data.get("offline") or ():
        label = data["arms"][cell["arm"]]["label"]
        where = f"batch {cell['batch']}, prompt {cell['prompt_tokens']}, new {cell['new_tokens']}"
        for key, what, unit in (
            ("prompt_tokens_s", "prompt", "tokens/s"),
            ("generated_tokens_s", "generated", "tokens/s"),
            ("requests_s", "requests", "requests/s"),
        ):
            yield label, f"offline, {where}: {what}", unit, *estimate(cell[key])
    for found in (data.get("cold") or {}).values():
        for key in (*COLD_PARTS, "second_token_s", "total_s"):
            what = key.removesuffix("_s").replace("_", " ")
            yield found["label"], f"cold: {what}", "s", *estimate(found[key])
    server_data = data.get("server") or {}
    for rate in server_data.get("rates") or ():
        label, at = server_data["target"]["label"], f"server at {rate['rate']:g}/s"
        yield label, f"{at}: goodput", "requests/s", rate["goodput"], None, None, rate["requests"]
        for key, what in _TIMES:
            for percentile in ("p50", "p90", "p95", "p99"):
                value, n = rate[key][percentile], rate[key]["n"]
                yield label, f"{at}: {what}, {percentile}", "ms", value, None, None, n


def _quality_rows(
    label: str, quality: Mapping[str, Any] | None, heldout: Mapping[str, Any]
) -> Iterator[tuple[Any, ...]]:
    for domain, found in (quality or {}).get("domains", {}).items():
        for key, what, unit in (
            ("nll", "loss", "nats"),
            ("perplexity", "perplexity", ""),
            ("bits_per_byte", "bits a byte", "bits"),
            ("kl", "KL to the mixture", "nats"),
            ("top1", "agreement with the mixture", ""),
            ("calibration_error", "calibration error", ""),
        ):
            yield (
                label,
                f"{what}, {domain}",
                unit,
                found.get(key),
                None,
                None,
                sum(heldout[domain]["labels"]),
            )


def _evaluation_rows(label: str, found: Mapping[str, Any] | None) -> Iterator[tuple[Any, ...]]:
    for name, share in (found or {}).get("shares", {}).items():
        yield label, f"right answers, {TITLES[name]}", "", *estimate(share)
    for name, loss in (found or {}).get("losses", {}).items():
        yield label, f"loss, {TITLES[name]}", "nats", loss, None, None, None
    if rise := (found or {}).get("forgetting"):
        what = "rise of loss elsewhere over the base"
        yield label, what, "%", *estimate({**rise, **_percent(rise)})


def estimate(found: Mapping[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Value, bounds and count of an interval."""
    return found["value"], found["low"], found["high"], found["n"]


def _percent(found: Mapping[str, Any]) -> dict[str, float | None]:
    figures = {key: found[key] for key in ("value", "low", "high")}
    return {key: None if figure is None else 100 * figure for key, figure in figures.items()}


def _bounds(estimate: Mapping[str, Any]) -> Sequence[float]:
    low, high = estimate["low"], estimate["high"]
    return (estimate["value"],) * 2 if low is None or high is None else (low, high)


def promised(estimate: Mapping[str, Any], unit: str) -> str:
    """A promise of the certificate in words."""
    text = f"{significant(estimate['value'])} {unit}"
    if estimate["low"] is None:
        return text
    low, high = significant(estimate["low"]), significant(estimate["high"])
    return f"{text} ({low} to {high}, {estimate['n']} blocks)"


def parity(
    forms: Mapping[str, Mapping[str, Any]], columns: Sequence[tuple[str, str, Callable[[Any], str]]]
) -> list[dict[str, Any]]:
    """Title and cells by form of the parity table; a figure that a form lacks is empty."""
    found = []
    for title, key, write in columns:
        cells = {
            name: write(form["parity"][key]) if key in form["parity"] else ""
            for name, form in forms.items()
        }
        found.append({"title": title, "cells": cells})
    return found


def source_text(source: Mapping[str, Any]) -> str:
    """A source of a recipe in words."""
    match source["kind"]:
        case "hub":
            return f"{source['id']} @ {source['revision']}"
        case "package":
            place = source.get("path") or ", ".join(source["paths"])
            return f"{source['package']} {source['version'] or ''}: {place}".replace(" :", ":")
        case "server":
            return f"{source['model']} behind {source['url']}"
        case "recipe":
            return f"student of {source['recipe']}"
        case "random":
            return f"random {source['config'].get('model_type', 'model')}, seed {source['seed']}"
        case "stdlib":
            return f"Python standard library: {', '.join(source['paths'])}"
        case "files":
            return ", ".join(source["paths"])
        case _:
            return str(source.get("path", source["kind"]))
