"""The check that every config makes of its own values, and the conversion of plain values to configs; both by pydantic.

pydantic rather than msgspec, which takes 10 ms to import instead of 100, beside 1500 of torch: msgspec checks ranges
only where it decodes, pydantic also where somebody builds a dataclass in Python, which is what recipes and users
of the library do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from spherelm.errors import UserError, nearest

T = TypeVar("T")

BelowOne = Annotated[float, Field(ge=0, lt=1)]
"""A number from 0 to below 1."""


@dataclass(frozen=True)
class Among:
    """Stands in a field's annotation: its value is one of the names `known`, of a table of functions for instance."""

    known: Iterable[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        """The schema of one of the names."""
        return handler.generate_schema(Literal[tuple(self.known)])


class FieldError(UserError):
    """A field has a value that it cannot have. said: all of the message that follows the field's name."""

    def __init__(self, field: str, said: str) -> None:
        super().__init__(f"{field} {said}")
        self.field, self.said = field, said


@contextmanager
def called(name: Callable[[str], str]) -> Iterator[None]:
    """Report the field of a `FieldError` under the name that the user gave it by: `name` of the field's."""
    try:
        yield
    except FieldError as error:
        raise FieldError(name(error.field), error.said) from None


@cache
def checker(kind: Any) -> TypeAdapter[Any]:
    """The validator of all fields of the dataclass `kind`."""
    hints = get_type_hints(kind, include_extras=True)
    # Nothing in a TypedDict is built or replaced but the values themselves.
    values = TypedDict(kind.__name__, {field.name: hints[field.name] for field in fields(kind)})  # type: ignore[misc]
    values.__pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False)  # type: ignore[attr-defined]
    return TypeAdapter(values)


def check(config: Any) -> None:
    """Raise `FieldError` for a field of the dataclass `config` whose value is not of the field's type or
    not in its range.

    `__post_init__` of every config calls it first; only rules between fields are its own.
    """
    kind: Any = type(config)
    try:
        values = checker(kind).validate_python(vars(config))
    except ValidationError as error:
        raise mistake(error) from None
    for name, value in values.items():  # a list has become a tuple, a whole number a float
        object.__setattr__(config, name, value)


def from_plain(kind: type[T], plain: Mapping[str, Any], place: str = "") -> T:
    """The dataclass `kind` of plain values such as JSON has them, unions of dataclasses by their `kind`.

    place: stands before the names of fields in what is said of them. Raises `UserError` for a field that there is not,
    that is missing, or that has a value it cannot have, and what `kind` itself raises.
    """
    wanted: Any = kind
    try:  # of JSON, where a list may be a tuple and an object a dataclass, but a text is never a number
        found: T = reader(wanted).validate_json(json.dumps(plain), strict=True, extra="forbid")
        return found
    except ValidationError as error:
        raise mistake(error, place) from None


@cache
def reader(kind: Any) -> TypeAdapter[Any]:
    """The builder of the dataclass `kind` and those nested in it."""
    return TypeAdapter(kind)


def mistake(error: ValidationError, place: str = "") -> UserError:
    """The first of the mistakes that pydantic found, in one line."""
    first, *others = error.errors(include_url=False)
    context = first.get("ctx", {})
    if isinstance(context.get("error"), UserError):
        cause: UserError = context["error"]
        return cause
    places = [one["loc"] for one in (first, *others) if one["type"] == "missing"]
    if places and isinstance(places[-1][-1], int):  # a list ends too early
        name = place + ".".join(map(str, places[-1][:-1]))
        return FieldError(name, f"must be a list of {places[-1][-1] + 1}, got {list(first['input'])!r}")
    name = place + ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return FieldError(name, "is missing")
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return FieldError(name, "is not a field: leave it out")
    if first["type"] == "union_tag_invalid":
        return FieldError(f"{name}.kind", f"must be one of {context['expected_tags']}, got {context['tag']!r}")
    bounds = [f"must be {words} {context[bound]:.4g}" for bound, words in BOUNDS.items() if bound in context]
    said = bounds[0] if bounds else LISTS.get(first["type"], first["msg"].replace("Input should", "must"))
    said = said.format(**context)
    known = re.findall("'(.+?)'", context.get("expected", "")) if first["type"] == "literal_error" else []
    return FieldError(name, f"{said}, got {first['input']!r}{nearest(str(first['input']), known)}")


LISTS = {"tuple_type": "must be a list", "too_long": "must be a list of {max_length}"}
"""In place of pydantic's own words, which are Python's."""

BOUNDS = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
"""pydantic's own words write 1e-38 out."""
