"""The figures behind `/metrics`, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)

from serve_bench.serve.engine import Engine

_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)


class Metrics:
    """Counters, histograms and gauges of one server."""

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(name, text, buckets=_SECONDS, registry=registry)

        self.requests = counter("limbeck_requests", "Answers by status.", "endpoint", "status")
        self.errors = counter("limbeck_errors", "Errors sent to clients, by code.", "code")
        self.finished = counter("limbeck_finished", "Ends of generations, by reason.", "reason")
        self.prompt = counter("limbeck_prompt_tokens", "Prompt tokens of accepted requests.")
        self.reused = counter(
            "limbeck_reused_prompt_tokens",
            "Prompt tokens taken from the prefix cache or from running requests.",
        )
        self.generated = counter("limbeck_generated_tokens", "Tokens sent.")
        self.ttft = seconds(
            "limbeck_time_to_first_token_seconds", "From a request's arrival to its first token."
        )
        self.itl = seconds(
            "limbeck_inter_token_latency_seconds", "From one token of a request to the next."
        )
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "limbeck_queue_length": ("Requests that wait for a slot.", lambda: engine.waiting),
            "limbeck_running": ("Requests that hold a slot.", lambda: engine.running),
            "limbeck_cache_bytes": (
                "Memory of the tokens that running requests hold.",
                lambda: engine.cache_bytes,
            ),
            "limbeck_prefix_cache_bytes": (
                "Memory of finished sequences.",
                lambda: engine.prefix_bytes,
            ),
            "limbeck_slots": ("Requests that may run at once.", lambda: engine.max_batch),
        }
        for name, (text, read) in gauges.items():
            Gauge(name, text, registry=registry).set_function(read)
