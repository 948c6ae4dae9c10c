"""The probe of every model that is loaded stays cheap: SmolLM2-135M, in seconds."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

import pytest

from compress.models.body import require_faithful
from compress.models.language import load_model, model_folder
from limbeck.contract.recipe import Recipe
from tests.real.students import recipe_of, skip_if_missing

MOST = 1.0  # seconds of processor time; wall time depends on what else the machine does


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_probe_takes_at_most_a_second(dtype: str) -> None:
    with skip_if_missing():
        recipe = recipe_of("smollm2", "lora", ["fp32"])
    assert isinstance(recipe, Recipe)
    folder = model_folder(recipe.student.base, folder=recipe.folder)
    spent: list[tuple[float, float]] = []

    def timed(*given: Any) -> None:
        wall, own = time.perf_counter(), time.process_time()
        require_faithful(*given)
        spent.append((time.perf_counter() - wall, time.process_time() - own))

    with patch("compress.models.language.require_faithful", timed):
        load_model(folder, dtype=dtype)
    ((wall, own),) = spent
    print(f"probe of SmolLM2-135M in {dtype}: {own:.2f} s of processor time, {wall:.2f} s in all")
    assert own <= MOST
