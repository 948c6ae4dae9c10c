"""``python -m tests.faults.page``: make the mistakes of users and write docs/errors.md."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limbeck.app.run import RUN, open_run
from limbeck.contract.artifact import MANIFEST, find_artifact, open_artifact, write_artifact
from limbeck.contract.data.heldout import load_heldout, save_heldout
from limbeck.contract.environment import require_launcher
from limbeck.contract.errors import DataError, LimbeckError
from limbeck.contract.files import explained, unwritable_is_a_user_error, write_atomically
from limbeck.contract.limits import Limits
from limbeck.contract.lock import locked
from limbeck.contract.reading import reading
from serve_bench.serve.listener import open_door
from serve_bench.serve.server import make_app
from tests import ROOT
from tests.faults import mistakes
from tests.pico import make_blocks, make_model, pico_recipe
from tests.servers.logprob_server import LogprobServer

PAGE = ROOT / "docs" / "errors.md"
_HEAD = """# Errors

A program made each mistake below; the message is Limbeck's answer, word for word, with shortened
paths. Every such error ends a command with exit code 2 and without a traceback. Results that were
complete before stay complete.

This page is written by `python -m tests.faults.page`; a test compares it with the code.
"""


def _artifact(folder: Path, text: str = "weights") -> Path:
    with write_artifact(folder / "student", kind="student", key="k", parents={}) as draft:
        (draft.folder / "model").write_text(text)
        draft.result = {"task": "causal-lm"}
    return folder / "student"


def _changed(folder: Path, **fields: object) -> Path:
    path = _artifact(folder)
    manifest = json.loads((path / MANIFEST).read_text()) | fields
    (path / MANIFEST).write_text(json.dumps(manifest))
    return path


def _no_artifact(folder: Path) -> None:
    open_artifact(folder / "student")


def _truncated(folder: Path) -> None:
    path = _artifact(folder)
    (path / MANIFEST).write_text('{"format": 2')
    open_artifact(path)


def _other_kind(folder: Path) -> None:
    open_artifact(_changed(folder, parents=["base"]))


def _former(folder: Path) -> None:
    open_artifact(_changed(folder, format=1))


def _newer(folder: Path) -> None:
    find_artifact(_changed(folder, format=99), kind="student", key="k")


def _file_changed(folder: Path) -> None:
    path = _artifact(folder)
    (path / "model").write_text("other")
    open_artifact(path)


def _file_gone(folder: Path) -> None:
    path = _artifact(folder)
    (path / "model").unlink()
    open_artifact(path)


def _file_more(folder: Path) -> None:
    path = _artifact(folder)
    (path / "notes.txt").write_text("mine")
    open_artifact(path)


def _pipe(folder: Path) -> None:
    path = _artifact(folder)
    (path / MANIFEST).unlink()
    os.mkfifo(path / MANIFEST)
    open_artifact(path)


def _strange_values(folder: Path) -> None:
    path = _changed(folder, result={"sources": "mine"})
    with reading(path):
        open_artifact(path).result["sources"].items()


def _write_over_a_device(_: Path) -> None:
    write_atomically(Path("/dev/null"), "{}")


def _in_use(folder: Path) -> None:
    with locked(folder, wait=False), locked(folder, wait=False):
        pass


def _other_recipe(folder: Path) -> None:
    for seed in (0, 1):
        with open_run(pico_recipe(seed=seed), folder / "run"):
            (folder / "run/student").mkdir()


def _not_a_run(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    with open_run(pico_recipe(), folder):
        pass


def _broken_claim(folder: Path) -> None:
    (folder / RUN).write_text("[]")
    with open_run(pico_recipe(), folder):
        pass


def _out_is_a_file(folder: Path) -> None:
    (folder / "run").write_text("")
    with open_run(pico_recipe(), folder / "run"):
        pass


def _long_name(folder: Path) -> None:
    with open_run(pico_recipe(), folder / ("x" * 300)):
        pass


def _full(folder: Path) -> None:
    def no_room(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kept, os.fsync = os.fsync, no_room
    try:
        write_atomically(folder / "report.json", "{}")
    finally:
        os.fsync = kept


def _read_only(folder: Path) -> None:
    with unwritable_is_a_user_error(folder):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def _descriptors(_: Path) -> None:
    error = explained(OSError(errno.EMFILE, os.strerror(errno.EMFILE), "report.json"))
    assert error is not None
    raise error


def _several(_: Path) -> None:
    kept = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = "two"
    try:
        require_launcher()
    finally:
        del os.environ["WORLD_SIZE"]
        if kept is not None:
            os.environ["WORLD_SIZE"] = kept


def _output(_: Path) -> None:
    error = explained(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert error is not None
    raise error


def _no_safetensors(folder: Path) -> None:
    (folder / "heldout.safetensors").write_text("text")
    load_heldout(folder / "heldout.safetensors")


def _scored(folder: Path) -> None:
    blocks = make_blocks()
    for block in blocks.values():
        block.scored[:, 0] = 1
    save_heldout(folder / "heldout.safetensors", blocks)
    load_heldout(folder / "heldout.safetensors")


def _ask(folder: Path, server: LogprobServer, **over: object) -> None:
    """Let a teacher behind ``server`` read a text of 20 tokens."""
    import torch

    from compress.teachers.served import ServedTeachers, served_teacher

    source = {"kind": "local", "path": str(folder / "model")}
    model = {"kind": "server", "url": server.url, "model": "big", "tokenizer": source, "top": 8}
    teacher = {"name": "big", "model": model | {"retries": 0} | over}
    recipe = pico_recipe(teachers=[teacher], fusion={"calibration": {"kind": "none"}})
    kept = {name: os.environ.get(name) for name in ("LIMBECK_CACHE", "OPENAI_API_KEY")}
    os.environ["LIMBECK_CACHE"] = str(folder / "cache")
    os.environ.pop("OPENAI_API_KEY", None)
    try:
        found = served_teacher(recipe.teachers[0], recipe)
        text = torch.arange(20)
        ServedTeachers([found], device=torch.device("cpu")).prepare([(text, text)])
    finally:
        for name, value in kept.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _server(folder: Path, **options: Any) -> LogprobServer:
    return LogprobServer(make_model(folder / "model"), **options)


def _no_server(folder: Path) -> None:
    with _server(folder) as server:
        pass
    _ask(folder, server)


def _no_key(folder: Path) -> None:
    with _server(folder, key="secret") as server:
        _ask(folder, server)


def _no_such_model(folder: Path) -> None:
    with _server(folder) as server:
        _ask(folder, server, model="bigger")


def _short_context(folder: Path) -> None:
    with _server(folder) as server:
        server.context = 16
        _ask(folder, server)


def _answering(status: int, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """A server whose answers are changed."""

    def make(folder: Path) -> None:
        with _server(folder) as server:
            server.fault = lambda _, right: (status, change(right))
            _ask(folder, server)

    return make


def _entries(change: Callable[[list[Any]], list[Any]]) -> Callable[[Path], None]:
    def changed(right: Any) -> Any:
        choice = right["choices"][0]
        return right | {"choices": [{"prompt_logprobs": change(choice["prompt_logprobs"])}]}

    return _answering(200, changed)


def _renamed(entries: list[Any]) -> list[Any]:
    return [
        entry and {token: one | {"decoded_token": "?"} for token, one in entry.items()}
        for entry in entries
    ]


def _fewer(entries: list[Any]) -> list[Any]:
    return [entry and dict(list(entry.items())[-5:]) for entry in entries]


def _another_model(folder: Path) -> None:
    import torch

    with _server(folder) as server:
        _ask(folder, server)
        with torch.no_grad():
            server.model.lm_head.weight.zero_()
        for path in (folder / "cache" / "teachers").rglob("rows-*/manifest.json"):
            path.unlink()
        _ask(folder, server)


def _serve(**limits: Any) -> Callable[[Path], None]:
    """`limbeck serve` with these limits."""

    def make(_: Path) -> None:
        Limits(**limits)

    return make


def _taken(_: Path) -> None:
    with open_door("127.0.0.1", 0) as door:
        port = door.getsockname()[1]
        try:
            open_door("127.0.0.1", port)
        except LimbeckError as error:
            raise type(error)(str(error).replace(f"port {port}", "port 8000")) from None


def _refused(
    path: str, body: object = None, *, limits: Limits | None = None, **headers: str
) -> Callable[[Path], None]:
    """A request that the server's endpoints refuse, asked without a socket."""

    def make(_: Path) -> None:
        app = make_app(
            _Idle(),
            model="pico",
            fingerprint="x",
            limits=limits or Limits(),  # type: ignore[arg-type]
        )
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, answer = asyncio.run(_asked(app, path, sent, headers))
        raise DataError(f"{status}: {answer['error']['message']}")

    return make


async def _asked(
    app: Any, path: str, body: bytes, headers: dict[str, str]
) -> tuple[int, dict[str, Any]]:
    """Status and JSON body of one POST request to the ASGI application."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    given = {"host": "localhost", "content-type": "application/json"} | headers
    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(),
        "query_string": b"", "headers": [(k.encode(), v.encode()) for k, v in given.items()],
        "http_version": "1.1", "scheme": "http", "root_path": "",
    }  # fmt: skip
    await app(scope, receive, send)
    return sent[0]["status"], json.loads(b"".join(m.get("body", b"") for m in sent))


class _Idle:
    """An engine that nothing reaches, because every request is refused before."""

    closing = False
    failure = None
    longest = 512
    running = waiting = peak = 0
    max_queue = max_batch = 1


_SECTIONS: dict[str, dict[str, Callable[[Path], None]]] = {
    **mistakes.SECTIONS,
    "Artifacts": {
        "No artifact is there, or its stage was stopped": _no_artifact,
        "The manifest is cut off": _truncated,
        "A field of the manifest has another type": _other_kind,
        "A file was changed": _file_changed,
        "A file was deleted": _file_gone,
        "A file was added": _file_more,
        "The artifact is of an older version of Limbeck": _former,
        "The artifact is of a newer version of Limbeck": _newer,
        "The manifest is a named pipe": _pipe,
        "A value in it is of another kind": _strange_values,
        "The file to write is a device": _write_over_a_device,
        "Held-out text is no safetensors file": _no_safetensors,
        "Held-out text scores a token that nothing precedes": _scored,
    },
    "Run folders": {
        "Another process works there": _in_use,
        "The folder belongs to another recipe": _other_recipe,
        "The folder holds other files": _not_a_run,
        "run.json was changed": _broken_claim,
        "`--out` names a file": _out_is_a_file,
        "`--out` is too long": _long_name,
    },
    "Teachers behind a server": {
        "No server answers": _no_server,
        "The key is missing or wrong": _no_key,
        "The server has no model of this name": _no_such_model,
        "The server's context is too short": _short_context,
        "The server is too busy": _answering(429, lambda _: {"detail": "try later"}),
        "The server refuses": _answering(
            400, lambda _: {"error": {"message": "prompt_logprobs: at most 5 are allowed"}}
        ),
        "The server has another tokenizer": _entries(_renamed),
        "The server answers fewer tokens than were asked for": _entries(_fewer),
        "The server cuts the text": _entries(lambda entries: entries[:-3]),
        "The server does not know `prompt_logprobs`": _answering(
            200, lambda right: right | {"choices": [{"text": "x"}]}
        ),
        "Another model has taken the name": _another_model,
    },
    "`limbeck serve`": {
        "`LIMBECK_API_KEY` is empty": _serve(api_key=""),
        "`LIMBECK_API_KEY` cannot be sent by every client": _serve(api_key="clé"),
        "The address is taken": _taken,
        "The key is missing or wrong (the answer to the client)": _refused(
            "/v1/completions", limits=Limits(api_key="secret")
        ),
        "The Host header is not a name of this server": _refused(
            "/v1/completions", host="evil.example"
        ),
        "The body is not JSON": _refused("/v1/completions", b"{"),
        "The body is too large": _refused("/v1/completions", **{"content-length": "2000000"}),
        "A field is not known": _refused(
            "/v1/completions", {"model": "pico", "prompt": "a", "colour": "red"}
        ),
        "A value is out of range": _refused(
            "/v1/completions", {"model": "pico", "prompt": "a", "temperature": 3}
        ),
        "The model has another name": _refused("/v1/completions", {"model": "gpt", "prompt": "a"}),
    },
    "The machine": {
        "The disk is full": _full,
        "The disk is read-only": _read_only,
        "Standard output is full": _output,
        "Too many files are open": _descriptors,
        "A variable of the environment is not a number": _several,
    },
}


def page() -> str:
    """The text of docs/errors.md. Raises `AssertionError` for a mistake that is not refused."""
    parts = [_HEAD]
    for title, section in _SECTIONS.items():
        parts.append(f"## {title}\n")
        for wrong, make in section.items():
            with tempfile.TemporaryDirectory(prefix="limbeck-") as root:
                parts.append(f"**{wrong}**\n\n```text\n{_message(make, Path(root))}\n```\n")
    return "\n".join(parts)


def _message(make: Callable[[Path], None], folder: Path) -> str:
    try:
        make(folder)
    except LimbeckError as error:
        text = str(error).replace(f"{folder}/", "").replace(str(folder), "runs/mine")
        text = re.sub(r"\b[0-9a-f]{8}\)", "1a2b3c4d)", text)  # it changes with every new field
        text = re.sub(r"http://127\.0\.0\.1:\d+", "http://host:8000", text)
        text = re.sub(r"\((\w+\.py), line \d+\)", r"(\1, line 1)", text)
        text = re.sub(r"served-[0-9a-f]{16}", "served-1a2b3c4d", text)
        text = text.replace(f"process {os.getpid()}", "process 4711").replace("x" * 300, "xxx…")
        # What the server answers is the client's: a status and a message.
        return text if re.match(r"\d{3}: ", text) else f"limbeck: {text}"
    raise AssertionError(f"{make.__name__}: nothing was refused")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
