"""The command line: what a stranger types, what comes back, and with which exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from limbeck import __version__
from limbeck.app import doctor
from limbeck.app import run as pipeline
from limbeck.app.cli import app
from limbeck.contract.artifact import open_artifact
from limbeck.contract.errors import EnvironmentalError
from limbeck.contract.recipe import Recipe, load_recipe, shipped_recipes
from tests import ROOT
from tests.pico import make_model, make_student, pico_recipe

HEAVY = (
    "torch",
    "numpy",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxruntime_genai",
    "matplotlib",
    "scipy",
)
COMMANDS = (
    "recipes",
    "validate",
    "schema",
    "init",
    "plan",
    "run",
    "compress",
    "export",
    "bench",
    "ablate",
    "search",
    "report",
    "verify",
    "compare",
    "eval",
    "pack",
    "push",
    "sbom",
    "sign",
    "generate",
    "serve",
    "doctor",
)
GOOD = """
name: mine
data: {domains: [{name: code, text: {kind: stdlib, paths: [abc.py]}}], block: 32}
student: {kind: lora, base: {kind: random, config: {model_type: llama}}}
training: {tokens: 64, batch_tokens: 32}
"""


def call(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


def imported_by(*arguments: str) -> set[str]:
    """Heavy packages that a command imports, in a process of its own."""
    code = (
        "import sys\nfrom limbeck.app import cli\nsys.argv = ['limbeck', *sys.argv[1:]]\n"
        "try:\n    cli.main()\nfinally:\n    print('\\n', *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return set(done.stderr.splitlines()[-1].split()) & set(HEAVY)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# Help ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["recipes"], ["validate", "pico", "smollm2/135m-two-experts"]],
)
def test_what_must_answer_at_once_imports_nothing_heavy(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert imported_by(*arguments) == set()


def test_help_does_not_load_recipes() -> None:
    """Half a second of pydantic stands between a user and the help."""
    code = (
        "import sys\nfrom limbeck.app import cli\nsys.argv = ['limbeck', '--help']\n"
        "try:\n    cli.main()\nfinally:\n    print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"pydantic", "yaml", "rich", "importlib.metadata"} & set(done.stderr.split())


def test_help_has_colours_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    painted = CliRunner().invoke(app, ["run", "--help"], color=True).output
    assert "\x1b[1mOptions:\x1b[0m" in painted
    assert "\x1b" not in call("run", "--help").output
    assert re.sub(r"\x1b\[\d*m", "", painted) == call("run", "--help").output
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in CliRunner().invoke(app, ["run", "--help"], color=True).output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands(shell: str) -> None:
    environment = {
        **os.environ,
        "_LIMBECK_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": "limbeck ver",
        "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "limbeck ver",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    code = "from limbeck.app.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert "verify" in done.stdout
    assert "compress" not in done.stdout


def test_help_lists_every_command() -> None:
    out = call("--help").output
    listed = re.findall(r"^  (\w+) ", out.split("Commands:")[1], re.MULTILINE)
    assert tuple(listed) == COMMANDS
    assert call().exit_code == 2
    versions = call("--version").output.splitlines()
    assert versions[0] == f"limbeck {__version__}"
    assert f"onnxruntime {metadata.version('onnxruntime')}" in versions
    assert __version__ == metadata.version("limbeck")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_and_describes_what_it_takes(command: str) -> None:
    out = call(command, "-h").output
    assert f"  limbeck {command}" in out
    for line in out.split("Options:")[1].splitlines():
        assert not re.fullmatch(r"  --\S+( \S+)?", line), (
            line
        )  # an option without a word of explanation


@pytest.mark.parametrize(
    "arguments", [["nope"], ["run"], ["run", "--nope"], ["generate", "x"], ["validate"]]
)
def test_usage_mistakes_exit_2(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr


# Recipes ------------------------------------------------------------------------------------------


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


# Bad input, in the words of issue 2 ---------------------------------------------------------------


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


def test_missing_files_and_empty_text_are_told_before_anything_runs(tmp_path: Path) -> None:
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


def test_set_is_applied_and_its_mistakes_are_told(
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


# Stopping -----------------------------------------------------------------------------------------

ENDLESS = """
import sys, time
import compress
from limbeck.app import cli
from limbeck.runtime import session as runtime
def distill(**_):
    print("working", flush=True)
    time.sleep(60)
compress.distill = distill
runtime.import_onnxruntime = lambda: None
sys.argv = ["limbeck", "run", "mine.yaml"]
cli.main()
"""


def _hears_ctrl_c() -> None:
    """A shell lets what it starts in the background ignore SIGINT, and children inherit that: undo
    it in the child."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD)
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_hears_ctrl_c,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert out == ""
    assert err.splitlines() == ["== compress", "", "stopped; run the same command again to go on"]


def test_a_reader_that_leaves_is_no_error() -> None:
    command = (
        f"{sys.executable} -c 'from limbeck.app.cli import main; main()' recipes --json | head -c "
        ""
        ""
        ""
        f"1; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[", "")


# Generate -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny student, exported by the real stage."""
    import export

    folder = tmp_path_factory.mktemp("exported")
    make_student(folder / "student", make_model(folder / "model"))
    export.export_student(student=folder / "student", out=folder / "onnx", recipe=pico_recipe())
    return folder / "onnx"


def test_generate_streams_the_same_text_from_folder_and_run(exported: Path, tmp_path: Path) -> None:
    first = call("generate", exported, "abc", "--max-new-tokens", "8", "--threads", "1")
    assert first.exit_code == 0, first.output
    assert first.stdout.endswith("\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "run" / "onnx").symlink_to(exported)
    assert call("generate", tmp_path / "run", "abc", "--max-new-tokens", "8").stdout == first.stdout
    assert (
        call("generate", exported, "-", "--max-new-tokens", "8", stdin="abc").stdout == first.stdout
    )
    assert (
        call("generate", exported, "abc", "--max-new-tokens", "8", "--form", "fp32").exit_code == 0
    )
    drawn = [
        call(
            "generate",
            exported,
            "abc",
            "--max-new-tokens",
            "8",
            "--temperature",
            "5",
            "--seed",
            seed,
        ).stdout
        for seed in ("1", "1", "2")
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert (
        call("generate", exported, "abc", "--max-new-tokens", "8", "--chat").stdout != first.stdout
    )
    greedy = call(
        "generate", exported, "abc", "--max-new-tokens", "8", "--temperature", "5", "--top-p", "0"
    ).stdout
    assert greedy == first.stdout


def test_generate_imports_no_torch(exported: Path) -> None:
    assert imported_by("generate", str(exported), "abc", "--max-new-tokens", "2") == {
        "numpy",
        "onnxruntime",
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["abc", "--form", "int2"], "no form 'int2'; it has fp32, int8-weight"),
        ([""], "the prompt is empty"),
        (["abc", "--max-new-tokens", "1000"], "this model's context is 64"),
        (["abc", "--top-p", "2"], "Invalid value for '--top-p'"),
        (["abc", "--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["abc", "--threads", "100000"], "Invalid value for '--threads'"),
        (["abc", "--temperature", "nan"], "Invalid value for '--temperature'"),
        (["abc", "--top-p", "nan"], "Invalid value for '--top-p'"),
        (["abc", "--temperature", "inf"], "Invalid value for '--temperature'"),
        (["abc", "--seed", str(2**70)], "Invalid value for '--seed'"),
    ],
)
def test_generate_mistakes(exported: Path, arguments: list[str], expected: str) -> None:
    result = call("generate", exported, *arguments)
    assert result.exit_code == 2
    assert expected in result.stderr


def test_generate_of_something_else(tmp_path: Path) -> None:
    result = call("generate", tmp_path, "abc")
    assert result.exit_code == 2
    assert "no complete artifact here" in result.stderr


@pytest.mark.parametrize("command", ["generate", "serve", "eval", "pack", "verify"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mine.yaml", "mine.yaml: is a recipe, and `limbeck {command}` takes what a run made"),
        ("pico", "pico: is a recipe"),
        ("model", "model: is a model folder, not an exported student"),
        ("adapter", "adapter: is a PEFT adapter"),
        ("model.onnx", "model.onnx: is an ONNX graph"),
        ("notes.txt", "notes.txt: is a file"),
        ("gone", "gone: no such folder"),
    ],
)
def test_something_else_is_named_with_the_command_it_wants(
    tmp_path: Path, command: str, name: str, expected: str
) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD)
    for folder, file in (("model", "config.json"), ("adapter", "adapter_config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    for file in ("model.onnx", "notes.txt"):
        (tmp_path / file).write_text("x")
    more = {"generate": ["hello"], "eval": ["--tasks", "x"], "pack": ["--out", "packed"]}
    result = call(command, name, *more.get(command, []))
    assert result.exit_code == 2
    assert expected.format(command=command) in result.stderr
    if name == "mine.yaml" and command == "verify":
        assert "`limbeck validate mine.yaml`" in result.stderr


# Strangers ----------------------------------------------------------------------------------------

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


def test_verify_measures_a_real_artifact_again(exported: Path) -> None:
    result = call("verify", exported)
    assert result.exit_code == 0, result.output
    assert re.search(r"^int8-weight +\d+ ", result.stdout, re.MULTILINE)
    assert result.stdout.endswith("\nverified\n")


def test_compare_mistakes(tmp_path: Path) -> None:
    for given in ("speed", "speed=much", "speed=-1", "luck=0.1"):
        result = call("compare", "a", "b", "--tolerance", given)
        assert result.exit_code == 2
        assert f"--tolerance {given}: expected one of speed, quality, size, memory" in result.stderr
    result = call("compare", tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 2
    assert "no measured run here" in result.stderr


# Doctor -------------------------------------------------------------------------------------------


def test_doctor_finds_this_machine_able() -> None:
    result = call("doctor", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0, found["missing"]
    assert found["able"]
    assert "CPUExecutionProvider" in found["onnx runtime"]["execution providers"]
    assert found["machine"]["cores"] >= 1
    assert found["libraries"]["torch"] == metadata.version("torch")
    shown = call("doctor").stdout
    assert shown.startswith("this machine can run Limbeck\n")
    assert "transformers" not in shown
    assert f"transformers {' ' * 16}".strip() in call("doctor", "--all").stdout


def test_doctor_imports_no_torch() -> None:
    assert imported_by("doctor") == {"numpy", "onnxruntime"}


def test_doctor_says_what_is_missing_and_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in {"peft", "onnxruntime-genai", "uvicorn"}:
            raise metadata.PackageNotFoundError(name)
        return "4.57.0" if name == "transformers" else real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    monkeypatch.setattr(doctor, "import_onnxruntime", lambda: _refuse("both are installed"))
    result = call("doctor")
    assert result.exit_code == 2
    for expected in (
        "peft is not installed; run: pip install 'peft>=",
        "transformers is 4.57.0, expected <6,>=5.",
        "both are installed",
        "limbeck serve needs uvicorn, which nothing else does; run: pip install 'limbeck[serve]'",
        "onnxruntime-genai is not installed and builds the graphs; run: pip install 'limbeck[cpu]'",
        "this machine cannot run Limbeck yet",
    ):
        assert expected in result.stdout


def _refuse(message: str) -> Any:
    raise EnvironmentalError(message)


def test_doctor_advises_about_a_gpu_that_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA Test, 80000 MiB, 600.1'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = json.loads(call("doctor", "--json").stdout)
    assert found["gpu"]["cards"] == ["NVIDIA Test, 80000 MiB, 600.1"]
    if found["onnx runtime"]["onnxruntime-gpu"] is None:
        assert any("onnxruntime is built for the CPU" in line for line in found["advice"])


# The whole job ------------------------------------------------------------------------------------


def test_pico_stopped_in_training_goes_on_to_a_verdict(tmp_path: Path) -> None:
    """The installed command, as a user meets it: stopped by Ctrl-C, started again, and once more
    when all is done."""
    command = [
        sys.executable,
        "-c",
        "from limbeck.app.cli import main; main()",
        "run",
        "pico",
        "--out",
        "out",
    ]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=_hears_ctrl_c,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "training pico" in line:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "stopped; run the same command again to go on"
    assert not (tmp_path / "out" / "student").exists()

    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "verdict: pass" in done.stdout
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    digests = [
        open_artifact(tmp_path / "out" / name).digest for name in ("student", "onnx", "bench")
    ]

    light = {"numpy", "onnxruntime", "matplotlib", "scipy"}  # no torch, transformers or onnx
    assert imported_by("run", "pico", "--out", "out") <= light
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert again.stderr.count("already complete") == 3
    assert [
        open_artifact(tmp_path / "out" / name).digest for name in ("student", "onnx", "bench")
    ] == digests
    assert (
        load_recipe("pico").digest
        == json.loads((tmp_path / "out" / "run.json").read_text())["digest"]
    )


@pytest.mark.slow
def test_two_processes_share_the_training_and_the_first_does_the_rest(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "limbeck",
        "run",
        "pico",
        "--out",
        "out",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [done.stderr.count(f"== {stage}") for stage in ("compress", "export", "bench")] == [
        1,
        1,
        1,
    ]
    assert done.stdout.count("verdict: pass") == 1
    assert open_artifact(tmp_path / "out" / "student").result["steps"] > 0
