"""Shared ground of the tests: a cache of their own, and one thread, so that results repeat."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from limbeck.contract.artifact import Artifact
from tests.factory import Factory

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, which test modules do


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing a test makes lands in the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Factory:
    """Tiny students and exports, each made once a session."""
    return Factory(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def served(tiny: Factory) -> Artifact:
    """An exported tiny student with room for long answers, for the engine and the server."""
    sizes = {"max_position_embeddings": 512, "tie_word_embeddings": False}
    return tiny.exported(seed=3, sizes=sizes)


@pytest.fixture(scope="session")
def gpt2(tiny: Factory) -> Artifact:
    """An exported tiny student of torch's exporter: its cache grows at every step."""
    return tiny.exported("gpt2")
