"""What every node of a recipe is made of: frozen models and numbers with bounds."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


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
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=80)]


def shorthand(value: Any) -> Any:
    """A choice written as its bare name: `int8-weight` for `{kind: int8-weight}`."""
    return {"kind": value} if isinstance(value, str) else value


def fingerprint(value: Any) -> str:
    """sha256 of the canonical JSON of ``value``."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()
