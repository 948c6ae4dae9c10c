"""A recipe with a teacher behind a server: what can be said of it before anything is asked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from limbeck.app import pico
from limbeck.app.cli import app
from limbeck.contract.recipe import Recipe, load_recipe, parse_recipe
from tests.pico import make_model
from tests.servers.logprob_server import LogprobServer

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LIMBECK_KEY_VARIABLES", "")  # --allow-key sets it
    make_model(tmp_path / "base")
    words = " ".join(f"word{i % 97} of line {i}" for i in range(2000))
    (tmp_path / "text.txt").write_text(words)


def call(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def written(**over: Any) -> dict[str, Any]:
    source = {"kind": "local", "path": "base"}
    model = {"kind": "server", "url": NOWHERE, "model": "big-llama", "tokenizer": source, "top": 8}
    tree = {
        "name": "far",
        "teachers": [{"name": "big", "model": model | over}],
        "data": {
            "domains": [{"name": "words", "text": {"kind": "files", "paths": ["text.txt"]}}],
            "block": 32,
            "heldout": {"every": 4, "piece_chars": 512, "blocks": 3},
        },
        "student": {"kind": "lora", "base": source, "rank": 2},
        "fusion": {"calibration": {"kind": "none"}},
        "training": {"tokens": 640, "batch_tokens": 64},
        "bench": {"prompt_tokens": 32, "new_tokens": 16},
    }
    Path("far.yaml").write_text(yaml.safe_dump(tree))
    return tree


def test_validate_needs_no_server_and_finds_a_missing_tokenizer() -> None:
    written()
    result = call("validate", "far.yaml")
    assert result.exit_code == 0, result.output
    written(tokenizer={"kind": "local", "path": "bose"})
    result = call("validate", "far.yaml")
    assert result.exit_code == 2
    assert re.search(
        r"teachers.0: \S+bose: no tokenizer.json and no GGUF file, did you mean base\?; name",
        result.output,
    )
    written(key_variable="AWS_SECRET")
    assert re.search(
        r"teachers.0.model.key_variable: .*it may only be LIMBECK_",
        call("validate", "far.yaml").output,
    )
    assert call("validate", "far.yaml", "--allow-key", "AWS_SECRET").exit_code == 0
    written(url="localhost:8000")
    assert "teachers.0.model.url: " in call("validate", "far.yaml").output


def test_the_plan_says_what_is_asked_and_kept() -> None:
    written()
    result = call("plan", "far.yaml", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["teachers"] == {}
    blocks = 640 // 32 + 3
    assert found["asked"]["big"] == {
        "model": "big-llama",
        "url": NOWHERE,
        "requests": blocks,
        "tokens": 32 * blocks,
        "bytes": 32 * blocks * (8 * 8 + 12),
    }
    shown = call("plan", "far.yaml").output
    assert f"big-llama at {NOWHERE}: at most 23 requests with 736 tokens, 0.06 MB" in shown


def test_the_plan_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many requests as planned at most, and as many bytes."""
    import compress

    with LogprobServer(Path("base"), name="big-llama") as server:
        tree = written(url=server.url)
        planned = json.loads(call("plan", "far.yaml", "--json").output)["asked"]["big"]
        recipe = parse_recipe(tree)
        compress.distill(recipe=recipe, out=Path("student"))
        assert len(server.asked) <= planned["requests"] + 1  # and the probe
        files = Path("cache/teachers").rglob("rows.safetensors")
        kept = sum(path.stat().st_size for path in files)
        assert 0.5 * planned["bytes"] < kept <= planned["bytes"] + 4096


def test_init_asks_for_the_tokenizer_of_a_served_teacher() -> None:
    given = ["--data", "text.txt", "--target-mb", "1"]
    result = call("init", "--teacher", "https://host/v1", *given)
    assert result.exit_code == 2
    assert "write https://host/v1=TOKENIZER" in result.output


def test_shrunk_to_pico_it_needs_no_server() -> None:
    written()
    small = pico.shrink_to_pico(load_recipe("far.yaml"))
    assert isinstance(small, Recipe)
    (teacher,) = small.teachers
    assert teacher.model.kind == "random"
    assert teacher.model.config["model_type"] == "llama"
