"""Other programs that load the exported folder, each in an environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from limbeck.contract.artifact import Artifact

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / ".venvs"
PROGRAMS = {
    "genai": [sys.executable, str(HERE / "genai.py")],
    "transformers-js": ["node", str(HERE / "transformers_js.mjs")],
    "optimum": [str(ENVIRONMENTS / "optimum/bin/python"), str(HERE / "optimum_onnx.py")],
}


@dataclass(frozen=True)
class Job:
    """What a program is asked: greedy answers to token ids, texts and a chat."""

    exported: Artifact
    forms: Sequence[str]
    prompts: Sequence[list[int]]  # one ragged batch
    alone: list[int]
    count: int  # new tokens of an answer
    pad: int
    texts: Sequence[str]
    messages: Sequence[dict[str, str]] = ()  # none for a tokenizer without a chat template

    def to_json(self) -> str:
        """The text that a program reads. ``ids`` and ``mask`` are padded on the left."""
        width = max(len(prompt) for prompt in self.prompts)
        graphs = {form: self.exported.result["forms"][form]["graph"] for form in self.forms}
        return json.dumps(
            {
                "folder": str(self.exported.path),
                "forms": list(self.forms),
                "files": {form: Path(graph).name for form, graph in graphs.items()},
                "prompts": self.prompts,
                "pad": self.pad,
                "ids": [[self.pad] * (width - len(row)) + row for row in self.prompts],
                "mask": [[0] * (width - len(row)) + [1] * len(row) for row in self.prompts],
                "alone": self.alone,
                "count": self.count,
                "texts": self.texts,
                "messages": self.messages,
            }
        )


def require_program(name: str) -> None:
    """Skip the test unless the environment of the program exists."""
    if name != "genai" and not (ENVIRONMENTS / name / ".ready").is_file():
        pytest.skip(f"{ENVIRONMENTS / name} is not set up; run: make test-clients")


def ask(program: str, job: Job) -> dict[str, Any]:
    """Token ids and texts that the program answers with, by form."""
    done = subprocess.run(
        PROGRAMS[program],
        input=job.to_json(),
        capture_output=True,
        text=True,
        cwd=HERE.parent if program == "genai" else ENVIRONMENTS / program,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def until_end(tokens: list[int], end: Collection[int]) -> list[int]:
    """Tokens before the first of ``end``."""
    return tokens[: next((at for at, token in enumerate(tokens) if token in end), len(tokens))]
