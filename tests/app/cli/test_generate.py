"""Commands on an exported folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.app.cli.calls import GOOD, call, imported_by
from tests.factory import Factory


@pytest.fixture(scope="module")
def exported(tiny: Factory) -> Path:
    """A tiny student, exported by the real stage."""
    return tiny.exported().path


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
        ([""], "is empty; give it a value"),
        (["-"], "the prompt is empty"),
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
