"""The whole job with teachers of three tokenizers, one of them behind a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from limbeck.app.cli import app
from limbeck.contract.artifact import open_artifact
from tests.compress.teachers.test_other_tokenizers import save_teacher
from tests.pico import make_model
from tests.servers.logprob_server import LogprobServer
from tests.tokenizers import byte_level, piece_level

TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] | trim }}"
    "{{ eos_token }}{% endfor %}"
)


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def recipe_of(folder: Path, url: str) -> Path:
    """Three teachers into a student of the local one's family."""
    local = {"kind": "local", "path": "models/base"}
    tokenizer = {"kind": "local", "path": "models/big"}
    served = {"kind": "server", "url": url, "model": "big", "tokenizer": tokenizer, "top": 16}
    talks = {"kind": "files", "paths": ["talks.jsonl"], "format": {"kind": "chat"}}
    tree: dict[str, Any] = {
        "name": "families",
        "teachers": [
            {"name": "own", "model": {"kind": "local", "path": "models/own"}},
            {"name": "other", "model": {"kind": "local", "path": "models/other"}},
            {"name": "served", "model": served},
        ],
        "data": {
            "domains": [
                {"name": "code", "text": {"kind": "stdlib", "paths": ["abc.py"]}},
                {"name": "talks", "text": talks},
            ],
            "block": 32,
            "heldout": {"every": 3, "piece_chars": 256, "blocks": 4},
        },
        "student": {"kind": "lora", "base": local, "rank": 4},
        "fusion": {"calibration": {"kind": "none"}},
        "training": {"tokens": 1280, "batch_tokens": 128, "precision": "fp32", "threads": 1},
        "export": {"forms": ["fp32", "int8-weight"]},
        "bench": {
            "prompt_tokens": 8,
            "new_tokens": 4,
            "minutes": 0.01,
            "min_blocks": 3,
            "threads": 1,
        },
        "gates": {"max_quantization_loss": 0.5},
    }
    path = folder / "families.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    for seed, name in enumerate(("base", "own")):
        make_model(tmp_path / "models" / name, seed=seed)
    for name, tokenizer in (("other", piece_level()), ("big", byte_level(300))):
        folder = save_teacher(tmp_path / "models" / name, tokenizer, hidden_size=48)
        (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    talks = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"yes {n}"}]
             for n in range(40)]  # fmt: skip
    rows = "\n".join(json.dumps({"messages": talk}) for talk in talks)
    (tmp_path / "talks.jsonl").write_text(rows, encoding="utf-8")
    return tmp_path


@pytest.mark.usefixtures("one_roofline", "forked_arms")
def test_three_teachers_of_two_families_and_a_server_reach_a_verdict(models: Path) -> None:
    with LogprobServer(models / "models" / "big") as server:
        recipe = recipe_of(models, server.url)
        checked = call("validate", recipe)
        assert checked.exit_code == 0, checked.output
        for name in ("other", "served"):
            assert f"teacher {name}: another tokenizer; aligned with" in checked.output
        assert not server.asked  # checking asks nothing of a server
        run = models / "run"
        done = call("run", recipe, "--out", run)
        assert done.exit_code == 0, done.output
        asked = len(server.asked)
        assert asked > 0
    # Everything is kept: the run is complete without the server.
    assert call("run", recipe, "--out", run).exit_code == 0
    assert len(server.asked) == asked
    student = open_artifact(run / "student", kind="student")
    teachers = student.result["teachers"]
    assert set(teachers) == {"own", "other", "served"}
    for name in ("other", "served"):
        for domain in ("code", "talks"):
            assert teachers[name]["coverage"][domain]["bytes"] > 0.98
    log = (run / "student" / "log.jsonl").read_text(encoding="utf-8")
    steps = [json.loads(line) for line in log.splitlines()]
    weights = [s["weights"] for s in steps if s["event"] == "step"]
    for shares in weights[-1].values():
        assert set(shares) == set(teachers)
        assert all(share > 0 for share in shares.values())
    page = (run / "report.html").read_text(encoding="utf-8")
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["verdict"] == "pass"
    for name in teachers:
        assert name in page
    # A row of its own in the table of quality: its bits a byte, as its answers gave them.
    assert "served<small>teacher, behind a server</small>" in page
    bits = list(teachers["served"]["bits_per_byte"].values())
    assert f'<td class="n">{sum(bits) / len(bits):.4f}</td>' in page
    certificate = json.loads((run / "certificate.json").read_text(encoding="utf-8"))
    assert set(teachers) < set(certificate["figures"]["loss_rise_over"])
    for command in (["verify", run, "--no-speed"], ["pack", run, "--out", models / "packed"]):
        found = call(*command)
        assert found.exit_code == 0, found.output
