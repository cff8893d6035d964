"""Whether the value of a field is of the field's type."""

from __future__ import annotations

import dataclasses
import math
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from typeguard import TypeCheckError, check_type

from spherelm.errors import UserError


def check_fields(config: Any, path: str = "") -> None:
    """Raise `UserError` for a field of the dataclass `config`, or of one in it, whose value is not of its type.

    `path` stands before the names of fields. Of a choice among names the dataclass itself says more.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if dataclasses.is_dataclass(value):
            check_fields(value, f"{path}{field.name}.")
        elif get_origin(hint) is not Literal:
            of_type(f"{path}{field.name}", value, hint)


def of_type(name: str, value: Any, hint: Any) -> Any:
    """`value`, a list as a tuple, if it is of the type `hint` and no number that is none; else `ValueError`."""
    value = tuple(value) if isinstance(value, list) else value
    try:
        check_type(value, hint)
        if isinstance(value, bool) and bool not in (hint, *get_args(hint)):
            raise TypeCheckError(name)
    except TypeCheckError:
        raise UserError(f"{name} must be {in_words(hint)}, got {value!r}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, got {value}")
    return value


WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "null"}


def in_words(hint: Any) -> str:
    """A type as it is told to people; of a union each of its types."""
    if isinstance(hint, UnionType):
        return " or ".join(map(in_words, get_args(hint)))
    return WORDS.get(hint) or (hint.__name__ if isinstance(hint, type) else str(hint).replace("float", "number"))
