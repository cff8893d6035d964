"""The law's choices for a run, the constants that its numbers come from, and where the run has others."""

from __future__ import annotations

from collections.abc import Collection
from math import isclose
from typing import Any

from spherelm.recipes.law import CONSTANTS, Number, law, numbers
from spherelm.recipes.overrides import model_fields
from spherelm.recipes.presets import Preset
from spherelm.runs.config import RunConfig


def shape_of(run: RunConfig) -> Preset:
    """The shape and the length of `run`."""
    model, train = run.model, run.train
    return Preset(
        model.n_layers, model.d_model, model.n_heads, train.seq_len, train.batch_size, train.steps,
        architecture=model.architecture, vocab_size=model.vocab_size,
    )  # fmt: skip


def lawful(run: RunConfig) -> dict[str, Any]:
    """What the law chooses for the shape and the length of `run`: numbers with their constants, then what has none."""
    found = law(run.arm, shape_of(run))
    schedule = {"schedule": found.schedule.kind, "warmup_steps": found.schedule.warmup_steps}
    kinds = {name: value for name, value in found.model.items() if isinstance(value, bool)}
    return {**numbers(run.arm, shape_of(run)), "optimizer": found.optim["optimizer"], **schedule, **kinds}


def in_use(run: RunConfig) -> dict[str, Any]:
    """What `run` has where the law chooses something; `None` for what its optimizer does not have. lr: that of the
    block matrices.
    """
    found, optim, rule = lawful(run), run.optim, run.optim.optimizer
    first, second = getattr(rule, "betas", (None, None))
    own = {
        "lr": optim.lr * optim.multipliers.matrix,
        "weight_decay": optim.weight_decay,
        "first_beta": first,
        "second_beta": second,
    }
    own |= {"momentum": getattr(rule, "momentum", None), "optimizer": rule.kind}
    own |= {"schedule": run.schedule.kind, "warmup_steps": run.schedule.warmup_steps}
    own |= {f"{role}_rate": rate for role, rate in vars(optim.multipliers).items()}
    return {name: (own | model_fields(found, run.model))[name] for name in found}


def departures(run: RunConfig) -> list[str]:
    """The names of the choices in which `run` differs from the law, for its shape and length."""
    own = in_use(run)

    def differs(own: Any, law: Any) -> bool:
        if isinstance(law, Number):
            return own is None or not isclose(own, law.value, rel_tol=1e-9)
        return bool(own != law)

    return [name for name, law in lawful(run).items() if differs(own[name], law)]


def kept(before: RunConfig, run: RunConfig) -> list[str]:
    """The names of the choices that `run` has from the run `before`, where they were the law's and are no longer."""
    own, earlier = in_use(run), in_use(before)
    return [name for name in departures(run) if own[name] == earlier[name] and name not in departures(before)]


def explained(run: RunConfig, roles: Collection[str]) -> list[str]:
    """A line for each choice of the law for `run`, then one for each constant; no lines for another recipe.

    roles: those that the model's parameters have. Where the run has another choice, its line gives both.
    """
    if run.recipe != "law":
        return []
    own, others = in_use(run), departures(run)
    found = {name: law for name, law in lawful(run).items() if name[:-5] in roles or not name.endswith("_rate")}
    used = dict.fromkeys(name for law in found.values() if isinstance(law, Number) for name in law.constants)
    other = {name: f"; this run has {in_words(own[name])}" for name in others}
    choices = [f"  {name:22} {origin(name, law, run.arm)}{other.get(name, '')}" for name, law in found.items()]
    constants = [
        f"  {name:14} {CONSTANTS[name].value:<8.4g} {CONSTANTS[name].means} ({CONSTANTS[name].source})" for name in used
    ]
    return ["the law's choices (docs/recipes.md)", *choices, "the constants behind them", *constants]


def in_words(value: Any) -> str:
    """A value of a run, numbers to four digits."""
    return "none" if value is None else format(value, ".4g") if isinstance(value, float) else str(value).lower()


def origin(name: str, law: Any, arm: str) -> str:
    """A choice of the law, and what it comes from."""
    if isinstance(law, Number):
        return f"{law.value:<10.4g} from {', '.join(law.constants)}"
    tenth = name == "warmup_steps" and arm == "gpt"
    return f"{in_words(law):<10} {'a tenth of the updates, 2000 at most' if tenth else f'in every run of {arm}'}"
