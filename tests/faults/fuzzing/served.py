"""``python -m tests.faults.fuzzing.served [SEED] [SECONDS]``: schemathesis against `limbeck serve`.

It reads the server's own OpenAPI document, makes bodies that keep and break it, and fails on an
answer of 500, on one that the document does not describe, and on one that takes longer than 10 s.
It runs in an environment of its own (`make fuzz`).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests import ROOT
from tests.factory import Factory
from tests.serve_bench.serve.asking import serving

_PROGRAM = ROOT / ".venvs" / "schemathesis" / "bin" / "st"
_CHECKS = "not_a_server_error,response_schema_conformance,content_type_conformance"


def main(seed: str = "1", seconds: str = "60") -> int:
    """Exit code of schemathesis, which prints its table and the seed."""
    with tempfile.TemporaryDirectory(prefix="limbeck-fuzz-") as root:
        with serving(Factory(Path(root)).exported().path) as server:
            command = [
                _PROGRAM, "run", f"{server.address}/openapi.json", "--seed", seed, "--max-time",
                seconds, "--checks", _CHECKS, "--max-response-time", "10", "--no-color",
                "--continue-on-failure", "--warnings", "off",
            ]  # fmt: skip
            return subprocess.run(command, cwd=root, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
