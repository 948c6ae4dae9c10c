"""An OpenAI-compatible server over the engine. Needs the extra ``limbeck[serve]``.

`open_server` puts together what the other modules of this folder provide: `listener` (sockets),
`gate` (who may ask), `service` (prompts and answers), `engine` (what generates, and when).
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from limbeck.contract.artifact import open_artifact
from limbeck.contract.limits import Limits
from serve_bench.serve.engine import PREFIX_BYTES, Engine
from serve_bench.serve.gate import ENDPOINTS, ApiError, Gate, refusal, why_no_json
from serve_bench.serve.listener import Listener, open_door
from serve_bench.serve.metrics import Metrics
from serve_bench.serve.page import HEADERS, docs_page
from serve_bench.serve.service import Service
from serve_bench.serve.wire import ChatBody, CompletionBody, first_mistake

Gather = Callable[[], Awaitable[Iterable[Metric]]]


def make_app(
    engine: Engine,
    *,
    model: str,
    fingerprint: str,
    limits: Limits,
    access_log: bool = False,
    gather: Gather | None = None,
) -> FastAPI:
    """The ASGI application over a running engine, for any server that takes one.

    `/metrics` tells what ``gather`` finds, where several processes serve. Without it, it tells
    ``state.registry`` of the application, the metrics of this process.
    """
    metrics = Metrics(engine)
    service = Service(engine, metrics, model=model, fingerprint=fingerprint, limits=limits)
    app = FastAPI(title="Limbeck", docs_url=None, redoc_url=None)
    app.state.registry = metrics.registry
    app.add_middleware(Gate, engine=engine, metrics=metrics, limits=limits, access_log=access_log)
    _answer_errors(app, metrics)
    card = {
        "id": model,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "limbeck",
        "max_model_len": engine.longest,
    }

    @app.get("/v1/models")
    @app.get("/v1/models/")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != model:
            raise ApiError(
                404, f"found model {name!r}; this server has {model!r}.", code="model_not_found"
            )
        return card

    @app.post("/v1/completions")
    async def completions(http: HttpRequest, body: CompletionBody) -> Response:
        return await service.complete(http, body)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: HttpRequest, body: ChatBody) -> Response:
        return await service.chat(http, body)

    _add_state(app, engine, gather)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(docs_page(app.openapi(), model), headers=HEADERS)

    for body in app.openapi()["components"]["schemas"].values():  # FastAPI keeps this tree
        if "model" in body.get("properties", {}):
            body["properties"]["model"]["enum"] = [model]
    return app


def _add_state(app: FastAPI, engine: Engine, gather: Gather | None) -> None:
    """Add the routes that say how the server is."""

    @app.get("/health")
    async def health() -> Response:
        status = "failed" if engine.failure else "shutting down" if engine.closing else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def figures() -> Response:
        found = app.state.registry if gather is None else _Found(await gather())
        return Response(generate_latest(found), media_type=CONTENT_TYPE_LATEST)


def _answer_errors(app: FastAPI, metrics: Metrics) -> None:
    """Give every error the form that OpenAI's clients expect, and count it."""

    @app.exception_handler(ApiError)
    async def refused(_: HttpRequest, error: ApiError) -> Response:
        return refusal(metrics, error)

    @app.exception_handler(HTTPException)
    async def not_served(_: HttpRequest, error: HTTPException) -> Response:
        if error.status_code == 400:  # FastAPI's, with json's own error behind it
            why = why_no_json(error.__cause__)
            return refusal(metrics, ApiError(400, f"the body cannot be read as JSON: {why}."))
        served = ", ".join(ENDPOINTS)
        message = f"{error.detail}; this server has {served}."
        return refusal(metrics, ApiError(error.status_code, message))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: HttpRequest, error: RequestValidationError) -> Response:
        message, field = first_mistake(error.errors())
        return refusal(metrics, ApiError(400, message, param=field))


class _Found(CollectorRegistry):
    """Metrics that were collected elsewhere."""

    def __init__(self, found: Iterable[Metric]) -> None:
        super().__init__()
        self._found = found

    def collect(self) -> Iterable[Metric]:
        return self._found


def load(
    folder: Path,
    *,
    limits: Limits,
    access_log: bool = False,
    gather: Gather | None = None,
    **options: Any,
) -> tuple[FastAPI, Engine, str]:
    """The application over the ``onnx`` artifact at ``folder``, its engine, and a line about them.

    ``options`` are those of `Engine`; raises as it does.
    """
    engine = Engine(folder, **options)
    artifact = open_artifact(folder, kind="onnx", verify=False)
    recipe = artifact.manifest["recipe"]
    model = str(recipe["resolved"]["name"]) if recipe else folder.resolve().name
    app = make_app(
        engine,
        model=model,
        fingerprint=f"limbeck-{artifact.digest[:12]}-{engine.form}",
        limits=limits,
        access_log=access_log,
        gather=gather,
    )
    title = f"{model} ({engine.form}, context {engine.longest} tokens, {engine.threads} threads)"
    return app, engine, title


def open_server(
    folder: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    form: str | None = None,
    threads: int | None = None,
    max_batch: int = 64,
    max_queue: int = 256,
    cache_bytes: int = 1_000_000_000,
    prefix_bytes: int = PREFIX_BYTES,
    limits: Limits | None = None,
    grace: float = 30.0,
    access_log: bool = False,
) -> Listener:
    """A server over the ``onnx`` artifact at ``folder``; `Listener.run` serves.

    Its address is taken and its model loaded. ``access_log`` writes a line for each request.
    Raises `EnvironmentalError` when ``host`` and
    ``port`` cannot be had, otherwise as `Engine` does.
    """
    limits = limits or Limits()
    door = open_door(host, port)
    try:
        if not ipaddress.ip_address(door.getsockname()[0]).is_loopback:
            # Whoever may reach another address has names for it that are not known here.
            limits = replace(limits, allowed_hosts=limits.allowed_hosts or ("*",))
        app, engine, title = load(
            folder,
            limits=limits,
            access_log=access_log,
            form=form,
            threads=threads,
            max_batch=max_batch,
            max_queue=max_queue,
            cache_bytes=cache_bytes,
            prefix_bytes=prefix_bytes,
        )
        return Listener(app, engine, door=door, title=title, grace=grace, limits=limits)
    except BaseException:
        door.close()
        raise
