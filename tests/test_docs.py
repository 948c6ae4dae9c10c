"""The documents are true: their commands exist, their recipes are valid, their Python calls fit, their links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from limbeck.app.cli import app
from limbeck.contract.recipe import parse_any_recipe

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


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


@pytest.mark.parametrize("words", shell_commands("limbeck"), ids=" ".join)
def test_every_command_exists_with_its_options(words: list[str]) -> None:
    assert words[1] in COMMANDS
    command = COMMANDS[words[1]]
    context = command.make_context(words[1], words[2:])  # parses, and runs nothing
    assert context.params


def test_the_readme_shows_every_command() -> None:
    shown = {words[1] for words in shell_commands("limbeck")}
    assert shown == set(COMMANDS)


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    benchmarks = {
        p.stem.replace("_", "-") for p in (ROOT / "tests" / "benchmarks").glob("bench_*.py")
    }
    for path in DOCUMENTS:
        text = path.read_text()
        named = re.findall(r"`make ([\w-]+)[^`]*`", text) + re.findall(
            r"^make ([\w-]+)", text, re.MULTILINE
        )
        for target in named:
            assert target in targets | benchmarks, f"{path.name}: make {target}"


def test_every_recipe_is_valid() -> None:
    base = """
name: part
data: {domains: [{name: a, text: {kind: files, paths: [a]}}]}
student: {kind: fresh, config: {}}
training: {tokens: 2048}
"""
    found = list(blocks("yaml"))
    assert found
    for path, text in found:
        tree = yaml.safe_load(text)
        if text.startswith("# part of a recipe"):
            tree = yaml.safe_load(base) | tree
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


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_internal_link_exists(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target).exists(), target


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
