"""Bounds of the command line and of `limbeck serve`, which take them from here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from limbeck.contract.errors import EnvironmentalError

MOST_THREADS = 1024  # of one command; 100,000 took 16 GB, and no signal ended them


@dataclass(frozen=True)
class Limits:
    """What clients may ask of the server."""

    max_tokens: int = 1000  # a request; also the default of chat, where the context has room
    max_body_bytes: int = 1 << 20
    request_timeout: float = 300.0  # seconds from the request's first byte to the last token
    api_key: str | None = None
    max_logprobs: int = 64  # tokens beside each one
    max_connections: int = 1000
    header_timeout: float = 10.0  # seconds until a connection has sent the headers of a request
    # Names in the Host header beside addresses and localhost; "*" is every name.
    allowed_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise EnvironmentalError(
                "found an empty API key, which would let everyone in; "
                "give a key (--api-key or LIMBECK_API_KEY), or unset LIMBECK_API_KEY."
            )
        if self.api_key is not None and not re.fullmatch("[!-~]+", self.api_key):
            raise EnvironmentalError(
                "found an API key with blanks, control characters or letters beyond ASCII, which "
                "not every client can send; give another key (--api-key or LIMBECK_API_KEY)."
            )
