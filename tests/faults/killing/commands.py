"""Commands that write beside a run, to be killed: report, push, schema, plan, the teacher cache,
the ablation, the search.

What a command writes to the system's temporary folder counts too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from limbeck.contract.artifact import open_artifact
from tests.faults.killing import job
from tests.faults.killing.events import Case
from tests.serve_bench.tell.runs import make_run
from tests.serve_bench.tell.runs import recipe as demo
from tests.servers.fake_hub import FakeHub

_NAME = "me/kills"

_SEARCH = (
    "--set", "budget.size_mb=0.6", "--set", "budget.tpot_ms=50", "--set", "training.tokens=1024",
    "--set", "bench.minutes=0.02", "--set", "search.depths=[0.5]", "--set", "search.widths=[1]",
    "--set", "search.rungs=[512]",
)  # fmt: skip


@contextmanager
def cases(prepared: Path) -> Iterator[tuple[Case, ...]]:
    """The commands; ``prepared`` is a folder that `job.prepare` has filled."""
    make_run(prepared / "demo" / "run", demo())
    (prepared / "demo" / "run" / "run.json").write_text("{}")
    with FakeHub() as hub:

        def push(folder: Path) -> None:
            import huggingface_hub.constants as constants

            constants.ENDPOINT, constants.HF_HUB_OFFLINE = hub.url, False
            os.environ["HF_TOKEN"] = "secret"
            _call(folder, "push", folder / "run", _NAME)

        def pushed(_: Path) -> Any:
            return {
                name: name == "manifest.json" or hashlib.sha256(content).hexdigest()  # it has times
                for name, content in hub.repositories[_NAME].items()
            }

        def copy_of(stage: str) -> Callable[[Path], None]:
            return lambda folder: shutil.copytree(
                prepared / stage, folder, symlinks=True, dirs_exist_ok=True
            )  # fmt: skip

        yield (
            Case("command, schema", _command("schema", "--out", "schema.json"), _files),
            Case("command, report", _command("report", "run"), _files, prepare=copy_of("demo")),
            Case("command, compare", _command("compare", "run", "run"), _files,
                 prepare=copy_of("demo")),
            Case("command, plan", _command("plan", "recipe.yaml", "--trial"), _files,
                 prepare=_recipe),
            Case("command, push", push, pushed, prepare=copy_of("export")),
            Case("command, cache", _command("cache", "recipe.yaml"), _teachers, prepare=_recipe),
            Case("command, ablate",
                 _command("ablate", "recipe.yaml", "--out", "run", "--arms", "uniform",
                          "--seeds", "1"),
                 _ablation, prepare=_recipe),
            Case("command, search", _command("search", "pico", "--out", "search", *_SEARCH),
                 _searched),
        )  # fmt: skip


def _call(folder: Path, *arguments: str | Path) -> None:
    """Run a command in a forked process. It must end with a verdict, not with an error."""
    from limbeck.app.cli.base import app

    tempfile.tempdir = str(folder)
    os.environ["LIMBECK_CACHE"] = str(folder / "cache")
    os.chdir(folder)
    code = app([str(a) for a in arguments], standalone_mode=False)
    if code not in (None, 0, 1, 3):
        raise RuntimeError(f"exit code {code}")


def _command(*arguments: str) -> Callable[[Path], None]:
    return lambda folder: _call(folder, *arguments)


def _recipe(folder: Path) -> None:
    tree = job.recipe().model_dump(mode="json", exclude_unset=True)
    tree["training"]["teacher_cache"] = {"kind": "hidden"}
    (folder / "recipe.yaml").write_text(json.dumps(tree))


def _files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (".lock", "log.jsonl") and not _made(path)
    }


def _made(path: Path) -> bool:
    """A file of an artifact, or of the cache: made anew, its manifest has another time."""
    return path.name == "manifest.json" or "cache" in path.parts


def _teachers(folder: Path) -> list[str]:
    return sorted(
        open_artifact(path.parent).digest
        for path in (folder / "cache" / "teachers").rglob("manifest.json")
    )


def _ablation(folder: Path) -> Any:
    found = json.loads((folder / "run" / "ablation" / "ablation.json").read_text())
    return json.dumps(_without_times(found))


def _without_times(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _without_times(v) for k, v in tree.items() if "second" not in k}
    return [_without_times(v) for v in tree] if isinstance(tree, list) else tree


def _searched(folder: Path) -> Any:
    return sorted(path.name for path in (folder / "search").iterdir())
