"""Pages of the site that are generated at build time, so that they are never out of date.

`mkdocs` calls `on_files` (mkdocs.yml names this file as a hook). The recipe reference comes from
the JSON Schema of the recipe classes, the command reference from the command line itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, get_args

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from limbeck.app.cli import app
from limbeck.contract.recipe import AnyRecipe, BaseRecipe

Schema = dict[str, Any]

RECIPES_INTRO = """# Recipe reference

This page is generated from the recipe classes when the site is built. `limbeck validate` checks a
recipe against the same classes. A *choice* is an object whose `kind` selects one of the listed
types; `a | b` separates alternatives. Paths are absolute or relative to the recipe file. See
[Recipes](recipes.md) for a guided tour.
"""

COMMANDS_INTRO = """# Command reference

This page is generated from the command line when the site is built. `limbeck COMMAND --help` prints
the same text.
[Exit codes](measuring.md#exit-codes) are the same for every command.
"""


def recipe_classes() -> tuple[type[BaseRecipe], ...]:
    """Every recipe class, one a task."""
    return get_args(AnyRecipe)


def task_of(cls: type[BaseRecipe]) -> str:
    """The one value that `task:` of a recipe class takes."""
    return str(get_args(cls.model_fields["task"].annotation)[0])


def words(cell: str) -> str:
    """Text for a cell of a table."""
    return " ".join(cell.split()).replace("|", "\\|")


def code(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"`{words(text)}`" if text else "empty"


def name_of(schema: Schema) -> str:
    return str(schema["$ref"]).rsplit("/", 1)[1]


def anchor(task: str, name: str) -> str:
    return f"{task}-{name}".lower()


class Page:
    """The reference of one recipe class; ``schema`` is its JSON Schema."""

    def __init__(self, cls: type[BaseRecipe]) -> None:
        self.schema: Schema = cls.model_json_schema()
        self.task: str = task_of(cls)
        self.types: dict[str, Schema] = self.schema.get("$defs", {})
        self.queue: list[str] = []

    def link(self, name: str) -> str:
        """Link to a type of this page. Each type is described once, in the order of first links."""
        if name not in self.queue:
            self.queue.append(name)
        kind = self.types[name].get("properties", {}).get("kind", {}).get("const")
        return f"[{'`' + kind + '`' if kind else name}](#{anchor(self.task, name)})"

    def kind(self, schema: Schema) -> str:
        """A value's type and bounds."""
        if "$ref" in schema:
            return self.link(name_of(schema))
        for key in ("oneOf", "anyOf"):
            if key in schema:
                some = [part for part in schema[key] if part.get("type") != "null"]
                return " \\| ".join(dict.fromkeys(self.kind(part) for part in some))
        if "const" in schema:
            return code(schema["const"])
        if "enum" in schema:
            return " \\| ".join(code(value) for value in schema["enum"])
        match schema.get("type"):
            case "array":
                items = schema.get("items") or (schema.get("prefixItems") or [{}])[0]
                return f"list of {self.kind(items)}"
            case "object":
                values = schema.get("additionalProperties")
                return f"map to {self.kind(values)}" if isinstance(values, dict) else "map"
            case "string":
                return "path" if schema.get("format") == "path" else "text"
            case "boolean":
                return "true or false"
            case "integer" | "number" as number:
                signs = {
                    "minimum": "≥",
                    "exclusiveMinimum": ">",
                    "maximum": "≤",
                    "exclusiveMaximum": "<",
                }
                bounds = [f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema]
                return f"{number} {', '.join(bounds)}".strip()
        return "any value"

    def default(self, name: str, schema: Schema, owner: Schema) -> str:
        if name in owner.get("required", ()):
            return "required"
        value = schema.get("default")
        if value is None:
            return "not set"
        if isinstance(value, dict):
            return code(value["kind"]) if value.get("kind") else "its own defaults"
        if isinstance(value, list):
            if not value:
                return "empty list"
            value = [
                item["kind"] if isinstance(item, dict) and "kind" in item else item
                for item in value
            ]
        return code(value)

    def meaning(self, schema: Schema) -> str:
        """The field's description; pydantic leaves it to the type where both are the same."""
        if "description" not in schema and "$ref" in schema:
            schema = self.types[name_of(schema)]
        return str(schema.get("description", ""))

    def rows(self, owner: Schema) -> Iterator[str]:
        fields = {k: v for k, v in owner.get("properties", {}).items() if k != "kind"}
        if not fields:
            yield "No fields.\n"
            return
        yield "| field | type | default | meaning |\n|---|---|---|---|"
        for name, schema in fields.items():
            cells = (
                code(name),
                self.kind(schema),
                self.default(name, schema, owner),
                words(self.meaning(schema)),
            )
            yield f"| {' | '.join(cells)} |"
        yield ""

    def section(self, name: str) -> Iterator[str]:
        owner = self.types[name]
        kind = owner.get("properties", {}).get("kind", {}).get("const")
        title = f"{name}: `kind: {kind}`" if kind else name
        yield f"### {title} {{ #{anchor(self.task, name)} }}\n"
        if "description" in owner:
            yield owner["description"] + "\n"
        yield from self.rows(owner)

    def text(self) -> str:
        lines = [f"## `task: {self.task}`\n", self.schema.get("description", "") + "\n"]
        lines += self.rows(self.schema)
        described = 0
        while described < len(self.queue):
            lines += self.section(self.queue[described])
            described += 1
        return "\n".join(lines)


def recipes_page() -> str:
    """Every field of every recipe as Markdown: type, bounds, default, meaning with its unit."""
    return "\n".join([RECIPES_INTRO, *(Page(cls).text() for cls in recipe_classes())])


def commands_page() -> str:
    """Every command with its arguments and options as Markdown."""
    lines = [COMMANDS_INTRO]
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        lines.append(f"## limbeck {name}\n")
        for paragraph in re.split(r"\n\s*\n", (command.help or "").replace("\b", "").strip()):
            text = "\n".join(line.strip() for line in paragraph.strip().splitlines())
            title, _, examples = text.partition("\n")
            if title in ("Example:", "Examples:"):
                lines.append(f"{title}\n\n```sh\n{examples}\n```\n")
            else:
                lines.append(f"{text}\n")
        lines.append("| argument or option | default | meaning |\n|---|---|---|")
        for parameter in command.params:
            option = parameter.param_type_name == "option"
            names = " ".join([*parameter.opts, *parameter.secondary_opts])
            shown = code(names) if option else code(parameter.name.upper())
            value = parameter.default if option else None
            if isinstance(value, bool):
                value = ("yes" if value else "no") if option else None
            default = code(value) if isinstance(value, str | int | float) else ""
            lines.append(f"| {shown} | {default} | {words(parameter.help or '')} |")
        lines.append("")
    return "\n".join(lines)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    for name, text in (("reference.md", recipes_page()), ("commands.md", commands_page())):
        files.append(File.generated(config, name, content=text))
    return files
