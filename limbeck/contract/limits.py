"""The bounds of `limbeck serve`: the command line and the server take their defaults from here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one client may ask of the server."""

    max_tokens: int = 1000  # a request; also the default of chat, where the context has room for it
    max_body_bytes: int = 1 << 20
    request_timeout: float = 300.0  # seconds from the first byte of the request to the last token
    api_key: str | None = None
