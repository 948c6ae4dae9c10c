"""The JSON Schema of recipes: an editor must accept what Limbeck accepts, and mark what it
refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from limbeck.app.cli import app
from limbeck.app.schema import recipe_schema
from limbeck.contract.recipe import RECIPES, shipped_recipes


class _Yaml12(yaml.SafeLoader):
    """Editors read YAML 1.2, where `3e-3` is a number; PyYAML reads 1.1, and our fields take its
    text."""


_Yaml12.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def read(text: str) -> Any:
    return yaml.load(text, Loader=_Yaml12)


@pytest.mark.parametrize(("name", "path"), shipped_recipes())
def test_every_shipped_recipe_fits_and_names_the_schema(
    name: str, path: Path, validator: jsonschema.Draft202012Validator
) -> None:
    text = path.read_text()
    validator.validate(read(text))
    found = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert found is not None, f"{name}: the first line names no schema"
    assert (path.parent / found[1]).resolve() == RECIPES / "schema.json"


def test_the_shipped_schema_is_up_to_date() -> None:
    stored = json.loads((RECIPES / "schema.json").read_text())
    assert stored == recipe_schema(), "run: limbeck schema --out recipes/schema.json"


@pytest.mark.parametrize(
    "change",
    [
        {"trainig": {}},
        {"seed": "many"},
        {"seed": -1},
        {"training": {"tokens": 0}},
        {"training": {"tokens": 4096, "warmup": 1.5}},
        {"gates": {"max_forgetting": -0.1}},
        {"student": {"kind": "lora"}},
        {"student": {"kind": "huge", "base": {"kind": "hub", "id": "a/b"}}},
        {"export": {"forms": ["fp32", "int5"]}},
        {"task": "classification"},
    ],
)
def test_mistakes_are_marked(
    change: dict[str, Any], validator: jsonschema.Draft202012Validator
) -> None:
    tree = read((RECIPES / "pico.yaml").read_text())
    validator.validate(tree)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(tree | change)


def test_a_recipe_that_extends_another_may_leave_out_what_is_required(
    validator: jsonschema.Draft202012Validator,
) -> None:
    validator.validate({"extends": "pico", "name": "mine", "student": {"rank": 4}})
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({"extends": "pico", "student": {"rnk": 4}})


def test_every_field_says_what_it_is() -> None:
    """Editors show the description while one types."""
    definitions = recipe_schema()["$defs"]
    for name, definition in definitions.items():
        for field, schema in definition.get("properties", {}).items():
            # The description of a part is left out where the field says the same.
            part = definitions.get(schema.get("$ref", "").rpartition("/")[2], {})
            assert field == "kind" or (schema | part).get("description"), f"{name}.{field}"


def test_the_command_writes_it(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["schema", "--out", str(tmp_path / "recipe.schema.json")])
    assert done.exit_code == 0
    assert json.loads((tmp_path / "recipe.schema.json").read_text()) == recipe_schema()
    done = CliRunner().invoke(app, ["schema"])
    assert json.loads(done.stdout) == recipe_schema()
