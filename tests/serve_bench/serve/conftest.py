"""Servers of a tiny student, one for the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from limbeck.contract.artifact import Artifact
from limbeck.contract.limits import Limits
from serve_bench.serve.server import Listener
from tests.serve_bench.serve.asking import connect, serving


@pytest.fixture(scope="module")
def server(served: Artifact) -> Iterator[Listener]:
    with serving(served.path) as listener:
        yield listener


@pytest.fixture
def client(server: Listener) -> Iterator[openai.OpenAI]:
    with connect(server) as connected:
        yield connected


@pytest.fixture(scope="module")
def limited(served: Artifact) -> Iterator[Listener]:
    limits = Limits(max_tokens=400, max_body_bytes=4000, request_timeout=1.0)
    with serving(served.path, max_batch=1, max_queue=1, limits=limits) as listener:
        yield listener
