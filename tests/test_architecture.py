"""Rules about imports that import-linter (the layers, in pyproject.toml) cannot check."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

STAGES = ("compress", "export", "serve_bench")
# Packages that importing `limbeck` may load: `limbeck --help` must stay quick.
LIGHT = {"yaml", "pydantic", "pydantic_core", "typer", "packaging", "limbeck"}
_ARRAYS, _FILES = {"numpy"}, {"numpy", "safetensors"}
ALLOWED = {  # modules that stages and functions import, never the command line at its top
    "limbeck/contract/data/arrays.py": _ARRAYS,
    "limbeck/contract/data/examples.py": _FILES,
    "limbeck/contract/data/heldout.py": _FILES,
    "limbeck/contract/data/tensors.py": _FILES,
    "limbeck/contract/models/alignment.py": _ARRAYS | {"tokenizers"},
    "limbeck/runtime/decoder.py": _ARRAYS,
    "limbeck/runtime/encoder.py": _ARRAYS,
    "limbeck/runtime/grammar.py": _ARRAYS,
    "limbeck/runtime/endpoint.py": {"httpx2"},
    "limbeck/runtime/sampling.py": _ARRAYS,
}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Full name of every import of a file, and whether it runs when the file is imported."""

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


def test_limbeck_imports_nothing_heavy_when_it_is_imported() -> None:
    for path in files("limbeck"):
        for name, eager in imports(path):
            package = name.split(".")[0]
            if eager and package not in sys.stdlib_module_names:
                allowed = ALLOWED.get(str(path.relative_to(ROOT)), set())
                assert package in {*LIGHT, *STAGES} | allowed, f"{path} imports {name} at its top"


def test_the_command_line_imports_stages_only_inside_functions() -> None:
    for path in files("limbeck/app"):
        for name, eager in imports(path):
            if name.split(".")[0] in STAGES and name != "serve_bench.serve.limits":
                assert not eager, f"{path} imports {name} at its top"


def test_peft_is_loaded_only_where_it_is_used() -> None:
    """It loads bitsandbytes and with it torch's compiler: three seconds of a processor."""
    for package in ("limbeck", *STAGES):
        for path in files(package):
            for name, eager in imports(path):
                heavy = name.split(".")[0] in {"peft", "bitsandbytes"}
                assert not (heavy and eager), f"{path} imports {name} at its top"


def test_importing_a_stage_is_cheap() -> None:
    for stage in STAGES:
        for name, eager in imports(ROOT / stage / "__init__.py"):
            package = name.split(".")[0]
            assert not eager or package in {*sys.stdlib_module_names, "limbeck"}, (
                f"{stage} imports {name} at its top"
            )


def test_the_reader_of_imports_sees_what_it_should(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(
        "import torch.nn, os\nfrom a.b import c\nif TYPE_CHECKING:\n    import hidden\n"
        "try:\n    import early\nexcept ImportError:\n    pass\n"
        "class C:\n    import inside\n    def f(self):\n        import late\n"
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
    modules = {path.stem for path in (ROOT / stage).iterdir()}
    assert not modules & set(__import__(stage).__all__)


def test_what_is_kept_in_the_cache_is_made_by_one_process_at_a_time() -> None:
    keepers = [path for path in files("compress") if "cache_folder()" in path.read_text()]
    assert keepers
    for path in keepers:
        assert "limbeck.contract.artifact.write_artifact" not in {
            f"{node.module}.{alias.name}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }, f"{path}: two runs would delete each other's files; use limbeck.contract.lock.make_once"


def _opens_text(call: ast.Call) -> bool:
    """Whether a call reads or writes text in the encoding of the machine's locale."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    named = any(keyword.arg == "encoding" for keyword in call.keywords)
    if name == "read_text":
        return not (call.args or named)
    if name == "write_text":
        return len(call.args) < 2 and not named
    mode = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else None
    text = isinstance(mode, str) and mode[:1] in tuple("rwax") and "b" not in mode
    return name == "open" and text and not named


def test_text_files_are_utf8_on_every_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in ("limbeck", *STAGES)
        for path in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and _opens_text(node)
    ]
    assert found == []


def test_folders_and_files_stay_small() -> None:
    """At most 14 modules a folder, 500 lines a file and 60 a function; ruff holds lines to 100
    characters."""
    ours = [p for name in ("limbeck", *STAGES, "tests", "docs") for p in files(name)]
    folders = Counter(path.parent for path in ours)
    assert {str(folder): n for folder, n in folders.items() if n > 14} == {}
    long = {
        str(path): len(path.read_text("utf-8").splitlines())
        for path in ours
        if "tests" not in path.parts
    }
    assert {path: lines for path, lines in long.items() if lines > 500} == {}
    functions = {
        f"{path}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in long
        for node in ast.walk(ast.parse(Path(path).read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in functions.items() if lines > 60} == {}
