"""``python -m tests.compress.teachers.killed_build FOLDER URL MODEL``: a build, to be killed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.compress.teachers.test_served import rows_of, served

if __name__ == "__main__":
    folder, url, model = sys.argv[1:]
    server: Any = SimpleNamespace(url=url)
    served(Path(folder), server, Path(model)).prepare(rows_of(20))
