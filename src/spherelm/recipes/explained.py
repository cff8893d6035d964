"""The law's numbers for a run, and the constants that each comes from: what a dry run prints."""

from __future__ import annotations

from spherelm.recipes.law import CONSTANTS, numbers
from spherelm.recipes.presets import Preset
from spherelm.runs.config import RunConfig


def explained(run: RunConfig) -> list[str]:
    """A line for each number that the law chose for `run`, then one for each constant; no lines for another recipe.

    A field that the run sets itself is not the law's: its line gives the law's number all the same.
    """
    if run.recipe != "law":
        return []
    model, train = run.model, run.train
    shape = Preset(
        model.n_layers, model.d_model, model.n_heads, train.seq_len, train.batch_size, train.steps,
        architecture=model.architecture, vocab_size=model.vocab_size,
    )  # fmt: skip
    found = numbers(run.arm, shape)
    used = dict.fromkeys(name for number in found.values() for name in number.constants)
    choices = [
        f"  {name:22} {number.value:<10.4g} from {', '.join(number.constants)}" for name, number in found.items()
    ]
    constants = [
        f"  {name:12} {CONSTANTS[name].value:<8.4g} {CONSTANTS[name].means} ({CONSTANTS[name].source})" for name in used
    ]
    return ["the law's choices (docs/recipes.md)", *choices, "the constants behind them", *constants]
