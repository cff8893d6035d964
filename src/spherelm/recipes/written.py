"""Fields of a run as they are written on a command line: FIELD=VALUE, and FIELD=VALUE,VALUE for several."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from spherelm.errors import UserError


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """`"alpha.init=0.05,0.25"` as ("alpha.init", [0.05, 0.25]); raises `ValueError` if it does not read so.

    A value that is a list itself stands in brackets: `"betas=[0.9,0.95],[0.9,0.99]"`.
    """
    field, _, values = text.partition("=")
    if not field or not values:
        raise UserError(f"cannot read {text!r}: write a field and its values, such as alpha.init=0.05,0.25")
    together = _value(f"[{values}]")
    if isinstance(together, list):
        return field, together
    if "[" in values:
        raise UserError(f"cannot read {text!r}: a value in brackets is a list, such as betas=[0.9,0.95]")
    return field, [_value(value) for value in values.split(",")]


FIXED = {
    "arm": "--arm",
    "preset": "--preset",
    "recipe": "--recipe",
    "data": "--data",
    "vocab_size": "the tokenizer of --data",
    "seed": "--seeds",
    "lr": "--lr-gpt and --lr-ngpt",
}
"""Fields that a flag sets and that cannot be varied or set otherwise, with their flags."""


OF_A_RUN = ("arm", "preset", "recipe", "data", "vocab_size")
"""Fields that have flags of their own where a single run is described."""


def parse_axes(words: Sequence[str], flags: Mapping[str, Any], fixed: Collection[str]) -> dict[str, list[Any]]:
    """`["alpha.init=0.05,0.25", "batch_size=4,8"]` as a mapping; raises `ValueError` for a field that is chosen twice.

    flags: what the command's own flags say, `None` where they were left out; fixed: which of `FIXED` cannot stand here.
    """
    axes: dict[str, list[Any]] = {}
    for text in words:
        field, values = parse_axis(text)
        if field in fixed:
            raise UserError(f"{text!r}: {field} is chosen by {FIXED[field]}")
        if field in axes:
            raise UserError(f"{text!r}: {field} is given twice: give it once")
        if flags.get(field) is not None:
            raise UserError(f"{text!r}: {field} is given by --{field.replace('_', '-')} too: give it once")
        axes[field] = values
    return axes


def parse_fields(
    words: Sequence[str], flags: Mapping[str, Any] = {}, fixed: Collection[str] = OF_A_RUN
) -> dict[str, Any]:
    """`["schedule=log", "rho=0.05"]` as a mapping; raises `ValueError` for what is no field with one value.

    flags, fixed: as for `parse_axes`.
    """
    fields = {}
    for field, values in parse_axes(words, flags, fixed).items():
        if len(values) > 1:
            raise UserError(f"{field} has {len(values)} values, {values}: a run has one")
        fields[field] = values[0]
    return fields


def _value(text: str) -> Any:
    """A JSON value where it is one, also as Python writes it (True, None), else the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text == "None":
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
