"""The law's numbers for a run, the constants that each comes from, and where the run has others."""

from __future__ import annotations

from collections.abc import Collection
from math import isclose
from typing import Any

from spherelm.recipes.law import CONSTANTS, Number, numbers
from spherelm.recipes.overrides import model_fields
from spherelm.recipes.presets import Preset
from spherelm.runs.config import RunConfig


def lawful(run: RunConfig) -> dict[str, Number]:
    """What the law chooses for the shape and the length of `run`."""
    model, train = run.model, run.train
    shape = Preset(
        model.n_layers, model.d_model, model.n_heads, train.seq_len, train.batch_size, train.steps,
        architecture=model.architecture, vocab_size=model.vocab_size,
    )  # fmt: skip
    return numbers(run.arm, shape)


def in_use(run: RunConfig) -> dict[str, Any]:
    """The numbers that `run` has where the law chooses one; `None` for what its optimizer does not have. lr: that of
    the block matrices.
    """
    found, optim, rule = lawful(run), run.optim, run.optim.optimizer
    first, second = getattr(rule, "betas", (None, None))
    own = {
        "lr": optim.lr * optim.multipliers.matrix,
        "weight_decay": optim.weight_decay,
        "first_beta": first,
        "second_beta": second,
    }
    own |= {"momentum": getattr(rule, "momentum", None)}
    own |= {f"{role}_rate": rate for role, rate in vars(optim.multipliers).items()}
    return {name: (own | model_fields(found, run.model))[name] for name in found}


def departures(run: RunConfig) -> list[str]:
    """The names of the numbers in which `run` differs from the law, for its shape and length."""
    own = in_use(run)
    return [
        name
        for name, law in lawful(run).items()
        if own[name] is None or not isclose(own[name], law.value, rel_tol=1e-9)
    ]


def explained(run: RunConfig, roles: Collection[str]) -> list[str]:
    """A line for each number that the law chooses for `run`, then one for each constant; no lines for another recipe.

    roles: those that the model's parameters have. Where the run has another number, its line gives both.
    """
    if run.recipe != "law":
        return []
    own, others = in_use(run), departures(run)
    found = {name: law for name, law in lawful(run).items() if name[:-5] in roles or not name.endswith("_rate")}
    used = dict.fromkeys(name for number in found.values() for name in number.constants)
    other = {name: f"; this run has {'none' if own[name] is None else format(own[name], '.4g')}" for name in others}
    choices = [
        f"  {name:22} {law.value:<10.4g} from {', '.join(law.constants)}{other.get(name, '')}"
        for name, law in found.items()
    ]
    constants = [
        f"  {name:14} {CONSTANTS[name].value:<8.4g} {CONSTANTS[name].means} ({CONSTANTS[name].source})" for name in used
    ]
    return ["the law's choices (docs/recipes.md)", *choices, "the constants behind them", *constants]
