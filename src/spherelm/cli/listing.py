"""The command that lists names to choose from: `list`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from spherelm.cli.parser import POSITIONAL, about, documented


def list_(*, what: Annotated[Literal["presets", "recipes", "fields", "tasks"], POSITIONAL]) -> None:
    """List the names to choose from, one per line.

    Example: spherelm list presets

    Args:
        what: presets: sizes and lengths of runs. recipes: ways to train. fields: everything --set
            takes. tasks: of eval.
    """
    print(columns({"presets": presets, "recipes": recipes, "fields": fields, "tasks": tasks}[what]()))


def presets() -> list[Sequence[str]]:
    """The presets: the size and the length of each."""
    from spherelm.recipes import PRESETS

    header = ("preset", "layers", "d_model", "heads", "context", "batch", "updates", "")
    rows = [
        (
            name,
            *(str(n) for n in (size.n_layers, size.d_model, size.n_heads, size.seq_len, size.batch_size, size.steps)),
            size.about,
        )
        for name, size in PRESETS.items()
    ]
    return [header, *rows]


def recipes() -> list[Sequence[str]]:
    """The recipes, and what each is."""
    from spherelm.recipes import RECIPES

    return [(name, about(make)) for name, make in RECIPES.items()]


def fields() -> list[Sequence[str]]:
    """The fields of a run, the arms that have each, and what it is."""
    from spherelm.models import ARMS
    from spherelm.recipes.overrides import fields_of

    owners = {arm: fields_of(arm) for arm in ARMS}
    return [
        (name, ",".join(arm for arm in ARMS if name in owners[arm]), about_field(name))
        for name in sorted(set().union(*owners.values()))
    ]


def about_field(name: str) -> str:
    """The description of a field of a run, from the docstrings of the dataclasses that have it."""
    from spherelm.layers.low_precision import Precision
    from spherelm.models import CONFIGS
    from spherelm.optim.transfer import BaseShape
    from spherelm.recipes.overrides import nested, owners_of

    if name.endswith("_rate") and name != "balance_rate":
        return f"Factor of lr for parameters of the role {name.removesuffix('_rate')}."
    own = {
        "d_k": "Channels of a head, in place of n_heads.",
        "schedule": "Decay of the learning rate: constant, cosine, linear, wsd or log.",
    }
    if name in own:
        return own[name]
    group, _, field = name.rpartition(".")
    owners: dict[str, list[Any]] = {arm: [*owners_of(arm)] for arm in CONFIGS}
    if group == "precision":
        owners = {"": [Precision]}
    elif group:
        owners = {arm: [type(nested(config)[group])] for arm, config in CONFIGS.items() if group in nested(config)}
    if name in ("base_d_model", "base_n_layers", "base_steps"):
        owners, field = {"": [BaseShape]}, name.removeprefix("base_")
    every = [kind for found in owners.values() for owner in reversed(found) for kind in reversed(owner.__mro__)]
    found: dict[str, str] = {}
    for kind in every:
        found |= documented(inspect.cleandoc(kind.__doc__ or ""), getattr(kind, "__dataclass_fields__", {}))
    return found.get(field, "")


def tasks() -> list[Sequence[str]]:
    """The tasks that are read from local copies too, and which the paper shows; the harness has many more."""
    from spherelm.evaluate.harness import PAPER_TASKS
    from spherelm.evaluate.local_tasks import LOCAL_TASKS

    own = [(name, "one of the paper's five" if name in PAPER_TASKS else "") for name in LOCAL_TASKS]
    return [*own, ("any other of lm-eval", "downloaded: lm-eval ls tasks lists them")]


def columns(rows: Sequence[Sequence[str]]) -> str:
    """`rows` of equally many texts, one below the other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
