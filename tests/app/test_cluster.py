"""`limbeck plan --nodes N --gpus M`: a plan spread over machines and cards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig
from typer.testing import CliRunner, Result

from limbeck.app.cli import app
from limbeck.app.plan import PROGRAM_BYTES
from limbeck.contract.recipe import load_recipe

MINE = """
name: mine
teachers:
  - {name: a, model: {kind: random, config: {model_type: llama}}}
data: {domains: [{name: code, text: {kind: stdlib, paths: [ast.py]}}], block: 32}
student: {kind: fresh, config: {model_type: llama, num_hidden_layers: 2, hidden_size: 32,
  intermediate_size: 64, num_attention_heads: 2, num_key_value_heads: 1, vocab_size: 300}}
features: {weight: 0}
training: {tokens: 2560, batch_tokens: 256, micro_batch: 1, precision: fp32, BUDGET}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(MINE.replace(", BUDGET", ", teacher_cache: hidden"))
    return path


def plan(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_a_plan_is_spread_over_cards(recipe: Path) -> None:
    here = json.loads(plan(recipe, "--json").stdout)
    found = json.loads(plan(recipe, "--nodes", 2, "--gpus", 4, "--tflops", 2.5, "--json").stdout)
    wide = found["cluster"]
    assert here["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found["device"] == "cuda"
    # Every process holds the whole of what one does, without the program in the card's memory.
    program = 0 if torch.cuda.is_available() else PROGRAM_BYTES
    assert wide["memory"] == here["memory_total"] - program
    assert wide["gradients"] == 4 * here["student"]
    assert wide["cache"] == here["cache"] > 0
    assert wide["seconds"] == pytest.approx(here["operations"] / 8 / 2.5e12)
    # A teacher takes two operations for a parameter and token, apart from its embedding and head.
    config = LlamaConfig()
    width, inner = config.hidden_size, config.intermediate_size
    layers = config.num_hidden_layers * (4 * width * width + 3 * width * inner)
    read = load_recipe(recipe)
    tokens = 2560 + read.data.heldout.blocks * read.data.block
    assert wide["filling"] == pytest.approx(2 * layers * tokens / 8 / 2.5e12, rel=0.02)
    assert "cluster" not in here


def test_a_time_is_never_made_up(recipe: Path) -> None:
    assert (
        "time of training      unknown: give the measured rate" in plan(recipe, "--gpus", 2).stdout
    )
    timed_plan = plan(recipe, "--gpus", 2, "--tflops", 100).stdout
    assert "at least" in timed_plan
    assert "filling the cache" in timed_plan
    assert "reading the cache" in timed_plan
    timed = recipe.with_name("timed.yaml")
    timed.write_text(MINE.replace("tokens: 2560,", "minutes: 3,").replace(", BUDGET", ""))
    found = plan(timed, "--nodes", 2, "--tflops", 100)
    assert "unknown: the budget is given in minutes" in found.stdout, found.stderr
    if not torch.cuda.is_available():
        refused = plan(recipe, "--gpus", 2, "--trial")
        assert refused.exit_code == 2
        assert "this machine has no card to time" in refused.stderr


def test_a_batch_that_so_many_cannot_share_is_refused(recipe: Path) -> None:
    assert plan(recipe, "--nodes", 8).exit_code == 0
    found = plan(recipe, "--nodes", 3, "--gpus", 3)
    assert found.exit_code == 2
    assert "the 8 blocks of a step cannot be shared by 9 processes" in found.stderr
