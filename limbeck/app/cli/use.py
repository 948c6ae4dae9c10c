"""Commands that use the exported student: generate and serve.

The options of each command have names of their own above it, so that its signature is a table.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.app.cli.base import Command, at_home, command
from limbeck.app.cli.options import ExportedArgument, FormOption, ThreadsOption
from limbeck.contract.errors import DataError, EnvironmentalError, UserError
from limbeck.contract.limits import Limits

_SERVE = ("fastapi", "starlette", "uvicorn", "prometheus_client")  # of the extra `serve`
_MOST_PROMPT = 16 << 20  # bytes of standard input; no model reads as much

# generate -----------------------------------------------------------------------------------------

Prompt = Annotated[
    str, typer.Argument(metavar="PROMPT", help="The text to go on from; - reads standard input.")
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, max=2**31 - 1, help="Most tokens to generate.")
]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="FILE|none",
        help="Adapter of another student of the same base; none: the base alone. "
        "Default: the student's own adapter.",
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature", min=0, max=1000, help="0 takes the likeliest token; higher is more varied."
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p",
        min=0,
        max=1,
        help="Draw from the likeliest tokens that hold this share; 0 is the likeliest alone.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of the draw.")]
Chat = Annotated[
    bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")
]


@command("generate")
def generate(
    artifact: ExportedArgument,
    prompt: Prompt,
    max_new_tokens: MaxNewTokens = 128,
    form: FormOption = None,
    adapter: Adapter = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    threads: ThreadsOption = None,
    chat: Chat = False,
) -> None:
    """Generate text with an exported student, under onnxruntime alone, and print it as it comes.

    \b
    Examples:
      limbeck generate runs/pico-1a2b3c4d/onnx "My fellow Americans,"
      limbeck generate runs/pico-1a2b3c4d "Who are you?" --chat --temperature 0.7 --top-p 0.9
    """
    from limbeck.app.given import exported_folder
    from limbeck.contract.reading import reading

    folder = exported_folder(artifact, command="generate")
    prompt = _read(prompt)

    from limbeck.runtime.decoder import Decoder
    from limbeck.runtime.sampling import Sampling
    from limbeck.runtime.text import load_text

    chosen: Any = "own" if adapter is None else adapter
    if adapter not in (None, "none"):
        chosen = Path(at_home(adapter))
    with reading(folder):
        decoder = Decoder(folder, form=form, threads=threads, adapter=chosen)
        text = load_text(folder)
    ids = text.chat([{"role": "user", "content": prompt}]) if chat else text.encode(prompt)
    tokens = decoder.generate(
        ids,
        max_new_tokens,
        stop_ids=text.stop_ids,
        sampling=Sampling(temperature=temperature, top_p=max(top_p, 1e-9)),
        seed=seed,
    )
    for piece in text.stream(tokens):
        print(piece, end="", flush=True)
    print()


def _read(prompt: str) -> str:
    """The prompt's text: of the argument, or of standard input for ``-``."""
    if prompt == "-":
        prompt = sys.stdin.buffer.read(_MOST_PROMPT + 1).decode("utf-8", errors="replace")
        if len(prompt) > _MOST_PROMPT:
            raise DataError(f"standard input: longer than {_MOST_PROMPT >> 20} MB; shorten it.")
    if not prompt:
        raise DataError("the prompt is empty; give the text to go on from.")
    # Bytes of an argument that are not UTF-8 arrive as lone surrogates.
    return prompt.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace")


# serve --------------------------------------------------------------------------------------------

Host = Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 is every one.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")]
MaxBatch = Annotated[int, typer.Option("--max-batch", min=1, help="Requests that run at once.")]
MaxQueue = Annotated[
    int,
    typer.Option(
        "--max-queue", min=0, help="Requests that may wait; one more is answered with 429."
    ),
]
CacheMb = Annotated[
    int, typer.Option("--cache-mb", min=1, help="Memory of all key-value caches, MB.")
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", min=1, help="Most tokens one request may generate.")
]
MaxBodyBytes = Annotated[
    int,
    typer.Option(
        "--max-body-bytes", min=1, help="Largest request; a larger one is answered with 413."
    ),
]
RequestTimeout = Annotated[
    float,
    typer.Option(
        "--request-timeout", min=0.001, help="Seconds a request may take, waiting included."
    ),
]
Grace = Annotated[
    float,
    typer.Option(
        "--grace", min=0, help="Seconds that running requests have left after SIGTERM or Ctrl-C."
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="LIMBECK_API_KEY",
        help="Key that clients must send; safer in the environment, which no process list shows.",
    ),
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host",
        help="Name that clients may call this server by, beside addresses and localhost; "
        "'*' is every name. Without it: every name, unless --host is a loopback address.",
    ),
]
PrefixCacheMb = Annotated[
    int,
    typer.Option(
        "--prefix-cache-mb",
        min=0,
        help="Memory in which finished requests stay, MB; prompts that begin alike are not "
        "read again. 0 switches it off.",
    ),
]
AccessLog = Annotated[
    bool,
    typer.Option(
        "--access-log/--no-access-log",
        help="A line for each request: method, path, status, time and tokens; no text of it.",
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Serve by replicas on a Ray cluster, with Ray Serve. ADDRESS: host:port of one "
        "that runs; without it, or local, one is started here.",
    ),
]
ReplicaCount = Annotated[
    str,
    typer.Option(
        "--replicas",
        metavar="N|N..M",
        help="With --ray: processes that serve, each with --threads cores (1 by default). A "
        "range: more are started when requests wait.",
    ),
]


class _ServeCommand(Command):
    """A bare `--ray` means `--ray local`; Typer has no options whose value may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Read the command line."""
        for place, word in reversed(list(enumerate(args))):
            if word == "--ray" and (args[place + 1 :] or ["-"])[0].startswith("-"):
                args.insert(place + 1, "local")
        return super().parse_args(ctx, args)


@command("serve", _ServeCommand)
def serve(
    artifact: ExportedArgument,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    form: FormOption = None,
    threads: ThreadsOption = None,
    max_batch: MaxBatch = 64,
    max_queue: MaxQueue = 256,
    cache_mb: CacheMb = 1000,
    max_tokens: MaxTokens = Limits.max_tokens,
    max_body_bytes: MaxBodyBytes = Limits.max_body_bytes,
    request_timeout: RequestTimeout = Limits.request_timeout,
    grace: Grace = 30.0,
    api_key: ApiKey = None,
    allow_host: AllowHost = None,
    prefix_cache_mb: PrefixCacheMb = 256,
    access_log: AccessLog = False,
    ray: Ray = None,
    replicas: ReplicaCount = "1",
) -> None:
    """Serve an exported student to many clients at once, as an OpenAI-compatible endpoint.

    /v1/models, /v1/completions, /v1/chat/completions, /health, /docs, and Prometheus /metrics.
    Needs the extra: pip install 'limbeck[serve]'; with --ray: 'limbeck[ray,serve]'.

    \b
    Examples:
      limbeck serve runs/pico-1a2b3c4d
      limbeck serve runs/pico-1a2b3c4d --ray 10.0.0.5:6379 --replicas 2..8
      limbeck serve runs/pico-1a2b3c4d/onnx --host 0.0.0.0 --port 8080 --max-batch 16 --threads 4
    """
    from limbeck.app.given import exported_folder

    if ray is None and replicas != "1":
        raise UserError("--replicas is for servers on Ray; add --ray.")
    run = _server(ray, replicas)
    folder = exported_folder(artifact, command="serve")
    limits = Limits(
        max_tokens=max_tokens,
        max_body_bytes=max_body_bytes,
        request_timeout=request_timeout,
        # Typer takes an empty variable for a missing one, which would open the server.
        api_key=os.environ.get("LIMBECK_API_KEY") if api_key is None else api_key,
        allowed_hosts=tuple(allow_host or ()),
    )
    run(
        folder,
        host=host,
        port=port,
        form=form,
        threads=threads,
        max_batch=max_batch,
        max_queue=max_queue,
        cache_bytes=cache_mb * 1_000_000,
        prefix_bytes=prefix_cache_mb * 1_000_000,
        grace=grace,
        access_log=access_log,
        limits=limits,
    )


def _server(ray: str | None, replicas: str) -> Callable[..., None]:
    """The function that serves a folder: on the Ray cluster ``ray``, or in this process for None.

    Raises `EnvironmentalError` with the extra to install when a package is missing.
    """
    from limbeck.contract.reading import reading

    try:
        if ray is None:
            from serve_bench.serve.server import open_server
        else:
            from serve_bench.serve.on_ray.deploy import Replicas, serve_on_ray
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extra = "serve" if missing in _SERVE else "ray"
        if missing == "limbeck" or (extra == "ray" and ray is None):
            raise
        raise EnvironmentalError(
            f"{missing} is not installed; run: pip install 'limbeck[{extra}]'."
        ) from None

    def here(folder: Path, **options: Any) -> None:
        with reading(folder):
            server = open_server(folder, **options)
        server.run()

    def on_ray(folder: Path, **options: Any) -> None:
        serve_on_ray(folder.resolve(), address=str(ray), replicas=Replicas.of(replicas), **options)

    return here if ray is None else on_ray
