"""Help, completion and `limbeck doctor`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from limbeck import __version__
from limbeck.app import doctor
from limbeck.app.cli import app
from limbeck.contract.errors import EnvironmentalError
from tests.app.cli.calls import COMMANDS, call, imported_by

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


@pytest.mark.parametrize(
    ("memory", "free", "overflows", "writable"), [(4, 1, True, False), (64, 100, False, True)]
)
def test_doctor_advises_about_the_machine(
    monkeypatch: pytest.MonkeyPatch, memory: int, free: int, overflows: bool, writable: bool
) -> None:
    machine = doctor.host() | {"memory_bytes": memory * 10**9}
    room = shutil.disk_usage("/")._replace(free=free * 10**9)
    monkeypatch.setattr(doctor, "host", lambda: machine)
    monkeypatch.setattr(doctor, "sums_overflow", lambda: overflows)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: room)
    monkeypatch.setattr(doctor.os, "access", lambda *_: writable)
    found = call("doctor", "--json")
    said = json.loads(found.stdout)
    text = "\n".join([*said["missing"], *said["advice"]])
    assert found.exit_code == (0 if writable else 2)
    for expected, is_said in (
        ("this processor has no VNNI", overflows),
        ("the demo needs about 8.0 GB of memory; `limbeck run pico` needs 2 GB", memory < 8),
        ("the demo writes about 4.0 GB; free some room or set LIMBECK_CACHE", free < 4),
        ("the demo writes about 4.0 GB; free some room or name another disk with --out", free < 4),
        ("cannot be written; set LIMBECK_CACHE to another folder", not writable),
        ("cannot be written; go to another folder, or use --out", not writable),
    ):
        assert (expected in text) == is_said, expected


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
