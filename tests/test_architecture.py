"""Who may import whom: the one rule of the house that no linter knows."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("compress", "export", "serve_bench")
TOP = ("cli", "pipeline", "plan", "init", "search")
# What the ground floor may import when it is itself imported. heldout serves stages, the others `limbeck serve` alone.
LIGHT = {"yaml", "pydantic", "pydantic_core", "typer", "packaging", "limbeck"}
ALLOWED = {
    "heldout": {"numpy", "safetensors"},
    "examples": {"numpy", "safetensors"},
    "batch": {"numpy"},
    "engine": {"numpy"},
    "server": {"fastapi", "starlette", "uvicorn", "prometheus_client"},
}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every package that a file imports, by its full name, and whether the import runs when the file is imported."""

    def walk(node: ast.AST, eager: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            match child:
                case ast.Import():
                    yield from ((alias.name, eager) for alias in child.names)
                case ast.ImportFrom():
                    assert child.level == 0, f"{path}: relative import"
                    yield str(child.module), eager
                case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                    continue
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                    yield from walk(child, False)
                case _:
                    yield from walk(child, eager)

    yield from walk(ast.parse(path.read_text()), True)


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, package
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_no_other_stage_and_nothing_from_the_top(stage: str) -> None:
    others = set(STAGES) - {stage}
    for path in files(stage):
        for name, _ in imports(path):
            assert name.split(".")[0] not in others, f"{path} imports {name}"
            assert ".".join(name.split(".")[:2]) not in {f"limbeck.{top}" for top in TOP}, f"{path} imports {name}"


def test_the_ground_floor_imports_nothing_heavy_when_it_is_imported() -> None:
    for path in files("limbeck"):
        for name, eager in imports(path):
            package = name.split(".")[0]
            if eager and package not in sys.stdlib_module_names:
                assert package in LIGHT | ALLOWED.get(path.stem, set()), f"{path} imports {name} at its top"


def test_only_the_top_imports_stages_and_only_inside_functions() -> None:
    for path in files("limbeck"):
        for name, eager in imports(path):
            if name.split(".")[0] in STAGES:
                part = path.relative_to(ROOT / "limbeck").parts[0].removesuffix(".py")
                assert part in TOP, f"{path} imports {name}"
                assert not eager, f"{path} imports {name} at its top"


def test_importing_a_stage_is_cheap() -> None:
    for stage in STAGES:
        for name, eager in imports(ROOT / stage / "__init__.py"):
            package = name.split(".")[0]
            assert not eager or package in {*sys.stdlib_module_names, "limbeck"}, f"{stage} imports {name} at its top"


def test_the_reader_of_imports_sees_what_it_should(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(
        "import torch.nn, os\nfrom a.b import c\nif TYPE_CHECKING:\n    import hidden\n"
        "try:\n    import early\nexcept ImportError:\n    pass\nclass C:\n    import inside\n    def f(self):\n        import late\n"
    )
    assert list(imports(path)) == [
        ("torch.nn", True),
        ("os", True),
        ("a.b", True),
        ("early", True),
        ("inside", True),
        ("late", False),
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_no_submodule_takes_the_name_of_a_public_function(stage: str) -> None:
    """Importing ``stage.name`` would replace the function ``stage.name`` for everyone after it."""
    modules = {path.stem for path in (ROOT / stage).glob("*.py")}
    assert not modules & set(__import__(stage).__all__)


def test_what_is_kept_in_the_cache_is_made_by_one_process_at_a_time() -> None:
    keepers = [path for path in files("compress") if "cache_folder()" in path.read_text()]
    assert keepers
    for path in keepers:
        assert "limbeck.artifact.write_artifact" not in {
            f"{node.module}.{alias.name}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }, f"{path}: two runs would delete each other's files; use limbeck.lock.make_once"
