"""Recipes on the command line, and bad input."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from limbeck.app import run as pipeline
from limbeck.contract.errors import EnvironmentalError
from limbeck.contract.recipe import Recipe, shipped_recipes
from tests.app.cli.calls import GOOD, call
from tests.pico import make_model


def test_recipes_lists_what_is_shipped() -> None:
    names = [name for name, _ in shipped_recipes()]
    listed = [line.split()[0] for line in call("recipes").stdout.splitlines()]
    assert sorted(listed) == names
    rows = json.loads(call("recipes", "--json").stdout)
    assert [row["name"] for row in rows] == listed
    small = json.loads(
        call("recipes", "--json", "--max-mb", "150", "--cpu", "--family", "smollm2").stdout
    )
    assert [row["name"] for row in small] == [
        n for n in listed if re.search("smollm2/expert|two-experts|gemma-and-smollm", n)
    ]
    assert "no recipe of that family" in call("recipes", "--family", "zzz").stderr
    demo = next(row for row in rows if row["name"] == "smollm2/135m-two-experts")
    assert demo["teachers"] == ["speeches", "scripture"]
    assert demo["about"].startswith("Two domain experts into one 135M student")


def test_validate_reports_every_mistake_of_every_file(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    (tmp_path / "bad.yaml").write_text(GOOD + "gate: {}\nsed: 1\n")
    (tmp_path / "hungry.yaml").write_text(
        GOOD.replace("{kind: stdlib, paths: [abc.py]}", "{kind: files, paths: [gone.txt]}").replace(
            "{kind: random, config: {model_type: llama}}",
            "{kind: package, package: no-such-package-here, path: x}",
        )
    )
    result = call("validate", "good.yaml", "bad.yaml", "hungry.yaml", "gone.yaml")
    assert result.exit_code == 2
    assert result.stdout.startswith("good.yaml: valid; mine, digest ")
    for expected in (
        "bad.yaml: 2 mistakes",
        "gate: unknown key; did you mean `gates`?",
        "sed: unknown key; did you mean `seed`?",
        "hungry.yaml: 2 things are missing or wrong here",
        "gone.txt: no such file",
        "student.base: the Python package no-such-package-here is not installed; run: pip install",
        "gone.yaml: no such recipe file",
    ):
        assert expected in result.stderr
    assert call("validate", "good.yaml").exit_code == 0
    assert call("validate", "good.yaml", "--set", "export.block=3").exit_code == 2
    assert call("validate", "good.yaml", "--set", "seed=7").exit_code == 0


@pytest.mark.parametrize(
    ("student", "where"),
    [
        ("{kind: lora, base: {kind: random, config: CONFIG}}", "student.base"),
        ("{kind: lora, base: {kind: local, path: model}}", "student.base"),
        ("{kind: fresh, config: CONFIG}", "student.config"),
    ],
)
def test_a_rope_that_no_builder_exports_is_a_mistake_before_training(
    tmp_path: Path, student: str, where: str
) -> None:
    sizes = "hidden_size: 32, num_attention_heads: 4, num_hidden_layers: 2, pad_token_id: 0"
    rope = "rope_parameters: {rope_type: dynamic, rope_theta: 10000.0, factor: 2.0}"
    config = f"{{model_type: smollm3, {sizes}, {rope}}}"
    if "path: model" in student:
        make_model(tmp_path / "model", **yaml.safe_load(config))
    text = GOOD.replace(GOOD.splitlines()[3], f"student: {student.replace('CONFIG', config)}")
    if "fresh" in student:
        teacher = "{kind: random, config: {model_type: llama, hidden_size: 32}}"
        text += f"teachers: [{{name: t, model: {teacher}}}]\n"
    text += "bench: {prompt_tokens: 24, new_tokens: 8}\n"  # the model reads 64 tokens
    (tmp_path / "mine.yaml").write_text(text)
    message = "smollm3 with rope of kind dynamic cannot be exported"
    for command in ("validate", "run", "plan"):
        result = call(command, "mine.yaml")
        assert result.exit_code == 2
        assert f"{'student' if command == 'plan' else where}: {message}" in result.stderr
    config = tmp_path / "model" / "config.json"
    for path in [tmp_path / "mine.yaml", *([config] if config.exists() else [])]:
        path.write_text(path.read_text().replace("dynamic", "linear"))
    assert call("validate", "mine.yaml").exit_code == 0
    result = call("validate", "mine.yaml", "--set", "export.backend=genai")
    assert "rope of kind linear" in result.stderr


def test_validate_looks_at_the_recipes_of_teachers(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        GOOD + "teachers: [{name: t, model: {kind: recipe, recipe: b.yaml}}]\n"
    )
    (tmp_path / "b.yaml").write_text(
        GOOD + "teachers: [{name: t, model: {kind: recipe, recipe: a.yaml}}]\n"
    )
    result = call("validate", "a.yaml")
    assert result.exit_code == 2
    assert "made from itself" in result.stderr


def test_only_a_recipe_can_be_shrunk(tmp_path: Path) -> None:
    result = call("bench", tmp_path, "--shrink-to", "pico")
    assert result.exit_code == 2
    assert result.stderr.startswith("limbeck: --shrink-to: only a recipe can be shrunk")


@pytest.mark.parametrize("command", ["run", "compress", "export", "bench"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD + "trainig: {}\n", "trainig: unknown key; did you mean `training`?"),
        (GOOD + "seed: [1]\n", "seed: found [1]; it should be a valid integer"),
        (GOOD + "seed: -1\n", "seed: found -1; it should be greater than or equal to 0"),
    ],
)
def test_a_wrong_recipe_is_one_message_and_exit_2(
    tmp_path: Path, command: str, text: str, expected: str
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    result = call(command, "mine.yaml")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"limbeck: {tmp_path}/mine.yaml: 1 mistake\n  {expected}")
    assert result.stdout == ""
    assert not Path("runs").exists()


def test_missing_files_and_empty_text_are_reported_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    for path, expected in (("gone.txt", "no such file"), ("empty.txt", "every file is empty")):
        (tmp_path / "mine.yaml").write_text(
            GOOD.replace("kind: stdlib, paths: [abc.py]", f"kind: files, paths: [{path}]")
        )
        result = call("run", "mine.yaml")
        assert result.exit_code == 2
        assert expected in result.stderr
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("file", "expected"),
    [(None, "no weights"), ("pytorch_model.bin", "is a pickle, which can run code")],
)
def test_a_teacher_without_safetensors_is_refused(
    tmp_path: Path, file: str | None, expected: str
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    if file:
        (tmp_path / "model" / file).write_text("")
    (tmp_path / "mine.yaml").write_text(
        GOOD + "teachers: [{name: t, model: {kind: local, path: model}}]\n"
    )
    result = call("run", "mine.yaml")
    assert result.exit_code == 2
    assert f"teachers.0: {tmp_path}/model: " in result.stderr
    assert expected in result.stderr


def test_set_is_applied_and_its_mistakes_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD)
    asked: list[Recipe] = []

    def run(recipe: Recipe, *, out: Path | None) -> Any:
        asked.append(recipe)
        raise EnvironmentalError("enough")

    monkeypatch.setattr(pipeline, "run", run)
    result = call("run", "mine.yaml", "--set", "seed=7", "--set", "training.learning_rate=0.5")
    assert (result.exit_code, result.stderr) == (2, "limbeck: enough\n")
    assert (asked[0].seed, asked[0].training.learning_rate) == (7, 0.5)
    assert "expected key=value" in call("run", "mine.yaml", "--set", "seed").stderr


def test_a_stage_that_comes_too_early_names_the_command_before_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD)
    result = call("export", "mine.yaml")
    assert result.exit_code == 2
    assert "run: limbeck compress mine.yaml" in result.stderr


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for command in ("report", "verify"):
        result = call(command, tmp_path)
        assert result.exit_code == 2
        assert "no complete artifact here" in result.stderr
    assert call("report", "gone").exit_code == 2


def test_a_defect_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD)
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: 1 / 0)
    assert isinstance(call("run", "mine.yaml").exception, ZeroDivisionError)


URL = (
    "bench: {scenarios: [single, {kind: server, target: {kind: url, url: 'http://a', "
    "key_variable: VAR}}]}\n"
)


@pytest.mark.parametrize(
    ("variable", "flags", "fine"),
    [
        ("OPENAI_API_KEY", [], True),
        ("LIMBECK_TEST", [], True),
        ("AWS_SECRET_ACCESS_KEY", [], False),
        ("XLIMBECK_TEST", [], False),
        ("OPENAI_API_KEY2", [], False),
        ("AWS_SECRET_ACCESS_KEY", ["--allow-key", "OTHER"], False),
        ("AWS_SECRET_ACCESS_KEY", ["--allow-key", "AWS_SECRET_ACCESS_KEY"], True),
    ],
)
def test_a_recipe_may_not_send_just_any_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, flags: list[str], fine: bool
) -> None:
    monkeypatch.setenv("LIMBECK_KEY_VARIABLES", "")
    (tmp_path / "mine.yaml").write_text(GOOD + URL.replace("VAR", variable))
    result = call("validate", "mine.yaml", *flags)
    assert result.exit_code == (0 if fine else 2), result.stderr
    if not fine:
        assert f"--allow-key {variable}" in result.stderr


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD + '"\\e[2Jkey": 1\n')
    (tmp_path / "base.yaml").write_text('extends: "\\e]0;title\\a.yaml"\n')
    for name in ("mine.yaml", "base.yaml"):
        for command in ("validate", "run"):
            result = call(command, name)
            assert result.exit_code == 2
            assert "\x1b" not in result.output + result.stderr
            assert "\x07" not in result.output + result.stderr
            assert "\\x1b" in result.stderr


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "~nosuchuser/x.yaml"])
def test_paths_that_cannot_be_are_one_message(name: str) -> None:
    for arguments in (["run", name], ["validate", name], ["plan", name]):
        result = call(*arguments)
        assert result.exit_code == 2
        assert isinstance(result.exception, SystemExit)


def test_a_path_may_begin_with_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    assert call("schema", "--out=~/schema.json").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert (home / "schema.json").is_file()
    folder = f"{home}/nothing"
    for arguments in (["report", "~/nothing"], ["bench", "~/nothing", "--against=~/nothing"]):
        assert folder in call(*arguments).stderr
    for arguments in (
        ["schema", "--out=~nosuchuser/x"],
        ["bench", "pico", "--against", "~nosuchuser/x"],
    ):
        result = call(*arguments)
        assert result.exit_code == 2
        assert "there is no such user here" in result.stderr
    (tmp_path / "~copy").write_text("a file of the user's")
    assert "~copy: there is no such user" not in call("report", "~copy").stderr


@pytest.mark.parametrize(
    "override", ["teachers.².name=x", ".".join("a" * 500) + "=1", "seed=[" * 90]
)
def test_sets_that_cannot_be_are_one_message(tmp_path: Path, override: str) -> None:
    (tmp_path / "mine.yaml").write_text(
        GOOD + "teachers: [{name: t, model: {kind: random, config: {model_type: llama}}}]\n"
    )
    result = call("validate", "mine.yaml", "--set", override)
    assert result.exit_code == 2
    assert result.stderr.startswith("--set ")


def test_it_is_said_what_is_learned_of_preferences(tmp_path: Path) -> None:
    messages = [{"role": "assistant", "content": "b"}]
    row = {"prompt": "a", "chosen": messages, "rejected": messages}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    for field in ("chosen", "messages"):
        text = f"{{kind: files, paths: [rows.jsonl], format: {{kind: chat, field: {field}}}}}"
        (tmp_path / "mine.yaml").write_text(GOOD.replace("{kind: stdlib, paths: [abc.py]}", text))
        for command in ("validate", "plan"):
            result = call(command, "mine.yaml")
            assert result.exit_code == 0, result.stderr
            said = "of preferences the chosen answers are learned, each after its prompt"
            assert (f"data.domains.0.text: {said}" in result.stdout) == (field == "chosen")


@pytest.mark.parametrize(
    ("arguments", "after"),
    [
        (["init", "--teacher", "x", "--data", "", "--target-mb", "1"], "--data"),
        (["init", "--teacher", "", "--data", "x", "--target-mb", "1"], "--teacher"),
        (["init", "--teacher", "x", "--data=", "--target-mb", "1"], "--data"),
        (["pack", "", "--out", "x"], "pack"),
        (["run", "pico", "--out", ""], "--out"),
        (["verify", ""], "verify"),
    ],
)
def test_an_empty_argument_is_not_the_folder_that_the_command_runs_in(
    arguments: list[str], after: str
) -> None:
    result = call(*arguments)
    assert (result.exit_code, f"what follows {after} is empty" in result.stderr) == (2, True)
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("inside", [True, False])
def test_a_folder_whose_name_is_not_utf8_is_refused_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path / "runs") + b"\xff"))
    folder.mkdir()
    (weights := folder / "x.safetensors").write_bytes(save({}))
    with pytest.raises(SafetensorError, match="UTF-8"):
        safe_open(weights, "pt")
    weights.unlink()
    monkeypatch.chdir(folder)
    result = call("run", "pico", *(() if inside else ("--out", folder / "pico")))
    assert (result.exit_code, "this path is not UTF-8" in result.stderr) == (2, True)
    result = call("init", "--teacher", folder, "--data", "x", "--target-mb", "1")
    assert (result.exit_code, "this path is not UTF-8" in result.stderr) == (2, True)
    assert list(folder.iterdir()) == []
