"""Find a model behind an OpenAI-compatible server. Knows `/v1/models` and what refusals look like.

Used by the load generator of the bench and by teachers behind a server.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

from limbeck.contract.errors import EnvironmentalError

CONNECT = 10.0  # seconds to reach a server


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


def find_endpoint(
    url: str, model: str | None = None, key_variable: str = "OPENAI_API_KEY"
) -> Endpoint:
    """Ask a server for its models; None for ``model`` takes the first.

    Raises `EnvironmentalError` when nothing usable answers or it lacks ``model``.
    """
    base = url.rstrip("/").removesuffix("/v1").rstrip("/") + "/v1"
    key = os.environ.get(key_variable)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx2.get(f"{base}/models", headers=headers, timeout=CONNECT)
        answer.raise_for_status()
        found = {str(entry["id"]): entry for entry in answer.json()["data"]}
    except httpx2.HTTPStatusError as error:
        hint = (
            f"; is the key in ${key_variable} right?"
            if error.response.status_code in (401, 403)
            else "."
        )
        raise EnvironmentalError(
            f"{base}/models: answered {error.response.status_code}{hint}"
        ) from None
    except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
        raise EnvironmentalError(
            f"{base}/models: no OpenAI-compatible server answers there ({type(error).__name__}: "
            f"{error}); is it running?"
        ) from None
    if model is not None and model not in found:
        raise EnvironmentalError(
            f"{base}: no model {model!r}; it has {', '.join(found) or 'none'}."
        )
    if not found:
        raise EnvironmentalError(f"{base}: the server lists no model; name one in the recipe.")
    name = model or next(iter(found))
    context = found[name].get("max_model_len")
    return Endpoint(base, name, headers, context if isinstance(context, int) else None)


def refusal(status: int, body: bytes) -> str:
    """Status and message of an answer that is an error."""
    text = body.decode(errors="replace").strip()
    try:
        found = json.loads(text)
        text = str(found.get("error", {}).get("message") or found.get("detail") or text)
    except (ValueError, AttributeError):
        pass
    return f"status {status}: {text[:300]}"
