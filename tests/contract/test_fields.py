"""The tree of a recipe: frozen, described and bounded."""

from __future__ import annotations

import typing
from collections.abc import Iterator

import pytest
from pydantic import BaseModel, ValidationError

from limbeck.contract import recipe as module
from limbeck.contract.recipe import BaseRecipe, Frozen, load_any_recipe, shipped_recipes
from tests.pico import pico_recipe


def models() -> Iterator[type[BaseModel]]:
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Frozen) and value is not Frozen:
            yield value


def test_a_recipe_is_frozen_all_the_way_down() -> None:
    recipe = pico_recipe()
    for node, field in (
        (recipe, "name"),
        (recipe.training, "tokens"),
        (recipe.data.domains[0], "name"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(node, field, "x")
    assert all(m.model_config["frozen"] and m.model_config["extra"] == "forbid" for m in models())


def test_every_model_and_every_field_is_described() -> None:
    assert len(list(models())) > 20
    for model in models():
        assert model.__doc__, model
        for name, field in model.model_fields.items():
            assert name == "kind" or field.description, f"{model.__name__}.{name}"


def test_bounds_are_enforced_not_only_written() -> None:
    """A bound that pydantic does not know (``lte=``) would be ignored without a word."""
    for model in models():
        for name, field in model.model_fields.items():
            assert not field.json_schema_extra, f"{model.__name__}.{name}"


def test_every_choice_is_told_apart_by_its_kind() -> None:
    for model in models():
        if "kind" in model.model_fields:
            assert len(typing.get_args(model.model_fields["kind"].annotation)) == 1, model
            assert model.model_fields["kind"].is_required(), model


@pytest.mark.parametrize("name", [name for name, _ in shipped_recipes()])
def test_every_shipped_recipe_is_valid_and_says_what_it_needs(name: str) -> None:
    recipe = load_any_recipe(name)
    assert isinstance(recipe, BaseRecipe)
    assert recipe.description
    header = [line for line in recipe.text.splitlines() if line.startswith("#")]
    assert any(line.startswith("# Needs:") for line in header), name


def test_shipped_recipes_have_names_of_their_own() -> None:
    names = [load_any_recipe(path).name for _, path in shipped_recipes()]
    assert len(set(names)) == len(names)
