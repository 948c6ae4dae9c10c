"""`/docs`: the endpoints and the fields of their bodies as one plain page.

It has no script and asks for nothing from elsewhere, unlike the page of fastapi, which loads its
script from a content delivery network.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { border: 1px solid #bbb; padding: .2em .6em; text-align: left; vertical-align: top }
code { font-family: monospace }
@media (prefers-color-scheme: dark) { body { background: #111; color: #eee } a { color: #8bf } }
"""
HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}


def docs_page(openapi: Mapping[str, Any], model: str) -> str:
    """The page for an OpenAPI description of the server."""
    title = f"{escape(model)}, served by Limbeck"
    schemas = openapi["components"]["schemas"]
    bodies = {name: schema for name, schema in schemas.items() if "ValidationError" not in name}
    parts = [
        f"<h1>{title}</h1>",
        '<p>The paths are those of OpenAI\'s interface. <a href="openapi.json">openapi.json</a> '
        "has the same for programs.</p>",
        "<h2>Paths</h2><table><tr><th>method</th><th>path</th><th>body</th></tr>",
        *(
            f"<tr><td>{escape(method.upper())}</td><td><code>{escape(path)}</code></td>"
            f"<td>{_body(operation)}</td></tr>"
            for path, operations in openapi["paths"].items()
            for method, operation in operations.items()
        ),
        "</table>",
        *(_fields(name, schema) for name, schema in bodies.items()),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def _body(operation: Mapping[str, Any]) -> str:
    content = operation.get("requestBody", {}).get("content", {})
    return ", ".join(_type(one["schema"]) for one in content.values())


def _fields(name: str, schema: Mapping[str, Any]) -> str:
    """A table of the fields of one kind of body."""
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{escape(field)}</code>{' (required)' if field in required else ''}</td>"
        f"<td>{_type(kind)}</td><td>{escape(kind.get('description', ''))}</td></tr>"
        for field, kind in schema.get("properties", {}).items()
    )
    about = escape(str(schema.get("description", "")).partition("\n")[0]).replace("`", "")
    return (
        f'<h2 id="{escape(name)}">{escape(name)}</h2><p>{about}</p>'
        f"<table><tr><th>field</th><th>value</th><th>meaning</th></tr>{rows}</table>"
    )


def _type(kind: Mapping[str, Any]) -> str:
    """The values that a field takes, in words."""
    if "$ref" in kind:
        name = escape(str(kind["$ref"]).rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in kind:
        return " or ".join(_type(one) for one in kind["anyOf"])
    if "enum" in kind or "const" in kind:
        values = kind.get("enum", [kind.get("const")])
        return " or ".join(f"<code>{escape(repr(one))}</code>" for one in values)
    if kind.get("type") == "array":
        return f"list of ({_type(kind.get('items', {}))})"
    bounds = [
        f"{sign} {kind[key]}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", "&gt;"), ("maximum", "≤"))
        if key in kind
    ]
    return ", ".join([escape(str(kind.get("type", "any"))), *bounds])
