"""Shared ground of the tests: a cache of their own, and one thread, so that results repeat."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from limbeck.contract.artifact import Artifact

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, which test modules do


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing a test makes lands in the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An exported tiny student with room for long answers, for the engine and the server."""
    from export import export_student
    from tests.pico import make_model, make_student, pico_recipe

    root = tmp_path_factory.mktemp("served")
    make_student(root / "student", make_model(root / "model", seed=3, max_position_embeddings=512))
    return export_student(student=root / "student", out=root / "onnx", recipe=pico_recipe())


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An exported tiny student of torch's exporter: its cache grows at every step."""
    from export import export_student
    from tests.architectures import SIZES
    from tests.pico import make_model, make_student, pico_recipe

    root = tmp_path_factory.mktemp("gpt2")
    make_student(root / "student", make_model(root / "model", model_type="gpt2", **SIZES["gpt2"]))
    return export_student(student=root / "student", out=root / "onnx", recipe=pico_recipe())
