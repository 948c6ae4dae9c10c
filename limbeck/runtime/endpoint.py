"""Find a model behind an OpenAI-compatible server. Knows `/v1/models` and what refusals look like.

Used by the load generator of the bench and by teachers behind a server.
"""

from __future__ import annotations

import os
import queue
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

from limbeck.contract.errors import EnvironmentalError
from limbeck.contract.files import parse_json
from limbeck.contract.recipe.base import mistake_of_address, without_password

CONNECT = 10.0  # seconds to reach a server
_LISTING = 30.0  # seconds for the whole list of models
_LIST = 16 << 20  # bytes of it
_TOLD = 300  # characters of a server's words in a message


@dataclass(frozen=True)
class Endpoint:
    """Where requests go, and as whom."""

    url: str  # up to and with /v1
    model: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    context: int | None = None  # tokens of prompt and answer together, if the server reports it

    def body(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        """A greedy request for ``new_tokens`` tokens after a prompt of token ids."""
        return {"model": self.model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0}

    def refusal(self, status: int, body: bytes) -> str:
        """Status and message of an answer that is an error, without a key that it repeats."""
        text = body.decode(errors="replace").strip()
        try:
            found = parse_json(text)
            text = str(found.get("error", {}).get("message") or found.get("detail") or text)
        except (ValueError, AttributeError):
            pass
        return f"status {status}: {self.told(text)}"

    def told(self, text: object) -> str:
        """What the server has written, or an error that may quote it, for messages and rows.

        At most 300 characters, and without the key that the server was sent.
        """
        return _told(text, self.headers.get("Authorization", "").removeprefix("Bearer "))


def require_address(url: str) -> None:
    """Raise `EnvironmentalError` when ``url`` cannot be the address of a server."""
    if mistake := mistake_of_address(url):
        raise EnvironmentalError(f"{without_password(url)}: {mistake}; correct the address.")


def find_endpoint(
    url: str, model: str | None = None, key_variable: str = "OPENAI_API_KEY"
) -> Endpoint:
    """Ask a server for its models; None for ``model`` takes the first.

    Raises `EnvironmentalError` when nothing usable answers or it lacks ``model``.
    """
    require_address(url)
    base = url.rstrip("/").removesuffix("/v1").rstrip("/") + "/v1"
    key = os.environ.get(key_variable)
    if key and not re.fullmatch("[!-~]+", key):  # the client would show it in its error
        raise EnvironmentalError(
            f"${key_variable}: found a key with blanks, control characters or letters beyond "
            "ASCII, which no header can hold; set the right one."
        )
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx2.Client(headers=headers, timeout=CONNECT) as client:
            answer = ask(client, "GET", f"{base}/models", seconds=_LISTING, most=_LIST)
        if not 200 <= answer.status < 300:
            hint = "."
            if answer.status in (401, 403):
                hint = f"; is the key in ${key_variable} right?"
            elif answer.status == 404:
                hint = "; is the path before /v1 right?"
            elif to := answer.headers.get("location"):
                hint = f" and sends on to {_told(to, key)}; give that address, up to /v1."
            raise EnvironmentalError(f"{base}/models: answered {answer.status}{hint}")
        found = {str(entry["id"]): entry for entry in parse_json(answer.body)["data"]}
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, TypeError) as error:
        hint = "is it running?"
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            hint = "if you trust it, name a file with its authority's certificate in $SSL_CERT_FILE"
        elif "WRONG_VERSION_NUMBER" in str(error):
            hint = "does it speak http, without s?"
        raise EnvironmentalError(
            f"{base}/models: no OpenAI-compatible server answers there ({type(error).__name__}: "
            f"{_told(error, key)}); {hint}"
        ) from None
    if model is not None and model not in found:
        raise EnvironmentalError(
            f"{base}: no model {model!r}; it has {_told(', '.join(found), key) or 'none'}."
        )
    if not found:
        raise EnvironmentalError(f"{base}: the server lists no model; name one in the recipe.")
    name = model or next(iter(found))
    context = found[name].get("max_model_len")
    is_length = type(context) is int and context > 0  # True is an int
    return Endpoint(base, name, headers, context if is_length else None)


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def ask(
    client: httpx2.Client,
    method: str,
    url: str,
    *,
    seconds: float,
    most: int,
    headers: Mapping[str, str] | None = None,
    json: Any = None,
) -> Reply:
    """One request and its whole answer, of ``most`` bytes at most, within ``seconds``.

    The time limits of httpx hold for each read, and a server may send a byte a second. Raises
    `httpx2.HTTPError` as the client does, for a late answer and for one that is too large.
    """
    end, box = time.monotonic() + seconds, queue.SimpleQueue[Reply | Exception]()
    late = httpx2.ReadTimeout(f"the answer took longer than {seconds:g} s")

    def read() -> Reply:
        body = bytearray()
        with client.stream(method, url, headers=headers, json=json) as answer:
            for part in answer.iter_bytes():
                body += part
                if len(body) > most:
                    raise httpx2.ReadError(f"the answer is larger than {most} bytes")
                if time.monotonic() > end:
                    raise late  # what has come is only a part
        return Reply(answer.status_code, answer.headers, bytes(body))

    def work() -> None:
        try:
            box.put(read())
        except Exception as error:
            box.put(error)

    # A read cannot be interrupted, so a thread waits for it that no command waits for.
    threading.Thread(target=work, name="limbeck-ask", daemon=True).start()
    try:
        found = box.get(timeout=seconds)
    except queue.Empty:
        raise late from None
    if isinstance(found, Exception):
        raise found
    return found


def _told(text: object, key: str | None) -> str:
    """See `Endpoint.told`. JSON, Python and addresses may each quote the key in their way."""
    shown = str(text)
    if key:
        forms = (rf"(?:\\{{0,4}}{re.escape(c)}|%{ord(c):02x})" for c in key)
        shown = re.sub("".join(forms), "[key]", shown, flags=re.IGNORECASE)
    return shown[:_TOLD]
