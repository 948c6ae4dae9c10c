"""Base of every node of a recipe: frozen models and numbers with bounds."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
)
from pydantic_core import PydanticCustomError, core_schema

from limbeck.contract.limits import MOST_THREADS


class Frozen(BaseModel):
    """Base of every node of the tree: no unknown keys, no change after reading."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _not_a_yes(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic takes true for 1
        raise PydanticCustomError("yes_or_no", "it should be a number")
    return value


Int = Annotated[int, BeforeValidator(_not_a_yes)]
Float = Annotated[float, BeforeValidator(_not_a_yes)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Positive = Annotated[Float, Field(gt=0)]
Count = Annotated[Int, Field(ge=1)]
Threads = Annotated[Int, Field(ge=1, le=MOST_THREADS)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=80)]

# A recipe from a stranger must not be able to send just any secret of this machine to a server that
# it names. This variable holds the names that the command line allows, separated by commas: workers
# inherit it, and no recipe can set it.
ALLOWED = "LIMBECK_KEY_VARIABLES"
_OURS = re.compile(r"LIMBECK_[A-Z0-9_]+|OPENAI_API_KEY")


def allow_keys(names: Iterable[str]) -> None:
    """Let recipes of this process and its children send these environment variables."""
    if names := [*names]:
        os.environ[ALLOWED] = ",".join([*_allowed(), *names])


def _allowed() -> list[str]:
    return [name for name in os.environ.get(ALLOWED, "").split(",") if name]


_LOGIN = re.compile(r"://\S*@")  # to the last @: a password may hold / and #
_QUERY = re.compile(r"(://[^\s?#]*)[?#][^\s'\"]*")


def _may_be_sent(name: str) -> str:
    if _OURS.fullmatch(name) is None and name not in _allowed():
        raise PydanticCustomError(
            "key_variable",
            "it may only be LIMBECK_… or OPENAI_API_KEY, unless the command line says "
            "--allow-key {name}",
            {"name": name},
        )
    return name


KeyVariable = Annotated[
    str,
    AfterValidator(_may_be_sent),
    Field(description="Environment variable that holds the API key, if it is set."),
]


def without_password(text: str) -> str:
    """``text`` with *** for what may be secret in each address, for messages."""
    return _QUERY.sub(r"\1?***", _LOGIN.sub("://***@", text))


def mistake_of_address(url: str) -> str | None:
    """Why ``url`` is no address of a server, or None if it may be one.

    What a recipe names stands in reports and certificates, so it may hold nothing secret.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for one that is no port
    except ValueError as error:
        if "@" in url:  # the error would show a part of a password that holds / or #
            return "it is no address (it holds an @)"
        return f"it is no address ({error})"
    if not url.isprintable() or " " in url:
        return "it is no address (it holds blanks or control characters)"
    if "@" in parts.netloc:
        return "it holds a name or password, which reports would show; put a key in key_variable"
    if parts.query or parts.fragment:
        return "it has a query or fragment, which reports would show; end it with its path"
    return None if parts.hostname else "it is no address (it names no host)"


def _address(url: str) -> str:
    if mistake := mistake_of_address(url):
        raise PydanticCustomError("address", "{mistake}", {"mistake": mistake})
    return url


Address = Annotated[str, AfterValidator(_address)]


class _Shorthand:
    """A choice written as its bare name: `int8-weight` for `{kind: int8-weight}`."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(_named, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        found = handler(schema)
        kinds = {
            kind: handler.resolve_ref_schema({"$ref": ref})
            for kind, ref in found["discriminator"]["mapping"].items()
        }
        names = [kind for kind, choice in kinds.items() if choice.get("required") == ["kind"]]
        return {"anyOf": [{"enum": names}, found]} if names else found


def _named(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


SHORTHAND = _Shorthand()


def fingerprint(value: Any) -> str:
    """sha256 of the canonical JSON of ``value``."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()
