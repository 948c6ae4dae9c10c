"""Commands as a user types them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner, Result

from limbeck.app.cli import app

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
    "cache",
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
    return called_alone(*arguments)[1]


def called_alone(*arguments: str) -> tuple[str, set[str]]:
    """What a command writes to stderr in a process of its own, and heavy packages it imports."""
    code = (
        "import sys\nfrom limbeck.app import cli\nsys.argv = ['limbeck', *sys.argv[1:]]\n"
        "try:\n    cli.main()\nfinally:\n    print('\\n', *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    *said, modules = done.stderr.splitlines()
    return "\n".join(said), set(modules.split()) & set(HEAVY)
