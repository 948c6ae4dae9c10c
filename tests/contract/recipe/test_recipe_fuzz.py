"""Recipes of strangers: whatever is in the file, reading it ends in a recipe or in one
`RecipeError`, and soon."""

from __future__ import annotations

import copy
import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.contract.errors import RecipeError
from limbeck.contract.recipe import load_any_recipe, parse_any_recipe, shipped_recipes
from limbeck.contract.recipe.reading import MOST_BYTES

TREES = [load_any_recipe(path).resolved() for _, path in shipped_recipes()]
TEXTS = [path.read_text() for _, path in shipped_recipes()]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["", "~nosuchuser/x", "\0", "\x1b[2J", "²", "/etc/passwd", "../..", "auto", "none", 10**400]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
LINES = st.sampled_from(
    [
        "extends: /etc/passwd",
        "extends: mine.yaml",
        "? [a]",
        "<<: *wide",
        "<<: {seed: 3}",
        "x: &x [*x]",
        "!!binary aGk=: 1",
        "x: !!binary aGk=",
        "x: 2024-01-01",
        "seed: !!int ''",
        "seed: 190:20:30",
        "1: 2",
        "~: 1",
        "\t",
        "---",
        "...",
        "%YAML 9.9",
        'x: "\\ud800"',
        'x: "\\0"',
        "x: '",
        "x: " + "[" * 500 + "]" * 500,
        "seed: " + "9" * 5000,
    ]
)


def changed(tree: Any, data: st.DataObject) -> Any:
    """The tree with one value, at any depth, replaced, removed or added."""
    tree = node = copy.deepcopy(tree)
    while True:
        places = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not places:
            return tree
        place = data.draw(st.sampled_from(places))
        inner = node[place]
        if isinstance(inner, dict | list) and inner and data.draw(st.booleans()):
            node = inner
            continue
        match data.draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                node[place] = data.draw(VALUES)
            case "remove":
                del node[place]
            case _ if isinstance(node, dict):
                node[data.draw(st.text(max_size=6))] = data.draw(VALUES)
            case _:
                node.append(data.draw(VALUES))
        return tree


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
def test_changed_trees(data: st.DataObject) -> None:
    tree = data.draw(st.sampled_from(TREES))
    for _ in range(data.draw(st.integers(1, 4))):
        tree = changed(tree, data)
    try:
        recipe = parse_any_recipe(tree)
    except RecipeError:
        return
    assert parse_any_recipe(recipe.resolved()).digest == recipe.digest


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
def test_changed_texts(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    lines = data.draw(st.sampled_from(TEXTS)).splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(lines)))
        match data.draw(st.sampled_from(["insert", "cut", "characters"])):
            case "insert":
                lines.insert(at, data.draw(LINES))
            case "cut":
                del lines[at : at + 3]
            case _ if at < len(lines):
                line, middle = lines[at], data.draw(st.integers(0, len(lines[at])))
                lines[at] = line[:middle] + data.draw(st.text(max_size=3)) + line[middle:]
    path = tmp_path_factory.mktemp("fuzz") / "mine.yaml"
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    read(path)


def read(path: Path, *, seconds: float = 10.0) -> str:
    """The error of reading a recipe, empty where there is none."""
    started = time.monotonic()
    try:
        assert load_any_recipe(path).digest
    except RecipeError as error:
        return str(error)
    finally:
        assert time.monotonic() - started < seconds
    return ""


# Bombs and traps, by name -------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x: &x [*x]\n", "*x refers to itself"),
        ("x: &x {y: {z: *x}}\n", "*x refers to itself"),
        ("x: " + "[" * 500 + "]" * 500 + "\n", "nested more than 40 deep"),
        ("x: " + "{a: " * 500 + "1" + "}" * 500 + "\n", "nested more than 40 deep"),
        (BOMB, "more than 100,000 values"),
        ("!!binary aGk=: 1\n", "of the type binary"),
        ("x: !!set {a, b}\n", "of the type set"),
        ("x: !!omap [a: 1]\n", "of the type omap"),
        ("yes: 1\n", "a key should be text; put 'yes' in quotes"),
        ("2024-01-01: 1\n", "of the type timestamp"),
        ('x: "\\0"\n', "NUL character"),
        ("seed: " + "9" * 5000 + "\n", "is no number of a field"),
        ("<<: 3\nname: a\n", "expected a mapping or list of mappings for merging"),
    ],
)
def test_traps_of_yaml_are_named(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    assert expected in read(tmp_path / "mine.yaml")


def test_merge_keys_merge_as_yaml_says(tmp_path: Path) -> None:
    """Against PyYAML's own reader."""
    pico = dict(shipped_recipes())["pico"].read_text()
    text = pico.replace(
        "gates: {max", "gates: {<<: {max_size_mb: 3, max_quantization_loss: 9}, max"
    )
    assert text != pico
    (tmp_path / "mine.yaml").write_text(text)
    gates = load_any_recipe(tmp_path / "mine.yaml").resolved()["gates"]
    expected = yaml.safe_load(text)["gates"]
    assert (
        {key: gates[key] for key in expected}
        == expected
        == {"max_size_mb": 3, "max_quantization_loss": 0.05}
    )


def test_a_long_chain_of_extends_is_refused(tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / f"{i}.yaml").write_text(f"extends: {i + 1}.yaml\n")
    assert "more than 20 times" in read(tmp_path / "0.yaml")


@pytest.mark.parametrize("name", ["secret", "secret.yaml"])
def test_a_file_that_is_extended_is_never_shown(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("root:$y$secret: [\n'hunter2\n")
    (tmp_path / "mine.yaml").write_text(f"extends: {name}\n")
    found = read(tmp_path / "mine.yaml")
    assert found
    assert "hunter2" not in found
    assert "$y$" not in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("extends: ~nosuchuser/a.yaml\n", "no such recipe file"),
        (f"extends: {'a' * 5000}\n", "no path of a recipe"),
        ("extends: .\n", "no such recipe file"),
    ],
)
def test_paths_that_cannot_be(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    assert expected in read(tmp_path / "mine.yaml")


def test_a_huge_recipe_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "mine.yaml").open("wb") as file:
        file.truncate(1 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert f"a recipe has at most {MOST_BYTES:,}" in read(tmp_path / "mine.yaml")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_a_pipe_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mine.yaml")
    assert "no such recipe file" in read(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"kind": "package", "package": "", "path": "x"}, "package: found ''"),
        ({"kind": "package", "package": "../x", "path": "x"}, "package: found '../x'"),
        ({"kind": "local", "path": "~nosuchuser/x"}, "there is no such user here"),
        ({"kind": "local", "path": ""}, "found ''; write a path"),
    ],
)
def test_sources_that_cannot_be(change: dict[str, str], expected: str) -> None:
    tree = copy.deepcopy(next(t for t in TREES if t["name"] == "pico"))
    tree["student"]["base"] = change
    with pytest.raises(RecipeError, match=r"student\.base") as caught:
        parse_any_recipe(tree)
    assert expected in str(caught.value)
