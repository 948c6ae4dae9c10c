"""The documents are true: commands, recipes, Python calls, links and named files exist and fit."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel

from limbeck.app.cli import app
from limbeck.contract.recipe import parse_any_recipe

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
GENERATED = {ROOT / "docs" / "reference.md", ROOT / "docs" / "commands.md"}  # by docs/reference.py
PYTHON_NAMES = {"export.export_student"}  # not fields of a recipe
BASE = """
name: part
data: {domains: [{name: a, text: {kind: files, paths: [a]}}]}
student: {kind: fresh, config: {}}
training: {tokens: 2048}
"""


def blocks(language: str) -> Iterator[tuple[Path, str]]:
    """Fenced code of one language in every document."""
    for path in DOCUMENTS:
        for fence, text in re.findall(
            r"^```(\w*)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL
        ):
            if fence == language:
                yield path, text


def shell_commands(program: str) -> list[list[str]]:
    lines = [line for _, text in blocks("sh") for line in text.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line and line[0] == program]


def names_in_code(path: Path) -> Iterator[str]:
    """Everything between single backticks outside fenced code."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"`([^`\n]+)`", text)


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """docs/reference.py, which makes pages when the site is built."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("words", shell_commands("limbeck"), ids=" ".join)
def test_every_command_exists_with_its_options(words: list[str]) -> None:
    assert words[1] in COMMANDS
    command = COMMANDS[words[1]]
    context = command.make_context(words[1], words[2:])  # parses, and runs nothing
    assert context.params


def test_the_documents_show_every_command() -> None:
    shown = {words[1] for words in shell_commands("limbeck")}
    assert shown == set(COMMANDS)


def test_the_readme_stays_short() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 120
    assert len(readme.encode()) <= 7000


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    benchmarks = {
        p.stem.replace("_", "-") for p in (ROOT / "tests" / "benchmarks").rglob("bench_*.py")
    }
    for path in DOCUMENTS:
        text = path.read_text()
        named = re.findall(r"`make ([\w-]+)[^`]*`", text) + re.findall(
            r"^make ([\w-]+)", text, re.MULTILINE
        )
        for target in named:
            assert target in targets | benchmarks, f"{path.name}: make {target}"


def test_every_recipe_is_valid() -> None:
    found = list(blocks("yaml"))
    assert found
    for path, text in found:
        tree = yaml.safe_load(text)
        if text.startswith("# part of a recipe"):
            tree = yaml.safe_load(BASE) | tree
        parse_any_recipe(tree, where=path.name)


def test_every_python_call_of_ours_fits() -> None:
    found = list(blocks("python"))
    assert found
    for _, text in found:
        names: dict[str, Any] = {}
        for node in ast.walk(ast.parse(text)):
            match node:
                case ast.Import():
                    names |= {
                        alias.name: importlib.import_module(alias.name) for alias in node.names
                    }
                case ast.ImportFrom():
                    source = importlib.import_module(str(node.module))
                    names |= {alias.name: getattr(source, alias.name) for alias in node.names}
        ours = 0
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                match node.func:
                    case ast.Attribute(value=ast.Name(id=module), attr=attribute) if (
                        inspect.ismodule(names.get(module))
                    ):
                        function = getattr(names[module], attribute)
                    case ast.Name(id=name) if name in names:
                        function = names[name]
                    case _:
                        continue
                inspect.signature(function).bind(
                    *node.args, **{str(k.arg): k.value for k in node.keywords}
                )
                ours += 1
        assert ours


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_internal_link_exists(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if not re.match(r"[a-z]+:", target):
            file = (path.parent / target).resolve()
            assert file in GENERATED or file.exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_named_file_and_module_exists(path: Path) -> None:
    """Files and modules that a page names in backticks. The changelog is about the past."""
    if path.name == "CHANGELOG.md":
        return
    for name in names_in_code(path):
        if re.fullmatch(r"(limbeck|compress|export|serve_bench|tests|recipes|docs)/[\w./-]+", name):
            assert (ROOT / name).exists(), name
        if re.fullmatch(r"(limbeck\.(app|runtime|contract)|serve_bench)(\.\w+)+", name):
            folders = [ROOT.joinpath(*name.split(".")[:depth]) for depth in range(2, 7)]
            assert any(f.is_dir() or f.with_suffix(".py").is_file() for f in folders), name


def test_every_page_that_the_code_names_exists() -> None:
    """Docstrings, messages and recipes that send a reader to a page."""
    named = set()
    for folder in ("limbeck", "compress", "export", "serve_bench", "recipes", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".html", ".jinja"):
                found = re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text())
                named |= {(name, path.relative_to(ROOT).as_posix()) for name in found}
    assert named
    assert not [(name, where) for name, where in sorted(named) if not (ROOT / name).exists()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_named_recipe_field_exists(path: Path, generator: ModuleType) -> None:
    """`training.tokens`, `export.mixed` … are fields of a recipe, at every depth."""
    schemas = [cls.model_json_schema() for cls in generator.recipe_classes()]
    parts = set().union(*(schema["properties"] for schema in schemas)) - {"name", "task"}

    def below(schema: Any, root: Any) -> Iterator[Any]:
        """The objects that a field may hold, references and choices resolved."""
        if "$ref" in schema:
            yield from below(root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root)
        for key in ("anyOf", "oneOf"):
            for part in schema.get(key, ()):
                yield from below(part, root)
        if "items" in schema:
            yield from below(schema["items"], root)
        if "properties" in schema:
            yield schema

    def exists(keys: list[str], schema: Any, root: Any) -> bool:
        if not keys or keys[0].isdigit():
            return not keys or exists(keys[1:], schema, root)
        return any(
            exists(keys[1:], choice["properties"][keys[0]], root)
            for choice in below(schema, root)
            if keys[0] in choice["properties"]
        )

    for name in names_in_code(path):
        field = re.match(r"([a-z_]+(?:\.\w+)+)(?=$|[:= ])", name)
        if name in PYTHON_NAMES or re.search(r"\.(md|yaml|json|jsonl|svg|db|py|html)$", name):
            continue
        if field and (keys := field[1].split("."))[0] in parts:
            assert any(exists(keys, schema, schema) for schema in schemas), name


def test_the_reference_has_every_field_with_its_default(generator: ModuleType) -> None:
    page = generator.recipes_page()
    teacher = {"name": "a", "model": {"kind": "local", "path": "a"}}
    recipe = parse_any_recipe(yaml.safe_load(BASE) | {"teachers": [teacher]})

    def check(node: Any) -> None:
        """A row for each field of a recipe as pydantic read it, with the default's value."""
        for name, field in type(node).model_fields.items():
            value = getattr(node, name)
            if name == "kind":
                continue
            assert f"| `{name}` |" in page
            if isinstance(value, bool | int | float | str) and field.default == value and value:
                shown = str(value).lower() if isinstance(value, bool) else str(value)
                row = rf"\| `{name}` \|.*\| `{re.escape(shown)}` \|"
                assert re.search(row, page), f"{type(node).__name__}.{name} = {shown}"
            if isinstance(value, BaseModel):
                check(value)

    check(recipe)
    for task in ("causal-lm", "classification", "embedding"):
        assert f"## `task: {task}`" in page


def test_the_command_reference_has_every_option(generator: ModuleType) -> None:
    page = generator.commands_page()
    for name, command in COMMANDS.items():
        section = page.partition(f"## limbeck {name}\n")[2].partition("\n## limbeck ")[0]
        usage = command.make_context(name, [], resilient_parsing=True).get_help()
        options = set(re.findall(r"--[a-z][a-z-]+", re.sub(r"\x1b\[[\d;]*m", "", usage)))
        assert options - {"--help"} <= set(re.findall(r"--[a-z][a-z-]+", section)), name


def test_the_site_is_whole_and_loads_nothing_from_the_network(tmp_path: Path) -> None:
    """mkdocs in strict mode: every page is in the navigation, every link and anchor exists.

    Not with --quiet, which hides warnings from the strict mode too.
    """
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "reference.html").is_file()
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?([^\"'\s>]+)"
            r"|<link\b[^>]*rel=[\"']?(?:stylesheet|preconnect|icon)[^>]*href=[\"']?([^\"'\s>]+)",
            page.read_text(),
        )
        assert loaded
        for address in itertools.chain(*loaded):
            assert not re.match(r"(https?:)?//", address), f"{page.name} loads {address}"


def test_data_packages_of_the_readme_and_the_recipes_agree() -> None:
    pinned = dict(
        re.findall(
            r"^([\w-]+)==([\w.]+)", (ROOT / "requirements-data.txt").read_text(), re.MULTILINE
        )
    )
    for recipe in (ROOT / "recipes").rglob("*.yaml"):
        for package, version in re.findall(
            r"package: ([\w-]+), version: ([\w.]+)", recipe.read_text()
        ):
            assert pinned[package] == version, recipe


def test_every_dependency_is_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [
        *project["dependencies"],
        *itertools.chain(*project["optional-dependencies"].values()),
    ]
    explained = (ROOT / "docs" / "dependencies.md").read_text().lower()
    for line in declared:
        name = re.split(r"[\[<>=;, ]", line)[0].lower()
        if not name.startswith("types-"):
            assert name.removesuffix("-cuda") in explained, name


def test_every_environment_of_the_makefile_names_its_version_of_torch() -> None:
    """A torch without a version brings gigabytes of CUDA, which filled the disk of a CI run."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    installs = [word for line in lines if "pip install" in line for word in line.split()]
    words = {word for word in installs if re.match(r"torch\b", word)}
    pinned = re.search(r"^torch==.*", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert words == {pinned[0]}
